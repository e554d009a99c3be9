"""Autograd's part in eager calls: the functions of operators.py once more, at a fraction of an operator's host time.

Compilers, modes, transforms and tensor subclasses see the operators instead.
"""

from __future__ import annotations

from typing import Any, cast

import torch

from jagtile.runtime.errors import UnsupportedError
from jagtile.runtime.ops import backward, forward

CALL = 10  # arguments of ``ops.forward`` before return_lse; dropout's, which may be left out, come after it


def is_eager() -> bool:
    """Whether no compiler, mode or transform looks on."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
    )


def is_real(x: torch.Tensor | None) -> bool:
    """Whether it is no tensor subclass, and of a CPU or a CUDA device."""
    return x is None or ((type(x) is torch.Tensor or type(x) is torch.nn.Parameter) and (x.is_cuda or x.is_cpu))


def keep_for_backward(ctx: Any, call: tuple[Any, ...], out: torch.Tensor, lse: torch.Tensor) -> None:
    """Save what ``gradients`` needs. call: q, k, v, both offsets, hints, is_causal, bottom_right, scale, dropout's."""
    *call_, dropout_state = call
    ctx.save_for_backward(*call_[:5], out, lse, dropout_state)
    ctx.options = tuple(call_[5:])
    ctx.set_materialize_grads(False)


def gradients(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """dq, dk and dv of what ``keep_for_backward`` saved; differentiating them again is refused."""
    *tensors, dropout_state = ctx.saved_tensors
    dout = torch.zeros_like(tensors[5]) if dout is None else dout
    direct = not torch.is_grad_enabled() and is_eager() and is_real(dout) and is_real(dlse)
    differentiate = cast(Any, backward if direct else torch.ops.jagtile.backward.default)
    found: tuple[torch.Tensor, ...] = differentiate(dout, dlse, *tensors, *ctx.options, dropout_state)
    return found


def refuse_second_derivative(ctx: Any, *grads: object) -> None:
    """UnsupportedError, as the formula of what has no derivative."""
    raise UnsupportedError(
        "jagtile has no second derivatives: its attention was differentiated with create_graph=True and the gradients "
        "are differentiated again; use torch's own attention there"
    )


class PackedAttention(torch.autograd.Function):
    """(out, lse) of ``ops.forward``'s arguments but return_lse, all of them."""

    @staticmethod
    def forward(ctx: Any, *call: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """As ``ops.forward``."""
        out, lse = cast(Any, forward)(*call[:CALL], True, *call[CALL:])
        keep_for_backward(ctx, call, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """As ``ops.backward``."""
        dout, dlse = grads
        found = gradients(ctx, dout, dlse)
        wanted = (grad if needed else None for grad, needed in zip(found, ctx.needs_input_grad, strict=False))
        return (*wanted, *(None,) * (len(ctx.needs_input_grad) - 3))
