"""The scripts that measure many batches: what they draw, and what they conclude."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path
from types import ModuleType

import pytest
import torch

from jagtile.generator.spec import KernelSpec
from jagtile.runtime.problem import REGIMES, regime

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def random_batches() -> ModuleType:
    return script("random_batches")


@pytest.fixture(scope="module")
def borders() -> ModuleType:
    return script("borders")


def test_random_batches_are_many_kinds_within_bounds_and_always_the_same(random_batches):
    workloads = random_batches.batches(50, 0, "cuda")
    assert workloads == random_batches.batches(50, 0, "cuda")
    assert workloads[:7] == random_batches.batches(7, 0, "cuda")
    assert {w.name.split()[1] for w in workloads} == set(random_batches.KINDS)
    assert {w.num_heads // w.num_heads_kv for w in workloads} == {1, 4, 8}
    assert {(w.head_dim, w.is_causal) for w in workloads} == {(64, False), (64, True), (128, False), (128, True)}
    for w in workloads:
        most = random_batches.MOST_TOKENS["cuda"] + random_batches.LONGEST
        assert min(w.seqlens_q) >= 1
        assert w.total_q <= most
        assert w.num_heads <= 64


def test_one_slow_batch_is_enough_to_fail(random_batches):
    lowest, geometric, enough = random_batches.verdict([2.0, 0.5], floor=0.95, mean=0.9)
    assert (lowest, geometric) == pytest.approx((0.5, 1.0))
    assert not enough
    assert random_batches.verdict([2.0, 1.0], floor=0.95, mean=1.4)[2]
    assert not random_batches.verdict([1.2, 1.3], floor=0.95, mean=1.4)[2]


def test_mean_lengths_lie_on_both_sides_of_every_border(borders):
    lines = borders.borders(KernelSpec.parse("fwd_bf16_d64"), torch.device("cuda"))
    assert lines == (22, 128, 1024, 2048)
    assert borders.borders(KernelSpec.parse("fwd_fp32_d64"), torch.device("cpu")) == (18, 96, 1024)
    assert min(borders.means(16, 8192, lines)) == 16
    assert max(borders.means(16, 8192, lines)) == 8192
    assert max(borders.means(16, 100, lines)) <= 100
    assert min(borders.means(2, 100, lines)) == 2
    seen = []
    for mean in borders.means(16, 8192, lines):
        w = borders.batch_of(mean, 1 << 16, 16, 64, False)
        assert w.total_q == mean * w.batch
        assert abs(w.total_q - (1 << 16)) <= 2 * mean
        seen.append(regime(w.problem("bf16")))
    changes = [(a, b) for a, b in itertools.pairwise(seen) if a != b]
    assert changes == [("tiny", "short"), ("short", "medium"), ("medium", "long"), ("long", "huge")]
    assert set(seen) < set(REGIMES)
