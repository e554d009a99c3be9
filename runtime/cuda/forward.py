"""The forward launcher: packs one parameter block, makes sure the work list exists, launches. Never waits."""

from __future__ import annotations

from typing import NamedTuple

import torch

from jagtile.runtime.artifact import Artifact, ArtifactMeta
from jagtile.runtime.cuda import driver, params, tensor_map, work_list
from jagtile.runtime.cuda.block import ParameterBlock
from jagtile.runtime.cuda.head_packs import ROWS, HeadPacks, packed, unpacked
from jagtile.runtime.cuda.list_builder import ListBuilder
from jagtile.runtime.cuda.operands import fill_maps, fill_out_rows, fill_rows, forward_copies
from jagtile.runtime.dropout import Dropout
from jagtile.runtime.errors import UnsupportedError

_LOG2_E = 1.4426950408889634
_BUILDER = "jagtile_build_work_list"
_SPLIT_BUILDER = "jagtile_build_split_work_list"
_SMALLEST_SCALE = 1e-30


class _Tiling(NamedTuple):
    """What follows from a call's numbers of heads; taken apart at once in a call."""

    packs: HeadPacks
    total_packs: int
    packs_per_kv_head: int
    block: int  # queries of a tile
    list_key: tuple[int, ...]  # what a work list depends on, beside the call's alignment and stream
    maps: tensor_map.MapCache


class CudaForwardKernel:
    """A loaded sm_90a forward (see ForwardKernel)."""

    def __init__(self, artifact: Artifact, device: torch.device) -> None:
        self.meta: ArtifactMeta = artifact.meta
        launch = self.meta.launch
        self._device = device.index if device.index is not None else torch.cuda.current_device()
        self._block_m, self._block_n = launch["block_m"], launch["block_n"]
        self._threads, self._smem = launch["num_threads"], launch["smem_bytes"]
        self._causal = launch["causal"]
        self._by_rows = launch.get("by_rows", 0)  # rows are copied without tensor maps
        self._out_rows = launch.get("out_rows", 0)  # out is stored from registers
        self._partial_bytes = launch.get("partial_bytes", 0)  # the result of one piece of keys, where keys are split
        self._dtype = self.meta.spec.split("_")[1]
        self._slots = torch.cuda.get_device_properties(self._device).multi_processor_count * launch["ctas_per_sm"]
        with torch.cuda.device(self._device):
            driver.bind_primary_context(self._device)
            module = driver.load_module(artifact.path.read_bytes())
            self._kernel = driver.function(module, self.meta.symbol, self._smem)
            self._kernel_with_lse = (
                driver.function(module, f"{self.meta.symbol}_lse", self._smem)
                if launch.get("lse_entry", 0)
                else self._kernel
            )
            self._builder = ListBuilder(module, _SPLIT_BUILDER if self._partial_bytes else _BUILDER)
        self._launch = driver.Launcher(self._device)
        self._tilings: dict[tuple[int, int], _Tiling] = {}
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
        if total_q == 0:
            return
        if torch._C._cuda_getDevice() != self._device:
            with torch.cuda.device(self._device):
                self.forward(q, k, v, cu_seqlens_q, cu_seqlens_k, out, lse, scale, bottom_right)
            return
        if scale < 0.0:  # the running maximum assumes a positive scale
            q, scale = -q, -scale
        total_k, heads_kv, _ = v.shape
        tiling = self._tilings.get((heads, heads_kv)) or self._tile(heads, heads_kv)
        packs, total_packs, packs_per_kv_head, tile_queries, list_key, map_cache = tiling
        block = self._block
        if self._by_rows:
            fill_rows(block, q, k, v, out)
        elif not fill_maps(block, map_cache, q, k, v, out):
            forward_copies(self.forward, q, k, v, cu_seqlens_q, cu_seqlens_k, out, lse, scale, bottom_right)
            return
        if self._out_rows:
            fill_out_rows(block, out)

        stream: int = torch._C._cuda_getCurrentRawStream(self._device)
        key = (*list_key, bottom_right, stream)
        found = None if work_list.rebuilt_now() else work_list.find(cu_seqlens_q, cu_seqlens_k, key)
        items = found or work_list.allocate(
            cu_seqlens_q, total_q, total_k, tile_queries, extra_items=packs.extra_items, extra_ints=packs.results
        )
        tiles = items.max_items * total_packs
        if tiles > work_list.MAX_TILES:
            raise UnsupportedError(f"up to {tiles} tiles of queries and heads; served: {work_list.MAX_TILES}")
        params.SCALARS.pack_into(
            block.data,
            params.SCALARS_OFFSET,
            cu_seqlens_q.data_ptr(),
            cu_seqlens_k.data_ptr(),
            items.address,
            lse.data_ptr() if lse is not None else 0,
            items.batch,
            total_packs,
            packs_per_kv_head,
            total_q,
            items.max_items,
            (cu_seqlens_q.dtype == torch.int64) + 2 * (cu_seqlens_k.dtype == torch.int64),
            bottom_right,
            tile_queries,
            self._block_n,
            self._causal,
            max(scale, _SMALLEST_SCALE) * _LOG2_E,
        )
        if self._partial_bytes:  # scratch is the stream's again as soon as the kernel is enqueued
            partials = q.new_empty(packs.results * self._partial_bytes, dtype=torch.uint8)
            params.SPLIT_SCALARS.pack_into(
                block.data,
                params.SPLIT_OFFSET,
                packs.heads,
                packs.extra_items,
                packs.results,
                partials.data_ptr(),
            )
        if found is None:
            self._builder.build(self._launch, items.batch, items.max_items - packs.extra_items, stream, block.arguments)
            work_list.keep(cu_seqlens_q, cu_seqlens_k, key, items)
        kernel = self._kernel if lse is None else self._kernel_with_lse
        self._launch(kernel, min(self._slots, tiles), self._threads, self._smem, stream, block.arguments)

    def _tile(self, heads: int, heads_kv: int) -> _Tiling:
        """The tiling for so many heads, remembered."""
        if self._partial_bytes:
            packs = packed(heads, heads_kv, self._block_m // ROWS, self._slots)
        else:
            packs = unpacked(heads, heads_kv)
        block = packs.tokens * (self._block_m // ROWS)
        split = (packs.extra_items, packs.results) if self._partial_bytes else ()
        rows = (packs.tokens, self._block_n, self._block_n, packs.tokens)
        maps = tensor_map.MapCache(self._dtype, rows, (packs.heads, 1, 1, packs.heads))
        list_key = (block, self._block_n, self._causal, *split)
        tiling = _Tiling(packs, packs.total, packs.per_kv_head, block, list_key, maps)
        self._tilings[heads, heads_kv] = tiling
        return tiling
