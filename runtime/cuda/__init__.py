"""The sm_90a launcher: cubins through the CUDA driver."""

from __future__ import annotations

import torch

from jagtile.runtime.artifact import Artifact
from jagtile.runtime.cuda.backward import CudaBackwardKernel
from jagtile.runtime.cuda.forward import CudaForwardKernel
from jagtile.runtime.cuda.packed import CudaPackedKernel

CudaKernel = CudaForwardKernel | CudaPackedKernel | CudaBackwardKernel


def load(artifact: Artifact, device: torch.device) -> CudaKernel:
    """Load a cubin on a CUDA device, its attributes set. CudaDriverError says what the driver refused."""
    if artifact.meta.spec.startswith("bwd_"):
        return CudaBackwardKernel(artifact, device)
    if artifact.meta.config["algorithm"] == "packed":
        return CudaPackedKernel(artifact, device)
    return CudaForwardKernel(artifact, device)
