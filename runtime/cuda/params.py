"""The parameter block of every CUDA kernel: the bytes of ``struct Params`` in templates/cuda/include/params.cuh."""

from __future__ import annotations

import struct

from jagtile.runtime.cuda.tensor_map import MAP_BYTES

MAPS = ("map_q", "map_k", "map_v", "map_out")
POINTERS = ("cu_seqlens_q", "cu_seqlens_k", "work_list", "lse")
INTEGERS = (
    "batch",
    "heads",
    "gqa_ratio",
    "total_q",
    "max_items",
    "wide_offsets",
    "bottom_right",
    "block_m",
    "block_n",
    "causal",
)
SCALARS = struct.Struct(f"<{len(POINTERS)}Q{len(INTEGERS)}if")
SCALARS_OFFSET = len(MAPS) * MAP_BYTES
BLOCK_BYTES = -(-(SCALARS_OFFSET + SCALARS.size) // 64) * 64

WORK_LIST_HEADER_BYTES = 64
WORK_ITEM_BYTES = 32


def work_list_bytes(max_items: int, batch: int) -> int:
    """Header, items in two orders, and the builder's scratch of batch + 1 ints."""
    return WORK_LIST_HEADER_BYTES + 2 * max_items * WORK_ITEM_BYTES + (batch + 1) * 4
