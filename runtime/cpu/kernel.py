"""What both launchers share: a loaded function, its parameter block, what its status means."""

from __future__ import annotations

import ctypes
import threading

import torch

from jagtile.runtime.artifact import Artifact, ArtifactMeta
from jagtile.runtime.cpu.openmp import share_openmp
from jagtile.runtime.cpu.params import BAD_OFFSETS, BLOCK, NO_MEMORY
from jagtile.runtime.dropout import KEEP_ALL, Dropout
from jagtile.runtime.errors import CorruptArtifactError


class _Block(threading.local):
    """A thread's own parameter block: ctypes releases the GIL, so another thread may be filling its own."""

    def __init__(self, size: int) -> None:
        self.data = bytearray(size)
        self._pinned = (ctypes.c_char * size).from_buffer(self.data)
        self.address = ctypes.c_void_p(ctypes.addressof(self._pinned))


class CpuKernel:
    """A loaded kernel, whose parameter block of ``block_bytes`` begins with a forward's."""

    def __init__(self, artifact: Artifact, block_bytes: int) -> None:
        self.meta: ArtifactMeta = artifact.meta
        share_openmp()
        try:
            self._function = ctypes.CDLL(str(artifact.path))[self.meta.symbol]
        except (OSError, AttributeError) as error:
            raise CorruptArtifactError(
                f"{artifact.path} can't be loaded: {error}; delete it to have it rebuilt"
            ) from error
        self._function.argtypes = [ctypes.c_void_p]
        self._function.restype = ctypes.c_int32
        self._block = _Block(block_bytes)

    def _pack(
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
        dropout: Dropout | None,
    ) -> _Block:
        """Fill the forward's part of this thread's block."""
        total_q, heads, _ = q.shape
        total_k, heads_kv, _ = k.shape
        if lse is not None:
            lse_address, (lse_head, lse_token) = lse.data_ptr(), lse.stride()
        else:
            lse_address = lse_head = lse_token = 0
        kept, seed, offset = KEEP_ALL if dropout is None else dropout.on_host()
        block = self._block
        BLOCK.pack_into(
            block.data,
            0,
            q.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            out.data_ptr(),
            lse_address,
            cu_seqlens_q.data_ptr(),
            cu_seqlens_k.data_ptr(),
            *q.stride()[:2],
            *k.stride()[:2],
            *v.stride()[:2],
            *out.stride()[:2],
            lse_token,
            lse_head,
            total_q,
            total_k,
            cu_seqlens_q.shape[0] - 1,
            heads_kv,
            heads // heads_kv,
            (cu_seqlens_q.dtype == torch.int64) + 2 * (cu_seqlens_k.dtype == torch.int64),
            bottom_right,
            torch.get_num_threads(),
            scale,
            kept,
            seed,
            offset,
        )
        return block

    def _launch(self, block: _Block, q: torch.Tensor, k: torch.Tensor, cu_seqlens_q: torch.Tensor) -> None:
        status = self._function(block.address)
        if status == BAD_OFFSETS:
            raise ValueError(
                f"cu_seqlens_q and cu_seqlens_k must never fall, and stay within the {q.shape[0]} tokens of q and the "
                f"{k.shape[0]} of k"
            )
        if status == NO_MEMORY:
            raise MemoryError(f"no memory to work on {cu_seqlens_q.shape[0] - 1} sequences of {k.shape[0]} keys")
