"""Tensors in places and with strides that TMA may or may not be able to address."""

from __future__ import annotations

import torch

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
