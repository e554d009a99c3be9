"""The operator: one packed attention call, its arguments checked, from tensors to a launched kernel.

Plain eager calls go straight to ``forward``. Everything that must see an operator (torch.compile, fake tensors,
dispatch modes, functorch) goes through ``torch.ops.jagtile.forward``: the same function under a dispatcher's name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch

from jagtile.runtime.checks import check_offsets_on_host
from jagtile.runtime.problem import regime_index
from jagtile.runtime.routes import ROUTES, resolve


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
) -> list[torch.Tensor]:
    """[out] or [out, lse]: out (total_q, H, D_v) in q's dtype, lse float32 (H, total_q). Shapes as in ForwardKernel.

    For real tensors on a CPU or a CUDA device. On the CPU the offsets' values are checked: ValueError.
    """
    total_q, heads, head_dim = q.shape
    total_k, _, head_dim_v = v.shape
    batch = cu_seqlens_q.shape[0] - 1
    device_index = q.get_device()
    covered = total_q
    if device_index < 0:
        covered = check_offsets_on_host("cu_seqlens_q", cu_seqlens_q, total_q)
        if cu_seqlens_k is not cu_seqlens_q or total_k < covered:
            check_offsets_on_host("cu_seqlens_k", cu_seqlens_k, total_k)
    out = q.new_empty(total_q, heads, head_dim_v)
    lse = q.new_empty(heads, total_q, dtype=torch.float32) if return_lse else None
    if batch and total_q and total_k:
        regime = regime_index(batch, total_q, total_k, max_seqlen_q or 0, max_seqlen_k or 0)
        route = (q.dtype, head_dim, head_dim_v, is_causal, device_index, regime)
        kernel = ROUTES.get(route) or resolve(route)
        kernel.forward(q, k, v, cu_seqlens_q, cu_seqlens_k, out, lse, scale, bottom_right)
    else:
        covered = 0
    if covered < total_q:
        out[covered:].zero_()
        if lse is not None:
            lse[:, covered:].fill_(float("-inf"))
    return [out] if lse is None else [out, lse]


def _forward_fake(
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
) -> list[torch.Tensor]:
    total_q, heads, _ = q.shape
    out = q.new_empty((total_q, heads, v.shape[2]))
    return [out, q.new_empty((heads, total_q), dtype=torch.float32)] if return_lse else [out]


# The operator exists as long as this object does.
_LIBRARY = torch.library.Library("jagtile", "DEF")  # type: ignore[no-untyped-call]
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "forward(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt? max_seqlen_q, "
    "SymInt? max_seqlen_k, bool is_causal, bool bottom_right, float scale, bool return_lse) -> Tensor[]"
)
for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("forward", forward, _key)  # type: ignore[no-untyped-call]
torch.library.register_fake("jagtile::forward", _forward_fake, lib=_LIBRARY)

Forward = Callable[..., list[torch.Tensor]]


def forward_for(q: torch.Tensor) -> Forward:
    """``forward``, or the operator where a compiler, a tensor subclass, a mode or a transform must see one."""
    if (
        torch.compiler.is_compiling()
        or (type(q) is not torch.Tensor and type(q) is not torch.nn.Parameter)
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or not (q.is_cuda or q.is_cpu)
    ):
        return cast(Forward, torch.ops.jagtile.forward.default)
    return forward
