"""The forward launcher: packs one parameter block, makes sure the work list exists, launches. Never waits."""

from __future__ import annotations

import ctypes
import threading

import torch

from jagtile.runtime.artifact import Artifact, ArtifactMeta
from jagtile.runtime.cuda import driver, params, tensor_map, work_list

_LOG2_E = 1.4426950408889634
_BUILDER = "jagtile_build_work_list"
_BUILDER_THREADS = 1024
_Q_ROWS = 64  # of one math warpgroup
_ELEMENT_BYTES = 2
_L2_SHARE = 32 << 20  # bytes of K and V that the heads in flight together may take
_SMALLEST_SCALE = 1e-30


class _Block(threading.local):
    """A thread's own parameter block: the driver copies it while other threads may be filling theirs."""

    def __init__(self) -> None:
        self.data = bytearray(params.BLOCK_BYTES)
        self._fixed = (ctypes.c_char * params.BLOCK_BYTES).from_buffer(self.data)
        self._pointers = (ctypes.c_void_p * 1)(ctypes.addressof(self._fixed))
        self.arguments = ctypes.addressof(self._pointers)


class CudaForwardKernel:
    """A loaded sm_90a forward (see ForwardKernel)."""

    def __init__(self, artifact: Artifact, device: torch.device) -> None:
        self.meta: ArtifactMeta = artifact.meta
        launch = self.meta.launch
        self._device = device.index if device.index is not None else torch.cuda.current_device()
        self._block_m, self._block_n = launch["block_m"], launch["block_n"]
        self._threads, self._smem = launch["num_threads"], launch["smem_bytes"]
        self._causal = launch["causal"]
        self._dtype = self.meta.spec.split("_")[1]
        self._slots = torch.cuda.get_device_properties(self._device).multi_processor_count * launch["ctas_per_sm"]
        with torch.cuda.device(self._device):
            driver.bind_primary_context(self._device)
            module = driver.load_module(artifact.path.read_bytes())
            self._kernel = driver.function(module, self.meta.symbol, self._smem)
            self._builder = driver.function(module, _BUILDER)
        self._launch = driver.Launcher(self._device)
        self._map_templates: dict[tuple[int, ...], bytes] = {}
        self._block = _Block()

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
    ) -> None:
        """Launch on the current stream of the tensors' device (see ForwardKernel)."""
        if q.shape[0] == 0:
            return
        if scale < 0.0:  # the running maximum assumes a positive scale
            q, scale = -q, -scale
        if torch._C._cuda_getDevice() == self._device:
            self._forward(q, k, v, cu_seqlens_q, cu_seqlens_k, out, lse, scale, bottom_right)
        else:
            with torch.cuda.device(self._device):
                self._forward(q, k, v, cu_seqlens_q, cu_seqlens_k, out, lse, scale, bottom_right)

    def _forward(
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
    ) -> None:
        total_q, heads, head_dim = q.shape
        total_k, heads_kv, head_dim_v = v.shape
        block = self._block
        data = block.data
        # Layouts that TMA cannot address are copied; every ordinary one, packed QKV views included, is not.
        if not self._put_map(data, 0, q, total_q, heads, head_dim, _Q_ROWS):
            q = q.clone(memory_format=torch.contiguous_format)
            self._put_map(data, 0, q, total_q, heads, head_dim, _Q_ROWS)
        if total_k == 0:  # nothing is loaded, but maps must be maps
            data[tensor_map.MAP_BYTES : 3 * tensor_map.MAP_BYTES] = data[: tensor_map.MAP_BYTES] * 2
        else:
            if not self._put_map(data, 1, k, total_k, heads_kv, head_dim, self._block_n):
                k = k.clone(memory_format=torch.contiguous_format)
                self._put_map(data, 1, k, total_k, heads_kv, head_dim, self._block_n)
            if not self._put_map(data, 2, v, total_k, heads_kv, head_dim_v, self._block_n):
                v = v.clone(memory_format=torch.contiguous_format)
                self._put_map(data, 2, v, total_k, heads_kv, head_dim_v, self._block_n)
        target = out
        if not self._put_map(data, 3, out, total_q, heads, head_dim_v, _Q_ROWS):
            target = torch.empty_like(out, memory_format=torch.contiguous_format)
            self._put_map(data, 3, target, total_q, heads, head_dim_v, _Q_ROWS)

        stream: int = torch._C._cuda_getCurrentRawStream(self._device)
        rebuilt = work_list.rebuilt_now()
        key = (self._block_m, self._block_n, self._causal, bottom_right, stream)
        found = None if rebuilt else work_list.find(cu_seqlens_q, cu_seqlens_k, key)
        items = found or work_list.allocate(cu_seqlens_q, cu_seqlens_k, total_q, self._block_m)
        params.SCALARS.pack_into(
            data,
            params.SCALARS_OFFSET,
            cu_seqlens_q.data_ptr(),
            cu_seqlens_k.data_ptr(),
            items.address,
            lse.data_ptr() if lse is not None else 0,
            items.batch,
            heads,
            _heads_per_group(heads, heads_kv, total_k * (head_dim + head_dim_v) * _ELEMENT_BYTES),
            heads // heads_kv,
            total_q,
            items.max_items,
            (cu_seqlens_q.dtype == torch.int64) + 2 * (cu_seqlens_k.dtype == torch.int64),
            bottom_right,
            self._block_m,
            self._block_n,
            self._causal,
            max(scale, _SMALLEST_SCALE) * _LOG2_E,
        )
        if found is None:
            self._launch(self._builder, 1, _BUILDER_THREADS, 0, stream, block.arguments)
            if not rebuilt:
                work_list.keep(cu_seqlens_q, cu_seqlens_k, key, items)
        grid = min(self._slots, items.max_items * heads)
        self._launch(self._kernel, grid, self._threads, self._smem, stream, block.arguments)
        if target is not out:
            out.copy_(target)

    def _put_map(
        self, data: bytearray, index: int, tensor: torch.Tensor, tokens: int, heads: int, dim: int, rows: int
    ) -> bool:
        """Write the ragged map of a packed tensor into a parameter block; False where TMA can't address its layout."""
        address = tensor.data_ptr()
        strides = tensor.stride()
        key = (index, tokens > 1, heads, *strides)
        encoded = self._map_templates.get(key)
        if encoded is None:
            # Strides that are never stepped over must be legal all the same.
            token_stride = strides[0] * _ELEMENT_BYTES if tokens > 1 else 16
            head_stride = strides[1] * _ELEMENT_BYTES if heads > 1 else 16
            if strides[2] != 1 or min(token_stride, head_stride) <= 0 or (token_stride | head_stride | address) % 16:
                return False
            encoded = tensor_map.encode(address, self._dtype, dim, heads, token_stride, head_stride, rows)
            if tensor_map.address_comes_first():
                self._map_templates[key] = encoded
        if address % 16:
            return False
        offset = index * tensor_map.MAP_BYTES
        data[offset : offset + tensor_map.MAP_BYTES] = encoded
        params.ADDRESS.pack_into(data, offset, address)
        return True


def _heads_per_group(heads: int, heads_kv: int, kv_bytes_per_head: int) -> int:
    """Query heads whose tiles are interleaved: as many as keep the K and V in flight inside L2, in whole kv heads."""
    if heads_kv * kv_bytes_per_head <= _L2_SHARE:
        return heads
    for groups in range(2, heads_kv):
        if heads_kv % groups == 0 and heads_kv // groups * kv_bytes_per_head <= _L2_SHARE:
            return heads // groups
    return heads // heads_kv
