"""The forward launcher: fills one parameter block, makes sure the work list exists, launches. Never waits."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import torch

from jagtile.runtime.artifact import Artifact, ArtifactMeta
from jagtile.runtime.cuda import driver, params, tensor_map, work_list
from jagtile.runtime.cuda.block import ParameterBlock, fill, map_addresses
from jagtile.runtime.cuda.list_builder import ListBuilder
from jagtile.runtime.cuda.operands import find_maps, forward_copies, rows_of
from jagtile.runtime.cuda.plans import Plans, forward_layout
from jagtile.runtime.cuda.recipe import Recipe, map_words, pointer_words
from jagtile.runtime.dropout import Dropout
from jagtile.runtime.errors import UnsupportedError
from jagtile.runtime.head_packs import ROWS, HeadPacks, packed, unpacked
from jagtile.runtime.layouts import Layout

_LOG2_E = 1.4426950408889634
_BUILDER = "jagtile_build_work_list"
_SPLIT_BUILDER = "jagtile_build_split_work_list"
_MOST_PACKED = 1 << 28  # sequences: what an item has room for (templates/cuda/include/sequence_packs.cuh)
_SMALLEST_SCALE = 1e-30


class _Tiling(NamedTuple):
    """What follows from a call's numbers of heads."""

    packs: HeadPacks
    total_packs: int
    packs_per_kv_head: int
    block: int  # queries of a tile
    list_key: tuple[int, ...]  # what a work list depends on, beside the call's alignment and tokens and the stream
    maps: tensor_map.MapCache


class _Plan(NamedTuple):
    """What follows from a call's shapes, strides and options (see ``plans.Plan``)."""

    block: bytes
    movable: bool
    grid: int
    max_items: int
    extra_items: int  # of them
    results: int
    list_key: tuple[int, ...]


class CudaForwardKernel:
    """A loaded sm_90a forward (see ForwardKernel)."""

    def __init__(self, artifact: Artifact, device: torch.device) -> None:
        self.meta: ArtifactMeta = artifact.meta
        launch = self.meta.launch
        self._device = device.index if device.index is not None else torch.cuda.current_device()
        self._block_m, self._block_n = launch["block_m"], launch["block_n"]
        self._threads, self._smem = launch["num_threads"], launch["smem_bytes"]
        self._causal = launch["causal"]
        self._cluster = launch.get("cluster", 1)  # CTAs that share a tile, and the loads of its keys
        self._by_rows = launch.get("by_rows", 0)  # rows are copied without tensor maps
        self._out_rows = launch.get("out_rows", 0)  # out is stored from registers
        self._partial_bytes = launch.get("partial_bytes", 0)  # the result of one piece of keys, where keys are split
        self._pack_sequences = bool(launch.get("pack_sequences"))
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
        self._plans: Plans[_Plan] = Plans()
        self._unaligned = 0 if self._by_rows else tensor_map.ALIGNMENT - 1  # bits that addresses must not have
        addressed = params.ROW_ADDRESSES if self._by_rows else map_addresses(len(params.MAPS))
        self._block = ParameterBlock(params.BLOCK_BYTES, addressed)

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
        shape = q.shape
        if shape[0] == 0:
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
        if plan is None or (addresses[0] | addresses[1] | addresses[2] | addresses[3]) & self._unaligned:
            plan = self._plan(call, q, k, v, cu_seqlens_q, cu_seqlens_k, out, scale, bottom_right)
            if plan is None:
                forward_copies(self.forward, q, k, v, cu_seqlens_q, cu_seqlens_k, out, lse, scale, bottom_right)
                return
        planned, movable, grid, max_items, extra_items, results, list_key = plan

        stream: int = torch._C._cuda_getCurrentRawStream(self._device)
        key = (list_key, stream)
        found = None if work_list.rebuilt_now() else work_list.find(cu_seqlens_q, cu_seqlens_k, key)
        items = found or work_list.allocate(cu_seqlens_q, max_items, results)
        block, arguments = fill(self._block, planned, addresses if movable else None)
        params.ADDRESSES.pack_into(
            block,
            params.SCALARS_OFFSET,
            cu_seqlens_q.data_ptr(),
            cu_seqlens_k.data_ptr(),
            items.address,
            lse.data_ptr() if lse is not None else 0,
        )
        if self._out_rows:
            params.ADDRESS.pack_into(block, params.OUT_ROWS_OFFSET, addresses[3])
        if self._partial_bytes:  # scratch is the stream's again as soon as the kernel is enqueued
            partials = q.new_empty(results * self._partial_bytes, dtype=torch.uint8)
            params.ADDRESS.pack_into(block, params.PARTIALS_OFFSET, partials.data_ptr())
        if found is None:
            batch = cu_seqlens_q.shape[0] - 1
            self._builder.build(self._launch, batch, max_items - extra_items, stream, arguments)
            work_list.keep(cu_seqlens_q, cu_seqlens_k, key, items)
        kernel = self._kernel if lse is None else self._kernel_with_lse
        self._launch(kernel, grid, self._threads, self._smem, stream, arguments)

    def recipe(self, layout: Layout, scale: float, bottom_right: bool, with_lse: bool) -> Recipe | None:
        """What ``forward`` does in such calls. None where each is looked at anew."""
        plan = self._plans.get((layout, scale, bottom_right))
        if plan is None:
            return None
        if self._by_rows:
            at = range(params.ROWS_OFFSET, params.ROWS_OFFSET + params.ROWS.size, params.OUT_ROWS.size)
            words = [(offset, name, 0) for offset, name in zip(at, params.ROW_TENSORS, strict=True)]
        else:
            words = map_words(params.MAPS)
        words += pointer_words(params.POINTERS, params.SCALARS_OFFSET, {})
        if self._out_rows:
            words.append((params.OUT_ROWS_OFFSET, "out", 0))
        if self._partial_bytes:
            words.append((params.PARTIALS_OFFSET, "scratch", 0))
        kernel = self._kernel_with_lse if with_lse else self._kernel
        return Recipe(
            block=plan.block,
            words=tuple(words),
            kernels=((kernel, plan.grid, self._threads, self._smem),),
            unaligned=self._unaligned,
            scratch_bytes=plan.results * self._partial_bytes,
            list_key=plan.list_key,
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
        tiling = self._tilings.get((heads, heads_kv)) or self._tile(heads, heads_kv)
        packs, total_packs, packs_per_kv_head, tile_queries, list_key, map_cache = tiling
        block = bytearray(params.BLOCK_BYTES)
        if self._by_rows:
            params.ROWS.pack_into(block, params.ROWS_OFFSET, *rows_of(q, k, v, out))
        else:
            maps = find_maps(map_cache, q, k, v, out)
            if maps is None:
                return None
            block[: len(maps)] = maps
        if self._out_rows:
            params.OUT_ROWS.pack_into(block, params.OUT_ROWS_OFFSET, *rows_of(out))
        work_list.check_tokens(total_q, total_k)
        batch = cu_seqlens_q.shape[0] - 1
        if self._pack_sequences and batch > _MOST_PACKED:
            raise UnsupportedError(f"a batch of {batch} sequences; served by a kernel that packs them: {_MOST_PACKED}")
        max_items = work_list.capacity(total_q, batch, tile_queries) + packs.extra_items
        tiles = max_items * total_packs
        if tiles > work_list.MAX_TILES:
            raise UnsupportedError(f"up to {tiles} tiles of queries and heads; served: {work_list.MAX_TILES}")
        params.SCALARS.pack_into(
            block,
            params.SCALARS_OFFSET,
            *(0,) * len(params.POINTERS),
            batch,
            total_packs,
            packs_per_kv_head,
            total_q,
            max_items,
            (cu_seqlens_q.dtype == torch.int64) + 2 * (cu_seqlens_k.dtype == torch.int64),
            bottom_right,
            tile_queries,
            self._block_n,
            packs.tokens * self._causal,
            max(scale, _SMALLEST_SCALE) * _LOG2_E,
        )
        if self._partial_bytes:
            params.SPLIT_SCALARS.pack_into(block, params.SPLIT_OFFSET, packs.heads, packs.extra_items, packs.results, 0)
        movable = bool(self._by_rows) or tensor_map.address_comes_first()
        grid = min(self._slots // self._cluster, tiles) * self._cluster
        list_key = (*list_key, bottom_right, max_items)
        plan = _Plan(bytes(block), movable, grid, max_items, packs.extra_items, packs.results, list_key)
        return self._plans.remember(call, plan)

    def _tile(self, heads: int, heads_kv: int) -> _Tiling:
        """The tiling for so many heads, remembered."""
        if self._partial_bytes:
            packs = packed(heads, heads_kv, self._block_m // ROWS, self._slots)
        else:
            packs = unpacked(heads, heads_kv)
        block = packs.tokens * (self._block_m // ROWS) * self._cluster
        split = (packs.extra_items, packs.results, self._pack_sequences) if self._partial_bytes else ()
        loaded = self._block_n // self._cluster
        rows = (packs.tokens, loaded, loaded, packs.tokens)
        maps = tensor_map.MapCache(self._dtype, rows, (packs.heads, 1, 1, packs.heads))
        list_key = (block, self._block_n, packs.tokens * self._causal, *split)
        tiling = _Tiling(packs, packs.total, packs.per_kv_head, block, list_key, maps)
        self._tilings[heads, heads_kv] = tiling
        return tiling
