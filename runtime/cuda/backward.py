"""The backward launcher: one parameter block, two or three launches, one more where the list is new. Never waits."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import torch

from jagtile.runtime.artifact import Artifact, ArtifactMeta
from jagtile.runtime.cuda import backward_params, driver, tensor_map, work_list
from jagtile.runtime.cuda.block import ParameterBlock, fill, map_addresses
from jagtile.runtime.cuda.delta_rows import PREPARE, ROW_THREADS, check_rows, row_ctas
from jagtile.runtime.cuda.list_builder import ListBuilder
from jagtile.runtime.cuda.operands import backward_copies
from jagtile.runtime.cuda.params import work_list_bytes
from jagtile.runtime.cuda.plans import Plans, backward_layout
from jagtile.runtime.cuda.recipe import Recipe, map_words, pointer_words
from jagtile.runtime.dropout import Dropout
from jagtile.runtime.errors import UnsupportedError
from jagtile.runtime.layouts import Layout

_LOG2_E = 1.4426950408889634
_BUILDER = "jagtile_build_work_list"
_FINISH = "jagtile_backward_finish"


class _Plan(NamedTuple):
    """What follows from a call's shapes, strides and options (see ``plans.Plan``)."""

    block: bytes
    movable: bool
    grid: int
    row_ctas: int  # of the passes over rows
    max_items: int
    list_ints: int  # behind a work list's items
    list_key: tuple[object, ...]
    scratch_floats: int
    delta: int  # bytes of the scratch before it
    turns: int | None  # likewise, where tiles wait for others before they add to dQ's sums
    progress: int | None  # likewise, where the attention kernel makes the passes over rows or has tiles in pieces
    direct: int  # bytes of the work list's buffer before it
    summed: int  # likewise


class CudaBackwardKernel:
    """A loaded sm_90a backward (see BackwardKernel)."""

    def __init__(self, artifact: Artifact, device: torch.device) -> None:
        self.meta: ArtifactMeta = artifact.meta
        launch = self.meta.launch
        self._device = device.index if device.index is not None else torch.cuda.current_device()
        self._block_m, self._block_n = launch["block_m"], launch["block_n"]
        self._threads, self._smem = launch["num_threads"], launch["smem_bytes"]
        self._causal, self._dq_adders = launch["causal"], launch["dq_adders"]
        self._fused, self._first_stores = bool(launch.get("fused")), bool(launch["first_stores"])
        self._tail_tiles, self._tail_columns = launch.get("tail_tiles", 0), launch.get("tail_columns")
        block_m, block_n, store_rows = self._block_m, self._block_n, launch["store_rows"]
        unit_rows = launch.get("unit_rows", 32)  # kernels of old don't say
        rows = (*(block_m,) * 2, *(block_n,) * 2, *(store_rows,) * 2, *(unit_rows,) * 2)
        sms: int = torch.cuda.get_device_properties(self._device).multi_processor_count
        self._sms, self._slots = sms, sms * launch["ctas_per_sm"]
        with torch.cuda.device(self._device):
            driver.bind_primary_context(self._device)
            module = driver.load_module(artifact.path.read_bytes())
            self._kernel = driver.function(module, self.meta.symbol, self._smem)
            self._builder = ListBuilder(module, _BUILDER)
            self._prepare = driver.function(module, PREPARE)
            self._finish = None if self._fused else driver.function(module, _FINISH)
        self._launch = driver.Launcher(self._device)
        self._dependent = bool(launch.get("dependent")) and driver.launches_dependents()  # kernels of old don't wait
        self._launch_next = driver.DependentLauncher(self._device) if self._dependent else self._launch
        self._maps = tensor_map.MapCache(self.meta.spec.split("_")[1], rows)
        self._plans: Plans[_Plan] = Plans()
        self._block = ParameterBlock(backward_params.BLOCK_BYTES, map_addresses(len(backward_params.MAPS)))

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
        """Launch on the current stream of the tensors' device (see BackwardKernel).

        Where ``torch.are_deterministic_algorithms_enabled()`` additions to dQ have a fixed order, and dK and dV are not
        added up of pieces.
        """
        if q.shape[0] == 0 or v.shape[0] == 0:
            for grad in (dq, dk, dv):
                grad.zero_()
            return
        if torch._C._cuda_getDevice() != self._device:
            with torch.cuda.device(self._device):
                self.backward(
                    q, k, v, cu_seqlens_q, cu_seqlens_k, out, lse, dout, dlse, dq, dk, dv, scale, bottom_right
                )
            return
        known = layout or backward_layout(q, k, v, cu_seqlens_q, cu_seqlens_k, out, dout, dq, dk, dv)
        call = (known, scale, bottom_right, torch.are_deterministic_algorithms_enabled())
        q_address, k_address, v_address, out_address = q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr()
        dout_address, dq_address, dk_address, dv_address = dout.data_ptr(), dq.data_ptr(), dk.data_ptr(), dv.data_ptr()
        of_operands = q_address | k_address | v_address | out_address | dout_address
        plan = self._plans.get(call)
        if plan is None or (of_operands | dq_address | dk_address | dv_address) & (tensor_map.ALIGNMENT - 1):
            plan = self._plan(call, q, k, v, cu_seqlens_q, cu_seqlens_k, out, dout, dq, dk, dv, scale, bottom_right)
            if plan is None:
                backward_copies(
                    self.backward,
                    *(q, k, v, cu_seqlens_q, cu_seqlens_k, out, lse, dout, dlse, dq, dk, dv, scale, bottom_right),
                )
                return
        lse = lse if lse.is_contiguous() else lse.contiguous()
        dlse = None if dlse is None else dlse.contiguous()

        stream: int = torch._C._cuda_getCurrentRawStream(self._device)
        key = (plan.list_key, stream)
        found = None if work_list.rebuilt_now() else work_list.find(cu_seqlens_q, cu_seqlens_k, key)
        items = found or work_list.allocate(cu_seqlens_q, plan.max_items, plan.list_ints)
        scratch = q.new_empty(plan.scratch_floats, dtype=torch.float32)
        list_address, dq_sums = items.address, scratch.data_ptr()
        mapped = (q_address, dout_address, k_address, v_address, dk_address, dv_address, out_address, dout_address)
        block, arguments = fill(self._block, plan.block, mapped if plan.movable else None)
        backward_params.ADDRESSES.pack_into(
            block,
            backward_params.SCALARS_OFFSET,
            cu_seqlens_q.data_ptr(),
            cu_seqlens_k.data_ptr(),
            list_address,
            lse.data_ptr(),
            0 if dlse is None else dlse.data_ptr(),
            out_address,
            dout_address,
            dq_address,
            dq_sums + plan.delta,
            dq_sums,
            0 if plan.turns is None else dq_sums + plan.turns,
            0 if plan.progress is None else dq_sums + plan.progress,
            list_address + plan.direct,
            list_address + plan.summed,
        )
        if found is None:
            self._builder.build(self._launch, cu_seqlens_q.shape[0] - 1, plan.max_items, stream, arguments)
            work_list.keep(cu_seqlens_q, cu_seqlens_k, key, items)
        launch = self._launch_next
        launch(self._prepare, plan.row_ctas, ROW_THREADS, 0, stream, arguments)
        launch(self._kernel, plan.grid, self._threads, self._smem, stream, arguments)
        if self._finish is not None:
            launch(self._finish, plan.row_ctas, ROW_THREADS, 0, stream, arguments)

    def recipe(self, layout: Layout, scale: float, bottom_right: bool) -> Recipe | None:
        """What ``backward`` does in such calls. None where each is looked at anew."""
        plan = self._plans.get((layout, scale, bottom_right, torch.are_deterministic_algorithms_enabled()))
        if plan is None:
            return None
        inside = {
            "delta": ("scratch", plan.delta),
            "dq_sums": ("scratch", 0),
            "turns": None if plan.turns is None else ("scratch", plan.turns),
            "progress": None if plan.progress is None else ("scratch", plan.progress),
            "direct": ("work_list", plan.direct),
            "summed": ("work_list", plan.summed),
        }
        pointers = pointer_words(backward_params.POINTERS, backward_params.SCALARS_OFFSET, inside)
        kernels = [
            (self._prepare, plan.row_ctas, ROW_THREADS, 0),
            (self._kernel, plan.grid, self._threads, self._smem),
        ]
        if self._finish is not None:
            kernels.append((self._finish, plan.row_ctas, ROW_THREADS, 0))
        return Recipe(
            block=plan.block,
            words=(*map_words(backward_params.MAPS), *pointers),
            kernels=tuple(kernels),
            unaligned=tensor_map.ALIGNMENT - 1,
            scratch_bytes=4 * plan.scratch_floats,
            list_key=plan.list_key,
            dependent=self._dependent,
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
        dout: torch.Tensor,
        dq: torch.Tensor,
        dk: torch.Tensor,
        dv: torch.Tensor,
        scale: float,
        bottom_right: bool,
    ) -> _Plan | None:
        """The plan of a call, remembered. None where TMA cannot address a tensor."""
        (total_q, heads, head_dim), (total_k, heads_kv, _) = q.shape, v.shape
        layout = (
            *(total_q > 1, total_k > 1, heads, heads_kv, q.stride(), dout.stride(), k.stride(), v.stride()),
            *(dk.stride(), dv.stride(), out.stride()),
        )
        maps = self._maps.find(layout, (q, dout, k, v, dk, dv, out, dout), (dq,))
        if maps is None:
            return None
        check_rows(total_q, heads)
        work_list.check_tokens(total_q, total_k)
        batch, in_order = cu_seqlens_q.shape[0] - 1, torch.are_deterministic_algorithms_enabled()
        if self._tail_tiles and total_q > backward_params.MOST_TAIL_BLOCKS * self._block_m:
            in_order = True  # nothing is in pieces then
        max_items = work_list.capacity(total_k, batch, self._block_n)
        tiles = max_items * heads_kv
        turn_count = tiles * self._dq_adders if in_order or self._first_stores else 0
        progress_count = backward_params.progress_ints(tiles) if self._fused else 0
        tail_tiles = min(tiles, self._tail_tiles)
        pieces = tail_tiles > 0 and not in_order  # for CTAs that have no tile
        others = turn_count + progress_count
        columns = self._tail_columns or head_dim + v.shape[2]  # kernels of old don't say
        others += backward_params.tail_words(tail_tiles, self._block_n, columns)
        if (most := max(tiles, turn_count, progress_count // 2)) > work_list.MAX_TILES:
            raise UnsupportedError(f"up to {most} tiles of keys and heads; served: {work_list.MAX_TILES}")
        block = bytearray(backward_params.BLOCK_BYTES)
        block[: len(maps)] = maps
        backward_params.SCALARS.pack_into(
            block,
            backward_params.SCALARS_OFFSET,
            *(0,) * len(backward_params.POINTERS),
            *out.stride()[:2],
            *dout.stride()[:2],
            *dq.stride()[:2],
            batch,
            heads,
            heads // heads_kv,
            total_q,
            max_items,
            (cu_seqlens_q.dtype == torch.int64) + 2 * (cu_seqlens_k.dtype == torch.int64),
            bottom_right,
            self._block_m,
            self._block_n,
            self._causal,
            turn_count,
            progress_count,
            in_order,
            scale,
            scale * _LOG2_E,
        )
        bit_words, offsets = backward_params.bit_words(total_q), 2 * (batch + 1)
        delta = 4 * backward_params.sum_floats(total_q, heads, head_dim)
        turns = delta + 4 * backward_params.delta_floats(total_q, heads)
        ctas, direct = row_ctas(total_q, heads), work_list_bytes(max_items, offsets)
        if self._fused:
            ctas = min(self._sms, ctas)
        if tail_tiles:
            ctas = max(self._sms, ctas)  # which also zero the tail's sums
        plan = _Plan(
            block=bytes(block),
            movable=tensor_map.address_comes_first(),
            grid=self._slots if pieces else min(self._slots, tiles),
            row_ctas=ctas,
            max_items=max_items,
            list_ints=offsets + 2 * bit_words,
            list_key=(
                *("bwd", self._block_m, self._block_n, self._causal, bottom_right),
                *(heads, heads_kv, in_order, total_q, max_items),
            ),
            scratch_floats=backward_params.scratch_bytes(total_q, heads, head_dim, others) // 4,
            delta=delta,
            turns=turns if turn_count else None,
            progress=turns + 4 * turn_count if self._fused or tail_tiles else None,
            direct=direct,
            summed=direct + 4 * bit_words,
        )
        return self._plans.remember(call, plan)
