"""What the operators do on a device: as ops.py, by the native host where it knows the call.

A graph that was compiled makes the same calls in every step, of which the dispatcher sees operators.
"""

from __future__ import annotations

import torch

from jagtile.runtime import native
from jagtile.runtime.checks import ALIGNMENTS, check_tensors
from jagtile.runtime.fallback import why_no_kernel
from jagtile.runtime.layouts import checked
from jagtile.runtime.ops import backward, forward
from jagtile.runtime.trainable import requires_grad


def forward_kernel(
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
) -> list[torch.Tensor]:
    """``ops.forward``."""
    batch = (q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    layout = None
    if native.serve is not None and not dropout_p and not requires_grad(q, k, v):
        served = native.serve(*batch, is_causal, ALIGNMENTS[bottom_right], scale, 0.0, return_lse)
        if isinstance(served, torch.Tensor):
            return [served]
        if isinstance(served, tuple):
            return list(served)
        if served is False:  # it is to be taught
            layout = checked(check_tensors, q, k, v, cu_seqlens_q, cu_seqlens_k)
    outputs = forward(*batch, is_causal, bottom_right, scale, return_lse, dropout_p, dropout_state, layout)
    if layout is not None:
        why_no_kernel(q, v, is_causal, False, layout)  # the layout then knows that there is one
        native.learn(batch, is_causal, bottom_right, scale, False, return_lse, layout)
    return outputs


def backward_kernel(
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
) -> tuple[torch.Tensor, ...]:
    """``ops.backward``."""
    operands = (q, k, v, cu_seqlens_q, cu_seqlens_k, out, lse)
    options = (max_seqlen_q, max_seqlen_k, is_causal, bottom_right, scale)
    served = None
    if native.serve_backward is not None and not dropout_p:
        served = native.serve_backward(dout, dlse, *operands, *options)
        if isinstance(served, tuple):
            return served
    grads = backward(dout, dlse, *operands, *options, dropout_p, dropout_state)
    if served is not None:
        native.learn_backward(served, dout, operands, options)
    return grads
