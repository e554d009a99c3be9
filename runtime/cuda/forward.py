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
        self._pinned = (ctypes.c_char * params.BLOCK_BYTES).from_buffer(self.data)
        self.argument = (ctypes.c_void_p * 1)(ctypes.addressof(self._pinned))


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
        scale = max(scale, _SMALLEST_SCALE)
        # Layouts that TMA cannot address are copied; every ordinary one, packed QKV views included, is not.
        q, k, v = _addressable(q), _addressable(k), _addressable(v)
        target = out if _is_addressable(out) else torch.empty_like(out, memory_format=torch.contiguous_format)
        if torch._C._cuda_getDevice() == self._device:
            self._launch(q, k, v, cu_seqlens_q, cu_seqlens_k, target, lse, scale, bottom_right)
        else:
            with torch.cuda.device(self._device):
                self._launch(q, k, v, cu_seqlens_q, cu_seqlens_k, target, lse, scale, bottom_right)
        if target is not out:
            out.copy_(target)

    def _launch(
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
        batch = cu_seqlens_q.shape[0] - 1
        stream: int = torch._C._cuda_getCurrentRawStream(self._device)
        capturing: bool = torch._C._cuda_isCurrentStreamCapturing()
        key = (self._block_m, self._block_n, self._causal, int(bottom_right), stream)
        found = None if capturing else work_list.find(cu_seqlens_q, cu_seqlens_k, key)
        items = found or work_list.allocate(cu_seqlens_q, cu_seqlens_k, total_q, self._block_m)

        block = self._block
        self._put_map(block.data, 0, q, _Q_ROWS)
        # With no keys at all nothing is loaded, but a map must point somewhere.
        self._put_map(block.data, 1, k if total_k else q, self._block_n)
        self._put_map(block.data, 2, v if total_k else q, self._block_n)
        self._put_map(block.data, 3, out, _Q_ROWS)
        params.SCALARS.pack_into(
            block.data,
            params.SCALARS_OFFSET,
            cu_seqlens_q.data_ptr(),
            cu_seqlens_k.data_ptr(),
            items.address,
            lse.data_ptr() if lse is not None else 0,
            batch,
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
            scale * _LOG2_E,
        )
        if found is None:
            driver.launch(self._builder, 1, _BUILDER_THREADS, 0, stream, block.argument, self._device)
            if not capturing:
                work_list.keep(cu_seqlens_q, cu_seqlens_k, key, items)
        grid = min(self._slots, items.max_items * heads)
        driver.launch(self._kernel, grid, self._threads, self._smem, stream, block.argument, self._device)

    def _put_map(self, block: bytearray, index: int, tensor: torch.Tensor, rows: int) -> None:
        """Write the ragged map of a packed tensor into a parameter block."""
        tokens, heads, dim = tensor.shape
        # Strides that are never stepped over must be legal all the same.
        token_stride = tensor.stride(0) * _ELEMENT_BYTES if tokens > 1 else 16
        head_stride = tensor.stride(1) * _ELEMENT_BYTES if heads > 1 else 16
        address = tensor.data_ptr()
        key = (dim, heads, token_stride, head_stride, rows)
        encoded = self._map_templates.get(key)
        if encoded is None:
            encoded = tensor_map.encode(address, self._dtype, dim, heads, token_stride, head_stride, rows)
            if tensor_map.address_comes_first():
                self._map_templates[key] = encoded
        offset = index * tensor_map.MAP_BYTES
        block[offset : offset + tensor_map.MAP_BYTES] = encoded
        params.ADDRESS.pack_into(block, offset, address)


def _is_addressable(tensor: torch.Tensor) -> bool:
    """Whether TMA can address the tensor: a 16-byte aligned base and positive strides of multiples of 16 bytes."""
    tokens, heads, _ = tensor.shape
    token_stride, head_stride, last = tensor.stride()
    return (
        tensor.data_ptr() % 16 == 0
        and last == 1
        and (tokens <= 1 or (token_stride > 0 and token_stride % 8 == 0))
        and (heads == 1 or (head_stride > 0 and head_stride % 8 == 0))
    )


def _addressable(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if _is_addressable(tensor) else tensor.clone(memory_format=torch.contiguous_format)


def _heads_per_group(heads: int, heads_kv: int, kv_bytes_per_head: int) -> int:
    """Query heads whose tiles are interleaved: as many as keep the K and V in flight inside L2, in whole kv heads."""
    for groups in range(1, heads_kv):
        if heads_kv % groups == 0 and heads_kv // groups * kv_bytes_per_head <= _L2_SHARE:
            return heads // groups
    return heads // heads_kv
