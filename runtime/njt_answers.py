"""What a nested tensor's size and layout are, answered at once.

Autograd asks every nested tensor that enters or leaves a node, and every gradient, for both: some twenty times in a
call's forward and backward. torch's own answer takes a lookup by name and, before torch 2.13, a check of arguments
against a schema, and sizes are carried from C++ to Python and back; these rules give the same one. Rules for a class of
tensors hold for the whole process, so they are made only once jagtile trains on nested tensors, and only where this
torch says the same.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch.nested._internal.nested_tensor import NestedTensor

_asked = False


def _size(cls: type, func: object, types: object, args: object, kwargs: object) -> None:
    """None: what the tensor holds in C++, which is what its constructor made ``_size`` of."""


def _layout(cls: type, func: object, types: object, args: object, kwargs: object) -> torch.layout:
    return torch.jagged


def answer_at_once(example: NestedTensor) -> None:
    """Make the rules, at the first call, unless torch answers otherwise for ``example`` or there are rules already."""
    global _asked
    if _asked:
        return
    _asked = True
    for namespace, name, rule, answer in (
        ("aten", "sym_size", _size, lambda: tuple(example.size())),
        ("prim", "layout", _layout, lambda: example.layout),
    ):
        # Somebody's rule is there already, or torch's private parts have changed: torch answers.
        with suppress(RuntimeError, AttributeError, TypeError, NotImplementedError):
            _make(getattr(getattr(torch.ops, namespace), name).default, rule, answer, example)


def _make(operator: Any, rule: Any, answer: Callable[[], object], example: NestedTensor) -> None:
    """As ``torch.library.register_torch_dispatch``, which does not take operators of the namespace prim."""
    torchs: Any = NestedTensor.__torch_dispatch__(operator, (NestedTensor,), (example,), {})  # type: ignore[no-untyped-call]
    rules = torch._library.simple_registry.singleton.find(operator.__qualname__).torch_dispatch_rules
    made = rules.register(NestedTensor, rule)
    same = False
    try:
        with torch._C.DisableTorchFunctionSubclass():
            same = answer() == torchs
    finally:
        if not same:
            made.destroy()
