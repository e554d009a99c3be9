"""The parameter block of the backward for short sequences: the bytes of ``struct PackedBackwardParams`` in
templates/cuda/include/packed_backward_params.cuh.
"""

from __future__ import annotations

import struct

from jagtile.runtime.cuda.tensor_map import MAP_BYTES

MAPS = ("map_q", "map_dout", "map_k", "map_v", "map_dq", "map_dk", "map_dv")
POINTERS = ("cu_seqlens_q", "cu_seqlens_k", "lse", "dlse", "out", "dout", "delta")
STRIDES = ("out_token", "out_head", "dout_token", "dout_head")
INTEGERS = ("batch", "heads", "gqa_ratio", "total_q", "total_k", "wide_offsets", "bottom_right")
FLOATS = ("scale", "scale_log2")
SCALARS = struct.Struct(f"<{len(POINTERS)}Q{len(STRIDES)}q{len(INTEGERS)}i{len(FLOATS)}f")
SCALARS_OFFSET = len(MAPS) * MAP_BYTES
ADDRESSES = struct.Struct(f"<{len(POINTERS)}Q")  # the scalars' first
BLOCK_BYTES = -(-(SCALARS_OFFSET + SCALARS.size) // 64) * 64
