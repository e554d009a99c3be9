"""The parameter blocks of templates/cpu/params.h, byte for byte."""

from __future__ import annotations

import struct

# Seven pointers; five (token, head) strides, total_q and total_k; six int32; the scale; dropout's three.
BLOCK = struct.Struct("=7Q12q6ifI2Q")
BLOCK_BYTES = (BLOCK.size + 7) // 8 * 8

# What a backward's block has behind a forward's: five pointers, five strides.
GRADIENTS = struct.Struct("=5Q10q")
GRADIENT_BLOCK_BYTES = BLOCK_BYTES + GRADIENTS.size

# Status that a kernel returns.
BAD_OFFSETS = 1
NO_MEMORY = 2
