"""The backward launcher: as the forward's, with the gradients behind a forward's parameters."""

from __future__ import annotations

import torch

from jagtile.runtime.artifact import Artifact
from jagtile.runtime.cpu.kernel import CpuKernel
from jagtile.runtime.cpu.params import BLOCK_BYTES, GRADIENT_BLOCK_BYTES, GRADIENTS
from jagtile.runtime.dropout import Dropout
from jagtile.runtime.layouts import Layout


class CpuBackwardKernel(CpuKernel):
    """A loaded CPU backward (see BackwardKernel)."""

    def __init__(self, artifact: Artifact) -> None:
        super().__init__(artifact, GRADIENT_BLOCK_BYTES)

    def backward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        dout: torch.Tensor,
        dlse: torch.Tensor | None,
        dq: torch.Tensor,
        dk: torch.Tensor,
        dv: torch.Tensor,
        scale: float,
        bottom_right: bool,
        dropout: Dropout | None = None,
        layout: Layout | None = None,
    ) -> None:
        """Compute at once (see BackwardKernel). ValueError for offsets that fall or leave the tensors."""
        block = self._pack(q, k, v, cu_seqlens_q, cu_seqlens_k, out, lse, scale, bottom_right, dropout)
        if dlse is not None:
            dlse_address, (dlse_head, dlse_token) = dlse.data_ptr(), dlse.stride()
        else:
            dlse_address = dlse_head = dlse_token = 0
        GRADIENTS.pack_into(
            block.data,
            BLOCK_BYTES,
            dout.data_ptr(),
            dlse_address,
            dq.data_ptr(),
            dk.data_ptr(),
            dv.data_ptr(),
            *dout.stride()[:2],
            dlse_token,
            dlse_head,
            *dq.stride()[:2],
            *dk.stride()[:2],
            *dv.stride()[:2],
        )
        self._launch(block, q, k, cu_seqlens_q)
