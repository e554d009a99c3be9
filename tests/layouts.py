"""Tensors in places and with strides that TMA may or may not be able to address, and batches of lengths alone."""

from __future__ import annotations

from itertools import accumulate

import torch

from jagtile.generator.workloads import JaggedBatch, Workload

ODD, EVEN = "an odd address, odd strides", "an odd address, even strides"
LAYOUTS = ("heads first", "a slice of a projection", ODD, EVEN)


def laid_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values in another place, NaN around them."""
    tokens, heads, dim = tensor.shape

    def empty(*shape: int) -> torch.Tensor:
        return torch.full(shape, float("nan"), dtype=tensor.dtype, device=tensor.device)

    if layout == "heads first":
        return empty(heads, tokens, dim).transpose(0, 1).copy_(tensor)
    if layout == "a slice of a projection":
        return empty(tokens, 3, heads, dim)[:, 1].copy_(tensor)
    row = dim + 2 - dim % 2 - (layout == ODD)
    token_stride = heads * row + (layout == ODD and heads % 2 == 0)
    storage = empty(1 + tokens * token_stride)  # from the second element on
    return storage.as_strided(tensor.shape, (token_stride, row, 1), 1).copy_(tensor)


def without_values(w: Workload, dtype: torch.dtype = torch.bfloat16) -> JaggedBatch:
    """A batch for what looks at lengths only: drawing values for a device's fill of work takes seconds."""
    q = torch.empty(w.total_q, w.num_heads, w.head_dim, dtype=dtype)
    k, v = (torch.empty(w.total_k, w.num_heads_kv, dim, dtype=dtype) for dim in (w.head_dim, w.head_dim_v))
    cu_q, cu_k = (torch.tensor([*accumulate(x, initial=0)], dtype=torch.int32) for x in (w.seqlens_q, w.seqlens_k))
    return JaggedBatch(q, k, v, cu_q, cu_k, max(w.seqlens_q, default=0), max(w.seqlens_k, default=0))
