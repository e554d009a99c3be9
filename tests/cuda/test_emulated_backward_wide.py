"""The generated Hopper backward of wide heads on the emulator: gradients against the float64 oracle, any schedule."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import backward_checks
import pytest
import torch
from emulator import kernels
from emulator.driver import emulated

from jagtile.generator.spaces.sm90_backward_wide import Sm90BackwardWideConfig, Sm90BackwardWideSpace
from jagtile.generator.spec import KernelSpec
from jagtile.generator.tile import Variant
from jagtile.generator.workloads import Workload
from jagtile.runtime import cuda
from jagtile.runtime.artifact import Artifact
from jagtile.runtime.cuda import CudaBackwardKernel

# Every mechanism of the template once: (spec, what differs from its default config).
CASES: tuple[tuple[str, dict[str, int]], ...] = (
    ("bwd_bf16_d256", {}),
    ("bwd_bf16_d192_causal", {"dout_stages": 1}),
    ("bwd_fp16_d192_dv128_causal", {}),
    ("bwd_bf16_d136_dv200_causal", {"block_n": 32, "q_stages": 3}),  # panels that are not full, pieces of 8 columns
)
EDGES = (0, 1, 63, 64, 65, 0, 129)
_seeds = itertools.count(1)  # no two runs share a schedule


@cache
def built(name: str, change: tuple[tuple[str, int], ...] = ()) -> Artifact:
    spec = KernelSpec.parse(name)
    base = Sm90BackwardWideSpace().default(spec).to_dict()
    base.pop("algorithm")
    return kernels.artifact(Variant("sm_90a", spec, Sm90BackwardWideConfig(**{**base, **dict(change)})))


@contextmanager
def loaded(artifact: Artifact, processors: int = 2) -> Iterator[CudaBackwardKernel]:
    with emulated(processors=processors, seed=1000 * next(_seeds)):
        kernel = cuda.load(artifact, torch.device("cuda", 0))
        assert isinstance(kernel, CudaBackwardKernel)
        yield kernel


@pytest.mark.parametrize(("name", "change"), CASES, ids=lambda x: x if isinstance(x, str) else "-".join(x) or "default")
def test_gradients_match_the_oracle(name: str, change: dict[str, int]) -> None:
    spec = KernelSpec.parse(name)
    kind = (spec.head_dim, spec.head_dim_v, spec.causal)
    with loaded(built(name, tuple(change.items()))) as kernel:
        backward_checks.assert_right(kernel, Workload("edges", EDGES, EDGES, 1, 1, *kind), launches=2)
        # Queries without keys, keys without queries, more of the ones than of the others; heads that share K and V.
        lengths = ((130, 0, 5, 64, 70), (100, 70, 140, 0, 81))
        backward_checks.assert_right(kernel, Workload("cross", *lengths, 2, 1, *kind))
        if spec.causal:
            w = Workload("cross", *lengths, 2, 1, *kind, causal_alignment="bottom_right")
            backward_checks.assert_right(kernel, w)


@pytest.mark.parametrize("scale", [-0.1, 0.0])
def test_any_scale(scale: float) -> None:
    w = Workload("edges", EDGES, EDGES, 1, 1, 192, 128, True)
    with loaded(built("bwd_fp16_d192_dv128_causal")) as kernel:
        backward_checks.assert_right(kernel, w, scale=scale, with_dlse=False)


@pytest.mark.parametrize("name", ["bwd_bf16_d256", "bwd_fp16_d192_dv128_causal"])
def test_deterministic_gradients_are_bitwise_equal_under_any_schedule(name: str) -> None:
    spec = KernelSpec.parse(name)
    w = Workload("several key blocks", (130, 70, 66), (200, 0, 230), 2, 1, spec.head_dim, spec.head_dim_v, spec.causal)
    found = []
    torch.use_deterministic_algorithms(True)
    try:
        for processors in (2, 5):
            with loaded(built(name), processors) as kernel:
                b, dout = backward_checks.batch(kernel, w, 9, "cpu")
                found.append(backward_checks.gradients(kernel, w, b, dout))
        with loaded(built(name)) as kernel:
            backward_checks.assert_right(kernel, w)
    finally:
        torch.use_deterministic_algorithms(False)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
