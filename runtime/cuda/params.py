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
    "causal_rows",
)
SCALARS = struct.Struct(f"<{len(POINTERS)}Q{len(INTEGERS)}if")
SCALARS_OFFSET = len(MAPS) * MAP_BYTES
ADDRESSES = struct.Struct(f"<{len(POINTERS)}Q")  # the scalars' first

# What only kernels that split keys read comes last, and is packed for them alone.
SPLIT_INTEGERS = ("packed_heads", "extra_items", "results")
SPLIT_POINTERS = ("partials",)
SPLIT_SCALARS = struct.Struct(f"<{len(SPLIT_INTEGERS)}i{len(SPLIT_POINTERS)}Q")
SPLIT_OFFSET = SCALARS_OFFSET + SCALARS.size
ADDRESS = struct.Struct("<Q")
PARTIALS_OFFSET = SPLIT_OFFSET + SPLIT_SCALARS.size - ADDRESS.size

# In place of the maps, for kernels that copy rows themselves: each tensor's address and two strides in bytes. The last
# one also for kernels that store out from registers.
ROW_TENSORS = ("q", "k", "v", "out")
ROWS = struct.Struct(f"<{3 * len(ROW_TENSORS)}Q")
ROWS_OFFSET = SPLIT_OFFSET + SPLIT_SCALARS.size
ROW_ADDRESSES = slice(ROWS_OFFSET // 8, (ROWS_OFFSET + ROWS.size) // 8, 3)  # words of a block
OUT_ROWS = struct.Struct("<3Q")
OUT_ROWS_OFFSET = ROWS_OFFSET + ROWS.size - OUT_ROWS.size
BLOCK_BYTES = -(-(ROWS_OFFSET + ROWS.size) // 64) * 64

WORK_LIST_HEADER_BYTES = 64
WORK_ITEM_BYTES = 32


def work_list_bytes(max_items: int, extra_ints: int = 0) -> int:
    """Header, items in two orders, and what else goes with a list."""
    return WORK_LIST_HEADER_BYTES + 2 * max_items * WORK_ITEM_BYTES + extra_ints * 4
