"""ops.py's functions as dispatchers, compilers and autograd see them: the operators of the namespace ``jagtile``.

``differentiable_forward`` is ``forward`` where grad is required: an operator of its own, because a formula for autograd
makes every call of an operator dearer. ``backward`` is its formula, and has none itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch.autograd import forward_ad

from jagtile.runtime.autograd import (
    PackedAttention,
    keep_for_backward,
    packed_attention,
    refuse_second_derivative,
)
from jagtile.runtime.eager import is_eager, is_real
from jagtile.runtime.errors import UnsupportedError
from jagtile.runtime.layouts import Layout
from jagtile.runtime.op_kernels import backward_kernel, forward_kernel
from jagtile.runtime.ops import forward

Forward = Callable[..., list[torch.Tensor]]

_DROPOUT_AT = 10  # arguments of ``differentiable_forward`` before dropout's, which may be left out


def forward_for(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, trained: bool, layout: Layout | None) -> Forward:
    """``ops.forward``, through autograd where grad is required (``trained``), and as an operator where a compiler, a
    tensor subclass, a mode or a transform must see one, which takes no layout.
    """
    if trained:
        return _forward_with_grad
    if forward_ad._current_level >= 0 and not torch.compiler.is_compiling():
        _refuse_tangents(q, k, v)
    direct = layout is not None or (is_eager() and is_real(q))
    return forward if direct else cast(Forward, torch.ops.jagtile.forward.default)


def _refuse_tangents(*operands: torch.Tensor) -> None:
    """Without a word from here the result would have no tangent: as if its derivative were zero."""
    tangents = [forward_ad.unpack_dual(operand).tangent for operand in operands]  # type: ignore[no-untyped-call]
    if any(tangent is not None for tangent in tangents):
        raise UnsupportedError(
            "jagtile has no forward-mode derivatives: an operand carries a tangent (torch.func.jvp, make_dual); use "
            "reverse mode, or float64, which plain operations serve"
        )


def _forward_with_grad(
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
    """The backward needs the lse, which is dropped here where the caller does not ask for it."""
    operands = (q, k, v, cu_seqlens_q, cu_seqlens_k)
    options = (max_seqlen_q, max_seqlen_k, is_causal, bottom_right, scale, dropout_p)
    if layout is not None or (is_eager() and is_real(q) and is_real(k) and is_real(v)):
        found = packed_attention(*operands, options, return_lse, dropout_state, layout)
        return list(found) if return_lse else [found]
    out, lse = torch.ops.jagtile.differentiable_forward.default(*operands, *options, dropout_state)
    return [out, lse] if return_lse else [out]


def _differentiable_forward(*call: Any) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = cast(Forward, forward_kernel)(*call[:_DROPOUT_AT], True, *call[_DROPOUT_AT:])
    return out, lse


def _differentiable_forward_fake(*call: Any) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = cast(Forward, _forward_fake)(*call[:_DROPOUT_AT], True)
    return out, lse


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
    dropout_p: float = 0.0,
    dropout_state: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    total_q, heads, _ = q.shape
    out = q.new_empty((total_q, heads, v.shape[2]))
    return [out, q.new_empty((heads, total_q), dtype=torch.float32)] if return_lse else [out]


def _backward_fake(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *rest: object,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    *operands_and_options, dropout_state = inputs
    keep_for_backward(ctx, tuple(operands_and_options[:5]), tuple(operands_and_options[5:]), dropout_state, *output)


# The operators exist as long as this object does.
_LIBRARY = torch.library.Library("jagtile", "DEF")  # type: ignore[no-untyped-call]
_BATCH = "Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k"
_OPTIONS = "SymInt? max_seqlen_q, SymInt? max_seqlen_k, bool is_causal, bool bottom_right, float scale"
_DROPOUT = "float dropout_p=0.0, Tensor? dropout_state=None"
for _schema, _function, _fake in (
    (f"forward({_BATCH}, {_OPTIONS}, bool return_lse, {_DROPOUT}) -> Tensor[]", forward_kernel, _forward_fake),
    (
        f"differentiable_forward({_BATCH}, {_OPTIONS}, {_DROPOUT}) -> (Tensor, Tensor)",
        _differentiable_forward,
        _differentiable_forward_fake,
    ),
    (
        f"backward(Tensor dout, Tensor? dlse, {_BATCH}, Tensor out, Tensor lse, {_OPTIONS}, {_DROPOUT})"
        " -> (Tensor dq, Tensor dk, Tensor dv)",
        backward_kernel,
        _backward_fake,
    ),
):
    _name = _schema.partition("(")[0]
    _LIBRARY.define(_schema)  # type: ignore[no-untyped-call]
    for _key in ("CPU", "CUDA"):
        _LIBRARY.impl(_name, _function, _key)  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"jagtile::{_name}", _fake, lib=_LIBRARY)
torch.library.register_autograd(
    "jagtile::differentiable_forward", PackedAttention.backward, setup_context=_keep_for_backward, lib=_LIBRARY
)
torch.library.register_autograd("jagtile::backward", refuse_second_derivative, lib=_LIBRARY)
