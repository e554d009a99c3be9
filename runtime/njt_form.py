"""Packed values as nested tensors of a given raggedness, without the cost of torch's constructor.

The constructor asks each new tensor for its sizes and marks them for compilers, by calls that go through Python once
more; and it multiplies nested ints anew. Here the same tensor is put together from what its model has at hand. Whether
it is the same is seen at the first one: where this torch makes others, the constructor makes all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch._C import DispatchKey, DispatchKeySet
from torch.nested._internal.nested_tensor import NestedTensor

from jagtile.runtime.eager import is_eager, is_real

_ATTRIBUTES = ("_ragged_idx", "_size", "_strides", "_values", "_offsets", "_lengths", "_metadata_cache")
_KEYS = DispatchKeySet(DispatchKey.NestedTensor).add(DispatchKey.AutogradNestedTensor)


class Form(NamedTuple):
    """What makes packed values (total, H, D) a nested tensor of a given raggedness."""

    offsets: torch.Tensor
    lengths: torch.Tensor | None
    ragged_idx: int  # 2, or 1 where there are no heads
    cache: dict[str, Any]  # torch's own, of minimal and maximal lengths
    size: tuple[int, ...]  # of the model, with its nested int
    strides: tuple[int, ...]  # of the model, or of another with its nested int

    def nest(self, packed: torch.Tensor) -> NestedTensor:
        """The nested tensor, which autograd does not follow."""
        values = packed.transpose(0, 1) if self.ragged_idx == 2 else packed.squeeze(1)
        if is_eager() and is_real(packed):
            marks = _marks or _learn(self, values)
            if marks.suffice:
                return self._assemble(values, marks)
        return self._construct(values)

    def _construct(self, values: torch.Tensor) -> NestedTensor:
        with torch._C.DisableTorchFunctionSubclass():  # else the constructor's own questions are dispatched in Python
            nested = NestedTensor(values, self.offsets, lengths=self.lengths, _ragged_idx=self.ragged_idx)
        nested._metadata_cache = self.cache  # given to the constructor it would be prepared for the compiler once more
        return nested

    def _assemble(self, values: torch.Tensor, marks: _Marks) -> NestedTensor:
        """As ``_construct``."""
        offsets, lengths, ragged_idx, cache, model_size, model_strides = self
        shape, stride, ragged = list(values.shape), values.stride(), model_size[ragged_idx]
        token = stride[ragged_idx - 1]
        whole = model_strides[0] if model_strides[ragged_idx] == token else ragged * token
        shape[ragged_idx - 1] = ragged
        size = (model_size[0], *shape)
        nested: NestedTensor = torch.Tensor._make_wrapper_subclass(
            NestedTensor,
            size,
            (0, *stride),  # torch asks for ``_strides``: those in C++ are not read, and a nested int there costs 2.4 us
            0,
            torch.contiguous_format,
            values.dtype,
            torch.jagged,
            values.device,
            False,
            False,
            "sizes",
            False,
            True,
            _KEYS,
            storage_size=values.untyped_storage().size(),
        )
        nested._ragged_idx, nested._size, nested._strides = ragged_idx, size, (whole, *stride)
        nested._values, nested._offsets, nested._lengths = values, offsets, lengths
        nested._metadata_cache = cache
        for name in marks.nested:
            setattr(nested, name, {ragged_idx})
        for name in marks.values:
            setattr(values, name, {ragged_idx - 1})
        return nested


def form_of(tensor: NestedTensor, like: NestedTensor | None = None) -> Form:
    """Its form. ``like`` is laid out as what will be nested: strides with the same nested int are taken from it."""
    ragged_idx, size, strides = tensor._ragged_idx, tensor._size, tensor._strides
    if like is not None and like._size[ragged_idx] is size[ragged_idx]:
        strides = like._strides
    return Form(tensor._offsets, tensor._lengths, ragged_idx, tensor._metadata_cache, size, strides)


class _Marks(NamedTuple):
    """The attributes by which this torch tells compilers the ragged dimension: names."""

    nested: tuple[str, ...]
    values: tuple[str, ...]
    suffice: bool  # whether a nested tensor with these is what the constructor makes


_marks: _Marks | None = None


def _learn(form: Form, values: torch.Tensor) -> _Marks:
    """From a nested tensor that the constructor makes."""
    global _marks
    seen = form._construct(values.detach())
    marks = _Marks(tuple(set(seen.__dict__) - set(_ATTRIBUTES)), tuple(seen._values.__dict__), True)
    try:
        # Of what was seen, not of the model: a deep copy of a nested tensor has its size from the original's offsets.
        suffice = _facts(form_of(seen)._assemble(values.detach(), marks)) == _facts(seen)
    except (TypeError, AttributeError, RuntimeError):  # torch's private functions have changed
        suffice = False
    _marks = marks._replace(suffice=suffice)
    return _marks


def _facts(nested: NestedTensor) -> tuple[object, ...]:
    attributes = {name: value for name, value in nested.__dict__.items() if name != "_values"}
    keys = str(torch._C._dispatch_keys(nested))
    kind = (type(nested), nested.dtype, nested.device, nested.layout, nested.requires_grad)
    return (attributes, nested._values.__dict__, keys, kind, nested.untyped_storage().size())


def marks_if(nest: Callable[[NestedTensor, torch.Tensor, _Marks], NestedTensor]) -> _Marks | None:
    """The marks, if ``nest`` makes of a model, values and them what the constructor makes of the model's form."""
    values = torch.zeros(1, 3, 1)
    form = form_of(NestedTensor(values, torch.tensor([0, 1, 3]), _ragged_idx=2))
    marks = _marks or _learn(form, values)
    seen = form._construct(values.detach())
    return marks if marks.suffice and _facts(nest(seen, values.detach(), marks)) == _facts(seen) else None
