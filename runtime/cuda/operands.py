"""Tensors of a call as a parameter block describes them, or copies of those that it can't describe."""

from __future__ import annotations

from collections.abc import Callable

import torch

from jagtile.runtime.cuda.tensor_map import MapCache, addressable

_BYTES = 2  # of an element


def find_maps(maps: MapCache, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> bytes | None:
    """The four tensor maps. None where TMA cannot address a tensor (see ``forward_copies``)."""
    (tokens_q, heads, _), (tokens_k, heads_kv, _) = q.shape, v.shape
    layout = (tokens_q > 1, tokens_k > 1, heads, heads_kv, q.stride(), k.stride(), v.stride(), out.stride())
    return maps.find(layout, (q, k, v, out))


def rows_of(*tensors: torch.Tensor) -> list[int]:
    """For kernels that copy rows of any alignment: each tensor's address, which is to come, and strides in bytes."""
    return [word for t in tensors for word in (0, _BYTES * t.stride(0), _BYTES * t.stride(1))]


def forward_copies(
    forward: Callable[..., None],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    out: torch.Tensor,
    *rest: object,
) -> None:
    """``forward`` with copies of what TMA cannot address; every ordinary layout, packed QKV views included, it can."""
    if k.shape[1] > 1 and k.stride(1) == v.stride(1) == 0:  # one head, expanded
        k, v = k[:, :1], v[:, :1]
    q, k, v = (t if addressable(t) else t.clone(memory_format=torch.contiguous_format) for t in (q, k, v))
    target = out if addressable(out) else torch.empty_like(out, memory_format=torch.contiguous_format)
    forward(q, k, v, cu_seqlens_q, cu_seqlens_k, target, *rest)
    if target is not out:
        out.copy_(target)


def backward_copies(
    backward: Callable[..., None],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    *rest: object,
) -> None:
    """``backward`` with copies of what TMA cannot address, or has no 16-byte pieces; gradients are copied back."""
    q, k, v, out, dout = (
        t if addressable(t) else t.clone(memory_format=torch.contiguous_format) for t in (q, k, v, out, dout)
    )
    grads = (dq, dk, dv)
    targets = [t if addressable(t) else torch.empty_like(t, memory_format=torch.contiguous_format) for t in grads]
    backward(q, k, v, cu_seqlens_q, cu_seqlens_k, out, lse, dout, dlse, *targets, *rest)
    for grad, found in zip(grads, targets, strict=True):
        if found is not grad:
            grad.copy_(found)
