"""The sm_90a launcher: cubins through the CUDA driver."""

from __future__ import annotations

import torch

from jagtile.runtime import native
from jagtile.runtime.artifact import Artifact
from jagtile.runtime.cuda.backward import CudaBackwardKernel
from jagtile.runtime.cuda.forward import CudaForwardKernel
from jagtile.runtime.cuda.packed import CudaPackedKernel
from jagtile.runtime.cuda.packed_backward import CudaPackedBackwardKernel

CudaKernel = CudaForwardKernel | CudaPackedKernel | CudaBackwardKernel | CudaPackedBackwardKernel


def load(artifact: Artifact, device: torch.device) -> CudaKernel:
    """Load a cubin on a CUDA device, its attributes set. CudaDriverError says what the driver refused."""
    native.start()
    algorithm = artifact.meta.config["algorithm"]
    if artifact.meta.spec.startswith("bwd_"):
        return (CudaPackedBackwardKernel if algorithm == "packedrows" else CudaBackwardKernel)(artifact, device)
    return (CudaPackedKernel if algorithm == "packed" else CudaForwardKernel)(artifact, device)
