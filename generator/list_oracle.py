"""Work lists built on the host, and whether one that a device built is right: for tests and benchmarks."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from jagtile.runtime.cuda.params import WORK_ITEM_BYTES, WORK_LIST_HEADER_BYTES

Ints = npt.NDArray[np.int64]
ROUND = 1024  # tiles that a device places at once, in any order
_MOST_PIECES, _PIECES_PER_CTA, _FEW_ROWS = 127, 4, 4  # templates/cuda/include/split_work_list.cuh
_LAST_TILES, _LAST_SEQUENCES = 256, 16  # templates/cuda/include/key_blocks.cuh
_PACKED_SEQUENCES = 8  # templates/cuda/include/sequence_packs.cuh
_SMALLEST_PIECE, _SMALLEST_OF_FEW_ROWS, _WORTH_CUTTING = 512, 256, 1024


class Blocking(NamedTuple):
    """What a list depends on, beside the offsets."""

    block_m: int
    block_n: int
    causal: bool = False
    bottom_right: bool = False
    warpgroup_rows: int = 64  # of block_m; causal blocks of queries end where the last such rows do
    packs: bool = False  # short neighbours share a tile


class BuiltList(NamedTuple):
    """A device's list; items are rows of eight numbers, as in ``struct WorkItem``."""

    longest: int
    total: float
    heads_together: int  # 0: they don't, 1: dearest blocks first, 2: sequence by sequence
    by_cost: Ints
    by_sequence: Ints
    max_items: int


def read(data: bytes, max_items: int) -> BuiltList:
    """The list in the bytes of its buffer."""
    count, longest = (int(number) for number in np.frombuffer(data, np.int32, 2))
    total, together = float(np.frombuffer(data, np.float32, 1, 8)[0]), int(np.frombuffer(data, np.int32, 1, 12)[0])
    assert 0 <= count <= max_items, f"{count} items, with room for {max_items}"
    assert not np.frombuffer(data, np.int32, 2, 16).any(), "counters that are not zero"
    words = np.frombuffer(data, np.int32, 2 * max_items * WORK_ITEM_BYTES // 4, WORK_LIST_HEADER_BYTES)
    items = words.reshape(2, max_items, -1).astype(np.int64)[:, :count]
    return BuiltList(longest, total, together, items[0], items[1], max_items)


def bucket(cost: Ints) -> Ints:
    """Where costs are sorted to, the dearest first."""
    bits = (cost + 1).astype(np.float32).view(np.int32).astype(np.int64) >> 19
    return np.asarray(511 - (bits - (127 << 4)))


def _packs(offsets_q: Ints, offsets_k: Ints, how: Blocking) -> Ints:
    """How many sequences the tile of each has, 0 where it is in that of one before: as many as fit, eight by eight."""
    batch = len(offsets_q) - 1
    packed = np.ones(batch, np.int64)
    limits = ((offsets_q.tolist(), how.block_m), (offsets_k.tolist(), how.block_n))

    def fit(first: int, last: int) -> bool:
        return all(0 <= at[last + 1] - at[first] <= most and at[last + 1] >= at[last] for at, most in limits)

    first = None
    for number in range(batch if how.packs else 0):
        if number % _PACKED_SEQUENCES and first is not None and fit(first, number):
            packed[first] += 1
            packed[number] = 0
        else:
            first = number if fit(number, number) else None
    return packed


def _query_tiles(offsets_q: Ints, offsets_k: Ints, how: Blocking, most: int) -> Ints:
    """Blocks of queries in the order of sequences, with all key blocks that they visit."""
    packed = _packs(offsets_q, offsets_k, how)
    ends = np.arange(len(packed)) + packed
    lengths_q, lengths_k = (np.maximum(offsets[ends] - offsets[:-1], 0) for offsets in (offsets_q, offsets_k))
    counts = -(-lengths_q // how.block_m)
    owner = np.repeat(np.arange(len(counts)), counts)[:most]
    row = (np.arange(len(owner)) - (np.cumsum(counts) - counts)[owner]) * how.block_m
    if how.causal:
        row -= (counts * how.block_m + -lengths_q // how.warpgroup_rows * how.warpgroup_rows)[owner]
    q_length, visible = lengths_q[owner], lengths_k[owner]
    if how.causal:
        shift = visible - q_length if how.bottom_right else 0
        visible = np.minimum(visible, np.maximum(np.minimum(row + how.block_m, q_length) + shift, 0))
    shares = packed[owner] > 1  # of all keys, whatever the mask; as many rows as there are
    row, visible = np.where(shares, 0, row), np.where(shares, lengths_k[owner], visible)
    piece = np.where(shares, (packed[owner] - 1 << 28 | owner) - (1 << 31), 0)
    columns = (offsets_q[owner], q_length, offsets_k[owner], lengths_k[owner], row, -(-visible // how.block_n))
    return np.stack([*columns, np.zeros_like(row), piece], 1)


def _pieces(tiles: Ints, how: Blocking, extra_items: int) -> Ints:
    """The same with keys cut into pieces, in order."""
    costs = tiles[:, 5]
    longest, total = int(costs.max(initial=0)), int(costs.sum())
    part, fewest = -(-total // extra_items), -(-longest // _MOST_PIECES)
    few_rows = max(part, fewest, _SMALLEST_OF_FEW_ROWS // how.block_n, 1)
    piece = max(min((_PIECES_PER_CTA - 1) * part, longest), fewest, _SMALLEST_PIECE // how.block_n, 1)
    whole = costs <= min(2 * _PIECES_PER_CTA * part + _WORTH_CUTTING // how.block_n, max(longest, 1))
    limits = np.where(_FEW_ROWS * tiles[:, 1] <= how.block_m, few_rows, np.where(whole, np.maximum(costs, 1), piece))
    pieces = np.maximum(-(-costs // limits), 1)
    index = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    tiles, pieces, slots = (np.repeat(values, pieces, 0) for values in (tiles, pieces, _slots(pieces)))
    blocks, longer = tiles[:, 5] // pieces, tiles[:, 5] % pieces
    tiles[:, 6] = blocks * index + np.minimum(index, longer)
    tiles[:, 5] = tiles[:, 6] + blocks + (index < longer)
    tiles[:, 7] = np.where(pieces > 1, slots | index << 16 | pieces << 24, tiles[:, 7])
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
    batch = len(offsets_q) - 1
    by_sequence = how.causal and (how.packs or 2 * len(tiles) > 3 * batch)
    together = 0 if len(tiles) > 2 * batch else 2 if by_sequence else 1
    assert built.heads_together == together, f"heads go together as {built.heads_together}, not as {together}"
    first = np.flatnonzero(tiles[:, 4] <= 0)
    lengths = np.diff(first, append=len(tiles))
    within = np.arange(len(tiles)) - np.repeat(first, lengths)
    backwards = np.repeat(first + lengths - 1, lengths) - within
    expected = items[::-1] if extra_items is not None else tiles[backwards]
    # Nobody reads it where all heads go together, dearest blocks first.
    assert built.heads_together == 1 or np.array_equal(built.by_sequence, expected), "the list by sequences"
    assert built.longest == (items[:, 5] - items[:, 6]).max(initial=0), "the longest item"
    assert built.total == np.float32(tiles[:, 5].sum()), "the sum of all costs"

    number = {item.tobytes(): place for place, item in enumerate(np.ascontiguousarray(items))}
    order = np.array([number[item.tobytes()] for item in np.ascontiguousarray(built.by_cost)], np.int64)
    assert np.array_equal(np.sort(order), np.arange(len(items))), "each item once"
    kinds = np.zeros(len(items), bool)
    if extra_items and 8 * built.longest <= _PIECES_PER_CTA * -(-int(tiles[:, 5].sum()) // extra_items):
        kinds = items[:, 1] > how.block_m
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


class Heads(NamedTuple):
    """What else a backward's list depends on."""

    queries: int
    keys: int
    in_order: bool = False  # additions to dQ

    def pairs(self, steps: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Sequences and kv heads side by side, of tiles of so many steps."""
        per_step = 1 / np.maximum(steps, 1)
        if self.in_order:
            return np.asarray(np.maximum(np.sqrt(16384 * per_step), 512 * per_step))
        return np.asarray(np.sqrt(1024 * per_step))


def _key_tiles(offsets_q: Ints, offsets_k: Ints, how: Blocking) -> tuple[Ints, Ints, Ints]:
    """Blocks of keys in the order of sequences, heads and turns left 0; the sequence of each; of each sequence the
    first's query blocks."""
    q_begin, q_length = offsets_q[:-1], np.maximum(np.diff(offsets_q), 0)
    k_begin, k_length = offsets_k[:-1], np.maximum(np.diff(offsets_k), 0)
    if how.causal and how.bottom_right:
        unseen = np.maximum(q_length - k_length, 0)
        q_begin, q_length = q_begin + unseen, q_length - unseen
    shift = k_length - q_length if how.causal and how.bottom_right else np.zeros_like(k_length)

    def query_blocks(owner: Ints, row: Ints) -> Ints:
        first = np.zeros_like(row)
        if how.causal:
            seen = row < q_length[owner] + shift[owner]
            first = np.maximum(row - shift[owner], 0) // how.block_m * how.block_m
            first = np.where(seen, first, q_length[owner])
        return np.asarray(-(-(q_length[owner] - first) // how.block_m))

    counts = -(-k_length // how.block_n)
    owner = np.repeat(np.arange(len(counts)), counts)
    block = np.arange(len(owner)) - (np.cumsum(counts) - counts)[owner]
    row = block * how.block_n
    columns = (*(values[owner] for values in (q_begin, q_length, k_begin, k_length)), row, query_blocks(owner, row))
    every, zeros = np.arange(len(counts)), np.zeros_like(row)
    return np.stack([*columns, zeros, zeros], 1), owner, query_blocks(every, np.zeros_like(every))


def assert_right_keys(
    data: bytes, max_items: int, total_q: int, offsets_q: Ints, offsets_k: Ints, how: Blocking, heads: Heads
) -> None:
    """A backward's list, in the bytes of its buffer, and what it says of each query. Offsets promise nothing wrong."""
    (count,) = (int(number) for number in np.frombuffer(data, np.int32, 1))
    tiles, owner, first_blocks = _key_tiles(offsets_q, offsets_k, how)
    assert count == len(tiles), f"{count} items, not {len(tiles)}"
    items = np.frombuffer(data, np.int32, 8 * count, WORK_LIST_HEADER_BYTES).reshape(-1, 8).astype(np.int64)
    together, turn = items[:, 6].copy(), items[:, 7].copy()
    items[:, 6:] = 0
    number = {tile.tobytes(): index for index, tile in enumerate(np.ascontiguousarray(tiles))}
    order = np.array([number[item.tobytes()] for item in items], np.int64)
    assert np.array_equal(np.sort(order), np.arange(count)), "each item once"

    place = np.empty(count, np.int64)
    place[order] = np.arange(count)
    same = np.flatnonzero(np.diff(owner) == 0)  # tiles that are followed by another of their sequence
    assert (place[same] < place[same + 1]).all(), "key blocks of a sequence in order"
    assert (together[place[same]] == together[place[same + 1]]).all(), "heads of a sequence"
    assert np.array_equal(np.sort(turn), np.arange(count)), "each turn once"
    assert (turn[place[same]] + 1 == turn[place[same + 1]]).all(), "turns of a sequence"
    first, last = (np.unique(part, return_index=True)[1] for part in (owner, owner[::-1]))
    last = count - 1 - last
    steps = first_blocks[owner[first]] * (heads.queries // heads.keys)
    by_place = np.argsort(place[first])
    assert (np.diff(bucket(steps[by_place])) >= 0).all(), "the dearest first"

    bits = (511 - bucket(steps) + (127 << 4)) << 19
    pairs = heads.pairs(bits.astype(np.int32).view(np.float32).astype(np.float64) - 1)
    alone = together[place[first]] < heads.keys
    assert (pairs[alone] <= heads.keys).all(), "all heads of sequences that go together"
    assert (place[last] - place[first] == last - first)[alone].all(), "sequences by themselves"
    begins = np.sort(place[first])
    within = np.searchsorted(begins, place[last], "right") - np.searchsorted(begins, place[first], "left")
    ending = _ending(last - first + 1, by_place, how, heads)
    usual = ~alone
    usual[ending] = False
    assert (within[usual] <= np.maximum(pairs[usual] / heads.keys, 1) + 0.51).all(), "few sequences at a time"
    tiles_of = last - first + 1  # of a head
    if len(ending) and tiles_of[ending[0]] >= -(-_LAST_TILES // heads.keys):
        one, ending = ending[0], ending[1:]
        each = together[place[first[one]]]
        last_group = heads.keys - (heads.keys - 1) // each * each
        assert last_group * tiles_of[one] >= _LAST_TILES, "tiles of the last long sequence's last heads"
        shares = _shares(heads.keys, float(pairs[one]))
        assert each in shares, "heads of the last long sequence"
        fewer = [share for share in shares[1:] if share < each]  # but for what a device may round
        last_groups = [heads.keys - (heads.keys - 1) // share * share for share in fewer]
        assert all(group * tiles_of[one] < _LAST_TILES for group in last_groups), "no more heads than it takes"
    in_turn = sorted((block, rank, one) for rank, one in enumerate(ending) for block in range(tiles_of[one]))
    expected = [first[one] + block for block, _, one in in_turn]
    assert np.array_equal(order[count - len(expected) :], expected), "the last sequences' key blocks in turn"
    assert not alone[ending].any(), "all heads of the last sequences"

    at = WORK_LIST_HEADER_BYTES + 2 * max_items * WORK_ITEM_BYTES + 8 * len(offsets_k)
    words = -(-total_q // 32)
    marks = [np.frombuffer(data, np.uint8, 4 * words, at + 4 * words * which) for which in range(2)]
    for mark, wanted in zip(marks, _marked(tiles[first], total_q, how), strict=True):
        found = np.unpackbits(mark, bitorder="little")
        assert np.array_equal(found[:total_q].astype(bool), wanted), "bits of queries"
        assert not found[total_q:].any(), "bits beyond the queries"


def _shares(heads: int, pairs: float) -> list[int]:
    """Heads of each of as many groups as make no more than `pairs` side by side, or of fewer."""
    usual = math.ceil(heads / pairs * (1 + 1e-5))  # as a device rounds
    return [math.ceil(heads / groups) for groups in range(max(usual, 1), 0, -1)]


def _ending(counts: Ints, by_place: Ints, how: Blocking, heads: Heads) -> Ints:
    """The sequences that end a causal list, in the order of places."""
    if not how.causal:
        return by_place[:0]
    after = counts.sum() - np.cumsum(counts[by_place])
    last = np.arange(len(by_place)) >= len(by_place) - _LAST_SEQUENCES
    return np.asarray(by_place[last & (after < -(-_LAST_TILES // heads.keys))])


def _marked(sequences: Ints, total_q: int, how: Blocking) -> list[npt.NDArray[np.bool_]]:
    """Queries that see keys of one block, and of more."""
    result = []
    for chosen in (sequences[:, 3] <= how.block_n, sequences[:, 3] > how.block_n):
        steps = np.zeros(total_q + 1, np.int64)
        begin = sequences[chosen, 0]
        np.add.at(steps, begin, 1)
        np.add.at(steps, begin + sequences[chosen, 1], -1)
        result.append(np.cumsum(steps[:-1]) > 0)
    return result
