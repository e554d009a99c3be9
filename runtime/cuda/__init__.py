"""The sm_90a launcher: cubins through the CUDA driver."""

from __future__ import annotations

import torch

from jagtile.runtime.artifact import Artifact
from jagtile.runtime.cuda.backward import CudaBackwardKernel
from jagtile.runtime.cuda.forward import CudaForwardKernel


def load(artifact: Artifact, device: torch.device) -> CudaForwardKernel | CudaBackwardKernel:
    """Load a cubin on a CUDA device, its attributes set. CudaDriverError says what the driver refused."""
    kind = CudaBackwardKernel if artifact.meta.spec.startswith("bwd_") else CudaForwardKernel
    return kind(artifact, device)
