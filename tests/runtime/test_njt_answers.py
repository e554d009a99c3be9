"""Rules for all nested tensors of the process: made by training alone, and never against torch or somebody else."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from njt_cases import head_by_head, njt, with_holes, without_heads
from torch._library.simple_registry import singleton
from torch.nested._internal.nested_tensor import NestedTensor
from torch.nested._internal.ops import lookup_jagged
from torch.utils._python_dispatch import TorchDispatchMode

import jagtile
from jagtile.runtime import njt_answers

OPERATORS = (torch.ops.aten.sym_size.default, torch.ops.prim.layout.default)


def holder(operator: Any) -> Any:
    return singleton.find(operator.__qualname__).torch_dispatch_rules


def rules() -> list[Callable[..., Any] | None]:
    return [holder(operator).find(NestedTensor) for operator in OPERATORS]


@pytest.fixture
def unasked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(njt_answers, "_asked", False)
    before = [(holder(operator)._data, dict(holder(operator)._data)) for operator in OPERATORS]
    for data, _ in before:
        data.pop(NestedTensor, None)
    yield
    for data, kept in before:
        data.clear()
        data.update(kept)


@pytest.mark.parametrize("model", [njt, head_by_head, without_heads, with_holes])
def test_rules_answer_as_torch_does(unasked, model):
    nested = model()
    njt_answers.answer_at_once(nested)
    assert rules() == [njt_answers._size, njt_answers._layout]
    for other in (nested, nested.detach(), copy.deepcopy(nested)):
        with torch._C.DisableTorchFunctionSubclass():
            answers = (other.size(), other.layout)
        for operator, answer in zip(OPERATORS, answers, strict=True):
            assert answer == lookup_jagged(operator, other)(other)


def test_modes_see_the_questions(unasked):
    class Asked(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            asked.append(func)
            return func(*args, **(kwargs or {}))

    nested, asked = njt(), []
    njt_answers.answer_at_once(nested)
    with Asked(), torch._C.DisableTorchFunctionSubclass():
        assert nested.size() == nested._size
        assert nested.layout == torch.jagged
    assert asked == list(OPERATORS)


def test_a_size_that_is_not_what_the_tensor_holds_is_torchs_to_answer(unasked):
    nested = njt()
    nested._size = njt()._size  # another nested int
    njt_answers.answer_at_once(nested)
    assert rules() == [None, njt_answers._layout]


def test_only_training_makes_rules(unasked):
    nested = njt()
    jagtile.sdpa(nested, nested, nested)
    assert rules() == [None, None]
    leaf = nested.detach().requires_grad_()
    out = jagtile.sdpa(leaf, leaf, leaf)
    assert rules() == [njt_answers._size, njt_answers._layout]
    (grad,) = torch.autograd.grad(out, leaf, torch.ones_like(out.detach()))
    assert (grad.shape, grad.layout) == (leaf.shape, torch.jagged)


def test_somebody_elses_rule_stays(unasked):
    def theirs(cls, func, types, args, kwargs):
        return args[0]._size

    holder(OPERATORS[0]).register(NestedTensor, theirs)
    njt_answers.answer_at_once(njt())
    assert rules() == [theirs, njt_answers._layout]


def test_a_torch_that_answers_otherwise_answers_itself(unasked, monkeypatch):
    torchs = NestedTensor.__torch_dispatch__

    def other(cls, func, types, args=(), kwargs=None):
        answer = torchs(func, types, args, kwargs)
        return torch.strided if func is OPERATORS[1] else list(answer)

    def refuses(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(func)

    example = njt()
    for dispatch in (other, refuses):
        monkeypatch.setattr(njt_answers, "_asked", False)
        monkeypatch.setattr(NestedTensor, "__torch_dispatch__", classmethod(dispatch))
        njt_answers.answer_at_once(example)
        monkeypatch.undo()
        assert rules() == [None, None]
