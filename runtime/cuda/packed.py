"""The launcher of the forward for short sequences: one parameter block, one launch, no work list. Never waits."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import torch

from jagtile.runtime.artifact import Artifact, ArtifactMeta
from jagtile.runtime.cuda import driver, params, work_list
from jagtile.runtime.cuda.block import ParameterBlock, fill, map_addresses
from jagtile.runtime.cuda.operands import find_maps, forward_copies
from jagtile.runtime.cuda.plans import Plans, forward_layout
from jagtile.runtime.cuda.recipe import Recipe, map_words, pointer_words
from jagtile.runtime.cuda.tensor_map import ALIGNMENT, MapCache, address_comes_first
from jagtile.runtime.dropout import Dropout
from jagtile.runtime.errors import UnsupportedError
from jagtile.runtime.layouts import Layout

_LOG2_E = 1.4426950408889634
_SMALLEST_SCALE = 1e-30


class _Plan(NamedTuple):
    """What follows from a call's shapes, strides and options (see ``plans.Plan``)."""

    block: bytes
    movable: bool
    grid: int


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
        self._plans: Plans[_Plan] = Plans()
        self._block = ParameterBlock(params.BLOCK_BYTES, map_addresses(len(params.MAPS)))

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
        """Launch on the current stream of the tensors' device (see ForwardKernel)."""
        shape, offsets_shape = q.shape, cu_seqlens_q.shape
        if shape[0] == 0 or offsets_shape[0] == 1:
            return
        if torch._C._cuda_getDevice() != self._device:
            with torch.cuda.device(self._device):
                self.forward(q, k, v, cu_seqlens_q, cu_seqlens_k, out, lse, scale, bottom_right)
            return
        if scale < 0.0:  # the running maximum assumes a positive scale
            q, scale, layout = -q, -scale, None
        call = (layout or forward_layout(q, k, v, cu_seqlens_q, cu_seqlens_k, out), scale, bottom_right)
        addresses = (q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr())
        plan = self._plans.get(call)
        if plan is None or (addresses[0] | addresses[1] | addresses[2] | addresses[3]) & (ALIGNMENT - 1):
            plan = self._plan(call, q, k, v, cu_seqlens_q, cu_seqlens_k, out, scale, bottom_right)
            if plan is None:
                forward_copies(self.forward, q, k, v, cu_seqlens_q, cu_seqlens_k, out, lse, scale, bottom_right)
                return
        block, arguments = fill(self._block, plan.block, addresses if plan.movable else None)
        params.ADDRESSES.pack_into(
            block,
            params.SCALARS_OFFSET,
            cu_seqlens_q.data_ptr(),
            cu_seqlens_k.data_ptr(),
            0,  # work_list
            lse.data_ptr() if lse is not None else 0,
        )
        stream: int = torch._C._cuda_getCurrentRawStream(self._device)
        self._launch(self._kernel, plan.grid, self._threads, self._smem, stream, arguments)

    def recipe(self, layout: Layout, scale: float, bottom_right: bool, with_lse: bool) -> Recipe | None:
        """What ``forward`` does in such calls. None where each is looked at anew."""
        plan = self._plans.get((layout, scale, bottom_right))
        if plan is None:
            return None
        pointers = pointer_words(params.POINTERS, params.SCALARS_OFFSET, {"work_list": None})
        return Recipe(
            block=plan.block,
            words=(*map_words(params.MAPS), *pointers),
            kernels=((self._kernel, plan.grid, self._threads, self._smem),),
            unaligned=ALIGNMENT - 1,
        )

    def _plan(
        self,
        call: Hashable,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        out: torch.Tensor,
        scale: float,
        bottom_right: bool,
    ) -> _Plan | None:
        """The plan of a call, remembered. None where TMA cannot address a tensor."""
        (total_q, heads, _), (total_k, heads_kv, _) = q.shape, v.shape
        maps = find_maps(self._maps, q, k, v, out)
        if maps is None:
            return None
        work_list.check_tokens(total_q, total_k)
        pairs = -(-total_q // self._block_m) * heads
        if pairs > work_list.MAX_TILES:
            raise UnsupportedError(f"{pairs} tiles of queries and heads; served: {work_list.MAX_TILES}")
        block = bytearray(params.BLOCK_BYTES)
        block[: len(maps)] = maps
        params.SCALARS.pack_into(
            block,
            params.SCALARS_OFFSET,
            *(0,) * len(params.POINTERS),
            cu_seqlens_q.shape[0] - 1,
            heads,
            heads // heads_kv,
            total_q,
            0,  # max_items
            (cu_seqlens_q.dtype == torch.int64) + 2 * (cu_seqlens_k.dtype == torch.int64),
            bottom_right,
            self._block_m,
            self._block_n,
            self._block_m * self._causal,
            max(scale, _SMALLEST_SCALE) * _LOG2_E,
        )
        plan = _Plan(bytes(block), address_comes_first(), min(self._slots, pairs))
        return self._plans.remember(call, plan)
