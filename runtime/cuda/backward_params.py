"""The parameter block of the CUDA backwards whose tiles are of one sequence: the bytes of ``struct BackwardParams`` in
templates/cuda/include/backward_params.cuh, and the sizes of the scratch that it points to.
"""

from __future__ import annotations

import struct

from jagtile.runtime.cuda.tensor_map import MAP_BYTES

MAPS = ("map_q", "map_dout", "map_k", "map_v", "map_dk", "map_dv", "map_rows_out", "map_rows_dout")
POINTERS = (
    *("cu_seqlens_q", "cu_seqlens_k", "work_list", "lse", "dlse"),
    *("out", "dout", "dq", "delta", "dq_sums", "turns", "progress", "direct", "summed"),
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
    "progress_count",
    "in_order",
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


def progress_ints(tiles: int) -> int:
    """int32 numbers of how far passes over rows between so many tiles are: two of all, two a sequence and kv head."""
    return 2 * (tiles + 1)


# A piece's place in its tile has room for so many blocks of queries (templates/cuda/include/tail_pieces.cuh).
MOST_TAIL_BLOCKS = (1 << 19) - 1


def tail_words(tiles: int, block_n: int, columns: int) -> int:
    """4-byte numbers of so many tiles that may be in pieces (templates/cuda/include/tail_pieces.cuh): float32 dK and dV
    of each, of so many columns together, and up to three counters, at multiples of 16 bytes, and what it takes to get
    to the first.
    """
    return tiles * (block_n * columns + 4) + 3 if tiles else 0


def scratch_bytes(total_q: int, heads: int, head_dim: int, others: int = 0) -> int:
    """Device memory of one backward beside its inputs, gradients and work list; ``others``: 4-byte numbers, one a tile
    for each that adds to dQ where tiles wait for others, ``progress_ints`` where a kernel makes all passes, and
    ``tail_words`` where tiles may be in pieces.
    """
    return 4 * (sum_floats(total_q, heads, head_dim) + delta_floats(total_q, heads) + others)
