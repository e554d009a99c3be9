"""The compiled host launches what Python launches: the same kernels, grids and blocks."""

from __future__ import annotations

import threading

import pytest
import torch
from stand_in import Batch, alike, connect

import jagtile
from jagtile.generator.spec import KernelSpec
from jagtile.runtime.cuda import driver

FORWARDS = [
    ("persistent", 64, 64),
    ("persistent", 33, 33),  # by rows, without tensor maps
    ("persistent", 64, 36),  # out is stored from registers
    ("split", 64, 64),  # with scratch
    ("packed", 64, 64),  # without a work list
]


def operands(dim: int, dim_v: int) -> list[torch.Tensor]:
    batch = Batch(dim)
    return [batch.q, batch.k, batch.v[..., :dim_v].clone(), batch.cu, batch.cu]


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize(("algorithm", "dim", "dim_v"), FORWARDS)
def test_a_forward_is_launched_as_by_python(recorder, kernels, algorithm, dim, dim_v, return_lse):
    kernels(KernelSpec("fwd", "bf16", dim, dim_v, causal=True), algorithm)
    given = operands(dim, dim_v)
    kind = {"is_causal": True, "causal_alignment": "bottom_right", "scale": 0.3, "return_lse": return_lse}
    first = jagtile.varlen_attention(*given, **kind)
    of_python = recorder.take("python")
    second = jagtile.varlen_attention(*given, **kind)
    (of_native,) = recorder.take("native")
    assert not of_native.dependent
    assert first is not second
    firsts, seconds = (found if return_lse else (found,) for found in (first, second))
    for a, b in zip(firsts, seconds, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
        assert b.data_ptr() in of_native.words
    alike(of_python[-1], of_native, list(zip(firsts, seconds, strict=True)))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize(
    ("algorithm", "dim", "heads_kv"),
    [("keyblocks", 64, 4), ("packedrows", 64, 2), ("wide", 192, 4), ("keyblocks", 128, 1)],
)
def test_a_backward_is_launched_as_by_python(recorder, kernels, algorithm, dim, heads_kv, return_lse, is_causal):
    kernels(KernelSpec("fwd", "bf16", dim, dim, is_causal), "persistent")
    kernels(KernelSpec("bwd", "bf16", dim, dim, is_causal), algorithm)
    batch, dlse = Batch(dim, heads_kv), torch.randn(4, 48)
    launches, outputs = [], []
    for _ in range(3):  # by Python, by a node that asks Python, by the host
        found = batch.attend(is_causal=is_causal, return_lse=return_lse)
        recorder.take()
        out, douts = (found, (batch.dout, dlse)) if return_lse else ((found,), (batch.dout,))
        grads = torch.autograd.grad(out, batch.leaves, douts)
        launches.append([launch for launch in recorder.take() if "build" not in launch.kernel])
        outputs.append((*out, *grads))
    assert {launch.by for launch in launches[1]} == {"python"}
    assert {launch.by for launch in launches[2]} == {"native"}
    unknown = 1 + (not return_lse)  # scratch, and an lse that is no output
    for a, b in zip(launches[1], launches[2], strict=True):
        alike(a, b, list(zip(outputs[1], outputs[2], strict=True)), unknown)
    first, _, last = outputs
    for a, b in zip(first, last, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
    for grad in last[-3:]:
        assert any(grad.data_ptr() in launch.words for launch in launches[2])
    if return_lse:
        assert dlse.data_ptr() in launches[2][0].words


@pytest.mark.parametrize("algorithm", ["keyblocks", "packedrows"])
@pytest.mark.parametrize(
    ("facts", "launches_dependents", "dependent"),
    [({}, True, True), ({"dependent": 0}, True, False), ({}, False, False)],  # one of old, a driver of old
)
def test_kernels_of_a_backward_are_dependent_where_they_wait_and_the_driver_can(
    recorder, kernels, batch, algorithm, facts, launches_dependents, dependent
):
    recorder.launches_dependents = launches_dependents
    kernels(KernelSpec("fwd", "bf16", 64, 64, causal=False), "persistent")
    kernels(KernelSpec("bwd", "bf16", 64, 64, causal=False), algorithm, **facts)
    for expected in ("python", "python", "native"):
        out = batch.attend()
        recorder.take()
        torch.autograd.grad(out, batch.leaves, batch.dout)
        launches = recorder.take(expected)
        assert len(launches) >= 2
        for launch in launches:
            assert launch.dependent == (dependent and "work_list" not in launch.kernel)


def test_each_thread_has_its_own_launch_configuration(recorder, kernels, monkeypatch):
    kernel = kernels(KernelSpec("bwd", "bf16", 64, 64, causal=False), "packedrows")
    configs = [kernel._launch._own.config, kernel._launch._own.config]
    thread = threading.Thread(target=lambda: configs.append(kernel._launch._own.config))
    thread.start()
    thread.join()
    assert configs[0] is configs[1]
    assert configs[0] is not configs[2]


@pytest.mark.parametrize("launcher", [driver.Launcher, driver.DependentLauncher])
def test_python_gives_a_thread_a_context_and_tells_of_what_fails_then(recorder, monkeypatch, launcher):
    codes, bound = [], []
    launch = launcher(3)
    monkeypatch.setattr(launch, "_launch", lambda *_: (codes.pop(0),))
    monkeypatch.setattr(driver, "bind_primary_context", bound.append)
    monkeypatch.setattr(driver, "_check", lambda _bindings, code, call: code and pytest.fail(call))
    codes[:] = [201, 0]
    launch(1, 2, 3, 4, 5, 6)
    assert bound == [3]
    for codes[:], asked in (([201, 1], [3, 3]), ([1], [3, 3])):
        with pytest.raises(pytest.fail.Exception, match="cuLaunchKernel"):
            launch(1, 2, 3, 4, 5, 6)
        assert (codes, bound) == ([], asked)


def test_gradients_that_nobody_asks_for_are_none(recorder, default_kernels, batch):
    for needed in ((0,), (1, 2), (0, 1, 2)):
        for _ in range(3):
            leaves = [x if at in needed else x.detach() for at, x in enumerate(batch.leaves)]
            out = jagtile.varlen_attention(*leaves, batch.cu, batch.cu)
            out.backward(batch.dout)
        assert recorder.launches[-1].by == "native"
        assert [x.grad is not None for x in batch.leaves] == [at in needed for at in range(3)]
        for x in batch.leaves:
            x.grad = None


def test_nested_calls_are_launched_too(recorder, default_kernels, batch):
    outs, grads, nested_launches = [], [], []
    for _ in range(3):
        out = batch.attend_nested()
        outs.append(out)
        grads.append(torch.autograd.grad(out, batch.nested_leaves, batch.nested_dout))
        nested_launches.append([launch for launch in recorder.take() if "build" not in launch.kernel])
    assert {launch.by for launch in nested_launches[2]} == {"native"}
    assert outs[2].grad_fn.name() == type(outs[0].grad_fn).__name__
    for a, b in zip((outs[0], *grads[0]), (outs[2], *grads[2]), strict=True):
        assert (a.shape, a._strides, a.dtype, a.layout) == (b.shape, b._strides, b.dtype, b.layout)
        assert a._offsets is b._offsets
        assert a._metadata_cache is b._metadata_cache
        assert a._values.stride() == b._values.stride()
        assert b._values.data_ptr() in {word for launch in nested_launches[2] for word in launch.words}
        assert b.transpose(1, 2).is_contiguous()
    with torch.no_grad():
        for expected in ("python", "native"):
            out = jagtile.sdpa(*batch.nested)
            assert recorder.take()[-1].by == expected
            assert out.grad_fn is None
            assert (out + batch.nested[0]).shape == out.shape


def test_what_packed_calls_taught_serves_nested_ones(recorder, default_kernels, batch):
    with torch.no_grad():
        jagtile.varlen_attention(batch.q, batch.k, batch.v, batch.cu, batch.cu, 40, 40)
        recorder.take("python")
        jagtile.sdpa(*batch.nested)
        recorder.take("native")


def test_every_stream_has_its_own_list(recorder, default_kernels, batch, extension):
    def attend() -> int:
        with torch.no_grad():
            jagtile.varlen_attention(batch.q, batch.k, batch.v, batch.cu, batch.cu)
        launch = recorder.take()[-1]
        assert launch.stream == recorder.stream
        return launch.words[64 + 2]  # behind four maps and the offsets

    lists = []
    for stream in (0, 7):
        recorder.stream = stream
        connect(extension, recorder)
        assert len({attend() for _ in range(3)}) == 1
        lists.append(attend())
    assert lists[0] != lists[1]


@pytest.mark.parametrize("with_dlse", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
def test_operators_are_served_too(recorder, kernels, batch, is_causal, with_dlse):
    """As a compiled graph calls them, without grad."""
    kernels(KernelSpec("fwd", "bf16", 64, 64, is_causal), "persistent")
    kernels(KernelSpec("bwd", "bf16", 64, 64, is_causal), "keyblocks")
    given = (batch.q, batch.k, batch.v, batch.cu, batch.cu)
    options = (40, 40, is_causal, False, 0.125)
    dlse = torch.randn(4, 48) if with_dlse else None
    outputs, launches = [], []
    with torch.no_grad():
        for _ in range(2):  # by Python, which teaches; by the host
            out, lse = torch.ops.jagtile.differentiable_forward(*given, *options)
            found = recorder.take()
            grads = torch.ops.jagtile.backward(batch.dout, dlse, *given, out, lse, *options)
            outputs.append((out, lse, *grads))
            launches.append([each for each in (*found, *recorder.take()) if "build" not in each.kernel])
        assert {launch.by for launch in launches[0]} == {"python"}
        assert {launch.by for launch in launches[1]} == {"native"}
        for a, b in zip(*launches, strict=True):
            alike(a, b, list(zip(*outputs, strict=True)))
        for a, b in zip(*outputs, strict=True):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
        for expected in ("python", "native"):  # without an lse
            (out,) = torch.ops.jagtile.forward(*given, *options, False)
            assert out.shape == batch.q.shape
            assert [launch.by for launch in recorder.take()] == [expected]


def test_operators_of_operands_that_require_grad(recorder, default_kernels, batch):
    """Without a formula for autograd they stay Python's; with one, what is below it is served."""
    options = (None, None, False, False, 0.125)
    for expected in ("python", "native"):
        torch.ops.jagtile.forward(*batch.leaves, batch.cu, batch.cu, *options, False)
        recorder.take("python")
        out, _ = torch.ops.jagtile.differentiable_forward(*batch.leaves, batch.cu, batch.cu, *options)
        assert [launch.by for launch in recorder.take()] == [expected]
    out.backward(batch.dout)
    assert all(x.grad is not None for x in batch.leaves)
