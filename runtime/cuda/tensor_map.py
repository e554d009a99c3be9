"""Ragged TMA tensor maps: one map serves every sequence of a packed (tokens, heads, dim) tensor and clips at its end.

A 5-D map (dim, 2^30 tokens, heads, 2^31 - 1, 2^31 - 1) with byte strides (token, head, 2^34 - token, token). For a
sequence (begin, length) the coordinates (column, 2^30 - length + row, head, 2^30, begin + length) address its row
``row`` modulo 2^64, while rows >= length are out of bounds: loads give zeros, stores are dropped. The extents do not
depend on the batch, so that a map is encoded once per (strides, heads, dim) and only its base address changes from call
to call. The technique is known from Triton's and quack's ragged TMA helpers.
"""

from __future__ import annotations

import ctypes
import struct
from functools import lru_cache

import torch

from jagtile.runtime.cuda.driver import NoContextError, bind_primary_context, bindings, call

MAP_BYTES = 128
ALIGNMENT = 16  # of addresses and strides, in bytes
_ELEMENT_BYTES = 2
_MAX_LAYOUTS = 4096  # remembered a kernel: the strides of head-major tensors change with every batch
_PANEL_COLUMNS = 64  # 128 bytes: the width of the 128-byte swizzle
_EXTENT = 1 << 30
_OUTER_EXTENT = (1 << 31) - 1


def encode(
    address: int,
    dtype: str,
    dim: int,
    heads: int,
    token_stride: int,
    head_stride: int,
    rows: int,
    box_heads: int = 1,
) -> bytes:
    """The 128 bytes of a map. Strides in bytes, multiples of 16; a box is ``box_heads`` x ``rows`` x 64 columns."""
    driver = bindings()
    types = driver.CUtensorMapDataType
    u32, u64 = driver.cuuint32_t, driver.cuuint64_t
    tensor_map = call(
        "cuTensorMapEncodeTiled",
        {"bf16": types.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, "fp16": types.CU_TENSOR_MAP_DATA_TYPE_FLOAT16}[dtype],
        5,
        address,
        [u64(extent) for extent in (dim, _EXTENT, heads, _OUTER_EXTENT, _OUTER_EXTENT)],
        [u64(stride) for stride in (token_stride, head_stride, (1 << 34) - token_stride, token_stride)],
        [u32(extent) for extent in (_PANEL_COLUMNS, rows, box_heads, 1, 1)],
        [u32(1)] * 5,
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_NONE,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    return ctypes.string_at(tensor_map.getPtr(), MAP_BYTES)


@lru_cache(maxsize=1)
def address_comes_first() -> bool:
    """Whether a map's first 8 bytes are its base address and nothing else depends on it; asked of this driver once."""
    arguments = ("bf16", 128, 8, 2048, 256, 64)
    first, second = 0x7F0000000000, 0x7F1234567890
    one, other = encode(first, *arguments), encode(second, *arguments)
    return one[:8] == struct.pack("<Q", first) and other == struct.pack("<Q", second) + one[8:]


# Whether there are two tokens or more of q and of k, heads, heads_kv, every tensor's strides: what maps depend on,
# beside addresses.
Layout = tuple[object, ...]


class MapCache:
    """The maps of a kernel's tensors by the tensors' layout; boxes of ``rows`` rows and ``heads`` heads, or one."""

    def __init__(self, dtype: str, rows: tuple[int, ...], heads: tuple[int, ...] | None = None) -> None:
        self._dtype = dtype
        self._boxes = tuple(zip(rows, heads or (1,) * len(rows), strict=True))
        self._maps: dict[Layout, bytes] = {}

    def __len__(self) -> int:
        return len(self._maps)

    def find(
        self, layout: Layout, mapped: tuple[torch.Tensor, ...], unmapped: tuple[torch.Tensor, ...] = ()
    ) -> bytes | None:
        """The maps of ``mapped``, of these or other addresses if ``address_comes_first``. None where TMA cannot address
        one of them, or where one of ``unmapped`` is laid out so.
        """
        if not all(map(addressable, (*mapped, *unmapped))):
            return None
        return self._maps.get(layout) or self._encode_all(layout, mapped)

    def _encode_all(self, layout: Layout, tensors: tuple[torch.Tensor, ...]) -> bytes:
        """The maps of addressable tensors, remembered where all but their addresses follows from the layout."""
        any_address = tensors[0].data_ptr()
        maps = b"".join(self._encode(*pair, any_address) for pair in zip(tensors, self._boxes, strict=True))
        if address_comes_first():
            if len(self._maps) >= _MAX_LAYOUTS:
                self._maps.clear()
            self._maps[layout] = maps
        return maps

    def _encode(self, tensor: torch.Tensor, box: tuple[int, int], any_address: int) -> bytes:
        """``any_address`` stands in for that of a tensor without elements."""
        _, heads, dim = tensor.shape
        address = tensor.data_ptr() or any_address
        arguments = (address, self._dtype, dim, heads, *_stepped_strides(tensor), *box)
        try:
            return encode(*arguments)
        except NoContextError:
            bind_primary_context(tensor.device.index)
            return encode(*arguments)


def addressable(tensor: torch.Tensor) -> bool:
    """Whether TMA can address a tensor's layout: nothing expanded, rows that begin at multiples of 16 bytes."""
    token_stride, head_stride = _stepped_strides(tensor)
    return (
        tensor.stride(2) == 1
        and min(token_stride, head_stride) > 0
        and (token_stride | head_stride | tensor.data_ptr()) % ALIGNMENT == 0
    )


def _stepped_strides(tensor: torch.Tensor) -> tuple[int, int]:
    """Bytes from token to token and from head to head; what is never stepped over gets a stride that is legal."""
    tokens, heads, _ = tensor.shape
    token_stride, head_stride, _ = tensor.stride()
    return (
        token_stride * _ELEMENT_BYTES if tokens > 1 else ALIGNMENT,
        head_stride * _ELEMENT_BYTES if heads > 1 else ALIGNMENT,
    )
