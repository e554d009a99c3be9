"""What launches remember of calls: all that follows from shapes, strides and options, and not from addresses."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Protocol, TypeVar

import torch

_MAX_PLANS = 1024  # a kernel's: there is one for every batch


class Plan(Protocol):
    """A launch but for addresses."""

    @property
    def block(self) -> bytes:
        """The parameter block, addresses missing."""
        ...

    @property
    def movable(self) -> bool:
        """Whether the tensors' addresses are words of the block. If not, it holds theirs in its tensor maps."""
        ...


P = TypeVar("P", bound=Plan)


def forward_layout(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    out: torch.Tensor,
) -> Hashable:
    """In the place of a ``Layout`` where there is none: what a forward's plan depends on of its tensors."""
    return (
        *(q.shape, v.shape, q.stride(), k.stride(), v.stride(), out.stride()),
        *(cu_seqlens_q.shape, cu_seqlens_q.dtype, cu_seqlens_k.dtype),
    )


def backward_layout(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    out: torch.Tensor,
    dout: torch.Tensor,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
) -> Hashable:
    """Likewise, a backward's."""
    return (
        *(q.shape, v.shape, q.stride(), k.stride(), v.stride(), out.stride(), dout.stride()),
        *(dq.stride(), dk.stride(), dv.stride(), cu_seqlens_q.shape, cu_seqlens_q.dtype, cu_seqlens_k.dtype),
    )


class Plans(dict[Hashable, P]):
    """The plans of a kernel by all that they depend on."""

    def remember(self, call: Hashable, plan: P) -> P:
        """The plan, which is kept if other tensors' addresses can be put into it."""
        if plan.movable:
            if len(self) >= _MAX_PLANS:
                self.clear()
            self[call] = plan
        return plan
