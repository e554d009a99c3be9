"""What a loaded kernel can do, whatever its target."""

from __future__ import annotations

from typing import Protocol

import torch

from jagtile.runtime.artifact import ArtifactMeta
from jagtile.runtime.dropout import Dropout
from jagtile.runtime.layouts import Layout


class ForwardKernel(Protocol):
    """A loaded forward kernel of one variant.

    Shapes: q (total_q, H, D), k (total_k, H_kv, D), v (total_k, H_kv, D_v), out (total_q, H, D_v), all of the spec's
    dtype, last stride 1; H a multiple of H_kv. cu_seqlens_q and cu_seqlens_k: (B+1,) int32 or int64 on the same device.
    lse: float32 (H, total_q), natural log, -inf for a row that sees no key; or None. dropout: what is dropped, None for
    nothing; only kernels whose spec has dropout are given one. layout: what stands for q, k, v and the offsets where it
    is known; out is contiguous then.
    The arguments have been checked; the launch is asynchronous on the current stream (CUDA) or done at return (CPU).
    """

    meta: ArtifactMeta

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor | None,
        scale: float,
        bottom_right: bool,
        dropout: Dropout | None = None,
        layout: Layout | None = None,
    ) -> None:
        """Compute attention of every sequence into ``out`` (and ``lse``)."""
        ...


class BackwardKernel(Protocol):
    """A loaded backward kernel of one variant.

    Shapes as in ``ForwardKernel``: out and lse are what the forward gave; dout (total_q, H, D_v) is the gradient of a
    loss by out, dlse (H, total_q) float32 that by lse, None for zeros; dq, dk and dv are shaped as q, k and v. All but
    lse and dlse are of the spec's dtype, last stride 1. layout: what stands for q, k, v, the offsets, out and dout
    where it is known; dq, dk and dv are contiguous then.
    """

    meta: ArtifactMeta

    def backward(
        self,
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
        scale: float,
        bottom_right: bool,
        dropout: Dropout | None = None,
        layout: Layout | None = None,
    ) -> None:
        """Compute the gradients by q, k and v into ``dq``, ``dk`` and ``dv``, zeros for tokens without partners."""
        ...


Kernel = ForwardKernel | BackwardKernel
