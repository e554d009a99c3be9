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

from jagtile.runtime.cuda.driver import bindings, call

MAP_BYTES = 128
_PANEL_COLUMNS = 64  # 128 bytes: the width of the 128-byte swizzle
_EXTENT = 1 << 30
_OUTER_EXTENT = (1 << 31) - 1


def encode(address: int, dtype: str, dim: int, heads: int, token_stride: int, head_stride: int, rows: int) -> bytes:
    """The 128 bytes of a map. Strides in bytes, multiples of 16; the box is ``rows`` x 64 columns."""
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
        [u32(extent) for extent in (_PANEL_COLUMNS, rows, 1, 1, 1)],
        [u32(1)] * 5,
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
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
