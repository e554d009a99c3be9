"""The forward launcher: packs one parameter block and calls the kernel on torch's number of threads."""

from __future__ import annotations

import torch

from jagtile.runtime.artifact import Artifact
from jagtile.runtime.cpu.kernel import CpuKernel
from jagtile.runtime.cpu.params import BLOCK_BYTES
from jagtile.runtime.dropout import Dropout
from jagtile.runtime.layouts import Layout


class CpuForwardKernel(CpuKernel):
    """A loaded CPU forward (see ForwardKernel)."""

    def __init__(self, artifact: Artifact) -> None:
        super().__init__(artifact, BLOCK_BYTES)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor | None,
        scale: float,
        bottom_right: bool,
        dropout: Dropout | None = None,
        layout: Layout | None = None,
    ) -> None:
        """Compute at once (see ForwardKernel). ValueError for offsets that fall or leave the tensors."""
        block = self._pack(q, k, v, cu_seqlens_q, cu_seqlens_k, out, lse, scale, bottom_right, dropout)
        self._launch(block, q, k, cu_seqlens_q)
