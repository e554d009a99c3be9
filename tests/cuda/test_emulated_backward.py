"""The generated Hopper backward on the emulator: gradients against the float64 oracle, under several schedules."""

from __future__ import annotations

import itertools
from functools import cache

import pytest
import torch
from emulator import kernels
from emulator.driver import emulated

from jagtile.generator.oracle import errors, reference
from jagtile.generator.oracle_gradients import Gradients, gradient_tolerance, reference_gradients
from jagtile.generator.spaces.sm90_backward import Sm90BackwardConfig
from jagtile.generator.spec import KernelSpec
from jagtile.generator.tile import Variant
from jagtile.generator.workloads import JaggedBatch, Workload
from jagtile.runtime import cuda
from jagtile.runtime.artifact import Artifact

# Every mechanism of the template once.
CASES: tuple[tuple[str, Sm90BackwardConfig], ...] = (
    ("bwd_bf16_d64", Sm90BackwardConfig(64, 128, 2, 1, "bulk", overlap=True)),
    ("bwd_bf16_d128_causal", Sm90BackwardConfig(64, 128, 2, 1, "bulk", overlap=False)),
    ("bwd_fp16_d64_causal", Sm90BackwardConfig(64, 128, 2, 1, "red", overlap=True)),
    ("bwd_bf16_d72_dv40_causal", Sm90BackwardConfig(64, 128, 3, 1, "bulk", overlap=True)),
    ("bwd_bf16_d96", Sm90BackwardConfig(64, 128, 2, 1, "red", overlap=False)),
    ("bwd_bf16_d32_causal", Sm90BackwardConfig(64, 64, 2, 2, "bulk", overlap=False)),
    ("bwd_fp16_d24_dv64", Sm90BackwardConfig(64, 192, 2, 1, "bulk", overlap=True)),
)
LENGTHS = (0, 1, 63, 64, 65, 0, 129, 200)
_seeds = itertools.count(1)  # no two runs share a schedule


@cache
def built(name: str, config: Sm90BackwardConfig) -> Artifact:
    return kernels.artifact(Variant("sm_90a", KernelSpec.parse(name), config))


def in_nan(tensor: torch.Tensor) -> torch.Tensor:
    """The same values inside a larger NaN-filled buffer: strided rows and heads, NaN on every side."""
    tokens, heads, dim = tensor.shape
    storage = torch.full((tokens + 300, heads + 1, dim + 8), float("nan"), dtype=tensor.dtype)
    return storage[150 : 150 + tokens, :heads, :dim].copy_(tensor)


def check(
    artifact: Artifact, w: Workload, scale: float = 0.1, launches: int = 1, with_dlse: bool = True, seed: int = 1
) -> None:
    """Gradients of the last of some launches against the oracle's; NaN around every tensor is neither read nor written."""
    spec = artifact.meta.spec
    b: JaggedBatch = w.make("cpu", spec.split("_")[1], seed)  # type: ignore[arg-type]
    kind = {"is_causal": w.is_causal, "causal_alignment": w.causal_alignment, "scale": scale}
    out, lse = reference(*b[:5], **kind)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    dout = torch.randn(out.shape, generator=generator).to(b.q.dtype)
    dlse = torch.randn(lse.shape, generator=generator) if with_dlse else None
    expected = reference_gradients(*b[:5], dout, dlse, **kind)  # type: ignore[arg-type]
    q, k, v, out, dout = (in_nan(x) for x in (b.q, b.k, b.v, out.to(b.q.dtype), dout))
    with emulated(processors=2, seed=1000 * next(_seeds)):
        kernel = cuda.load(artifact, torch.device("cuda", 0))
        for _ in range(launches):
            grads = Gradients(*(in_nan(torch.full_like(x, float("nan"))) for x in b[:3]))
            kernel.backward(
                *(q, k, v, b.cu_seqlens_q, b.cu_seqlens_k, out, lse.float(), dout, dlse, *grads),
                scale,
                w.causal_alignment == "bottom_right",
            )
    for name, grad, want in zip(Gradients._fields, grads, expected, strict=True):
        around = grad._base
        assert around is not None
        assert int(around.isnan().sum()) == around.numel() - grad.numel(), f"NaN in {name}, or a write outside of it"
        assert errors(grad, want).rel <= gradient_tolerance(grad.dtype), name


@pytest.mark.parametrize(("name", "config"), CASES, ids=lambda x: x if isinstance(x, str) else x.name)
def test_gradients_match_the_oracle(name: str, config: Sm90BackwardConfig) -> None:
    spec = KernelSpec.parse(name)
    w = Workload("edges", LENGTHS, LENGTHS, 2, 1, spec.head_dim, spec.head_dim_v, spec.causal)
    check(built(name, config), w)
