"""Nested tensors with holes (lengths beside offsets): rows moved together before a kernel and apart after it.

Sequence b of such a tensor holds rows offsets[b] to offsets[b] + lengths[b] of its buffer. Nothing here makes the host
wait: a closed buffer keeps a number of rows that the host knows, and those beyond the last sequence belong to none.
"""

from __future__ import annotations

import torch


def offsets_of(lengths: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The (B+1,) offsets of sequences of these lengths (B,) without holes."""
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(dtype)


def close_holes(values: torch.Tensor, offsets: torch.Tensor, lengths: torch.Tensor, rows: int) -> torch.Tensor:
    """values (total, H, D) with holes as (rows, H, D) without; rows is at least the sum of lengths, at most total."""
    closed = offsets_of(lengths, offsets.dtype)
    row = torch.arange(rows, device=offsets.device)
    sequence = torch.searchsorted(closed[1:], row, right=True)
    return _take(values, offsets[sequence] + row - closed[sequence], sequence < lengths.shape[0])


def open_holes(values: torch.Tensor, offsets: torch.Tensor, lengths: torch.Tensor, total: int) -> torch.Tensor:
    """The inverse: values (rows, H, D) without holes as (total, H, D) with holes, which are 0."""
    closed = offsets_of(lengths, offsets.dtype)
    row = torch.arange(total, device=offsets.device)
    sequence = torch.searchsorted(offsets[1:], row, right=True)
    position = row - offsets[sequence]
    filled = (position >= 0) & (position < torch.cat([lengths, lengths.new_zeros(1)])[sequence])
    return _take(values, closed[sequence] + position, filled)


def _take(values: torch.Tensor, rows: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    taken = values.index_select(0, rows.clamp(0, max(0, values.shape[0] - 1)))
    return torch.where(valid[:, None, None], taken, 0.0)
