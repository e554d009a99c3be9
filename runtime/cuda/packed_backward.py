"""The launcher of the backward for short sequences: one parameter block, two launches, no work list. Never waits."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import torch

from jagtile.runtime.artifact import Artifact, ArtifactMeta
from jagtile.runtime.cuda import driver, packed_backward_params, tensor_map, work_list
from jagtile.runtime.cuda.backward_params import delta_floats
from jagtile.runtime.cuda.block import ParameterBlock, fill, map_addresses
from jagtile.runtime.cuda.delta_rows import PREPARE, ROW_THREADS, check_rows, row_ctas
from jagtile.runtime.cuda.operands import backward_copies
from jagtile.runtime.cuda.plans import Plans, backward_layout
from jagtile.runtime.cuda.recipe import Recipe, map_words, pointer_words
from jagtile.runtime.dropout import Dropout
from jagtile.runtime.errors import UnsupportedError
from jagtile.runtime.layouts import Layout

_LOG2_E = 1.4426950408889634


class _Plan(NamedTuple):
    """What follows from a call's shapes, strides and options (see ``plans.Plan``)."""

    block: bytes
    movable: bool
    grid: int
    row_ctas: int  # of the pass over rows
    delta_floats: int


class CudaPackedBackwardKernel:
    """A loaded sm_90a backward whose tiles cross the borders of sequences (see BackwardKernel).

    Nothing is added up in memory: gradients are the same in every run, and beside delta no scratch is used.
    """

    def __init__(self, artifact: Artifact, device: torch.device) -> None:
        self.meta: ArtifactMeta = artifact.meta
        launch = self.meta.launch
        self._device = device.index if device.index is not None else torch.cuda.current_device()
        self._tile_rows = launch["tile_rows"]
        self._threads, self._smem = launch["num_threads"], launch["smem_bytes"]
        self._slots = torch.cuda.get_device_properties(self._device).multi_processor_count * launch["ctas_per_sm"]
        with torch.cuda.device(self._device):
            driver.bind_primary_context(self._device)
            module = driver.load_module(artifact.path.read_bytes())
            self._kernel = driver.function(module, self.meta.symbol, self._smem)
            self._prepare = driver.function(module, PREPARE)
        self._dependent = bool(launch.get("dependent")) and driver.launches_dependents()  # kernels of old don't wait
        self._launch = (driver.DependentLauncher if self._dependent else driver.Launcher)(self._device)
        maps = len(packed_backward_params.MAPS)
        self._maps = tensor_map.MapCache(self.meta.spec.split("_")[1], (launch["box_rows"],) * maps)
        self._plans: Plans[_Plan] = Plans()
        self._block = ParameterBlock(packed_backward_params.BLOCK_BYTES, map_addresses(maps))

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
        """Launch on the current stream of the tensors' device (see BackwardKernel)."""
        if q.shape[0] == 0 or v.shape[0] == 0 or cu_seqlens_q.shape[0] == 1:
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
        call = (known, scale, bottom_right)
        q_address, dout_address, k_address, v_address = q.data_ptr(), dout.data_ptr(), k.data_ptr(), v.data_ptr()
        dq_address, dk_address, dv_address, out_address = dq.data_ptr(), dk.data_ptr(), dv.data_ptr(), out.data_ptr()
        of_operands = q_address | dout_address | k_address | v_address | out_address
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
        delta = q.new_empty(plan.delta_floats, dtype=torch.float32)
        mapped = (q_address, dout_address, k_address, v_address, dq_address, dk_address, dv_address)
        block, arguments = fill(self._block, plan.block, mapped if plan.movable else None)
        packed_backward_params.ADDRESSES.pack_into(
            block,
            packed_backward_params.SCALARS_OFFSET,
            cu_seqlens_q.data_ptr(),
            cu_seqlens_k.data_ptr(),
            lse.data_ptr(),
            0 if dlse is None else dlse.data_ptr(),
            out_address,
            dout_address,
            delta.data_ptr(),
        )
        stream: int = torch._C._cuda_getCurrentRawStream(self._device)
        launch = self._launch
        launch(self._prepare, plan.row_ctas, ROW_THREADS, 0, stream, arguments)
        launch(self._kernel, plan.grid, self._threads, self._smem, stream, arguments)

    def recipe(self, layout: Layout, scale: float, bottom_right: bool) -> Recipe | None:
        """What ``backward`` does in such calls. None where each is looked at anew."""
        plan = self._plans.get((layout, scale, bottom_right))
        if plan is None:
            return None
        pointers = pointer_words(
            packed_backward_params.POINTERS, packed_backward_params.SCALARS_OFFSET, {"delta": ("scratch", 0)}
        )
        return Recipe(
            block=plan.block,
            words=(*map_words(packed_backward_params.MAPS), *pointers),
            kernels=(
                (self._prepare, plan.row_ctas, ROW_THREADS, 0),
                (self._kernel, plan.grid, self._threads, self._smem),
            ),
            unaligned=tensor_map.ALIGNMENT - 1,
            scratch_bytes=4 * plan.delta_floats,
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
        (total_q, heads, _), (total_k, heads_kv, _) = q.shape, v.shape
        layout = (
            *(total_q > 1, total_k > 1, heads, heads_kv, q.stride(), dout.stride(), k.stride(), v.stride()),
            *(dq.stride(), dk.stride(), dv.stride()),
        )
        maps = self._maps.find(layout, (q, dout, k, v, dq, dk, dv), (out,))
        if maps is None:
            return None
        check_rows(total_q, heads)
        work_list.check_tokens(total_q, total_k)
        tiles = -(-total_q // self._tile_rows) * heads + -(-total_k // self._tile_rows) * heads_kv
        if tiles > work_list.MAX_TILES:
            raise UnsupportedError(f"{tiles} tiles of rows and heads; served: {work_list.MAX_TILES}")
        block = bytearray(packed_backward_params.BLOCK_BYTES)
        block[: len(maps)] = maps
        packed_backward_params.SCALARS.pack_into(
            block,
            packed_backward_params.SCALARS_OFFSET,
            *(0,) * len(packed_backward_params.POINTERS),
            *out.stride()[:2],
            *dout.stride()[:2],
            cu_seqlens_q.shape[0] - 1,
            heads,
            heads // heads_kv,
            total_q,
            total_k,
            (cu_seqlens_q.dtype == torch.int64) + 2 * (cu_seqlens_k.dtype == torch.int64),
            bottom_right,
            scale,
            scale * _LOG2_E,
        )
        plan = _Plan(
            block=bytes(block),
            movable=tensor_map.address_comes_first(),
            grid=min(self._slots, tiles),
            row_ctas=row_ctas(total_q, heads),
            delta_floats=delta_floats(total_q, heads),
        )
        return self._plans.remember(call, plan)
