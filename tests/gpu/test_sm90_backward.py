"""Hopper backward kernels against the float64 oracle: every head dim's default and the mechanisms of the templates."""

from __future__ import annotations

import random
from functools import cache

import gradient_checks
import pytest
import torch

from jagtile.generator.build import build_one
from jagtile.generator.spec import KernelSpec
from jagtile.generator.tile import Variant, config_from_dict, spaces_of
from jagtile.generator.workloads import Workload, random_workload
from jagtile.runtime import cuda
from jagtile.runtime.cuda import CudaBackwardKernel

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(120),
    pytest.mark.skipif(not HOPPER, reason="needs a CUDA GPU of compute capability 9.0"),
]

# (spec, what differs from the default config of its space)
WIDE = (
    ("bwd_bf16_d256", {}),
    ("bwd_bf16_d256_causal", {}),
    ("bwd_fp16_d256_causal", {"block_n": 64, "dout_stages": 2}),
    ("bwd_bf16_d192", {}),
    ("bwd_bf16_d192_causal", {"dout_stages": 1}),
    ("bwd_bf16_d192_dv128", {}),
    ("bwd_fp16_d192_dv128_causal", {}),
    ("bwd_bf16_d128_dv192_causal", {}),
    ("bwd_bf16_d136_dv200_causal", {"block_n": 32, "q_stages": 3}),
    ("bwd_fp16_d64_dv256", {}),
    ("bwd_bf16_d160_causal", {"block_n": 48}),
)
EDGES = (0, 1, 63, 64, 65, 0, 129, 300, 1, 127, 128, 577)


@cache
def loaded(name: str, change: tuple[tuple[str, int], ...] = ()) -> CudaBackwardKernel:
    spec = KernelSpec.parse(name)
    (space,) = spaces_of("sm_90a", spec)
    config = config_from_dict("sm_90a", {**space.default(spec).to_dict(), **dict(change)})
    kernel = cuda.load(build_one(Variant("sm_90a", spec, config)), torch.device("cuda", torch.cuda.current_device()))
    assert isinstance(kernel, CudaBackwardKernel)
    return kernel


def workloads(spec: KernelSpec, rng: random.Random) -> list[Workload]:
    kind = (spec.head_dim, spec.head_dim_v, spec.causal)
    few_keys = tuple((0, 1, 257)[i % 3] for i in range(40))
    return [
        Workload("edges", EDGES, EDGES, 4, 2, *kind),
        Workload("edges, cross", EDGES, EDGES[::-1], 2, 2, *kind),
        Workload("edges, cross", EDGES, EDGES[::-1], 2, 2, *kind, causal_alignment="bottom_right"),
        Workload("few queries", (5, 64, 130, 1), (2000, 700, 1500, 0), 4, 1, *kind, causal_alignment="bottom_right"),
        Workload("few keys", (300,) * 40, few_keys, 16, 4, *kind, causal_alignment="bottom_right"),
        *(
            random_workload(
                rng,
                head_dim=spec.head_dim,
                head_dim_v=spec.head_dim_v,
                is_causal=spec.causal,
                max_seqlen=700,
                max_batch=20,
            )
            for _ in range(3)
        ),
    ]


@pytest.mark.parametrize(("name", "change"), WIDE, ids=lambda x: x if isinstance(x, str) else "-".join(x) or "default")
def test_gradients_match_the_oracle(name: str, change: dict[str, int]) -> None:
    rng = random.Random(name)
    kernel = loaded(name, tuple(change.items()))
    for w in workloads(KernelSpec.parse(name), rng):
        if w.total_q and w.total_k:
            gradient_checks.assert_right(kernel, w, seed=rng.randrange(1 << 30), launches=3, device="cuda")


@pytest.mark.parametrize("name", ["bwd_bf16_d256_causal", "bwd_bf16_d192_dv128"])
@pytest.mark.parametrize("scale", [-0.1, 0.0, 1e-3])
def test_any_scale(name: str, scale: float) -> None:
    spec = KernelSpec.parse(name)
    w = Workload("edges", EDGES, EDGES, 4, 2, spec.head_dim, spec.head_dim_v, spec.causal)
    gradient_checks.assert_right(loaded(name), w, scale=scale, with_dlse=False, device="cuda")


@pytest.mark.parametrize("name", ["bwd_bf16_d256", "bwd_bf16_d256_causal", "bwd_bf16_d192_dv128_causal"])
def test_deterministic_gradients_are_right_and_bitwise_equal_over_runs(name: str) -> None:
    spec = KernelSpec.parse(name)
    lengths = ((3000, 70, 900, 0, 2000), (3000, 500, 100, 60, 2500))
    w = Workload("many key blocks", *lengths, 4, 2, spec.head_dim, spec.head_dim_v, spec.causal)
    b, dout = gradient_checks.batch(loaded(name), w, 9, "cuda")
    torch.use_deterministic_algorithms(True)
    try:
        gradient_checks.assert_right(loaded(name), w, device="cuda")
        first = gradient_checks.gradients(loaded(name), w, b, dout)
        for _ in range(10):
            for one, other in zip(first, gradient_checks.gradients(loaded(name), w, b, dout), strict=True):
                assert torch.equal(one, other)
    finally:
        torch.use_deterministic_algorithms(False)
