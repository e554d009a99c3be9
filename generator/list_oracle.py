"""Work lists built on the host, and whether one that a device built is right: for tests and benchmarks."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from jagtile.runtime.cuda.params import WORK_ITEM_BYTES, WORK_LIST_HEADER_BYTES

Ints = npt.NDArray[np.int64]
ROUND = 1024  # tiles that a device places at once, in any order
_MOST_PIECES, _SMALLEST_PIECE = 127, 256  # templates/cuda/include/split_work_list.cuh


class Blocking(NamedTuple):
    """What a list depends on, beside the offsets."""

    block_m: int
    block_n: int
    causal: bool = False
    bottom_right: bool = False


class BuiltList(NamedTuple):
    """A device's list; items are rows of eight numbers, as in ``struct WorkItem``."""

    longest: int
    total: float
    by_cost: Ints
    by_sequence: Ints
    max_items: int


def read(data: bytes, max_items: int) -> BuiltList:
    """The list in the bytes of its buffer."""
    count, longest = (int(number) for number in np.frombuffer(data, np.int32, 2))
    total = float(np.frombuffer(data, np.float32, 1, 8)[0])
    assert 0 <= count <= max_items, f"{count} items, with room for {max_items}"
    assert not np.frombuffer(data, np.int32, 2, 12).any(), "counters that are not zero"
    words = np.frombuffer(data, np.int32, 2 * max_items * WORK_ITEM_BYTES // 4, WORK_LIST_HEADER_BYTES)
    items = words.reshape(2, max_items, -1).astype(np.int64)[:, :count]
    return BuiltList(longest, total, items[0], items[1], max_items)


def bucket(cost: Ints) -> Ints:
    """Where costs are sorted to, the dearest first."""
    bits = (cost + 1).astype(np.float32).view(np.int32).astype(np.int64) >> 19
    return np.asarray(511 - (bits - (127 << 4)))


def _query_tiles(offsets_q: Ints, offsets_k: Ints, how: Blocking, most: int) -> Ints:
    """Blocks of queries in the order of sequences, with all key blocks that they visit."""
    lengths_q, lengths_k = np.maximum(np.diff(offsets_q), 0), np.maximum(np.diff(offsets_k), 0)
    counts = -(-lengths_q // how.block_m)
    owner = np.repeat(np.arange(len(counts)), counts)[:most]
    row = (np.arange(len(owner)) - (np.cumsum(counts) - counts)[owner]) * how.block_m
    q_length, visible = lengths_q[owner], lengths_k[owner]
    if how.causal:
        shift = visible - q_length if how.bottom_right else 0
        visible = np.minimum(visible, np.maximum(np.minimum(row + how.block_m, q_length) + shift, 0))
    columns = (offsets_q[owner], q_length, offsets_k[owner], lengths_k[owner], row, -(-visible // how.block_n))
    return np.stack([*columns, np.zeros_like(row), np.zeros_like(row)], 1)


def _pieces(tiles: Ints, how: Blocking, extra_items: int) -> Ints:
    """The same with keys cut into pieces, in order."""
    costs = tiles[:, 5]
    longest, total = int(costs.max(initial=0)), int(costs.sum())
    room, fewest = -(-total // extra_items), -(-longest // _MOST_PIECES)
    limit = max(room, fewest, _SMALLEST_PIECE // how.block_n, 1)
    pieces = np.maximum(-(-costs // limit), 1)
    index = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    tiles, pieces, slots = (np.repeat(values, pieces, 0) for values in (tiles, pieces, _slots(pieces)))
    blocks, longer = tiles[:, 5] // pieces, tiles[:, 5] % pieces
    tiles[:, 6] = blocks * index + np.minimum(index, longer)
    tiles[:, 5] = tiles[:, 6] + blocks + (index < longer)
    tiles[:, 7] = np.where(pieces > 1, slots | index << 16 | pieces << 24, 0)
    return tiles


def _slots(pieces: Ints) -> Ints:
    split = np.where(pieces > 1, pieces, 0)
    return np.asarray(np.cumsum(split) - split)


def assert_right_queries(
    built: BuiltList, offsets_q: Ints, offsets_k: Ints, how: Blocking, extra_items: int | None = None
) -> None:
    """A forward's list; ``extra_items``: of a kernel that splits keys."""
    tiles = _query_tiles(offsets_q, offsets_k, how, built.max_items - (extra_items or 0))
    items = _pieces(tiles, how, extra_items) if extra_items else tiles
    first = np.flatnonzero(np.diff(tiles[:, 4], prepend=0) <= 0) if len(tiles) else np.zeros(0, np.int64)
    lengths = np.diff(first, append=len(tiles))
    within = np.arange(len(tiles)) - np.repeat(first, lengths)
    backwards = np.repeat(first + lengths - 1, lengths) - within
    expected = items[::-1] if extra_items is not None else tiles[backwards]
    assert np.array_equal(built.by_sequence, expected), "the list by sequences"
    longest = [(some[:, 5] - some[:, 6]).max(initial=0) for some in (items, tiles)]
    assert longest[0] <= built.longest <= longest[1], "the longest item"
    assert built.total == np.float32(tiles[:, 5].sum()), "the sum of all costs"

    number = {item.tobytes(): place for place, item in enumerate(np.ascontiguousarray(items))}
    order = np.array([number[item.tobytes()] for item in np.ascontiguousarray(built.by_cost)], np.int64)
    assert np.array_equal(np.sort(order), np.arange(len(items))), "each item once"
    kinds = items[:, 1] > how.block_m if extra_items is not None else np.zeros(len(items), bool)
    if 0 < kinds.sum() < len(kinds):
        alone = len(kinds) - int(kinds.sum())
        places = np.arange(alone) + np.arange(alone) * int(kinds.sum()) // alone
        assert np.array_equal(np.flatnonzero(~kinds[order]), places), "the two kinds at even distances"
    for kind in (order[~kinds[order]], order[kinds[order]]):
        buckets = bucket(items[kind, 5] - items[kind, 6])
        assert (np.diff(buckets) >= 0).all(), "the dearest first"
        for one in np.split(kind, np.flatnonzero(np.diff(buckets)) + 1):
            late = np.maximum.accumulate(one) - one
            assert late.max(initial=0) < ROUND + (len(items) - len(tiles)), "sequences in order"
