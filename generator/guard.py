"""Tensors among rows of NaN: what a kernel reads or writes beyond its tensors is seen."""

from __future__ import annotations

import math

import torch

_ROWS = 8  # before and behind


def guarded(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with rows of NaN before and after it in memory."""
    whole = tensor.new_full((tensor.shape[0] + 2 * _ROWS, *tensor.shape[1:]), math.nan)
    inner = whole[_ROWS : _ROWS + tensor.shape[0]]
    inner.copy_(tensor)
    return inner


def poisoned(like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """An output that is NaN throughout, and so is what is around it."""
    return guarded(torch.full_like(like, math.nan, dtype=dtype))


def guards_intact(tensor: torch.Tensor) -> bool:
    """Whether what is around a guarded tensor still is NaN."""
    rows, row = tensor.shape[0], tensor.stride(0)
    whole = tensor.as_strided((rows + 2 * _ROWS, row), (row, 1), 0)
    return bool(whole[:_ROWS].isnan().all() and whole[_ROWS + rows :].isnan().all())
