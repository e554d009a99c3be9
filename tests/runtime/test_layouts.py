"""What is remembered of tensors that passed their checks: only where they are alike in all that checks read."""

from __future__ import annotations

import pytest
import torch
from test_arguments import CU, ERRORS, call

from jagtile.runtime import layouts
from jagtile.runtime.checks import check_tensors
from jagtile.runtime.layouts import checked, layout_of_backward


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(layouts, "_KNOWN", {})


def tensors(heads: int = 4, total: int = 5) -> list[torch.Tensor]:
    return [torch.ones(total, heads, 8), torch.ones(total, 2, 8), torch.ones(total, 2, 8), CU, CU]


def layout_of(*operands: torch.Tensor):
    return checked(check_tensors, *operands)


@pytest.mark.parametrize("name", ERRORS)
def test_what_passed_once_says_nothing_of_other_arguments(oracle_kernels, name):
    call()
    changes, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        call(**changes)


def test_tensors_that_differ_in_nothing_but_values_have_one_layout():
    layout = layout_of(*tensors())
    assert layout is not None
    assert layout.sizes == (2, 5, 4, 8, 5, 2, 8)
    assert layout_of(*[2 * x for x in tensors()[:3]], CU.clone().copy_(CU), CU) is not layout  # two offsets tensors
    other = CU.clone()
    assert layout_of(*[2 * x for x in tensors()[:3]], other, other) is layout


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v, cu, _: (q[:4], k, v, cu, cu),
        lambda q, k, v, cu, _: (q[:, :2], k, v, cu, cu),
        lambda q, k, v, cu, _: (q.transpose(0, 1).contiguous().transpose(0, 1), k, v, cu, cu),
        lambda q, k, v, cu, _: (q, k[:, :1].expand(-1, 2, -1), v, cu, cu),
        lambda q, k, v, cu, _: (q, k, v[..., :4], cu, cu),
        lambda q, k, v, cu, _: (q.half(), k.half(), v.half(), cu, cu),
        lambda q, k, v, cu, _: (torch.nn.Parameter(q), k, v, cu, cu),
        lambda q, k, v, cu, _: (q, k, v, cu.long(), cu),
        lambda q, k, v, cu, _: (q, k, v, cu, cu.long()),
        lambda q, k, v, cu, _: (q, k, v, cu[:2], cu[:2].clone()),
    ],
)
def test_tensors_that_differ_in_what_is_checked_have_layouts_of_their_own(change):
    assert layout_of(*tensors()) is not layout_of(*change(*tensors()))


def test_checks_of_other_names_are_made_apart():
    seen = []
    for check in (lambda *operands: seen.append("one"), lambda *operands: seen.append("other")) * 2:
        checked(check, *tensors())
    assert seen[:2] == ["one", "other"]


def test_there_is_no_layout_in_sight_of_a_mode_or_for_tensors_that_are_not_real():
    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    class Own(torch.Tensor):
        pass

    layout_of(*tensors())
    with Seen():
        assert layout_of(*tensors()) is None
    q, k, v, cu, _ = tensors()
    assert layout_of(q.as_subclass(Own), k, v, cu, cu) is None
    assert layout_of(*(x.to("meta") for x in tensors())) is None


def test_as_many_layouts_are_remembered_as_fit(monkeypatch):
    monkeypatch.setattr(layouts, "_MAX_LAYOUTS", 3)
    for total in range(5, 15):
        assert layout_of(*tensors(total=total)).sizes[1] == total
    assert 0 < len(layouts._KNOWN) <= 3


def operands_of_backward() -> dict[str, torch.Tensor]:
    q, k, v, cu, _ = tensors()
    return {"q": q, "k": k, "v": v, "cu_seqlens_q": cu, "cu_seqlens_k": cu, "out": q.clone(), "dout": q.clone()}


@pytest.mark.parametrize("name", ["q", "k", "v", "out", "dout"])
def test_a_backwards_layout_goes_by_all_strides_and_is_there_only_where_the_last_is_1(name):
    usual = operands_of_backward()
    layout = layout_of_backward(**usual)
    assert layout.sizes == (2, 5, 4, 8, 5, 2, 8)
    assert layout_of_backward(**operands_of_backward()) is layout
    head_major = usual[name].transpose(0, 1).contiguous().transpose(0, 1)
    assert layout_of_backward(**{**usual, name: head_major}) not in (None, layout)
    strided = usual[name].mT.contiguous().mT
    assert layout_of_backward(**{**usual, name: strided}) is None


def test_a_backwards_layout_goes_by_both_offsets():
    usual = operands_of_backward()
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        assert layout_of_backward(**{**usual, name: CU.long()}) is not layout_of_backward(**usual)
    assert layout_of_backward(**{**usual, "cu_seqlens_q": CU[:2]}).sizes[0] == 1
