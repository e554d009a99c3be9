"""Callers in several threads: of one kernel, of the first call, of replicas of one module, and with dropout."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable

import pytest
import torch
from njt_cases import assert_close, attention, qkv
from torch.nn.functional import scaled_dot_product_attention

import jagtile
from jagtile.generator.oracle import errors, reference, tolerance
from jagtile.generator.toolchain import find_cxx
from jagtile.generator.workloads import Workload
from jagtile.runtime import loader
from jagtile.runtime.routes import forget

try:
    find_cxx()
    NO_COMPILER = ""
except jagtile.CompilerNotFoundError as error:
    NO_COMPILER = str(error)

pytestmark = pytest.mark.skipif(bool(NO_COMPILER), reason=f"no C++ compiler: {NO_COMPILER}")


def in_threads(work: Callable[[int], None], count: int = 4) -> None:
    """work(0), work(1), ... at the same time; the first failure is raised here."""
    failures: list[BaseException] = []
    start = threading.Barrier(count)

    def run(index: int) -> None:
        try:
            start.wait(60)
            work(index)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    if failures:
        raise failures[0]


def test_calls_of_one_kind_and_of_several_do_not_disturb_each_other():
    def work(index: int) -> None:
        for round_ in range(5):
            w = Workload("w", (20 + index, 3), (31, 8 + round_), 4, 2, 16, 24, is_causal=index % 2 == 0)
            b = w.make("cpu", torch.float32, seed=index)
            out = jagtile.varlen_attention(*b[:5], is_causal=w.is_causal)
            assert errors(out, reference(*b[:5], is_causal=w.is_causal)[0]).rel <= tolerance(torch.float32)
            with jagtile.enabled():
                call = qkv((9, index, 4), dim=16, dim_v=24)
                assert_close(scaled_dot_product_attention(**call), attention(**call))

    in_threads(work)


def test_threads_that_make_the_first_call_together_load_one_kernel(monkeypatch):
    loads = []
    load = loader.load

    def counted(artifact, device):
        loads.append(artifact.meta.symbol)
        return load(artifact, device)

    monkeypatch.setattr(loader, "load", counted)
    forget()
    b = Workload("w", (5, 3), (5, 3), 2, 2, 16, 24).make("cpu", torch.float32)
    in_threads(lambda index: jagtile.varlen_attention(*b))
    assert len(loads) == 1


class Layer(torch.nn.Module):
    """A projection and attention over packed tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(8, 3 * 2 * 16)

    def forward(self, x: torch.Tensor, cu: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).view(-1, 3, 2, 16).unbind(1)
        return jagtile.varlen_attention(q, k, v, cu, cu, is_causal=True)


def test_replicas_that_train_at_the_same_time_give_the_gradients_of_the_whole_batch():
    """As DataParallel has it: a thread a replica, all with the same parameters."""
    layer = Layer()
    parts = [(torch.randn(30 + i, 8), torch.tensor([0, 7 + i, 30 + i])) for i in range(3)]
    replicas = [copy.copy(layer) for _ in parts]
    losses: dict[int, torch.Tensor] = {}

    def work(index: int) -> None:
        losses[index] = replicas[index](*parts[index]).square().sum()

    in_threads(work, len(parts))
    torch.stack([losses[i] for i in range(len(parts))]).sum().backward()
    found = [parameter.grad.clone() for parameter in layer.parameters()]
    layer.zero_grad()
    whole = torch.cat([x for x, _ in parts])
    begins = torch.tensor([0, 30, 61])
    cu = torch.cat([torch.zeros(1, dtype=torch.long), *(cu[1:] + b for (_, cu), b in zip(parts, begins, strict=True))])
    layer(whole, cu).square().sum().backward()
    for grad, parameter in zip(found, layer.parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-4, atol=1e-4)


def test_dropout_of_several_threads_takes_turns_at_the_generator():
    b = Workload("w", (40,), (40,), 2, 2, 16, 16).make("cpu", torch.float32)
    torch.manual_seed(3)
    alone = [jagtile.varlen_attention(*b, dropout_p=0.5) for _ in range(4)]
    found: dict[int, torch.Tensor] = {}
    torch.manual_seed(3)

    def work(index: int) -> None:
        found[index] = jagtile.varlen_attention(*b, dropout_p=0.5)

    in_threads(work)
    assert all(sum(torch.equal(out, one) for one in alone) == 1 for out in found.values())
    assert len({tuple(out.flatten()[:50].tolist()) for out in found.values()}) == 4
