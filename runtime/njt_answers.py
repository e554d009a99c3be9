"""What a nested tensor's size and layout are, answered at once.

Autograd asks every nested tensor that enters or leaves a node, and every gradient, for both: some thirty times in a
call's forward and backward. torch's own answer takes a lookup by name and, before torch 2.13, a check of arguments
against a schema; these rules give the same one. They are for the whole process, as rules for a class of tensors are.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch.nested._internal.nested_tensor import NestedTensor


def _size(cls: type, func: object, types: object, args: tuple[NestedTensor], kwargs: object) -> tuple[int, ...]:
    return args[0]._size


def _layout(cls: type, func: object, types: object, args: tuple[NestedTensor], kwargs: object) -> torch.layout:
    return torch.jagged


_RULES: tuple[tuple[Any, Callable[..., Any]], ...] = (
    (torch.ops.aten.sym_size.default, _size),
    (torch.ops.prim.layout.default, _layout),
)


# As ``torch.library.register_torch_dispatch``, which does not take operators of the namespace prim.
for _operator, _rule in _RULES:
    with suppress(RuntimeError, AttributeError):  # somebody's rule is there already, or torch has none any more
        torch._library.simple_registry.singleton.find(_operator.__qualname__).torch_dispatch_rules.register(
            NestedTensor, _rule
        )
