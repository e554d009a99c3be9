"""One packed attention call, its arguments checked, from tensors to a launched kernel: forward and backward.

Plain eager calls without grad go straight to ``forward``; the others see these functions as operators (operators.py).
"""

from __future__ import annotations

import torch

from jagtile.generator.spec import Direction
from jagtile.runtime.checks import check_offsets_on_host
from jagtile.runtime.dropout import dropout_of
from jagtile.runtime.layouts import Layout, Sizes, layout_of_backward, sizes_of
from jagtile.runtime.problem import counted_rows, regime_index, short_means
from jagtile.runtime.routes import BACKWARD_ROUTES, ROUTES, Route, resolve, resolve_backward


def route_of(
    direction: Direction,
    sizes: Sizes,
    dtype: torch.dtype,
    device_index: int,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    is_causal: bool,
    dropout: bool = False,
) -> Route:
    """Of a call that has something to compute."""
    batch, total_q, heads, head_dim, total_k, heads_kv, head_dim_v = sizes
    on_gpu = device_index >= 0
    rows = counted_rows(direction, total_q * heads, on_gpu)
    means = short_means(direction, head_dim, head_dim_v, is_causal, on_gpu)
    hints = (max_seqlen_q or 0, max_seqlen_k or 0)
    regime = regime_index(batch, total_q, total_k, *hints, heads // heads_kv, rows, *means)
    return dtype, head_dim, head_dim_v, is_causal, device_index, regime, dropout


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    is_causal: bool,
    bottom_right: bool,
    scale: float,
    return_lse: bool,
    dropout_p: float = 0.0,
    dropout_state: torch.Tensor | None = None,
    layout: Layout | None = None,
) -> list[torch.Tensor]:
    """[out] or [out, lse]: out (total_q, H, D_v) in q's dtype, lse float32 (H, total_q). Shapes as in ForwardKernel.

    For real tensors on a CPU or a CUDA device, whose layout may be known. On the CPU the offsets' values are checked:
    ValueError.
    """
    sizes = sizes_of(q, v, cu_seqlens_q) if layout is None else layout.sizes
    batch, total_q, heads, _, total_k, _, head_dim_v = sizes
    device_index = q.get_device()
    covered = total_q
    if device_index < 0:
        covered = check_offsets_on_host("cu_seqlens_q", cu_seqlens_q, total_q)
        if cu_seqlens_k is not cu_seqlens_q or total_k < covered:
            check_offsets_on_host("cu_seqlens_k", cu_seqlens_k, total_k)
    out = q.new_empty(total_q, heads, head_dim_v)
    lse = q.new_empty(heads, total_q, dtype=torch.float32) if return_lse else None
    if batch and total_q and total_k:
        dropout = dropout_of(dropout_p, dropout_state) if dropout_p else None
        hints = (max_seqlen_q, max_seqlen_k)
        route = route_of("fwd", sizes, q.dtype, device_index, *hints, is_causal, dropout is not None)
        kernel = ROUTES.get(route) or resolve(route)
        kernel.forward(q, k, v, cu_seqlens_q, cu_seqlens_k, out, lse, scale, bottom_right, dropout, layout)
    else:
        covered = 0
    if covered < total_q:
        out[covered:].zero_()
        if lse is not None:
            lse[:, covered:].fill_(float("-inf"))
    return [out] if lse is None else [out, lse]


def backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    is_causal: bool,
    bottom_right: bool,
    scale: float,
    dropout_p: float = 0.0,
    dropout_state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients by q, k and v, contiguous, of a loss whose gradients by ``forward``'s results are dout and dlse.

    Shapes as in BackwardKernel; tensors whose last stride is not 1 are copied. Tokens without partners have zeros.
    """
    layout = layout_of_backward(q, k, v, cu_seqlens_q, cu_seqlens_k, out, dout)
    if layout is None:
        q, k, v, out, dout = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v, out, dout))
    sizes = sizes_of(q, v, cu_seqlens_q) if layout is None else layout.sizes
    batch, total_q, heads, head_dim, total_k, heads_kv, head_dim_v = sizes
    dq = q.new_empty(total_q, heads, head_dim)  # a shape as one argument would be twice as dear
    dk = k.new_empty(total_k, heads_kv, head_dim)
    dv = v.new_empty(total_k, heads_kv, head_dim_v)
    if batch and total_q and total_k:
        dropout = dropout_of(dropout_p, dropout_state) if dropout_p else None
        hints = (max_seqlen_q, max_seqlen_k)
        route = route_of("bwd", sizes, q.dtype, q.get_device(), *hints, is_causal, dropout is not None)
        kernel = BACKWARD_ROUTES.get(route) or resolve_backward(route)
        operands = (q, k, v, cu_seqlens_q, cu_seqlens_k, out, lse, dout, dlse)
        kernel.backward(*operands, dq, dk, dv, scale, bottom_right, dropout, layout)
    else:
        for grad in (dq, dk, dv):
            grad.zero_()
    return dq, dk, dv
