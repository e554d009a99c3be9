"""How the algorithm split lays a call's heads into tiles, and for how many pieces of keys it provides.

Both follow from the numbers of heads and the device alone: the rule by which the device cuts keys into pieces
(templates/cuda/include/split_work_list.cuh) never needs more than what is provided here.
"""

from __future__ import annotations

from typing import NamedTuple

ROWS = 64  # of one math warpgroup
PIECES_PER_CTA = 4  # beyond the first of each block of rows: how evenly work can be shared out (kPiecesPerCta there)
MAX_EXTRA_ITEMS = (1 << 15) - 1  # twice as many slots are counted in 16 bits


class HeadPacks(NamedTuple):
    """The query heads of a call in packs that share tiles."""

    total: int
    per_kv_head: int
    heads: int  # of a pack
    tokens: int  # of each of them in the rows of one warpgroup
    extra_items: int  # room for pieces beyond the first of each block of rows, for each pack
    results: int  # of one piece and warpgroup, that there must be room for


def unpacked(heads: int, heads_kv: int) -> HeadPacks:
    """Packs of one head; keys are not split."""
    return HeadPacks(heads, heads // heads_kv, 1, ROWS, 0, 0)


def packed(heads: int, heads_kv: int, warpgroups: int, ctas: int) -> HeadPacks:
    """Packs of as many heads of a kv head as fit; room for pieces that keep so many CTAs busy."""
    ratio = heads // heads_kv
    together = packed_heads(ratio)
    packs = heads // together
    extra = min(PIECES_PER_CTA * ctas // packs, MAX_EXTRA_ITEMS)
    # A block of rows in n pieces has n - 1 beyond its first, and n results: at most twice as many.
    return HeadPacks(packs, ratio // together, together, ROWS // together, extra, 2 * extra * packs * warpgroups)


def packed_heads(ratio: int) -> int:
    """How many of a kv head's query heads share a tile: the largest divisor of their number that fits its rows."""
    return max(n for n in range(1, min(ratio, ROWS) + 1) if ratio % n == 0)
