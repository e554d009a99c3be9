"""Implementations of jagged attention, ours and the others', behind one small interface for ``bench``.

A peer is imported when it is asked for, never before. What it needs to be prepared (slices, nested tensors, masks,
compilation) is prepared outside the timed call, in the peer's favour.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch.nn import functional

from jagtile.generator.spec import DType
from jagtile.generator.workloads import JaggedBatch, Workload

Call = Callable[[], Any]


class Prepared(NamedTuple):
    """A peer on one batch."""

    call: Call  # what is timed
    packed: Callable[[Any], torch.Tensor]  # its result as (total_q, H, D_v)


class Peer(Protocol):
    """An implementation that ``bench`` can run."""

    name: str

    def missing(self, device: torch.device) -> str | None:
        """None where it can be imported and runs on this kind of device, else the reason why not."""
        ...

    def refuses(self, workload: Workload, dtype: DType, device: torch.device) -> str | None:
        """None where it computes the workload as we define it, else the reason why not."""
        ...

    def prepare(self, workload: Workload, batch: JaggedBatch) -> Prepared:
        """The call to be timed. May raise anything."""
        ...


def _as_it_is(out: Any) -> torch.Tensor:
    return cast(torch.Tensor, out[0] if isinstance(out, (tuple, list)) else out)


def _unequal(workload: Workload) -> bool:
    return workload.seqlens_q != workload.seqlens_k


def _refuses_alignment(workload: Workload, served: str) -> str | None:
    if workload.is_causal and _unequal(workload) and workload.causal_alignment != served:
        return f"causal with unequal lengths is {served} only"
    return None


def _only_16_bit(dtype: DType) -> str | None:
    return "bf16 and fp16 only" if dtype == "fp32" else None


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
            lambda: jagtile.varlen_attention(*batch, is_causal=causal, causal_alignment=alignment), _as_it_is
        )


class JagtileNested(Jagtile):
    """``jagtile.sdpa`` on nested tensors."""

    name = "jagtile-njt"

    def prepare(self, workload: Workload, batch: JaggedBatch) -> Prepared:
        import jagtile

        nested = _nested(workload, batch)
        return Prepared(
            lambda: jagtile.sdpa(
                *nested,
                is_causal=workload.is_causal,
                enable_gqa=True,
                causal_alignment=workload.causal_alignment,
            ),
            _nested_values,
        )


class TorchNested:
    """torch's own ``scaled_dot_product_attention`` on nested tensors whose lengths are cached."""

    name = "torch-njt"

    def missing(self, device: torch.device) -> str | None:
        return None

    def refuses(self, workload: Workload, dtype: DType, device: torch.device) -> str | None:
        if workload.num_heads != workload.num_heads_kv:
            return "no GQA on nested tensors"
        if workload.is_causal and device.type == "cpu":
            return "no causal backend on the CPU"
        return _refuses_alignment(workload, "top_left" if dtype == "fp32" else "bottom_right")

    def prepare(self, workload: Workload, batch: JaggedBatch) -> Prepared:
        query, key, value = _nested(workload, batch)
        return Prepared(
            lambda: functional.scaled_dot_product_attention(query, key, value, is_causal=workload.is_causal),
            _nested_values,
        )


def _nested(workload: Workload, batch: JaggedBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    def view(values: torch.Tensor, offsets: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
        nested = torch.nested.nested_tensor_from_jagged(
            values, offsets, min_seqlen=min(lengths), max_seqlen=max(lengths)
        )
        return nested.transpose(1, 2)

    offsets_k = batch.cu_seqlens_k if _unequal(workload) else batch.cu_seqlens_q
    return (
        view(batch.q, batch.cu_seqlens_q, workload.seqlens_q),
        view(batch.k, offsets_k, workload.seqlens_k),
        view(batch.v, offsets_k, workload.seqlens_k),
    )


def _nested_values(out: torch.Tensor) -> torch.Tensor:
    return out.transpose(1, 2).values()


class TorchVarlen:
    """``torch.nn.attention.varlen.varlen_attn``."""

    name = "torch-varlen"

    def missing(self, device: torch.device) -> str | None:
        if device.type != "cuda":
            return "CUDA only"
        return None if find_spec("torch.nn.attention.varlen") else "this torch has no torch.nn.attention.varlen"

    def refuses(self, workload: Workload, dtype: DType, device: torch.device) -> str | None:
        if workload.head_dim != workload.head_dim_v:
            return "head_dim_v must be head_dim"
        if workload.head_dim % 8:
            return "head_dim must be a multiple of 8"
        return _only_16_bit(dtype) or _refuses_alignment(workload, "bottom_right")

    def prepare(self, workload: Workload, batch: JaggedBatch) -> Prepared:
        varlen_attn = importlib.import_module("torch.nn.attention.varlen").varlen_attn
        options: dict[str, object] = {"window_size": (-1, 0) if workload.is_causal else (-1, -1)}
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            options["enable_gqa"] = workload.num_heads != workload.num_heads_kv
        return Prepared(lambda: varlen_attn(*batch, **options), _as_it_is)


class TorchLoop:
    """A Python loop of dense ``scaled_dot_product_attention`` calls over the sequences."""

    name = "torch-loop"

    def missing(self, device: torch.device) -> str | None:
        return None

    def refuses(self, workload: Workload, dtype: DType, device: torch.device) -> str | None:
        return _refuses_alignment(workload, "top_left")

    def prepare(self, workload: Workload, batch: JaggedBatch) -> Prepared:
        sdpa, gqa = functional.scaled_dot_product_attention, workload.num_heads != workload.num_heads_kv
        kept = [both[0] > 0 < both[1] for both in zip(workload.seqlens_q, workload.seqlens_k, strict=True)]
        queries, keys, values = (
            [
                piece.transpose(0, 1).unsqueeze(0)
                for piece, keep in zip(torch.split(tensor, list(lens)), kept, strict=True)
                if keep
            ]
            for tensor, lens in (
                (batch.q, workload.seqlens_q),
                (batch.k, workload.seqlens_k),
                (batch.v, workload.seqlens_k),
            )
        )
        causal = workload.is_causal

        def call() -> list[torch.Tensor]:
            return [
                sdpa(q, k, v, is_causal=causal, enable_gqa=gqa) for q, k, v in zip(queries, keys, values, strict=True)
            ]

        def packed(pieces: list[torch.Tensor]) -> torch.Tensor:
            results, size = iter(pieces), (workload.num_heads, workload.head_dim_v)
            rows = [
                next(results)[0].transpose(0, 1) if keep else batch.q.new_zeros((length, *size))
                for length, keep in zip(workload.seqlens_q, kept, strict=True)
            ]
            return torch.cat(rows) if rows else batch.q.new_zeros((0, *size))

        return Prepared(call, packed)


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
        return _refuses_alignment(workload, "bottom_right")

    def prepare(self, workload: Workload, batch: JaggedBatch) -> Prepared:
        attention = importlib.import_module("fa3_fwd_interface").flash_attn_varlen_func
        return Prepared(lambda: attention(*batch, causal=workload.is_causal), _as_it_is)


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
        return _only_16_bit(dtype) or _refuses_alignment(workload, "bottom_right")

    def prepare(self, workload: Workload, batch: JaggedBatch) -> Prepared:
        attention = importlib.import_module("flash_attn.cute").flash_attn_varlen_func
        options = {name: value for name, value in batch._asdict().items() if name not in ("q", "k", "v")}
        options["causal"] = workload.is_causal
        return Prepared(lambda: attention(batch.q, batch.k, batch.v, **options), _as_it_is)


class Flex:
    """``flex_attention``, compiled, with a block mask of the documents on the packed tokens."""

    name = "flex"

    def missing(self, device: torch.device) -> str | None:
        if device.type != "cuda":
            return "CUDA only"
        return None if find_spec("triton") else "triton is not installed"

    def refuses(self, workload: Workload, dtype: DType, device: torch.device) -> str | None:
        if 0 in (workload.total_q, workload.total_k):
            return "needs at least one query and one key"
        return None

    def prepare(self, workload: Workload, batch: JaggedBatch) -> Prepared:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        torch._dynamo.reset()  # every batch is compiled anew: a cache limit must not make one run uncompiled
        tokens = (workload.total_q, workload.total_k)
        # Compiled, or the mask would be written out: tens of GB for the longest packed batches.
        mask = create_block_mask(document_mask(workload, batch), None, None, *tokens, batch.q.device, _compile=True)
        compiled = torch.compile(flex_attention, dynamic=False)
        query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in batch[:3])
        gqa = workload.num_heads != workload.num_heads_kv
        return Prepared(
            lambda: compiled(query, key, value, block_mask=mask, enable_gqa=gqa),
            lambda out: cast(torch.Tensor, out[0].transpose(0, 1)),
        )


def document_mask(workload: Workload, batch: JaggedBatch) -> Callable[..., torch.Tensor]:
    """The mask of a packed batch as FlexAttention wants it: which packed query sees which packed key."""
    device = batch.q.device

    def rows(lengths: tuple[int, ...], offsets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of every packed row: its sequence, its position in it."""
        counts = torch.tensor(lengths, device=device)
        sequence = torch.repeat_interleave(torch.arange(len(lengths), device=device), counts)
        return sequence, torch.arange(sum(lengths), device=device) - offsets.long()[sequence]

    sequence_q, position_q = rows(workload.seqlens_q, batch.cu_seqlens_q)
    sequence_k, position_k = rows(workload.seqlens_k, batch.cu_seqlens_k)
    if workload.causal_alignment == "bottom_right":
        shift = batch.cu_seqlens_k.long().diff() - batch.cu_seqlens_q.long().diff()
        position_q = position_q + shift[sequence_q]

    def mask(b: torch.Tensor, h: torch.Tensor, q_idx: torch.Tensor, kv_idx: torch.Tensor) -> torch.Tensor:
        same = sequence_q[q_idx] == sequence_k[kv_idx]
        return same & (position_q[q_idx] >= position_k[kv_idx]) if workload.is_causal else same

    return mask


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
