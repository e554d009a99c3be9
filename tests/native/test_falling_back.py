"""What the compiled host leaves to Python, and what it must not remember too long."""

from __future__ import annotations

import gc
import math

import pytest
import torch
from stand_in import Batch, connect
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import jagtile
from jagtile.generator.spec import KernelSpec
from jagtile.runtime import native, routes, trainable

pytestmark = pytest.mark.usefixtures("default_kernels")


@pytest.fixture
def taught(recorder, default_kernels, batch: Batch) -> Batch:
    """Its calls without grad are served by the host."""
    with torch.no_grad():
        for _ in range(2):
            attend(batch)
            jagtile.sdpa(*batch.nested)
    recorder.take()
    return batch


def attend(batch: Batch, **kind: object) -> torch.Tensor:
    return jagtile.varlen_attention(batch.q, batch.k, batch.v, batch.cu, batch.cu, **kind)


class DispatchMode(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


class FunctionMode(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_a_function_mode_sees_python(recorder, taught):
    with FunctionMode():
        attend(taught)
    recorder.take("python")
    attend(taught)
    recorder.take("native")


def test_a_dispatch_mode_sees_the_operator(taught):
    with DispatchMode() as mode, torch.no_grad():
        attend(taught)
    assert torch.ops.jagtile.forward.default in mode.seen


def test_a_subclass_of_a_tensor_and_a_parameter(recorder, taught):
    class Other(torch.Tensor):
        pass

    q = taught.q
    taught.q = q.as_subclass(Other)
    attend(taught)
    recorder.take("python")
    taught.q = torch.nn.Parameter(q, requires_grad=False)
    attend(taught)
    recorder.take("native")


def test_addresses_that_tma_can_not_reach(recorder, taught):
    shifted = torch.empty(taught.q.numel() + 1, dtype=torch.bfloat16)[1:].view_as(taught.q).copy_(taught.q)
    taught.q = shifted
    for _ in range(2):
        attend(taught)
        recorder.take("python")


def test_a_capture_builds_its_own_list(recorder, taught):
    recorder.capturing = True
    for _ in range(2):
        attend(taught)
        assert "build" in recorder.take("python")[0].kernel
    recorder.capturing = False
    attend(taught)
    recorder.take("native")


def test_offsets_changed_in_place_get_a_new_list(recorder, taught):
    taught.cu.add_(0)
    attend(taught)
    assert "build" in recorder.take("python")[0].kernel
    attend(taught)
    recorder.take("native")


def test_lists_die_with_their_offsets(recorder, taught, extension):
    before = extension.count_lists()
    cu = taught.cu.clone()
    for _ in range(2):
        jagtile.varlen_attention(taught.q, taught.k, taught.v, cu, cu)
    recorder.take()
    assert extension.count_lists() == before + 1
    del cu
    gc.collect()
    assert extension.count_lists() == before


def test_lists_that_are_there_already_are_found(recorder, taught, extension):
    native.disconnect()
    attend(taught)
    recorder.take("python")
    connect(extension, recorder)
    attend(taught)
    assert "build" not in recorder.take("python")[0].kernel
    attend(taught)
    recorder.take("native")


def test_inference_offsets_have_no_lists(recorder, taught):
    with torch.inference_mode():
        cu = taught.cu.clone()
        for _ in range(3):
            jagtile.varlen_attention(taught.q, taught.k, taught.v, cu, cu)
            assert "build" in recorder.take("python")[0].kernel


def test_wrong_arguments_are_told_of_as_always(taught):
    for kind, error in (
        ({"is_causal": 1}, TypeError),
        ({"causal_alignment": "left"}, ValueError),
        ({"scale": math.nan}, ValueError),
        ({"dropout_p": 2.0}, ValueError),
        ({"max_seqlen_q": -1}, ValueError),
        ({"return_lse": None}, TypeError),
    ):
        with pytest.raises(error, match=next(iter(kind))):
            attend(taught, **kind)
    with pytest.raises(ValueError, match="attn_mask"):
        jagtile.sdpa(*taught.nested, torch.ones(1))
    with pytest.raises(TypeError, match="k must be"):
        jagtile.varlen_attention(taught.q, None, taught.v, taught.cu, taught.cu)


def test_heads_are_shared_only_where_that_is_asked_for(recorder, default_kernels):
    batch = Batch(heads_kv=2)
    for _ in range(2):
        jagtile.sdpa(*batch.nested, enable_gqa=True)
    assert recorder.take()[-1].by == "native"
    with pytest.raises(ValueError, match="enable_gqa"):
        jagtile.sdpa(*batch.nested)


def test_autocast_casts(recorder, taught):
    with torch.autocast("cpu", torch.bfloat16):
        jagtile.sdpa(*taught.nested)
    recorder.take("python")


def test_a_tangent_is_refused(taught):
    from torch.autograd import forward_ad

    with forward_ad.dual_level():
        taught.q = forward_ad.make_dual(taught.q, torch.ones_like(taught.q))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            attend(taught)


@pytest.mark.filterwarnings("ignore:none in this test")
def test_what_has_no_backward_kernel_is_not_served_where_it_is_trained(recorder, taught, monkeypatch):
    monkeypatch.setattr(trainable, "why_no_backward", lambda *case: "none in this test")
    fresh = Batch(lengths=(4, 4))
    for _ in range(2):
        attend(fresh)
    assert recorder.take()[-1].by == "native"
    for _ in range(2):
        fresh.attend().float().sum().backward()
        assert not recorder.take()


def test_deterministic_mode_is_a_call_of_its_own(recorder, taught):
    for _ in range(3):
        taught.attend().backward(taught.dout)
    usual = recorder.take()[-1]
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(3):
            taught.attend().backward(taught.dout)
        in_order = recorder.take()[-1]
    finally:
        torch.use_deterministic_algorithms(False)
    assert usual.by == in_order.by == "native"
    assert usual.words != in_order.words


def test_other_kernels_are_learned_anew(recorder, taught, kernels):
    routes.forget()
    kernels(KernelSpec("fwd", "bf16", 64, 64, causal=False), "packed")
    for expected in ("python", "native"):
        attend(taught)
        (launch,) = recorder.take(expected)
        assert launch.kernel == "packed"


def test_a_thread_without_a_context_gets_one(recorder, taught, monkeypatch):
    recovered = []
    monkeypatch.setattr(native, "_failed", lambda *failure: recovered.append(failure))
    connect_anew = native._host
    assert connect_anew is not None
    native.disconnect()
    connect(connect_anew, recorder)
    for _ in range(2):
        attend(taught)
    recorder.fails_with = 201
    attend(taught)
    assert recovered == [(201, -1, 0)]
    assert recorder.take()[-1].by == "native"


def test_a_thread_without_a_context_gets_one_in_a_backward_too(recorder, batch, monkeypatch, extension):
    recovered = []
    monkeypatch.setattr(native, "_failed", lambda *failure: recovered.append(failure))
    native.disconnect()
    connect(extension, recorder)
    for code in (0, 0, 201):
        out = batch.attend()
        recorder.take()
        recorder.fails_with = code
        torch.autograd.grad(out, batch.leaves, batch.dout)
    assert recovered == [(201, -1, 0)]
    launches = recorder.take("native")
    assert [launch.dependent for launch in launches] == [True, True]


def test_a_refused_launch_is_an_error(recorder, taught, monkeypatch, extension):
    def failed(*failure: int) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(native, "_failed", failed)
    native.disconnect()
    connect(extension, recorder)
    for _ in range(2):
        attend(taught)
    recorder.fails_with = 1
    with pytest.raises(RuntimeError, match="no such kernel"):
        attend(taught)
