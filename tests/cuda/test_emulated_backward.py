"""The generated Hopper backward on the emulator: gradients against the float64 oracle, under several schedules."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest
import torch
from emulator import kernels
from emulator.backward_checks import assert_right, backward

from jagtile.generator.spaces.sm90_backward import Sm90BackwardConfig
from jagtile.generator.spec import KernelSpec
from jagtile.generator.tile import Variant
from jagtile.generator.workloads import CausalAlignment, Workload
from jagtile.runtime.artifact import Artifact

BULK = Sm90BackwardConfig(64, 128, 2, 1, "bulk", overlap=True)
RED = Sm90BackwardConfig(64, 128, 2, 1, "red", overlap=False)
# Every mechanism of the template once.
CASES: tuple[tuple[str, Sm90BackwardConfig], ...] = (
    ("bwd_bf16_d64", BULK),
    ("bwd_bf16_d128_causal", Sm90BackwardConfig(64, 128, 2, 1, "bulk", overlap=False)),
    ("bwd_fp16_d64_causal", Sm90BackwardConfig(64, 128, 2, 1, "red", overlap=True)),
    ("bwd_bf16_d72_dv40_causal", Sm90BackwardConfig(64, 128, 3, 1, "bulk", overlap=True)),
    ("bwd_bf16_d96", RED),
    ("bwd_bf16_d32_causal", Sm90BackwardConfig(64, 64, 2, 2, "bulk", overlap=False)),
    ("bwd_fp16_d24_dv64", Sm90BackwardConfig(64, 192, 2, 1, "bulk", overlap=True)),
)
LENGTHS = (0, 1, 63, 0, 65, 129)
QUERIES, KEYS = (5, 0, 130, 1, 64, 140), (150, 70, 0, 1, 20, 70)


@cache
def built(name: str, config: Sm90BackwardConfig) -> Artifact:
    return kernels.artifact(Variant("sm_90a", KernelSpec.parse(name), config))


def workload(
    name: str,
    queries: tuple[int, ...],
    keys: tuple[int, ...],
    heads: tuple[int, int] = (2, 1),
    alignment: CausalAlignment = "top_left",
) -> Workload:
    spec = KernelSpec.parse(name)
    return Workload("emulated", queries, keys, *heads, spec.head_dim, spec.head_dim_v, spec.causal, alignment)


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("name", "config"), CASES, ids=lambda x: x if isinstance(x, str) else x.name)
def test_gradients_match_the_oracle(name: str, config: Sm90BackwardConfig) -> None:
    assert_right(built(name, config), workload(name, LENGTHS, LENGTHS))


@pytest.mark.parametrize("alignment", ["top_left", "bottom_right"])
def test_queries_without_keys_and_keys_without_queries(alignment: CausalAlignment) -> None:
    name = "bwd_fp16_d64_causal"
    assert_right(built(*CASES[2]), workload(name, QUERIES, KEYS, (1, 1), alignment), with_dlse=False)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_a_scale_that_is_not_positive(scale: float) -> None:
    assert_right(built(*CASES[2]), workload("bwd_fp16_d64_causal", (65,), (65,), (1, 1)), scale=scale)


def test_each_launch_makes_the_list_ready_for_the_next() -> None:
    assert_right(built(*CASES[0]), workload("bwd_bf16_d64", (65, 3), (129, 3), (2, 2)), launches=3)


@pytest.mark.parametrize("case", [0, 1, 2])
def test_in_order_additions_come_out_the_same_whatever_the_schedule(deterministic: None, case: int) -> None:
    name, config = CASES[case]
    alignment: CausalAlignment = "bottom_right" if case else "top_left"
    w = workload(name, (5, 140, 70), (150, 140, 290), (1, 1), alignment)
    b = w.make("cpu", KernelSpec.parse(name).dtype, 3)
    dout = torch.randn(w.total_q, 1, w.head_dim_v).to(b.q.dtype)
    first, second = (backward(built(name, config), w, b, dout, processors=count) for count in (2, 3))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def test_gradients_in_order_match_the_oracle(deterministic: None) -> None:
    assert_right(built(*CASES[2]), workload("bwd_fp16_d64_causal", QUERIES, KEYS, (1, 1)))
