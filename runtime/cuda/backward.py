"""The backward launcher: one parameter block, three launches, and a fourth where the work list is new. Never waits."""

from __future__ import annotations

import torch

from jagtile.runtime.artifact import Artifact, ArtifactMeta
from jagtile.runtime.cuda import backward_params, driver, tensor_map, work_list
from jagtile.runtime.cuda.block import ParameterBlock
from jagtile.runtime.cuda.list_builder import ListBuilder
from jagtile.runtime.cuda.params import work_list_bytes
from jagtile.runtime.cuda.tensor_map import addressable
from jagtile.runtime.dropout import Dropout
from jagtile.runtime.errors import UnsupportedError

_LOG2_E = 1.4426950408889634
_BUILDER = "jagtile_build_work_list"
_PREPARE = "jagtile_backward_prepare"
_FINISH = "jagtile_backward_finish"
_ROW_THREADS = 256  # of prepare and finish (templates/cuda/include/backward_rows.cuh)
_ROW_TOKENS = 16  # of one head, a warp
_MAX_ROWS = 1 << 31


class CudaBackwardKernel:
    """A loaded sm_90a backward (see BackwardKernel)."""

    def __init__(self, artifact: Artifact, device: torch.device) -> None:
        self.meta: ArtifactMeta = artifact.meta
        launch = self.meta.launch
        self._device = device.index if device.index is not None else torch.cuda.current_device()
        self._block_m, self._block_n = launch["block_m"], launch["block_n"]
        self._threads, self._smem = launch["num_threads"], launch["smem_bytes"]
        self._causal, self._dq_adders = launch["causal"], launch["dq_adders"]
        rows = (self._block_m, self._block_m, self._block_n, self._block_n, launch["store_rows"], launch["store_rows"])
        sms: int = torch.cuda.get_device_properties(self._device).multi_processor_count
        self._slots = sms * launch["ctas_per_sm"]
        with torch.cuda.device(self._device):
            driver.bind_primary_context(self._device)
            module = driver.load_module(artifact.path.read_bytes())
            self._kernel = driver.function(module, self.meta.symbol, self._smem)
            self._builder = ListBuilder(module, _BUILDER)
            self._prepare, self._finish = (driver.function(module, symbol) for symbol in (_PREPARE, _FINISH))
        self._launch = driver.Launcher(self._device)
        self._maps = tensor_map.MapCache(self.meta.spec.split("_")[1], rows)
        self._block = ParameterBlock(backward_params.BLOCK_BYTES, len(backward_params.MAPS))

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
    ) -> None:
        """Launch on the current stream of the tensors' device (see BackwardKernel).

        Additions to dQ have a fixed order where ``torch.are_deterministic_algorithms_enabled()``.
        """
        total_q, heads, head_dim = q.shape
        total_k, heads_kv, _ = v.shape
        if total_q == 0 or total_k == 0:
            for grad in (dq, dk, dv):
                grad.zero_()
            return
        if torch._C._cuda_getDevice() != self._device:
            with torch.cuda.device(self._device):
                self.backward(
                    q, k, v, cu_seqlens_q, cu_seqlens_k, out, lse, dout, dlse, dq, dk, dv, scale, bottom_right
                )
            return
        block, mapped = self._block, (q, dout, k, v, dk, dv)
        dout_address, out_address, dq_address = dout.data_ptr(), out.data_ptr(), dq.data_ptr()
        addresses = (q.data_ptr(), dout_address, k.data_ptr(), v.data_ptr(), dk.data_ptr(), dv.data_ptr())
        out_strides, dout_strides, dq_strides = out.stride(), dout.stride(), dq.stride()
        layout = (
            *(total_q > 1, total_k > 1, heads, heads_kv, q.stride(), dout_strides, k.stride(), v.stride()),
            *(dk.stride(), dv.stride(), out_strides, dq_strides),
        )
        if not self._maps.fill(block, layout, mapped, addresses, (out, dq), out_address | dq_address):
            self._backward_copies(
                q, k, v, cu_seqlens_q, cu_seqlens_k, out, lse, dout, dlse, dq, dk, dv, scale, bottom_right
            )
            return
        if total_q * heads >= _MAX_ROWS:
            raise UnsupportedError(f"{total_q} queries of {heads} heads; served: fewer than {_MAX_ROWS} in all")
        lse = lse if lse.is_contiguous() else lse.contiguous()
        dlse = None if dlse is None else dlse.contiguous()

        deterministic = torch.are_deterministic_algorithms_enabled()
        stream: int = torch._C._cuda_getCurrentRawStream(self._device)
        tile = (self._block_m, self._block_n, self._causal, bottom_right)
        key = ("bwd", *tile, heads, heads_kv, deterministic, total_q, stream)
        found = None if work_list.rebuilt_now() else work_list.find(cu_seqlens_q, cu_seqlens_k, key)
        items = found or work_list.allocate(
            *(cu_seqlens_q, total_q, total_k, self._block_n),
            of_keys=True,
            extra_ints=2 * cu_seqlens_k.numel() + 2 * backward_params.bit_words(total_q),
        )
        tiles = items.max_items * heads_kv
        turn_count = tiles * self._dq_adders if deterministic else 0
        if (most := max(tiles, turn_count)) > work_list.MAX_TILES:
            raise UnsupportedError(f"up to {most} tiles of keys and heads; served: {work_list.MAX_TILES}")
        scratch = q.new_empty(
            backward_params.scratch_bytes(total_q, heads, head_dim, turn_count) // 4, dtype=torch.float32
        )
        dq_sums = scratch.data_ptr()
        delta = dq_sums + 4 * backward_params.sum_floats(total_q, heads, head_dim)
        turns = delta + 4 * backward_params.delta_floats(total_q, heads) if deterministic else 0
        direct = items.address + work_list_bytes(items.max_items, 2 * (items.batch + 1))
        backward_params.SCALARS.pack_into(
            block.data,
            backward_params.SCALARS_OFFSET,
            cu_seqlens_q.data_ptr(),
            cu_seqlens_k.data_ptr(),
            items.address,
            lse.data_ptr(),
            0 if dlse is None else dlse.data_ptr(),
            out_address,
            dout_address,
            dq_address,
            delta,
            dq_sums,
            turns,
            direct,
            direct + 4 * backward_params.bit_words(total_q),
            *out_strides[:2],
            *dout_strides[:2],
            *dq_strides[:2],
            items.batch,
            heads,
            heads // heads_kv,
            total_q,
            items.max_items,
            (cu_seqlens_q.dtype == torch.int64) + 2 * (cu_seqlens_k.dtype == torch.int64),
            bottom_right,
            self._block_m,
            self._block_n,
            self._causal,
            turn_count,
            scale,
            scale * _LOG2_E,
        )
        launch, arguments = self._launch, block.arguments
        if found is None:
            self._builder.build(launch, items.batch, items.max_items, stream, arguments)
            work_list.keep(cu_seqlens_q, cu_seqlens_k, key, items)
        row_ctas = -(-(-(-total_q // _ROW_TOKENS) * heads) // (_ROW_THREADS // 32))
        launch(self._prepare, row_ctas, _ROW_THREADS, 0, stream, arguments)
        launch(self._kernel, min(self._slots, tiles), self._threads, self._smem, stream, arguments)
        launch(self._finish, row_ctas, _ROW_THREADS, 0, stream, arguments)

    def _backward_copies(
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
    ) -> None:
        """Layouts that TMA cannot address, or that have no 16-byte pieces, are copied; gradients are copied back."""
        q, k, v, out, dout = (
            t if addressable(t) else t.clone(memory_format=torch.contiguous_format) for t in (q, k, v, out, dout)
        )
        grads = (dq, dk, dv)
        new_dq, new_dk, new_dv = (
            t if addressable(t) else torch.empty_like(t, memory_format=torch.contiguous_format) for t in grads
        )
        self.backward(
            *(q, k, v, cu_seqlens_q, cu_seqlens_k, out, lse, dout, dlse, new_dq, new_dk, new_dv), scale, bottom_right
        )
        for grad, found in zip(grads, (new_dq, new_dk, new_dv), strict=True):
            if found is not grad:
                grad.copy_(found)
