"""What is known of a batch's tensors from calls before: checks pass once for all that differ in nothing but values.

A call reads types, shapes, strides, dtypes and devices once, and looks them up; checks, routes and launchers, which
would read the same again, take what was found.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch

from jagtile.runtime.eager import is_eager, is_real

_MAX_LAYOUTS = 2048  # there are two for every batch: of its forward, and its backward

Sizes = tuple[int, int, int, int, int, int, int]
Check = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]


class Layout:
    """Stands for real tensors q, k, v, cu_seqlens_q and cu_seqlens_k that differ in nothing but values. There is one
    object for all that are alike, so that it is a cheap key.
    """

    __slots__ = ("served", "sizes")

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self.served: set[tuple[bool, bool]] = set()  # (is_causal, trained) that are known to have kernels


# By all that checks read of tensors: those that have passed one.
_KNOWN: dict[Hashable, Layout] = {}


def sizes_of(q: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor) -> Sizes:
    """The batch, total_q, heads, head_dim, total_k, heads_kv, head_dim_v."""
    total_q, heads, head_dim = q.shape
    total_k, heads_kv, head_dim_v = v.shape
    return cu_seqlens_q.shape[0] - 1, total_q, heads, head_dim, total_k, heads_kv, head_dim_v


def checked(
    check: Check,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
) -> Layout | None:
    """The layout of tensors that pass the check, whose errors are raised. None where it can't be relied on: in sight of
    a compiler, mode or transform, and of tensors that are not real.
    """
    eager = is_eager()
    if eager:
        try:
            alike = (
                check,
                type(q),
                type(k),
                type(v),
                type(cu_seqlens_q),
                q.shape,
                k.shape,
                v.shape,
                cu_seqlens_q.shape,
                q.stride(),
                k.stride(),
                v.stride(),
                cu_seqlens_q.stride(),
                q.dtype,
                k.dtype,
                v.dtype,
                cu_seqlens_q.dtype,
                q.device,
                k.device,
                v.device,
                cu_seqlens_q.device,
                cu_seqlens_k is cu_seqlens_q or _facts(cu_seqlens_k),
            )
            if (known := _KNOWN.get(alike)) is not None:
                return known
        except (AttributeError, TypeError, RuntimeError):  # no tensors, or without strides: the check tells
            eager = False
    check(q, k, v, cu_seqlens_q, cu_seqlens_k)
    if not (eager and all(map(is_real, (q, k, v, cu_seqlens_q, cu_seqlens_k)))):
        return None
    return _remember(alike, sizes_of(q, v, cu_seqlens_q))


def layout_of_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    out: torch.Tensor,
    dout: torch.Tensor,
) -> Layout | None:
    """The layout of a backward's operands, of whatever device and dtype; None where a last stride is not 1."""
    alike = (
        q.shape,
        v.shape,
        cu_seqlens_q.shape,
        q.stride(),
        k.stride(),
        v.stride(),
        out.stride(),
        dout.stride(),
        cu_seqlens_q.dtype,
        cu_seqlens_k.dtype,
    )
    known = _KNOWN.get(alike)
    if known is not None or any(x.stride(2) != 1 for x in (q, k, v, out, dout)):
        return known
    return _remember(alike, sizes_of(q, v, cu_seqlens_q))


def _remember(alike: Hashable, sizes: Sizes) -> Layout:
    if len(_KNOWN) >= _MAX_LAYOUTS:
        _KNOWN.clear()
    return _KNOWN.setdefault(alike, Layout(sizes))


def _facts(x: torch.Tensor) -> Hashable:
    return type(x), x.shape, x.stride(), x.dtype, x.device
