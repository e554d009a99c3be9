"""Nested tensors for the tests of the contract, and what attention on them is, sequence by sequence in float64."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch.nested._internal.nested_tensor import NestedTensor, nested_view_from_values_offsets_lengths

from jagtile.generator.oracle import reference, tolerance


def offsets_of(lengths, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()], dtype=dtype)


def njt(lengths=(3, 4), heads=2, dim=8, dtype=torch.float32, offsets=None, **cached) -> torch.Tensor:
    """(B, heads, j, dim), made the usual way: (B, j, heads, dim), transposed."""
    values = torch.randn(sum(lengths), heads, dim).to(dtype)
    offsets = offsets_of(lengths) if offsets is None else offsets
    return torch.nested.nested_tensor_from_jagged(values, offsets, **cached).transpose(1, 2)


def qkv(lengths=(3, 4), lengths_k=None, heads=2, heads_kv=None, dim=8, dim_v=None, dtype=torch.float32):
    """query, key and value as the arguments of a call; key and value share offsets."""
    query = njt(lengths, heads, dim, dtype)
    lengths_k = lengths if lengths_k is None else lengths_k
    key = njt(lengths_k, heads_kv or heads, dim, dtype)
    value = njt(lengths_k, heads_kv or heads, dim_v or dim, dtype, key.offsets())
    return {"query": query, "key": key, "value": value}


def one_for_all(tensor: torch.Tensor):
    return {"query": tensor, "key": tensor, "value": tensor}


def without_heads(lengths=(3, 4), dim=8, holes=False) -> torch.Tensor:
    """(B, j, dim)."""
    if holes:
        shorter = torch.tensor([n - 1 for n in lengths])
        return nested_view_from_values_offsets_lengths(torch.randn(sum(lengths), dim), offsets_of(lengths), shorter)
    return torch.nested.nested_tensor_from_jagged(torch.randn(sum(lengths), dim), offsets_of(lengths))


def with_holes(heads=2, dim=8) -> torch.Tensor:
    """(3, heads, j, dim) of lengths 2, 4, 1 in a buffer of ten rows."""
    values, offsets, lengths = torch.randn(10, heads, dim), torch.tensor([0, 3, 8, 10]), torch.tensor([2, 4, 1])
    return nested_view_from_values_offsets_lengths(values, offsets, lengths).transpose(1, 2)


def packed_projection(lengths=(3, 4), heads=2, dim=8):
    """Chunks of one projection (B, j, 3 * heads * dim): query, key and value share its storage."""
    packed = torch.nested.nested_tensor_from_jagged(torch.randn(sum(lengths), 3 * heads * dim), offsets_of(lengths))
    chunks = (x.unflatten(-1, (heads, dim)).transpose(1, 2) for x in packed.chunk(3, dim=-1))
    return dict(zip(("query", "key", "value"), chunks, strict=True))


def head_by_head(lengths=(3, 4), heads=2, dim=8) -> torch.Tensor:
    """(B, heads, j, dim) whose storage has that order too."""
    return NestedTensor(torch.randn(heads, sum(lengths), dim), offsets_of(lengths), _ragged_idx=2)


def sequences(nested: torch.Tensor) -> list[torch.Tensor]:
    """The (length, H, D) of each sequence; holes are left out."""
    values = nested._values.unsqueeze(0) if nested._ragged_idx == 1 else nested._values
    offsets = nested._offsets.tolist()
    lengths = [b - a for a, b in pairwise(offsets)] if nested._lengths is None else nested._lengths.tolist()
    return [values[:, a : a + n].transpose(0, 1) for a, n in zip(offsets, lengths, strict=False)]


def attention(query, key, value, is_causal=False, scale=None, causal_alignment="top_left", **ignored):
    """The oracle on each sequence: a list of float64 (length, H, D_v)."""
    found = []
    for q, k, v in zip(*map(sequences, (query, key, value)), strict=True):
        cu_q, cu_k = offsets_of([q.shape[0]]), offsets_of([k.shape[0]])
        kind = {"is_causal": is_causal, "causal_alignment": causal_alignment, "scale": scale}
        found.append(reference(q, k, v, cu_q, cu_k, **kind)[0])
    return found


def assert_close(out: torch.Tensor, expected: list[torch.Tensor]) -> None:
    """Every sequence within a few roundings of its dtype."""
    bar = 4 * (tolerance(out.dtype) if out.dtype != torch.float64 else 1e-14)
    found = sequences(out)
    assert len(found) == len(expected)
    for ours, wanted in zip(found, expected, strict=True):
        assert ours.shape == wanted.shape
        assert (ours.double() - wanted).norm() <= bar * wanted.norm().clamp_min(1e-30)
