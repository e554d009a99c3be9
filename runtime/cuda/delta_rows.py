"""The pass over rows before a backward's attention kernel (templates/cuda/include/delta_rows.cuh): its launch."""

from __future__ import annotations

from jagtile.runtime.errors import UnsupportedError

PREPARE = "jagtile_backward_prepare"
ROW_THREADS = 256
_ROW_TOKENS = 16  # of one head, a warp
_MAX_ROWS = 1 << 31


def check_rows(total_q: int, heads: int) -> None:
    """UnsupportedError where there are more rows than a kernel can count."""
    if total_q * heads >= _MAX_ROWS:
        raise UnsupportedError(f"{total_q} queries of {heads} heads; served: fewer than {_MAX_ROWS} in all")


def row_ctas(total_q: int, heads: int) -> int:
    """CTAs of the pass."""
    return -(-(-(-total_q // _ROW_TOKENS) * heads) // (ROW_THREADS // 32))
