"""What a nested tensor's size and layout are, answered at once.

Autograd asks every nested tensor that enters or leaves a node, and every gradient, for both: some thirty times in a
call's forward and backward. torch's own answer takes a lookup by name and, before torch 2.13, a check of arguments
against a schema; these rules give the same one. Rules for a class of tensors hold for the whole process, so they are
made only once jagtile trains on nested tensors, and only where this torch says the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nested._internal.nested_tensor import NestedTensor

_asked = False


def _size(cls: type, func: object, types: object, args: tuple[NestedTensor], kwargs: object) -> tuple[int, ...]:
    return args[0]._size


def _layout(cls: type, func: object, types: object, args: tuple[NestedTensor], kwargs: object) -> torch.layout:
    return torch.jagged


def answer_at_once(example: NestedTensor) -> None:
    """Make the rules, at the first call, unless torch answers otherwise for ``example`` or there are rules already."""
    global _asked
    if _asked:
        return
    _asked = True
    for namespace, name, rule in (("aten", "sym_size", _size), ("prim", "layout", _layout)):
        try:
            operator: Any = getattr(getattr(torch.ops, namespace), name).default
            question: Any = (NestedTensor, operator, (NestedTensor,), (example,), {})
            if rule(*question) is NestedTensor.__torch_dispatch__(*question[1:]):  # type: ignore[no-untyped-call]
                # As ``torch.library.register_torch_dispatch``, which does not take operators of the namespace prim.
                rules = torch._library.simple_registry.singleton.find(operator.__qualname__).torch_dispatch_rules
                rules.register(NestedTensor, rule)
        except (RuntimeError, AttributeError, TypeError, NotImplementedError):
            pass  # somebody's rule is there already, or torch's private parts have changed: torch answers
