"""The compiled host on Hopper GPUs: it gives what Python gives, and leaves to Python what it must."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import jagtile
from jagtile.generator.oracle import errors, reference, tolerance
from jagtile.generator.oracle_gradients import gradient_tolerance, reference_gradients
from jagtile.generator.workloads import JaggedBatch, Workload
from jagtile.runtime import native
from jagtile.runtime.settings import settings

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HOPPER, reason="needs a CUDA GPU of compute capability 9.0"),
]

BATCHES = {
    "tiny": (3, 1, 0, 14, 9, 2) * 4,
    "short": (1, 70, 30, 12, 50, 8, 40, 32),
    "medium": (200, 31, 700),
}


@pytest.fixture(autouse=True, scope="module")
def host() -> None:
    """It is there before the first call."""
    with settings.override(native_host="wait"):
        native.start()
    assert native.serve is not None
    first = of_lengths(BATCHES["short"])
    offsets = first.cu_seqlens_q.long()
    nested = torch.nested.nested_tensor_from_jagged(first.q, offsets).transpose(1, 2)
    jagtile.sdpa(nested, nested, nested)  # compares nested tensors with torch's constructor's
    assert native.serve_nested not in (None, native._first_nested, native._leave_to_python)


@pytest.fixture(params=BATCHES)
def batch(request: pytest.FixtureRequest) -> JaggedBatch:
    return of_lengths(BATCHES[request.param])


def of_lengths(lengths: tuple[int, ...], heads_kv: int = 2, dim: int = 64) -> JaggedBatch:
    return Workload("w", lengths, lengths, 4, heads_kv, dim, dim).make("cuda", torch.bfloat16, 0)


def without_host() -> object:
    return mock.patch.multiple(native, serve=None, serve_nested=None)


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """How many calls the host served, and how many it left to Python."""
    count = {"native": 0, "python": 0}

    def counting(serve: Callable[..., object]) -> Callable[..., object]:
        def counted(*arguments: object) -> object:
            served = serve(*arguments)
            count["python" if served is None or served is False else "native"] += 1
            return served

        return counted

    with mock.patch.multiple(native, serve=counting(native.serve), serve_nested=counting(native.serve_nested)):
        yield count


Train = Callable[[], list[torch.Tensor]]


def packed(b: JaggedBatch, **kind: object) -> Train:
    """Makes out, lse and gradients."""
    leaves = [x.detach().requires_grad_() for x in b[:3]]

    def train() -> list[torch.Tensor]:
        out, lse = jagtile.varlen_attention(*leaves, *b[3:5], return_lse=True, **kind)
        return [out, lse, *torch.autograd.grad([out, lse], leaves, [out.detach().cos(), lse.detach().sin()])]

    return train


def nested(b: JaggedBatch, is_causal: bool = False) -> Train:
    """Makes the values of the output and of the gradients."""
    offsets = b.cu_seqlens_q.long()
    leaves = [
        torch.nested.nested_tensor_from_jagged(x, offsets).transpose(1, 2).detach().requires_grad_() for x in b[:3]
    ]

    def train() -> list[torch.Tensor]:
        with jagtile.enabled():
            out = scaled_dot_product_attention(*leaves, is_causal=is_causal, enable_gqa=True)
        return [x._values for x in (out, *torch.autograd.grad(out, leaves, out.detach() * 0.5))]

    return train


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("trains", [packed, nested])
def test_it_gives_what_python_gives(batch, trains, is_causal):
    train = trains(batch, is_causal=is_causal)
    torch.use_deterministic_algorithms(True)  # gradients are added up in a fixed order
    try:
        with without_host():
            expected = train()
        for _ in range(2):
            train()
        with counted() as count:
            found = train()
    finally:
        torch.use_deterministic_algorithms(False)
    assert count == {"native": 1, "python": 0}
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one, other)


def test_it_is_right(batch):
    train = packed(batch)
    for _ in range(3):
        out, lse, *grads = train()
    expected, _ = reference(*batch[:5])
    assert errors(out, expected).rel <= tolerance(out.dtype)
    wanted = reference_gradients(*batch[:5], out.cos(), lse.sin())
    for grad, want in zip(grads, wanted, strict=True):
        assert errors(grad, want).rel <= gradient_tolerance(grad.dtype)


def test_the_host_never_waits_for_the_device(batch):
    train = packed(batch)
    for _ in range(2):
        train()
        with torch.no_grad():
            jagtile.varlen_attention(*batch[:5])
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        train()
        with torch.no_grad():
            jagtile.varlen_attention(*batch[:5])
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_a_captured_call_sees_offsets_that_change(batch):
    def attend() -> torch.Tensor:
        with torch.no_grad():
            return jagtile.varlen_attention(*batch[:5])

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            attend()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend()
    total = int(batch.cu_seqlens_q[-1])
    for offsets in (batch.cu_seqlens_q, batch.cu_seqlens_k):
        offsets[1:-1] = torch.linspace(1, total - 1, len(offsets) - 2).to(offsets)
    graph.replay()
    expected, _ = reference(*batch[:5])
    assert errors(out, expected).rel <= tolerance(out.dtype)


def test_streams_have_lists_of_their_own(batch):
    found, train = [], packed(batch)
    for stream in (torch.cuda.Stream(), torch.cuda.Stream(), torch.cuda.current_stream()):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                found.append(train())
    torch.cuda.synchronize()
    for outputs in found[1:]:
        assert torch.equal(outputs[0], found[0][0])


def test_offsets_that_change_in_place_get_a_new_list():
    b = of_lengths((600, 100, 300))
    for _ in range(3):
        jagtile.varlen_attention(*b[:5])
    for offsets in (b.cu_seqlens_q, b.cu_seqlens_k):
        offsets[1:3] = torch.tensor([10, 900]).to(offsets)
    for _ in range(2):
        out = jagtile.varlen_attention(*b[:5])
        expected, _ = reference(*b[:5])
        assert errors(out, expected).rel <= tolerance(out.dtype)


def test_nothing_is_left_behind(batch):
    train = packed(batch)
    for _ in range(3):
        train()
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(20):
        train()
    gc.collect()
    assert torch.cuda.memory_allocated() == before
