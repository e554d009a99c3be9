"""Kernels of a backward may start while the one before runs: each waits before it touches memory, on the emulator."""

from __future__ import annotations

import gradient_checks
import pytest
import torch
from emulator import kernels
from emulator.backward_checks import loaded
from emulator.driver import EmulatorError, Machine, emulated
from emulator.kernels import Snippet
from msgspec.structs import replace

from jagtile.generator.tile import Variant
from jagtile.generator.workloads import Workload
from jagtile.runtime import cuda
from jagtile.runtime.cuda import driver

FUSED = "bwd_bf16_d32/keyblocks_m64_n64_s2_c1_dbulk_o0_k1_hnone_l1_e0_f1"
TAIL = f"{FUSED}_y1"
APART = "bwd_bf16_d32_causal/keyblocks_m64_n64_s2_c1_dred_o0_k1_hnone_l0_e0"
WIDE = "bwd_bf16_d136/wide_n32_q2_o1_d0_ared"
WIDE_FUSED = "bwd_bf16_d136/wide_n32_q2_o1_d0_abulk_f1"
PACKED = "bwd_bf16_d64/packedrows_n32_s1_c1"
PREPARE, FINISH = "jagtile_backward_prepare", "jagtile_backward_finish"
WAIT = "  await_previous_kernels();\n"
# Kernels by what follows their wait.
PREPARES = {
    FUSED: "  begin_tasks<",
    TAIL: "  begin_tasks<",
    APART: "  prepare_rows<",
    WIDE: "  prepare_rows<",
    WIDE_FUSED: "  begin_tasks<",
    PACKED: "  const TokenRows rows = token_rows(p);\n",
}
FINISHES = dict.fromkeys((APART, WIDE), "  finish_rows<")
ATTENTIONS = dict.fromkeys(PREPARES, "  if (threadIdx.x == 0) {\n") | {PACKED: "  __syncthreads();\n"}
ALL = [(name, behind) for each in (PREPARES, FINISHES, ATTENTIONS) for name, behind in each.items()]


def workload(variant: Variant) -> Workload:
    spec = variant.spec
    return Workload("some", (70, 0, 20), (70, 5, 90), 2, 1, spec.head_dim, spec.head_dim_v, spec.causal)


@pytest.mark.parametrize("name", PREPARES)
def test_every_kernel_but_those_that_build_lists_is_dependent(name: str) -> None:
    variant = Variant.parse(f"sm_90a/{name}")
    names = [PREPARE, variant.symbol, *[FINISH] * (name in FINISHES)]
    with emulated(processors=2) as machine:
        kernel = cuda.load(kernels.artifact(variant), torch.device("cuda", 0))
        gradient_checks.assert_right(kernel, workload(variant), launches=2)
        assert launched(machine)[-len(names) :] == [(each, True) for each in names]
        others = [(each, dependent) for each, dependent in launched(machine) if each not in names]
    assert len(others) == (name != PACKED)
    assert all("work_list" in each and not dependent for each, dependent in others)


def launched(machine: Machine) -> list[tuple[str, bool]]:
    return [(name, dependent) for (name, *_), dependent in zip(machine.launches, machine.dependent, strict=True)]


@pytest.mark.parametrize(("name", "behind"), ALL)
def test_a_kernel_that_does_not_wait_is_found(name: str, behind: str) -> None:
    variant = Variant.parse(f"sm_90a/{name}")
    artifact = kernels.artifact(variant, kernels.substitution(WAIT + behind, behind))
    with loaded(artifact) as kernel, pytest.raises(EmulatorError, match=r"without griddepcontrol\.wait"):
        gradient_checks.assert_right(kernel, workload(variant))


@pytest.mark.parametrize("name", [FUSED, PACKED])
@pytest.mark.parametrize("of_old", ["kernel", "driver"])
def test_what_is_of_old_is_launched_one_after_the_other(
    name: str, of_old: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    variant = Variant.parse(f"sm_90a/{name}")
    artifact = kernels.artifact(variant)
    if of_old == "kernel":  # its launch facts don't say, and it does not wait
        facts = {key: value for key, value in artifact.meta.launch.items() if key != "dependent"}
        artifact = replace(artifact, meta=replace(artifact.meta, launch=facts))
    with emulated(processors=2) as machine:
        if of_old == "driver":
            driver.bindings().cuDriverGetVersion = lambda: (driver.bindings().CUresult.CUDA_SUCCESS, 12020)
        kernel = cuda.load(artifact, torch.device("cuda", 0))
        gradient_checks.assert_right(kernel, workload(variant))
    assert machine.dependent
    assert not any(machine.dependent)


# --- the emulator

SNIPPETS = """
#include "cuda/include/dependent_launch.cuh"

extern "C" __global__ void waits(float* out, int waiting, int from) {
  if (threadIdx.x < waiting) await_previous_kernels();
  if (threadIdx.x >= from) out[threadIdx.x] = 1.0f;
}
"""


@pytest.mark.parametrize(
    ("waiting", "begin", "dependent", "report"),
    [
        (64, 0, True, None),
        (0, 0, False, None),
        (63, 0, True, "touches global memory, without"),
        (0, 64, True, "ends, without"),
        (63, 64, True, "ends, without"),
    ],
)
def test_every_thread_of_a_dependent_launch_has_to_wait(
    waiting: int, begin: int, dependent: bool, report: str | None
) -> None:
    out = torch.zeros(64)
    arguments = ("waits", 1, 64, out, waiting, begin)
    if report is None:
        Snippet(SNIPPETS)(*arguments, dependent=dependent)
        assert out.sum() == 64 - begin
    else:
        with pytest.raises(EmulatorError, match=report):
            Snippet(SNIPPETS)(*arguments, dependent=dependent)
