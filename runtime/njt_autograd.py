"""Attention over nested tensors as one node of autograd, in eager calls.

torch's own way from a nested tensor to its values and back is a chain of views, each of which dispatches to Python
several times in the forward and in the backward pass; here there is one node whose gradients are nested tensors.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.nested._internal.nested_tensor import NestedTensor

from jagtile.runtime.autograd import gradients, keep_for_backward, refuse_second_derivative
from jagtile.runtime.operators import forward_for


class Form(NamedTuple):
    """What makes packed values (total, H, D) a nested tensor of a given raggedness."""

    offsets: torch.Tensor
    lengths: torch.Tensor | None
    ragged_idx: int  # 2, or 1 where there are no heads
    cache: dict[str, Any]  # torch's own, of minimal and maximal lengths

    def nest(self, packed: torch.Tensor) -> NestedTensor:
        """The nested tensor, which autograd does not follow."""
        values = packed.transpose(0, 1) if self.ragged_idx == 2 else packed.squeeze(1)
        with torch._C.DisableTorchFunctionSubclass():  # else the constructor's own questions are dispatched in Python
            nested = NestedTensor(values, self.offsets, lengths=self.lengths, _ragged_idx=self.ragged_idx)
        nested._metadata_cache = self.cache  # given to the constructor it would be prepared for the compiler once more
        return nested


def form_of(tensor: NestedTensor) -> Form:
    """Its form."""
    return Form(tensor._offsets, tensor._lengths, tensor._ragged_idx, tensor._metadata_cache)


class NestedAttention(torch.autograd.Function):
    """A nested output of nested operands without holes, from their packed views, which autograd does not follow.

    ``call``: the arguments of ``ops.forward`` but return_lse, dropout's included.
    """

    @staticmethod
    def forward(
        ctx: Any, query: NestedTensor, key: NestedTensor, value: NestedTensor, call: tuple[Any, ...]
    ) -> NestedTensor:
        """The output, of query's form."""
        *before, dropout_p, dropout_state = call
        out, lse = forward_for(*call[:3])(*before, True, dropout_p, dropout_state)
        keep_for_backward(ctx, call, out, lse)
        ctx.forms = [(form_of(x), x._values.dtype) for x in (query, key, value)]
        return form_of(query).nest(out)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[torch.Tensor | None, ...]:
        """Nested gradients of the forms and dtypes of the operands."""
        if grads[0] is None:
            return (None,) * 4
        values = grads[0]._values
        with torch.no_grad():
            packed = values.transpose(0, 1) if ctx.forms[0][0].ragged_idx == 2 else values.unsqueeze(1)
            found = [
                form.nest(grad.to(dtype)) if needed else None
                for grad, (form, dtype), needed in zip(
                    gradients(ctx, packed, None), ctx.forms, ctx.needs_input_grad, strict=False
                )
            ]
        if torch.is_grad_enabled():  # create_graph=True
            found = [None if grad is None else _Last.apply(grad.requires_grad_()) for grad in found]  # type: ignore[no-untyped-call]
        return (*found, None)


class _Last(torch.autograd.Function):
    """The identity, differentiating which is refused."""

    @staticmethod
    def forward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        """A tensor of its own: a view of the argument would be followed through it."""
        return grad.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """UnsupportedError."""
        refuse_second_derivative(ctx, *grads)
