"""Graphs, streams, threads, devices and processes on Hopper GPUs, and that the host never waits."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import jagtile
from jagtile.compat import flash_attn_varlen_func
from jagtile.generator.oracle import errors, reference, tolerance
from jagtile.generator.oracle_gradients import gradient_tolerance, reference_gradients
from jagtile.generator.workloads import JaggedBatch, Workload
from jagtile.runtime import fallback
from jagtile.runtime.trainable import why_no_backward

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HOPPER, reason="needs a CUDA GPU of compute capability 9.0"),
]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second CUDA GPU")

LENGTHS = [(600, 0, 0), (1, 198, 401), (200, 200, 200), (0, 599, 1)]  # of the same totals


def batch(lengths=(200, 31, 700), seed: int = 0, device: str = "cuda", heads_kv: int = 4) -> JaggedBatch:
    return Workload("w", tuple(lengths), tuple(lengths), 4, heads_kv, 64, 64).make(device, torch.bfloat16, seed)


def njt(values: torch.Tensor, offsets: torch.Tensor, **cached: int) -> torch.Tensor:
    """(B, H, j, D) of packed values (total, H, D)."""
    return torch.nested.nested_tensor_from_jagged(values, offsets, **cached).transpose(1, 2)


def assert_right(out: torch.Tensor, b: JaggedBatch, **kind: object) -> None:
    expected, _ = reference(*b[:5], **kind)
    assert errors(out, expected).rel <= tolerance(out.dtype)


@contextmanager
def no_waits() -> Iterator[None]:
    """Whatever makes the host wait for the device raises."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def in_threads(works: list[Callable[[], None]]) -> None:
    """Run them at the same time; the first failure is raised here."""
    failures: list[BaseException] = []
    start = threading.Barrier(len(works))

    def run(work: Callable[[], None]) -> None:
        try:
            start.wait(60)
            work()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    if failures:
        raise failures[0]


def assert_right_gradients(grads: Sequence[torch.Tensor], b: JaggedBatch, dout: torch.Tensor, **kind: object) -> None:
    """Of packed operands, whose forward was rounded too."""
    for grad, wanted in zip(grads, reference_gradients(*b[:5], dout, **kind), strict=True):
        assert errors(grad, wanted).rel <= 1.5 * gradient_tolerance(grad.dtype)


@pytest.fixture
def training() -> None:
    """Forward and backward kernels are loaded: nothing is built later."""
    if reason := why_no_backward(torch.bfloat16, 64, 64, torch.device("cuda")):
        pytest.skip(reason)
    jagtile.warmup(64, torch.bfloat16, is_causal=True, device="cuda", training=True)


# --- graphs


@pytest.mark.parametrize("wide", [False, True], ids=["int32", "int64"])
def test_a_graph_of_two_layers_follows_offsets_that_change_between_replays(wide):
    static = batch(LENGTHS[0])
    cu = static.cu_seqlens_q.long() if wide else static.cu_seqlens_q.clone()
    jagtile.warmup(64, torch.bfloat16, is_causal=True, device="cuda")

    def layers() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        first, lse = jagtile.varlen_attention(static.q, static.k, static.v, cu, cu, is_causal=True, return_lse=True)
        return first, lse, jagtile.varlen_attention(first, static.k, static.v, cu, cu, is_causal=True)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first, lse, second = layers()
    for seed, lengths in enumerate(LENGTHS * 2):
        fresh = batch(lengths, seed)
        for into, source in zip((*static[:3], cu), fresh[:4], strict=True):
            into.copy_(source)
        graph.replay()
        assert_right(first, fresh, is_causal=True)
        expected_lse = reference(*fresh[:5], is_causal=True)[1].float()
        torch.testing.assert_close(lse, expected_lse, rtol=1e-3, atol=2e-3)
        assert_right(second, fresh._replace(q=first), is_causal=True)


@pytest.mark.parametrize("enabled", [False, True], ids=["sdpa", "enabled"])
def test_a_graph_over_nested_tensors_follows_offsets_that_change_between_replays(enabled):
    static = batch(LENGTHS[0])
    offsets = static.cu_seqlens_q.long()
    query, key, value = (njt(x, offsets) for x in static[:3])
    jagtile.warmup(64, torch.bfloat16, device="cuda")
    attend = scaled_dot_product_attention if enabled else jagtile.sdpa
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), jagtile.enabled():
        with torch.cuda.graph(graph):
            out = attend(query, key, value)
        for seed, lengths in enumerate(LENGTHS):
            fresh = batch(lengths, seed)
            for into, source in zip((*static[:3], offsets), fresh[:4], strict=True):
                into.copy_(source)
            graph.replay()
            assert_right(out._values.transpose(0, 1), fresh)


def test_eager_calls_after_a_capture_are_right_too():
    """What was captured belongs to the graph: the next eager call makes a work list of its own."""
    b = batch()
    jagtile.warmup(64, torch.bfloat16, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = jagtile.varlen_attention(*b[:5])
    assert_right(jagtile.varlen_attention(*b[:5]), b)
    graph.replay()
    assert_right(captured, b)


@pytest.mark.usefixtures("training")
def test_a_captured_training_step_follows_offsets_that_change_between_replays():
    static, dout = batch(LENGTHS[0]), torch.randn(600, 4, 64, device="cuda", dtype=torch.bfloat16)
    leaves = [x.requires_grad_() for x in static[:3]]

    def step() -> tuple[torch.Tensor, ...]:
        out = jagtile.varlen_attention(*leaves, *static[3:5], is_causal=True)
        return torch.autograd.grad(out, leaves, dout)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # autograd's own threads start here, not during the capture
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        grads = step()
    for seed, lengths in enumerate(LENGTHS):
        fresh = batch(lengths, seed)
        with torch.no_grad():
            for into, source in zip(static[:5], fresh[:5], strict=True):
                into.copy_(source)
        graph.replay()
        assert_right_gradients(grads, fresh, dout, is_causal=True)


# --- streams


@pytest.mark.usefixtures("training")
def test_the_backward_pass_runs_on_the_stream_of_the_forward():
    b = batch([2000, 31, 1700])
    dout = torch.randn_like(b.q)
    spinning = torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(3):
            spinning @ spinning
        leaves = [x.clone().requires_grad_() for x in b[:3]]
        out = jagtile.varlen_attention(*leaves, *b[3:5], is_causal=True)
    grads = torch.autograd.grad(out, leaves, dout)
    torch.cuda.synchronize()
    assert_right_gradients(grads, b, dout, is_causal=True)


def test_calls_on_side_streams_come_after_what_the_stream_holds():
    b = batch([2000, 31, 1700])
    static = [torch.zeros_like(x) for x in b[:3]]
    spinning = torch.randn(4096, 4096, device="cuda")
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    outs = []
    for stream in streams:
        with torch.cuda.stream(stream):
            for _ in range(3):
                spinning @ spinning
            inputs = [x.clone() for x in static]
            for into, source in zip(inputs, b[:3], strict=True):
                into.copy_(source, non_blocking=True)
            outs.append(jagtile.varlen_attention(*inputs, *b[3:5], is_causal=True))
    torch.cuda.synchronize()
    for out in outs:
        assert_right(out, b, is_causal=True)


def test_one_offsets_tensor_may_be_used_on_several_streams_at_once():
    b = batch([300] * 40)
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    outs = []
    for _ in range(10):
        for stream in streams:
            with torch.cuda.stream(stream):
                outs.append(jagtile.varlen_attention(*b[:5]))
    torch.cuda.synchronize()
    assert_right(outs[0], b)
    assert all(torch.equal(out, outs[0]) for out in outs)


# --- no waiting


def test_packed_calls_never_wait_not_even_for_offsets_that_are_new():
    b, gqa = batch([200, 0, 31, 700]), batch([5, 900], heads_kv=1)
    fresh = [(b.cu_seqlens_q.clone(), b.cu_seqlens_k.long()) for _ in range(3)]

    def calls(cu_q: torch.Tensor, cu_k: torch.Tensor) -> None:
        jagtile.varlen_attention(*b[:3], cu_q, cu_k, is_causal=True, return_lse=True)
        jagtile.varlen_attention(*b[:3], cu_q, cu_k, is_causal=True, causal_alignment="bottom_right", scale=-0.3)
        jagtile.varlen_attention(*gqa)
        flash_attn_varlen_func(*b, causal=True)

    calls(*fresh[0])
    with no_waits():
        for offsets in fresh[1:]:
            calls(*offsets)


@pytest.mark.parametrize("cached", [{}, {"min_seqlen": 31, "max_seqlen": 700}], ids=["bare", "cached lengths"])
def test_nested_calls_never_wait(cached):
    b = batch()
    offsets = b.cu_seqlens_q.long()

    def calls() -> None:
        query, key, value = (njt(x, offsets, **cached) for x in b[:3])
        out = jagtile.sdpa(query, key, value, is_causal=True)
        other = njt(b.v, offsets.clone(), **cached)
        jagtile.sdpa(query, key, other)
        with jagtile.enabled():
            scaled_dot_product_attention(query, key, value) + out
        with torch.autocast("cuda", torch.float16):
            jagtile.sdpa(query, key, value)

    with torch.no_grad():
        calls()
        with no_waits():
            calls()


@pytest.mark.usefixtures("training")
@pytest.mark.parametrize("cached", [{}, {"min_seqlen": 31, "max_seqlen": 700}], ids=["bare", "cached lengths"])
def test_training_never_waits(cached):
    b = batch()
    packed = [x.clone().requires_grad_() for x in b[:3]]
    projected = torch.randn(931, 3 * 4 * 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def step() -> None:
        offsets = b.cu_seqlens_q.clone()
        out, lse = jagtile.varlen_attention(*packed, offsets, offsets, is_causal=True, return_lse=True)
        (out.float().sum() + lse.sum()).backward()
        x = torch.nested.nested_tensor_from_jagged(projected, offsets.long(), **cached)
        heads = (part.unflatten(-1, (4, 64)).transpose(1, 2) for part in x.chunk(3, -1))
        with jagtile.enabled():
            scaled_dot_product_attention(*heads, is_causal=True).values().sum().backward()

    step()
    with no_waits():
        step()
    assert projected.grad.isfinite().all()


@pytest.mark.filterwarnings("ignore::jagtile.JagtileWarning")
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_plain_operations_never_wait(p):
    b = batch([200, 0, 31])
    wide = [x.double().requires_grad_() for x in b[:3]]

    def step() -> None:
        jagtile.varlen_attention(*wide, *b[3:], is_causal=True, dropout_p=p).sum().backward()

    step()
    with no_waits():
        step()


@pytest.mark.skipif(not hasattr(torch.nn.attention, "activate_flash_attention_impl"), reason="torch has no registry")
def test_torchs_varlen_attention_never_waits_while_jagtile_is_activated():
    from torch.nn.attention.varlen import varlen_attn

    b = batch()
    torch.nn.attention.activate_flash_attention_impl("JAGTILE")
    try:
        with torch.no_grad():
            out = varlen_attn(*b)
            with no_waits():
                varlen_attn(*b)
    finally:
        torch.nn.attention.restore_flash_attention_impl()
    assert_right(out, b)


# --- threads


def test_threads_of_one_device_do_not_disturb_each_other():
    def work(seed: int) -> Callable[[], None]:
        def run() -> None:
            with torch.cuda.stream(torch.cuda.Stream()):
                for round_ in range(10):
                    b = batch([100 + seed, 7, 300 + round_], seed)
                    out = jagtile.varlen_attention(*b[:5], is_causal=seed % 2 == 0)
                    assert_right(out, b, is_causal=seed % 2 == 0)

        return run

    in_threads([work(seed) for seed in range(4)])


@pytest.mark.usefixtures("training")
def test_threads_may_train_at_the_same_time():
    def work(seed: int) -> Callable[[], None]:
        def run() -> None:
            for _ in range(5):
                b = batch([100 + seed, 7, 300], seed)
                leaves, dout = [x.requires_grad_() for x in b[:3]], torch.randn_like(b.q)
                out = jagtile.varlen_attention(*leaves, *b[3:5], is_causal=True)
                grads = torch.autograd.grad(out, leaves, dout)
                plain = JaggedBatch(*(x.detach() for x in leaves), *b[3:])
                assert_right_gradients(grads, plain, dout, is_causal=True)

        return run

    in_threads([work(seed) for seed in range(4)])


def test_threads_may_share_offsets_and_enable_at_the_same_time():
    b = batch()
    query, key, value = (njt(x, b.cu_seqlens_q.long()) for x in b[:3])

    def run() -> None:
        for _ in range(20):
            with torch.no_grad(), jagtile.enabled():
                out = scaled_dot_product_attention(query, key, value)
        assert_right(out._values.transpose(0, 1), b)

    in_threads([run] * 4)


# --- devices


@two_gpus
def test_tensors_of_another_than_the_current_device_are_served_there():
    torch.cuda.set_device(0)
    b = batch(device="cuda:1")
    out, lse = jagtile.varlen_attention(*b[:5], is_causal=True, return_lse=True)
    assert (out.device, lse.device, torch.cuda.current_device()) == (b.q.device, b.q.device, 0)
    assert_right(out, b, is_causal=True)
    query, key, value = (njt(x, b.cu_seqlens_q.long()) for x in b[:3])
    with torch.no_grad(), jagtile.enabled():
        nested = scaled_dot_product_attention(query, key, value)
    assert nested.device == b.q.device
    assert_right(nested._values.transpose(0, 1), b)


@two_gpus
def test_a_stream_of_another_device_is_that_devices_own():
    b = batch(device="cuda:1")
    with torch.cuda.device(1), torch.cuda.stream(torch.cuda.Stream(1)):
        out = jagtile.varlen_attention(*b[:5])
        torch.cuda.current_stream(1).synchronize()
    assert_right(out, b)


@two_gpus
@pytest.mark.usefixtures("training")
def test_gradients_of_another_than_the_current_device_are_made_there():
    torch.cuda.set_device(0)
    b = batch(device="cuda:1")
    leaves, dout = [x.clone().requires_grad_() for x in b[:3]], torch.randn_like(b.q)
    grads = torch.autograd.grad(jagtile.varlen_attention(*leaves, *b[3:5], is_causal=True), leaves, dout)
    assert {grad.device for grad in grads} == {b.q.device}
    assert_right_gradients(grads, b, dout, is_causal=True)


class Layer(torch.nn.Module):
    """Projections and attention over packed tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(256, 3 * 256, dtype=torch.bfloat16)

    def forward(self, x: torch.Tensor, cu: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).view(-1, 3, 4, 64).unbind(1)
        return jagtile.varlen_attention(q, k, v, cu, cu, is_causal=True)


@two_gpus
def test_replicas_on_two_devices_give_what_one_module_gives():
    layer = Layer().cuda(0)
    x = torch.randn(600, 256, device="cuda:0", dtype=torch.bfloat16)
    cu = torch.tensor([0, 250, 600], device="cuda:0")
    with torch.no_grad():
        expected = layer(x, cu)
        replicas = torch.nn.parallel.replicate(layer, [0, 1])
        inputs = [(x.to(f"cuda:{i}"), cu.to(f"cuda:{i}")) for i in range(2)]
        for _ in range(5):
            outs = torch.nn.parallel.parallel_apply(replicas, inputs, devices=[0, 1])
    for index, out in enumerate(outs):
        assert out.device == torch.device("cuda", index)
        torch.testing.assert_close(out.cpu(), expected.cpu(), rtol=0, atol=1e-2)


# --- processes

FORKS = """
import os, sys
import torch, jagtile
assert not torch.cuda.is_initialized(), "importing jagtile must leave CUDA alone"
if os.fork() == 0:
    x = torch.randn(600, 4, 64, device="cuda", dtype=torch.bfloat16)
    cu = torch.tensor([0, 250, 600], device="cuda")
    out = jagtile.varlen_attention(x, x, x, cu, cu)
    os._exit(0 if bool(out.isfinite().all()) else 3)
sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
"""


def test_a_process_forked_after_the_import_runs_kernels():
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", FORKS], env=paths, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# --- dropout, of which sm_90a has no kernels


def test_dropout_is_refused_by_name_and_torchs_own_takes_it_while_enabled():
    b = batch()
    with pytest.raises(
        jagtile.UnsupportedError, match=r"dropout_p is 0\.1; served: 0 \(no kernel for fwd_bf16_d64_drop"
    ):
        jagtile.varlen_attention(*b[:5], dropout_p=0.1)
    query, key, value = (njt(x, b.cu_seqlens_q.long()) for x in b[:3])
    with torch.no_grad(), jagtile.enabled(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert scaled_dot_product_attention(query, key, value, dropout_p=0.1).is_nested
    assert any("torch's own implementation serves this call: dropout_p" in str(w.message) for w in said)


def test_plain_operations_drop_the_same_on_every_device():
    b = batch([60, 0, 31])
    wide = [x.double() for x in b[:3]]
    state = torch.tensor([1 << 61, 17])
    call = (None, None, True, False, 0.125, False, 0.4)
    on_gpu = fallback.attention(*wide, *b[3:5], *call, state.cuda())[0]
    on_cpu = fallback.attention(*(x.cpu() for x in (*wide, *b[3:5])), *call, state)[0]
    torch.testing.assert_close(on_gpu.cpu(), on_cpu)


@pytest.mark.filterwarnings("ignore::jagtile.JagtileWarning")
def test_a_graph_that_drops_drops_anew_at_every_replay():
    b = batch([60, 31])
    wide = [x.double() for x in b[:3]]
    jagtile.varlen_attention(*wide, *b[3:], dropout_p=0.4)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = jagtile.varlen_attention(*wide, *b[3:], dropout_p=0.4)
    graph.replay()
    first = out.clone()
    graph.replay()
    assert not torch.equal(out, first)
