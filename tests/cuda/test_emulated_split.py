"""The Hopper forward that packs heads and splits keys, run by the emulator: its numbers and its work list."""

from __future__ import annotations

import itertools
import random
import struct
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import pytest
import torch
from emulator import kernels
from emulator.driver import emulated
from emulator.schedules import next_seed
from layouts import without_values

from jagtile.generator.guard import guarded, guards_intact, poisoned
from jagtile.generator.oracle import errors, reference, tolerance
from jagtile.generator.tile import Variant
from jagtile.generator.workloads import JaggedBatch, Workload
from jagtile.runtime import cuda
from jagtile.runtime.artifact import Artifact
from jagtile.runtime.cuda import list_builder, params, work_list

SCALE = 0.1
ONE_GROUP = "fwd_bf16_d64_causal/split_m64_n32_s2_q1_c1"
TWO_GROUPS = "fwd_bf16_d64/split_m128_n64_s2_q2_c1"
THREE_GROUPS = "fwd_fp16_d72_dv40_causal/split_m192_n48_s3_q2_c1"
VARIANTS = [ONE_GROUP, TWO_GROUPS, THREE_GROUPS]
ALTERNATING = "fwd_bf16_d64_causal/split_m128_n32_s2_q1_c1_a1"
WIDE = "fwd_bf16_d256/split_m64_n64_s2_q2_c1"
LARGE_TILES = "fwd_bf16_d64_causal/split_m192_n64_s3_q2_c1"
# Few queries and long keys, skewed; sequences without queries, without keys, without either.
QUERIES, KEYS = (1, 0, 3, 1, 0, 70, 1), (1500, 300, 0, 65, 0, 130, 2)


@cache
def built(name: str, *edit: str) -> Artifact:
    return kernels.artifact(Variant.parse(f"sm_90a/{name}"), kernels.substitution(*edit) if edit else None)


def workload(name: str, queries=QUERIES, keys=KEYS, ratio: int = 4, heads_kv: int = 1, **more) -> Workload:
    spec = Variant.parse(f"sm_90a/{name}").spec
    kind = (spec.head_dim, spec.head_dim_v, spec.causal)
    return Workload(f"ratio {ratio}", queries, keys, ratio * heads_kv, heads_kv, *kind, **more)


def expected_of(w: Workload, b: JaggedBatch) -> tuple[torch.Tensor, torch.Tensor]:
    kind = {"is_causal": w.is_causal, "causal_alignment": w.causal_alignment}
    out, lse = reference(*b[:5], **kind, scale=SCALE)  # type: ignore[arg-type]
    return out, lse.float()


def run(
    name: str, w: Workload, b: JaggedBatch, processors: int = 3, launches: int = 1
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """out and lse of launches in a row on one work list, every tensor among rows of NaN."""
    q, k, v = map(guarded, b[:3])
    results = []
    with emulated(processors, seed=next_seed()):
        kernel = cuda.load(built(name), torch.device("cuda", 0))
        for _ in range(launches):
            out = poisoned(b.q.new_empty(w.total_q, w.num_heads, w.head_dim_v), b.q.dtype)
            lse = torch.full((w.num_heads, w.total_q), float("nan"))
            bottom_right = w.causal_alignment == "bottom_right"
            kernel.forward(q, k, v, b.cu_seqlens_q, b.cu_seqlens_k, out, lse, SCALE, bottom_right)
            assert guards_intact(out)
            results.append((out, lse))
    return results


def assert_right(name: str, w: Workload, b: JaggedBatch, **how: int) -> None:
    expected, expected_lse = expected_of(w, b)
    for out, lse in run(name, w, b, **how):
        assert errors(out, expected).rel <= tolerance(out.dtype)
        torch.testing.assert_close(lse, expected_lse, rtol=1e-4, atol=1e-3)


# --- numbers


@pytest.mark.parametrize("name", [f"{ONE_GROUP}_t1", "fwd_fp16_d64/split_m192_n48_s3_q2_c1_t1"])
@pytest.mark.parametrize("ratio", [1, 4])
def test_sums_of_products_are_added_up_from_pieces_too(name: str, ratio: int) -> None:
    w = workload(name, ratio=ratio, causal_alignment="bottom_right")
    b = w.make("cpu", built(name).meta.spec.split("_")[1], ratio)  # type: ignore[arg-type]
    assert_right(name, w, b)
    expected, _ = expected_of(w, b)
    with emulated(3, seed=next_seed()):
        kernel = cuda.load(built(name), torch.device("cuda", 0))
        for _ in range(2):
            out = poisoned(expected, b.q.dtype)
            kernel.forward(*b[:5], out, None, SCALE, True)
            assert errors(out, expected).rel <= tolerance(out.dtype)
            assert guards_intact(out)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("ratio", [1, 2, 3, 4, 8, 16])
def test_numbers_match_the_oracle_for_every_ratio_of_heads(name: str, ratio: int) -> None:
    w = workload(name, ratio=ratio, causal_alignment="bottom_right" if ratio % 2 else "top_left")
    assert_right(name, w, w.make("cpu", built(name).meta.spec.split("_")[1], ratio), launches=2)  # type: ignore[arg-type]


def test_more_heads_than_a_tile_has_rows() -> None:
    w = workload(ONE_GROUP, (1, 2), (300, 40), ratio=96, causal_alignment="bottom_right")
    assert_right(ONE_GROUP, w, w.make("cpu", "bf16", 1))


def test_a_piece_that_begins_on_the_diagonal_of_some_rows_and_beyond_that_of_others() -> None:
    w = workload(THREE_GROUPS, (192, 1), (288, 1000), ratio=1, causal_alignment="bottom_right")
    assert_right(THREE_GROUPS, w, w.make("cpu", "fp16", 8))


@pytest.mark.parametrize("name", [ONE_GROUP, WIDE])
@pytest.mark.parametrize("ratio", [1, 3])
def test_whole_tiles_of_rows_are_added_up_from_many_pieces(name: str, ratio: int) -> None:
    w = workload(name, (70, 64), (2700 if ratio == 1 else 6000, 600), ratio=ratio, causal_alignment="bottom_right")
    assert_right(name, w, w.make("cpu", "bf16", 9), processors=16, launches=2)
    assert max(item.pieces for item in build_list(name, w, 16).by_cost) >= (6 if ratio == 1 else 4)


def test_pieces_of_the_same_rows_are_added_up_whichever_warpgroups_took_them() -> None:
    queries, keys = (5, 200, 1, 0, 129, 300), (900, 700, 40, 10, 129, 0)
    w = workload(ALTERNATING, queries, keys, causal_alignment="bottom_right")
    assert any(item.pieces > 1 for item in build_list(ALTERNATING, w, 3).by_cost)
    assert_right(ALTERNATING, w, w.make("cpu", "bf16", 12), launches=2)


@pytest.mark.parametrize(
    "name", ["fwd_bf16_d64/split_m64_n32_s2_q3_c4_t1", "fwd_fp16_d72_dv40_causal/split_m64_n48_s2_q3_c1"]
)
@pytest.mark.parametrize("ratio", [1, 4])
def test_two_tiles_of_rows_ahead(name: str, ratio: int) -> None:
    w = workload(
        name, (1, 0, 3, 200, 0, 70, 1, 9, 64, 65), (1500, 300, 0, 65, 0, 130, 2, 30, 64, 1), ratio=ratio, heads_kv=2
    )
    b = w.make("cpu", built(name).meta.spec.split("_")[1], ratio)  # type: ignore[arg-type]
    for processors in (1, 3):
        assert_right(name, w, b, processors=processors, launches=2)


def test_heads_side_by_side_sequence_by_sequence() -> None:
    """Causal sequences of two blocks of rows."""
    w = workload(ONE_GROUP, (100,) * 12, (100,) * 12, ratio=1, heads_kv=3)
    assert_right(ONE_GROUP, w, w.make("cpu", "bf16", 10), processors=2, launches=2)


def test_several_kv_heads_and_offsets_of_64_bits() -> None:
    w = workload(TWO_GROUPS, ratio=2, heads_kv=3)
    b = w.make("cpu", "bf16", 2)
    b = b._replace(cu_seqlens_q=b.cu_seqlens_q.long(), cu_seqlens_k=b.cu_seqlens_k.long())
    assert_right(TWO_GROUPS, w, b, processors=2)


def test_a_single_query_over_keys_in_more_pieces_than_there_are_ctas() -> None:
    w = workload(ONE_GROUP, (1,), (5000,), ratio=2, causal_alignment="bottom_right")
    assert_right(ONE_GROUP, w, w.make("cpu", "bf16", 3), processors=1, launches=3)


def test_the_result_does_not_depend_on_who_comes_last() -> None:
    w = workload(ONE_GROUP, (2, 1), (1500, 2500), ratio=4, causal_alignment="bottom_right")
    b = w.make("cpu", "bf16", 4)
    outs = [out for _ in range(4) for out, _ in run(ONE_GROUP, w, b, processors=4)]
    for out in outs[1:]:
        assert torch.equal(out, outs[0])


def test_pieces_whose_scores_differ_widely_are_added_up_by_their_weights() -> None:
    """The references of pieces lie further apart than float32 has exponents for."""
    w = workload(TWO_GROUPS, (3,), (2000,), ratio=2)
    b = w.make("cpu", "bf16", 5)
    b.q.abs_()
    b.k.add_(torch.linspace(-40, 40, 2000)[:, None, None])
    assert_right(TWO_GROUPS, w, b, processors=4)


def test_nan_in_one_sequence_stays_there() -> None:
    w = workload(TWO_GROUPS, (1, 2, 1), (900, 700, 800), ratio=3)
    b = w.make("cpu", "bf16", 6)
    expected, _ = expected_of(w, b)
    b.q[1:3] = b.k[900:1600] = b.v[900:1600] = float("nan")
    ((out, _),) = run(TWO_GROUPS, w, b, processors=4)
    for token in (0, 3):
        assert errors(out[token], expected[token]).rel <= tolerance(torch.bfloat16)
    assert out[1:3].isnan().all()


# --- the list


class Item(NamedTuple):
    """A WorkItem (templates/cuda/include/work_list.cuh) and its packed piece."""

    q_begin: int
    q_length: int
    k_begin: int
    k_length: int
    row: int
    kv_blocks: int
    first_block: int
    slot: int
    piece: int
    pieces: int


class WorkList(NamedTuple):
    block: dict[str, int]  # scalars of the parameter block
    longest: int
    total: float
    heads_together: bool
    by_cost: list[Item]
    by_sequence: list[Item]
    tickets: list[int]


def build_list(name: str, w: Workload, processors: int, *edit: str) -> WorkList:
    """The work list of a batch as the device builds it; the attention kernel is not run."""
    b = without_values(w)
    with emulated(processors, seed=next_seed()):
        kernel = cuda.load(built(name, *edit), torch.device("cuda", 0))
        launch, attention = kernel._launch, kernel._kernel
        kernel._launch = lambda function, *more: None if function is attention else launch(function, *more)
        kernel.forward(*b[:5], torch.empty_like(b.q), None, SCALE, w.causal_alignment == "bottom_right")
        (entry,) = work_list._ENTRIES.values()
        scalars = params.SCALARS.unpack_from(kernel._block.data, params.SCALARS_OFFSET)
        scalars += params.SPLIT_SCALARS.unpack_from(kernel._block.data, params.SPLIT_OFFSET)
    names = [*params.POINTERS, *params.INTEGERS, "scale_log2", *params.SPLIT_INTEGERS, *params.SPLIT_POINTERS]
    block = dict(zip(names, scalars, strict=True))
    data = bytes(entry.built.buffer.numpy())
    count, longest, total, together, next_tile, finished = struct.unpack_from("<iifiii", data)
    assert next_tile == finished == 0
    assert count <= block["max_items"]

    def items(first: int) -> list[Item]:
        found = []
        for index in range(first, first + count):
            at = params.WORK_LIST_HEADER_BYTES + index * params.WORK_ITEM_BYTES
            found.append(Item(*struct.unpack_from("<7iHBB", data, at)))
        return found

    tickets = struct.unpack_from(f"<{block['results']}i", data, len(data) - 4 * block["results"])
    return WorkList(block, longest, total, bool(together), items(0), items(block["max_items"]), list(tickets))


def visible_blocks(w: Workload, item: Item, block: dict[str, int]) -> int:
    last = min(item.row + block["block_m"], item.q_length) - 1
    shift = item.k_length - item.q_length if block["bottom_right"] else 0
    keys = min(item.k_length, max(last + shift + 1, 0)) if w.is_causal else item.k_length
    return -(-keys // block["block_n"])


@pytest.mark.parametrize("number", range(12))
def test_every_key_block_is_in_one_piece_and_there_is_room_for_all(number: int) -> None:
    rng = random.Random(number)
    batch = rng.choice((1, 3, 40, 1100))
    longest = rng.choice((300, 5000)) if batch < 1000 else 40
    queries = tuple(rng.choice((0, 1, 1, 2, 30, 200)) for _ in range(batch))
    keys = tuple(rng.choice((0, 1, 60, rng.randrange(longest), longest)) for _ in range(batch))
    name = rng.choice((ONE_GROUP, TWO_GROUPS))
    w = workload(name, (*queries, 1), (*keys, 2000), rng.choice((1, 4, 6)), rng.choice((1, 2)))
    w = replace(w, causal_alignment=rng.choice(("top_left", "bottom_right")))
    processors = rng.choice((1, 3, 20))
    found = build_list(name, w, processors)
    block = found.block

    assert found.heads_together or sorted(found.by_cost) == sorted(found.by_sequence)
    assert not any(found.tickets)
    rows = defaultdict(list)
    for item in found.by_cost:
        rows[item.q_begin, item.row].append(item)
    begins = [0, *itertools.accumulate(w.seqlens_q)]
    wanted = {
        (begin, row)
        for begin, length in zip(begins, w.seqlens_q, strict=False)
        for row in range(0, length, block["block_m"])
    }
    assert rows.keys() == wanted
    slots: list[int] = []
    for pieces in rows.values():
        pieces.sort(key=lambda item: item.piece)
        assert [item.piece for item in pieces] == list(range(len(pieces))) or len(pieces) == 1
        ends = [item.kv_blocks for item in pieces]
        assert [item.first_block for item in pieces] == [0, *ends[:-1]]
        assert ends[-1] == visible_blocks(w, pieces[0], block)
        sizes = [item.kv_blocks - item.first_block for item in pieces]
        assert max(sizes) - min(sizes) <= 1
        assert max(sizes) <= found.longest
        if len(pieces) > 1:
            assert min(sizes) * block["block_n"] >= 128
            assert {item.pieces for item in pieces} == {len(pieces)}
            (slot,) = {item.slot for item in pieces}
            slots += range(slot, slot + len(pieces))
    assert sorted(slots) == list(range(len(slots)))
    assert len(slots) * block["heads"] * (2 if name == TWO_GROUPS else 1) <= block["results"]
    assert found.total == sum(item.kv_blocks - item.first_block for item in found.by_cost)


def test_the_dearest_come_first_and_of_each_sequence_the_last_rows() -> None:
    queries, keys = (700, 1, 40, 300, 64, 1), (700, 1200, 900, 300, 70, 10)
    w = workload(ONE_GROUP, queries, keys, ratio=1, heads_kv=2, causal_alignment="bottom_right")
    found = build_list(ONE_GROUP, w, 3)
    assert_dearest_first(found.by_cost)
    places = [(item.q_begin, item.row, item.kv_blocks) for item in found.by_sequence]
    assert [place[:2] for place in places] == sorted((place[:2] for place in places), reverse=True)


def assert_dearest_first(items: Sequence[Item]) -> None:
    for before, after in itertools.pairwise(item.kv_blocks - item.first_block for item in items):
        assert after <= before * 17 / 16 + 1


def test_sequences_of_one_row_block_are_among_the_others_at_even_distances_where_no_tile_is_long() -> None:
    """They are bound by memory."""
    lengths = (150,) * 40 + (20,) * 20
    w = workload(ONE_GROUP, lengths, lengths, ratio=1, heads_kv=2)
    found = build_list(ONE_GROUP, w, 3)
    alone, sharing = ([item for item in found.by_cost if (item.q_length <= 64) == short] for short in (True, False))
    assert_dearest_first(alone)
    assert_dearest_first(sharing)
    distance = len(sharing) / len(alone)
    assert [found.by_cost.index(item) for item in alone] == [i + int(i * distance) for i in range(len(alone))]


LIMITS = """
#include "cuda/include/split_work_list.cuh"
extern "C" __global__ void __launch_bounds__(32) limits(const long long* total, int longest, int extra, int* found) {
  Params p = {};
  p.extra_items = extra;
  p.block_n = 64;
  const Limits limits(p, Divisor(p.block_n), Divisor(extra), *total, longest);
  found[0] = limits.few_rows;
  found[1] = limits.piece;
  found[2] = limits.whole;
}
"""


def test_no_more_is_cut_than_there_is_room_for_where_totals_have_more_than_32_bits() -> None:
    total, longest = (1 << 32) + 5, 1 << 20
    for extra_items in (1, 3, 40, 5000):
        found = torch.zeros(3, dtype=torch.int32)
        kernels.Snippet(LIMITS)("limits", 1, 32, torch.tensor([total]), longest, extra_items, found)
        for limit in found.tolist():
            assert limit >= min(-(-total // extra_items), longest)


def test_keys_are_split_where_few_tiles_must_fill_the_device_and_only_there() -> None:
    few = workload(ONE_GROUP, (1,), (8192,), ratio=1, heads_kv=2, causal_alignment="bottom_right")
    found = build_list(ONE_GROUP, few, 16)
    assert len(found.by_cost) == 32  # pieces of 256 keys, the smallest; there is room for 33
    many = workload(ONE_GROUP, (64,) * 60, (256,) * 60, ratio=1, heads_kv=4, causal_alignment="bottom_right")
    assert {item.pieces for item in build_list(ONE_GROUP, many, 16).by_cost} == {0}


@pytest.mark.parametrize("most_alone", [0, 2048])
@pytest.mark.parametrize(
    ("queries", "keys", "cut"),
    [
        ((700, 300, 40), (700, 300, 40), False),  # longer than a piece of few rows would be, but of many rows
        ((700, 300, 1), (700, 300, 200), False),
        ((700, 300, 1), (700, 300, 700), True),
        ((64, 64), (64, 6000), True),
    ],
)
def test_pieces_are_counted_only_where_something_is_cut(
    queries: tuple[int, ...], keys: tuple[int, ...], cut: bool, most_alone: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(list_builder, "MOST_ALONE", most_alone)  # one CTA, or a cluster
    w = workload(ONE_GROUP, queries, keys, ratio=1, heads_kv=2, causal_alignment="bottom_right")
    found = build_list(ONE_GROUP, w, 16)
    assert any(item.pieces > 0 for item in found.by_cost) == cut
    assert max(visible_blocks(w, item, found.block) for item in found.by_cost) > 256 / 32
    assert found.total < found.block["extra_items"] * 256 / 32  # which is thus what few rows are cut into
    told = build_list(ONE_GROUP, w, 16, "longest = cut.longest;", "longest = 12345;")
    assert told.longest == (12345 if cut else found.longest)


def test_decoding_is_cut_into_quarters_of_a_share() -> None:
    w = workload(LARGE_TILES, (1,) * 64, (16384, *range(300, 6600, 100)), 4, 8, causal_alignment="bottom_right")
    found = build_list(LARGE_TILES, w, 132)
    assert found.longest <= found.total * found.block["heads"] / (4 * 132) + 1
    assert max(item.pieces for item in found.by_cost) > 3


@pytest.mark.parametrize(
    ("lengths", "ratio", "heads_kv"),
    [
        ((1024,) * 32, 1, 16),
        ((335,) * 379, 1, 32),
        ((2048,) * 4, 4, 8),
        ((2667,) * 2 + (83,) * 25, 1, 8),  # its longest row blocks are as dear as a CTA's share
        ((16384, *(256,) * 63), 1, 16),
    ],
)
def test_nothing_is_cut_where_row_blocks_fill_the_device(lengths: tuple[int, ...], ratio: int, heads_kv: int) -> None:
    w = workload(LARGE_TILES, lengths, lengths, ratio, heads_kv)
    assert {item.pieces for item in build_list(LARGE_TILES, w, 132).by_cost} == {0}


@pytest.mark.parametrize(("lengths", "heads", "cut"), [((4000, 4358, 5031), 2, False), ((9000, 100), 1, True)])
def test_few_sequences_with_few_heads_are_cut_little(lengths: tuple[int, ...], heads: int, cut: bool) -> None:
    w = workload(LARGE_TILES, lengths, lengths, ratio=1, heads_kv=heads)
    found = build_list(LARGE_TILES, w, 132)
    quarter = -(-found.total // found.block["extra_items"])
    limit = 8 * quarter + 1024 / 64
    row_blocks = sum(-(-length // 192) for length in w.seqlens_q)
    assert (row_blocks < len(found.by_cost)) == cut
    assert len(found.by_cost) < 4 * row_blocks
    assert found.longest <= limit
    for item in found.by_cost:
        blocks = visible_blocks(w, item, found.block)
        assert (item.pieces > 0) == (blocks > limit)
        if item.pieces:
            assert 512 / 64 <= item.kv_blocks - item.first_block <= 3 * quarter
