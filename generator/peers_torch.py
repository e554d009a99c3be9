"""Torch's own implementations of jagged attention, as peers for ``bench``."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from importlib.util import find_spec
from typing import cast

import torch
from torch.nn import functional

from jagtile.generator.peer import Prepared, as_it_is, nested, nested_values, only_16_bit, refuses_alignment
from jagtile.generator.spec import DType
from jagtile.generator.workloads import JaggedBatch, Workload


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
        return refuses_alignment(workload, "top_left" if dtype == "fp32" else "bottom_right")

    def prepare(self, workload: Workload, batch: JaggedBatch) -> Prepared:
        query, key, value = nested(workload, batch)
        return Prepared(
            lambda: functional.scaled_dot_product_attention(query, key, value, is_causal=workload.is_causal),
            nested_values,
        )


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
        return only_16_bit(dtype) or refuses_alignment(workload, "bottom_right")

    def prepare(self, workload: Workload, batch: JaggedBatch) -> Prepared:
        varlen_attn = importlib.import_module("torch.nn.attention.varlen").varlen_attn
        known = inspect.signature(varlen_attn).parameters
        options: dict[str, object] = {"is_causal": workload.is_causal}  # torch 2.10; later ones have windows
        if "window_size" in known:
            options = {"window_size": (-1, 0) if workload.is_causal else (-1, -1)}
        if "enable_gqa" in known:
            options["enable_gqa"] = workload.num_heads != workload.num_heads_kv
        return Prepared(lambda: varlen_attn(*batch, **options), as_it_is)


class TorchLoop:
    """A Python loop of dense ``scaled_dot_product_attention`` calls over the sequences."""

    name = "torch-loop"

    def missing(self, device: torch.device) -> str | None:
        return None

    def refuses(self, workload: Workload, dtype: DType, device: torch.device) -> str | None:
        return refuses_alignment(workload, "top_left")

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
