"""The launcher of the forward for short sequences: one parameter block, one launch, no work list. Never waits."""

from __future__ import annotations

import torch

from jagtile.runtime.artifact import Artifact, ArtifactMeta
from jagtile.runtime.cuda import driver, params
from jagtile.runtime.cuda.block import ParameterBlock
from jagtile.runtime.cuda.operands import fill_maps, forward_copies
from jagtile.runtime.cuda.tensor_map import MapCache
from jagtile.runtime.cuda.work_list import MAX_TILES, MAX_TOKENS
from jagtile.runtime.dropout import Dropout
from jagtile.runtime.errors import UnsupportedError

_LOG2_E = 1.4426950408889634
_SMALLEST_SCALE = 1e-30


class CudaPackedKernel:
    """A loaded sm_90a forward whose tiles cross the borders of sequences (see ForwardKernel).

    Rows of no sequence are written too: zeros, lse -inf.
    """

    def __init__(self, artifact: Artifact, device: torch.device) -> None:
        self.meta: ArtifactMeta = artifact.meta
        launch = self.meta.launch
        self._device = device.index if device.index is not None else torch.cuda.current_device()
        self._block_m, self._block_n = launch["block_m"], launch["block_n"]
        self._threads, self._smem = launch["num_threads"], launch["smem_bytes"]
        self._causal = launch["causal"]
        self._slots = torch.cuda.get_device_properties(self._device).multi_processor_count * launch["ctas_per_sm"]
        with torch.cuda.device(self._device):
            driver.bind_primary_context(self._device)
            module = driver.load_module(artifact.path.read_bytes())
            self._kernel = driver.function(module, self.meta.symbol, self._smem)
        self._launch = driver.Launcher(self._device)
        rows = (self._block_m, self._block_n, self._block_n, self._block_m)
        self._maps = MapCache(self.meta.spec.split("_")[1], rows)
        self._block = ParameterBlock(params.BLOCK_BYTES, len(params.MAPS))

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
    ) -> None:
        """Launch on the current stream of the tensors' device (see ForwardKernel)."""
        total_q, heads, _ = q.shape
        total_k, heads_kv, _ = v.shape
        batch = cu_seqlens_q.shape[0] - 1
        if total_q == 0 or batch == 0:
            return
        if torch._C._cuda_getDevice() != self._device:
            with torch.cuda.device(self._device):
                self.forward(q, k, v, cu_seqlens_q, cu_seqlens_k, out, lse, scale, bottom_right)
            return
        if scale < 0.0:  # the running maximum assumes a positive scale
            q, scale = -q, -scale
        block = self._block
        if not fill_maps(block, self._maps, q, k, v, out):
            forward_copies(self.forward, q, k, v, cu_seqlens_q, cu_seqlens_k, out, lse, scale, bottom_right)
            return

        if max(total_q, total_k) > MAX_TOKENS:
            raise UnsupportedError(f"{total_q} queries and {total_k} keys; served: up to {MAX_TOKENS} tokens each")
        pairs = -(-total_q // self._block_m) * heads
        if pairs > MAX_TILES:
            raise UnsupportedError(f"{pairs} tiles of queries and heads; served: {MAX_TILES}")
        params.SCALARS.pack_into(
            block.data,
            params.SCALARS_OFFSET,
            cu_seqlens_q.data_ptr(),
            cu_seqlens_k.data_ptr(),
            0,  # work_list
            lse.data_ptr() if lse is not None else 0,
            batch,
            heads,
            heads // heads_kv,
            total_q,
            0,  # max_items
            (cu_seqlens_q.dtype == torch.int64) + 2 * (cu_seqlens_k.dtype == torch.int64),
            bottom_right,
            self._block_m,
            self._block_n,
            self._causal,
            max(scale, _SMALLEST_SCALE) * _LOG2_E,
        )
        stream: int = torch._C._cuda_getCurrentRawStream(self._device)
        self._launch(self._kernel, min(self._slots, pairs), self._threads, self._smem, stream, block.arguments)
