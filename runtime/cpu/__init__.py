"""The CPU launcher: shared objects through ctypes."""

from __future__ import annotations

from jagtile.runtime.artifact import Artifact
from jagtile.runtime.cpu.backward import CpuBackwardKernel
from jagtile.runtime.cpu.forward import CpuForwardKernel


def load(artifact: Artifact) -> CpuForwardKernel | CpuBackwardKernel:
    """Load a shared object. CorruptArtifactError says what the dynamic linker refused."""
    return CpuBackwardKernel(artifact) if artifact.meta.spec.startswith("bwd_") else CpuForwardKernel(artifact)
