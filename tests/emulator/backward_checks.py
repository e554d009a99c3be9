"""Backward kernels on the emulator: the checks of tests/gradient_checks.py, each under a schedule of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import gradient_checks
import pytest
import torch

from emulator.driver import emulated
from emulator.schedules import next_seed
from jagtile.generator.oracle_gradients import Gradients
from jagtile.generator.workloads import JaggedBatch, Workload
from jagtile.runtime import cuda
from jagtile.runtime.artifact import Artifact
from jagtile.runtime.cuda import CudaBackwardKernel, CudaPackedBackwardKernel
from jagtile.runtime.kernel import BackwardKernel


@contextmanager
def loaded(artifact: Artifact, processors: int = 2) -> Iterator[BackwardKernel]:
    """The kernel, on an emulated device of so many processors."""
    with emulated(processors=processors, seed=next_seed()):
        kernel = cuda.load(artifact, torch.device("cuda", 0))
        assert isinstance(kernel, CudaBackwardKernel | CudaPackedBackwardKernel)
        yield kernel


def backward(
    artifact: Artifact,
    w: Workload,
    b: JaggedBatch,
    dout: torch.Tensor,
    dlse: torch.Tensor | None = None,
    *,
    scale: float = gradient_checks.SCALE,
    launches: int = 1,
    processors: int = 2,
) -> Gradients:
    """See ``gradient_checks.gradients``."""
    with loaded(artifact, processors) as kernel:
        return gradient_checks.gradients(kernel, w, b, dout, dlse, scale=scale, launches=launches)


def assert_right(
    artifact: Artifact,
    w: Workload,
    seed: int = 5,
    *,
    scale: float = gradient_checks.SCALE,
    with_dlse: bool = True,
    launches: int = 1,
) -> None:
    """See ``gradient_checks.assert_right``."""
    with loaded(artifact) as kernel:
        gradient_checks.assert_right(kernel, w, seed, scale=scale, with_dlse=with_dlse, launches=launches)


def poison_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is often zeros, which would hide that a sum is used before it is written."""

    def new_empty(like: torch.Tensor, size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((size,), float("nan"), dtype=dtype)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
