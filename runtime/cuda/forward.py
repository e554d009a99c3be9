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
_Q_ROWS = 64  # a math warpgroup's
_L2_SHARE = 32 << 20  # bytes of K and V that heads in flight together may take
_SMALLEST_SCALE = 1e-30


class _Block(threading.local):
    """A thread's own parameter block: the driver copies it while other threads may be filling theirs."""

    def __init__(self) -> None:
        self.bytes = ctypes.create_string_buffer(params.BLOCK_BYTES)
        self.address = ctypes.c_void_p(ctypes.addressof(self.bytes))
        self.argument = (ctypes.c_void_p * 1)(ctypes.addressof(self.bytes))


class CudaForwardKernel:
    """A loaded sm_90a forward (see ForwardKernel)."""

    def __init__(self, artifact: Artifact, device: torch.device) -> None:
        self.meta: ArtifactMeta = artifact.meta
        launch = self.meta.launch
        self._device_index = device.index if device.index is not None else torch.cuda.current_device()
        self._block_m, self._block_n = launch["block_m"], launch["block_n"]
        self._threads, self._smem = launch["num_threads"], launch["smem_bytes"]
        self._causal = launch["causal"]
        self._dtype = self.meta.spec.split("_")[1]
        properties = torch.cuda.get_device_properties(self._device_index)
        self._slots = properties.multi_processor_count * launch["ctas_per_sm"]
        with torch.cuda.device(self._device_index):
            driver.bind_primary_context(self._device_index)
            module = driver.load_module(artifact.path.read_bytes())
            self._kernel = driver.function(module, self.meta.symbol, self._smem)
            self._builder = driver.function(module, _BUILDER)
        self._patch_address = tensor_map.address_comes_first()
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
        total_q, heads, _ = q.shape
        if total_q == 0:
            return
        if torch._C._cuda_getDevice() != self._device_index:
            with torch.cuda.device(self._device_index):
                return self.forward(q, k, v, cu_seqlens_q, cu_seqlens_k, out, lse, scale, bottom_right)
        if scale <= 0.0:  # the running maximum assumes a positive scale
            if scale < 0.0:
                q, scale = -q, -scale
            else:
                scale = _SMALLEST_SCALE
        stream: int = torch._C._cuda_getCurrentRawStream(self._device_index)
        total_k, heads_kv, _ = k.shape
        block = self._block
        # Layouts that TMA cannot address are copied; every ordinary one (packed QKV views included) is not.
        q, k, v = (t if _aligned(t) else t.contiguous() for t in (q, k, v))
        staged: torch.Tensor | None = None
        if not _aligned(out):
            staged, out = out, torch.empty_like(out, memory_format=torch.contiguous_format)
        self._put_map(0, q, _Q_ROWS)
        # With no keys at all nothing is loaded, but a map must point somewhere.
        self._put_map(1, k if total_k else out, self._block_n)
        self._put_map(2, v if total_k else out, self._block_n)
        self._put_map(3, out, _Q_ROWS)

        capturing = torch._C._cuda_isCurrentStreamCapturing()
        key = (self._block_m, self._block_n, self._causal, int(bottom_right), stream)
        found = None if capturing else work_list.find(cu_seqlens_q, cu_seqlens_k, key)
        items = found or work_list.allocate(cu_seqlens_q, cu_seqlens_k, total_q, self._block_m)
        batch = cu_seqlens_q.shape[0] - 1
        kv_bytes = total_k * (k.shape[2] + v.shape[2]) * 2
        params.SCALARS.pack_into(
            block.bytes,
            params.SCALARS_OFFSET,
            cu_seqlens_q.data_ptr(),
            cu_seqlens_k.data_ptr(),
            items.address,
            lse.data_ptr() if lse is not None else 0,
            batch,
            heads,
            _heads_per_group(heads, heads_kv, kv_bytes),
            heads // heads_kv,
            total_q,
            items.max_items,
            int(cu_seqlens_q.dtype == torch.int64) | 2 * int(cu_seqlens_k.dtype == torch.int64),
            int(bottom_right),
            self._block_m,
            self._block_n,
            self._causal,
            scale * _LOG2_E,
        )
        if found is None:
            driver.launch(self._builder, 1, _BUILDER_THREADS, 0, stream, block.argument, self._device_index)
            if not capturing:
                work_list.keep(cu_seqlens_q, cu_seqlens_k, key, items)
        grid = min(self._slots, items.max_items * heads)
        driver.launch(self._kernel, grid, self._threads, self._smem, stream, block.argument, self._device_index)
        if staged is not None:
            staged.copy_(out)

    def _put_map(self, index: int, tensor: torch.Tensor, rows: int) -> None:
        """Write the ragged map of a packed tensor into this thread's parameter block."""
        tokens, heads, dim = tensor.shape
        # Strides that are never stepped over must be legal all the same.
        token_stride = tensor.stride(0) * 2 if tokens > 1 else 16
        head_stride = tensor.stride(1) * 2 if heads > 1 else 16
        address = tensor.data_ptr()
        offset = index * tensor_map.MAP_BYTES
        block = self._block.bytes
        key = (dim, heads, token_stride, head_stride, rows)
        if self._patch_address:
            template = self._map_templates.get(key)
            if template is None:
                template = tensor_map.encode(address, self._dtype, dim, heads, token_stride, head_stride, rows)
                self._map_templates[key] = template
            block[offset : offset + tensor_map.MAP_BYTES] = template
            params.ADDRESS.pack_into(block, offset, address)
        else:
            encoded = tensor_map.encode(address, self._dtype, dim, heads, token_stride, head_stride, rows)
            block[offset : offset + tensor_map.MAP_BYTES] = encoded


def _aligned(tensor: torch.Tensor) -> bool:
    """Whether TMA can address the tensor: a 16-byte aligned base and positive strides of multiples of 16 bytes."""
    tokens, heads, _ = tensor.shape
    token_stride, head_stride, last = tensor.stride()
    return (
        tensor.data_ptr() % 16 == 0
        and last == 1
        and (tokens <= 1 or (token_stride > 0 and token_stride % 8 == 0))
        and (heads == 1 or (head_stride > 0 and head_stride % 8 == 0))
    )


def _heads_per_group(heads: int, heads_kv: int, kv_bytes_per_head: int) -> int:
    """Query heads whose tiles are interleaved: as many as keep the K and V in flight inside L2, in whole kv heads."""
    for groups in range(1, heads_kv + 1):
        if heads_kv % groups == 0 and heads_kv // groups * kv_bytes_per_head <= _L2_SHARE:
            return heads // groups
    return heads // heads_kv
