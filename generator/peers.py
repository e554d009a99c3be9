"""Implementations of jagged attention, ours and the others', behind one small interface for ``bench``.

A peer is imported when it is asked for, never before. What it needs to be prepared (slices, nested tensors, masks,
compilation) is prepared outside the timed call, in the peer's favour.
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec

import torch

from jagtile.generator.peer import Peer, Prepared, as_it_is, nested, nested_values, only_16_bit, refuses_alignment
from jagtile.generator.peers_torch import Flex, TorchLoop, TorchNested, TorchVarlen
from jagtile.generator.spec import DType
from jagtile.generator.workloads import JaggedBatch, Workload


class Jagtile:
    """``jagtile.varlen_attention``, with whatever is tuned or default here."""

    name = "jagtile"

    def missing(self, device: torch.device) -> str | None:
        return None

    def refuses(self, workload: Workload, dtype: DType, device: torch.device) -> str | None:
        from jagtile.runtime.device import device_id
        from jagtile.runtime.dispatch import default_variant
        from jagtile.runtime.errors import UnsupportedError

        try:
            default_variant(workload.spec(dtype), device_id(device).target)
        except UnsupportedError as error:
            return str(error)
        return None

    def prepare(self, workload: Workload, batch: JaggedBatch) -> Prepared:
        import jagtile

        causal, alignment = workload.is_causal, workload.causal_alignment
        return Prepared(
            lambda: jagtile.varlen_attention(*batch, is_causal=causal, causal_alignment=alignment), as_it_is
        )


class JagtileNested(Jagtile):
    """``jagtile.sdpa`` on nested tensors."""

    name = "jagtile-njt"

    def prepare(self, workload: Workload, batch: JaggedBatch) -> Prepared:
        import jagtile

        operands = nested(workload, batch)
        return Prepared(
            lambda: jagtile.sdpa(
                *operands,
                is_causal=workload.is_causal,
                enable_gqa=True,
                causal_alignment=workload.causal_alignment,
            ),
            nested_values,
        )


class FlashAttention3:
    """``flash_attn_varlen_func`` of the package ``fa3_fwd`` (forward only)."""

    name = "fa3"

    def missing(self, device: torch.device) -> str | None:
        if device.type != "cuda":
            return "CUDA only"
        return None if find_spec("fa3_fwd_interface") else "fa3_fwd is not installed"

    def refuses(self, workload: Workload, dtype: DType, device: torch.device) -> str | None:
        if dtype != "bf16":
            return "built for bf16 only"
        if workload.head_dim % 8 or workload.head_dim_v % 8:
            return "head dims must be multiples of 8"
        return refuses_alignment(workload, "bottom_right")

    def prepare(self, workload: Workload, batch: JaggedBatch) -> Prepared:
        attention = importlib.import_module("fa3_fwd_interface").flash_attn_varlen_func
        return Prepared(lambda: attention(*batch, causal=workload.is_causal), as_it_is)


class FlashAttention4:
    """``flash_attn_varlen_func`` of the package ``flash-attn-4`` (CuTe DSL)."""

    name = "fa4"

    def missing(self, device: torch.device) -> str | None:
        if device.type != "cuda":
            return "CUDA only"
        try:
            found = find_spec("flash_attn.cute")
        except ImportError:  # no flash_attn at all
            found = None
        return None if found else "flash-attn-4 is not installed"

    def refuses(self, workload: Workload, dtype: DType, device: torch.device) -> str | None:
        return only_16_bit(dtype) or refuses_alignment(workload, "bottom_right")

    def prepare(self, workload: Workload, batch: JaggedBatch) -> Prepared:
        attention = importlib.import_module("flash_attn.cute").flash_attn_varlen_func
        options = {name: value for name, value in batch._asdict().items() if name not in ("q", "k", "v")}
        options["causal"] = workload.is_causal
        return Prepared(lambda: attention(batch.q, batch.k, batch.v, **options), as_it_is)


PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Jagtile(),
        JagtileNested(),
        TorchNested(),
        TorchVarlen(),
        TorchLoop(),
        FlashAttention3(),
        FlashAttention4(),
        Flex(),
    )
}
OURS = ("jagtile", "jagtile-njt")
