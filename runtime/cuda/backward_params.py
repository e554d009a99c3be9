"""The parameter block of every CUDA backward: the bytes of ``struct BackwardParams`` in
templates/cuda/include/backward_params.cuh, and the sizes of the scratch that it points to.
"""

from __future__ import annotations

import struct

from jagtile.runtime.cuda.tensor_map import MAP_BYTES

MAPS = ("map_q", "map_dout", "map_k", "map_v", "map_dk", "map_dv")
POINTERS = (
    *("cu_seqlens_q", "cu_seqlens_k", "work_list", "lse", "dlse"),
    *("out", "dout", "dq", "delta", "dq_sums", "turns", "direct", "summed"),
)
STRIDES = ("out_token", "out_head", "dout_token", "dout_head", "dq_token", "dq_head")
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
    "turn_count",
)
FLOATS = ("scale", "scale_log2")
SCALARS = struct.Struct(f"<{len(POINTERS)}Q{len(STRIDES)}q{len(INTEGERS)}i{len(FLOATS)}f")
SCALARS_OFFSET = len(MAPS) * MAP_BYTES
ADDRESSES = struct.Struct(f"<{len(POINTERS)}Q")  # the scalars' first
BLOCK_BYTES = -(-(SCALARS_OFFSET + SCALARS.size) // 64) * 64


def sum_floats(total_q: int, heads: int, head_dim: int) -> int:
    """float32 numbers that dQ is summed up in: as many as dQ has, without padding."""
    return total_q * heads * head_dim


def delta_floats(total_q: int, heads: int) -> int:
    """float32 numbers of rowsum(dO * O) - dlse."""
    return total_q * heads


def bit_words(total_q: int) -> int:
    """int32 words of a bit a query."""
    return -(-total_q // 32)


def scratch_bytes(total_q: int, heads: int, head_dim: int, turns: int = 0) -> int:
    """Device memory of one backward beside its inputs, gradients and work list; ``turns``: counters, int32, one a tile
    for each that adds to dQ, 0 where additions need no order.
    """
    return 4 * (sum_floats(total_q, heads, head_dim) + delta_floats(total_q, heads) + turns)
