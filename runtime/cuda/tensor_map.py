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

from jagtile.runtime.cuda.driver import check, library

MAP_BYTES = 128
PANEL_COLUMNS = 64  # 128 bytes: the width of the 128-byte swizzle
_TYPES = {"bf16": 9, "fp16": 6}
_EXTENT = 1 << 30
_OUTER_EXTENT = (1 << 31) - 1
_SWIZZLE_128B = 3
_L2_PROMOTION_256B = 3


def encode(address: int, dtype: str, dim: int, heads: int, token_stride: int, head_stride: int, rows: int) -> bytes:
    """The 128 bytes of a map. Strides in bytes, multiples of 16; the box is ``rows`` x 64 columns."""
    storage = ctypes.create_string_buffer(MAP_BYTES + 64)
    aligned = (ctypes.addressof(storage) + 63) & ~63
    dims = (ctypes.c_uint64 * 5)(dim, _EXTENT, heads, _OUTER_EXTENT, _OUTER_EXTENT)
    strides = (ctypes.c_uint64 * 4)(token_stride, head_stride, (1 << 34) - token_stride, token_stride)
    box = (ctypes.c_uint32 * 5)(PANEL_COLUMNS, rows, 1, 1, 1)
    unit = (ctypes.c_uint32 * 5)(1, 1, 1, 1, 1)
    code = library().cuTensorMapEncodeTiled(
        ctypes.c_void_p(aligned),
        ctypes.c_int(_TYPES[dtype]),
        ctypes.c_uint32(5),
        ctypes.c_void_p(address),
        dims,
        strides,
        box,
        unit,
        ctypes.c_int(0),
        ctypes.c_int(_SWIZZLE_128B),
        ctypes.c_int(_L2_PROMOTION_256B),
        ctypes.c_int(0),
    )
    check(
        code,
        f"cuTensorMapEncodeTiled(address={address:#x}, dim={dim}, heads={heads}, token_stride={token_stride}, "
        f"head_stride={head_stride}, rows={rows})",
    )
    return ctypes.string_at(aligned, MAP_BYTES)


@lru_cache(maxsize=1)
def address_comes_first() -> bool:
    """Whether a map's first 8 bytes are its base address and nothing else depends on it; asked of this driver once."""
    arguments = ("bf16", 128, 8, 2048, 256, 64)
    first, second = 0x7F0000000000, 0x7F1234567890
    one, other = encode(first, *arguments), encode(second, *arguments)
    return one[:8] == struct.pack("<Q", first) and other == struct.pack("<Q", second) + one[8:]
