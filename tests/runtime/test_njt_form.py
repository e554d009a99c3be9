"""Nested tensors put together without torch's constructor are those that it makes."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from njt_cases import head_by_head, njt, with_holes, without_heads
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nested._internal.nested_tensor import NestedTensor

import jagtile
from jagtile.runtime import njt_form


def packed_like(model: NestedTensor) -> torch.Tensor:
    values = model._values
    heads, dim = (values.shape[0], values.shape[2]) if model._ragged_idx == 2 else (1, values.shape[1])
    return torch.randn(values.shape[model._ragged_idx - 1], heads, dim + 4)


@pytest.fixture
def unlearned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(njt_form, "_marks", None)


@pytest.mark.parametrize("model", [njt, head_by_head, without_heads, with_holes])
def test_a_nested_tensor_is_what_torchs_constructor_makes(unlearned, model):
    form = njt_form.form_of(model())
    packed = packed_like(model())
    made = form.nest(packed)
    assert njt_form._marks.suffice
    for again in (made, form.nest(packed)):
        wanted = form._construct((packed.transpose(0, 1) if form.ragged_idx == 2 else packed.squeeze(1)).detach())
        assert njt_form._facts(again) == njt_form._facts(wanted)
        assert again._values.data_ptr() == packed.data_ptr()
        for question in (torch.Tensor.numel, torch.Tensor.dim, torch.Tensor.stride, torch.Tensor.is_contiguous):
            assert question(again) == question(wanted)
        assert again.shape == wanted.shape


@pytest.mark.parametrize("same_offsets", [True, False])
def test_strides_are_those_of_what_is_nested(unlearned, same_offsets):
    model = head_by_head()
    offsets = model._offsets if same_offsets else model._offsets.clone()
    like = njt(heads=model._values.shape[0], dim=model._values.shape[2], offsets=offsets)
    packed = model._values.transpose(0, 1).contiguous()
    for _ in range(2):
        made = njt_form.form_of(model, like).nest(packed)
        assert made._strides == njt_form.form_of(model)._construct(packed.transpose(0, 1))._strides
    assert (made._strides[0] is like._strides[0]) == same_offsets


def test_it_can_be_computed_with_saved_and_copied(unlearned):
    model = njt()
    made = njt_form.form_of(model).nest(model._values.transpose(0, 1).contiguous())
    torch.testing.assert_close((made + model)._values, 2 * model._values)
    file = io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    for other in (torch.load(file, weights_only=False), copy.deepcopy(made)):
        torch.testing.assert_close(other._values, made._values)


def test_a_torch_that_makes_others_makes_all(unlearned, monkeypatch):
    constructed = []
    init = NestedTensor.__init__

    def other(self, values, offsets, **kind):
        init(self, values, offsets, **kind)
        self._new = object()
        constructed.append(self)

    monkeypatch.setattr(NestedTensor, "__init__", other)
    form = njt_form.form_of(njt())
    for _ in range(2):
        assert form.nest(torch.randn(7, 2, 8)) is constructed[-1]
    assert not njt_form._marks.suffice


def test_modes_see_torchs_constructor(unlearned):
    form = njt_form.form_of(njt())
    with FakeTensorMode(allow_non_fake_inputs=True):
        form.nest(torch.randn(7, 2, 8))
    assert njt_form._marks is None


def test_fake_tensors_teach_nothing_outside_their_mode(unlearned):
    model, mode = njt(), FakeTensorMode(allow_non_fake_inputs=True)
    fake = mode.from_tensor(torch.randn(7, 2, 8))
    nested = njt_form.form_of(model).nest(fake)
    assert type(nested._values) is type(fake)
    assert njt_form._marks is None


def test_a_deep_copy_does_not_tell_of_another_torch(unlearned):
    copied = copy.deepcopy(njt())  # torch's own results of it have another nested int
    out = jagtile.sdpa(copied, copied, copied)
    assert njt_form._marks.suffice
    assert jagtile.sdpa(copied, copied, copied).shape == out.shape
