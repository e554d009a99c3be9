"""Autograd's part in eager calls: the functions of operators.py once more, at a fraction of an operator's host time.

Compilers, modes, transforms and tensor subclasses see the operators instead.
"""

from __future__ import annotations

from typing import Any

import torch

from jagtile.runtime.eager import is_eager, is_real
from jagtile.runtime.errors import UnsupportedError
from jagtile.runtime.layouts import Layout
from jagtile.runtime.ops import backward, forward

_forward: Any = forward  # of arguments in tuples


def keep_for_backward(
    ctx: Any,
    operands: tuple[torch.Tensor, ...],
    options: tuple[Any, ...],
    dropout_state: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Save what ``gradients`` needs. operands: q, k, v, both offsets; options: hints, is_causal, bottom_right, scale,
    dropout_p.
    """
    ctx.save_for_backward(*operands, out, lse, dropout_state)
    ctx.options = options
    ctx.set_materialize_grads(False)


def gradients(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """dq, dk and dv of what ``keep_for_backward`` saved; differentiating them again is refused."""
    *operands, dropout_state = ctx.saved_tensors
    return gradients_of(dout, dlse, tuple(operands), ctx.options, dropout_state)


def gradients_of(
    dout: torch.Tensor | None,
    dlse: torch.Tensor | None,
    operands: tuple[torch.Tensor, ...],
    options: tuple[Any, ...],
    dropout_state: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """Likewise. operands: q, k, v, both offsets, out, lse."""
    dout = torch.zeros_like(operands[5]) if dout is None else dout
    direct = not torch.is_grad_enabled() and is_eager() and is_real(dout) and is_real(dlse)
    differentiate: Any = backward if direct else torch.ops.jagtile.backward.default
    found: tuple[torch.Tensor, ...] = differentiate(dout, dlse, *operands, *options, dropout_state)
    return found


def refuse_second_derivative(ctx: Any, *grads: object) -> None:
    """UnsupportedError, as the formula of what has no derivative."""
    raise UnsupportedError(
        "jagtile has no second derivatives: its attention was differentiated with create_graph=True and the gradients "
        "are differentiated again; use torch's own attention there"
    )


class PackedAttention(torch.autograd.Function):
    """out, or (out, lse), of packed operands. options, return_lse and the state of dropout as in ``ops.forward``."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        rest: tuple[torch.Tensor, torch.Tensor, tuple[Any, ...], bool, torch.Tensor | None, Layout | None],
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """As ``ops.forward``. What autograd looks at costs host time: ``rest`` is one argument, and an lse that nobody
        asked for is kept without being an output.
        """
        cu_seqlens_q, cu_seqlens_k, options, return_lse, dropout_state, layout = rest
        operands = (q, k, v, cu_seqlens_q, cu_seqlens_k)
        out, lse = _forward(*operands, *options[:5], True, options[5], dropout_state, layout)
        keep_for_backward(ctx, operands, options, dropout_state, out, lse)
        return (out, lse) if return_lse else out

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None = None) -> tuple[Any, ...]:
        """As ``ops.backward``."""
        dq, dk, dv = gradients(ctx, dout, dlse)
        needed = ctx.needs_input_grad
        return (
            dq if needed[0] else None,
            dk if needed[1] else None,
            dv if needed[2] else None,
            *(None,) * (len(needed) - 3),
        )


# Autograd's own ``apply``: that of ``Function`` comes to it after looking at each argument for transforms and defaults.
_apply: Any = super(torch.autograd.Function, PackedAttention).apply
_unwrapped = torch._C._functorch.unwrap_if_dead


def packed_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    options: tuple[Any, ...],
    return_lse: bool,
    dropout_state: torch.Tensor | None,
    layout: Layout | None,
) -> Any:
    """``PackedAttention`` in an eager call (``is_eager``)."""
    offsets = (_unwrapped(cu_seqlens_q), _unwrapped(cu_seqlens_k))
    rest = (*offsets, options, return_lse, dropout_state, layout)
    return _apply(_unwrapped(q), _unwrapped(k), _unwrapped(v), rest)
