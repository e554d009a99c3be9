"""Attention over nested tensors as one node of autograd, in eager calls.

torch's own way from a nested tensor to its values and back is a chain of views, each of which dispatches to Python
several times in the forward and in the backward pass; here there is one node whose gradients are nested tensors.
"""

from __future__ import annotations

import weakref
from typing import Any, cast

import torch
from torch.nested._internal.nested_tensor import NestedTensor

from jagtile.runtime.autograd import gradients, keep_for_backward, refuse_second_derivative
from jagtile.runtime.layouts import Layout
from jagtile.runtime.njt_form import form_of
from jagtile.runtime.ops import forward

_NO_GRADS = (None,) * 4  # by what is no nested operand


class NestedAttention(torch.autograd.Function):
    """A nested output of nested operands without holes, from their packed views, which autograd does not follow.

    operands: q, k, v, both offsets; options and the state of dropout as in ``PackedAttention``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: NestedTensor,
        key: NestedTensor,
        value: NestedTensor,
        operands: tuple[torch.Tensor, ...],
        options: tuple[Any, ...],
        dropout_state: torch.Tensor | None,
        layout: Layout | None,
    ) -> NestedTensor:
        """The output, of query's form."""
        out, lse = cast(Any, forward)(*operands, *options[:5], True, options[5], dropout_state, layout)
        keep_for_backward(ctx, operands, options, dropout_state, out, lse)
        nested = form_of(query).nest(out)
        ctx.versions = _versions((query, key, value, nested), (*operands[:3], out))
        # Gradients are as contiguous as the output, wherever operands lie, and mostly as wide.
        ctx.forms = [(form_of(x, like=nested), x._values.dtype) for x in (query, key, value)]
        return nested

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[torch.Tensor | None, ...]:
        """Nested gradients of the forms and dtypes of the operands."""
        if grads[0] is None:
            return (None, None, None, *_NO_GRADS)
        if not torch.is_grad_enabled():
            return (*_gradients(ctx, grads[0]), *_NO_GRADS)
        with torch.no_grad():  # create_graph=True
            found = _gradients(ctx, grads[0])
        last = [None if grad is None else last_derivative(grad, grads[0]) for grad in found]
        return (*last, *_NO_GRADS)


# Past the questions of ``Function.apply``, as in autograd.py.
nested_attention: Any = super(torch.autograd.Function, NestedAttention).apply


def _versions(
    nested: tuple[NestedTensor, ...], packed: tuple[torch.Tensor, ...]
) -> list[tuple[weakref.ref[NestedTensor], int]]:
    """Versions of the nested tensors whose values were saved, uncopied: changing one in place does not count up that of
    its values. Weak references: the output leads here, and what is saved is freed by a backward.
    """
    with torch._C.DisableTorchFunctionSubclass():  # else each look costs a Python dispatch
        return [
            (weakref.ref(x), x._version)
            for x, saved in zip(nested, packed, strict=True)
            if x._values.data_ptr() == saved.data_ptr() and not x.is_inference()  # which has no version
        ]


def _check_versions(versions: list[tuple[weakref.ref[NestedTensor], int]]) -> None:
    """RuntimeError, as torch's, for what was changed in place since."""
    with torch._C.DisableTorchFunctionSubclass():
        for reference, version in versions:
            x = reference()
            if x is not None and x._version != version:
                raise RuntimeError(
                    f"one of the variables needed for gradient computation has been modified by an inplace operation: "
                    f"a nested operand or output of jagtile's attention is at version {x._version}; expected {version}"
                )


def _gradients(ctx: Any, dout: NestedTensor) -> list[NestedTensor | None]:
    _check_versions(ctx.versions)
    packed = dout._values.transpose(0, 1) if dout._ragged_idx == 2 else dout._values.unsqueeze(1)
    return [
        form.nest(grad if grad.dtype == dtype else grad.to(dtype)) if needed else None
        for grad, (form, dtype), needed in zip(
            gradients(ctx, packed, None), ctx.forms, ctx.needs_input_grad, strict=False
        )
    ]


class _Last(torch.autograd.Function):
    """The identity, differentiating which is refused."""

    @staticmethod
    def forward(ctx: Any, grad: torch.Tensor, dout: torch.Tensor) -> torch.Tensor:
        """A tensor of its own: a view of the argument would be followed through it. dout leads to what it came from:
        without it a second derivative by that alone would be taken for zero.
        """
        return grad.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """UnsupportedError."""
        refuse_second_derivative(ctx, *grads)


def last_derivative(grad: torch.Tensor, dout: torch.Tensor) -> torch.Tensor:
    """A gradient by ``dout``, differentiating which is refused."""
    return cast(torch.Tensor, _Last.apply(grad.requires_grad_(), dout))  # type: ignore[no-untyped-call]
