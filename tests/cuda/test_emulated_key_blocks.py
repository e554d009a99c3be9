"""The order of the backward's work (templates/cuda/include/key_blocks.cuh): the list that an emulated device builds."""

from __future__ import annotations

import math
import random
import struct
from collections import defaultdict
from itertools import accumulate, pairwise
from typing import NamedTuple

import pytest
import torch
from emulator import kernels
from emulator.driver import emulated
from layouts import without_values

from jagtile.generator.oracle_gradients import Gradients
from jagtile.generator.spaces.sm90_backward import Sm90BackwardConfig
from jagtile.generator.spec import KernelSpec
from jagtile.generator.tile import Variant
from jagtile.generator.workloads import Workload
from jagtile.runtime import cuda
from jagtile.runtime.cuda import CudaBackwardKernel, params, work_list

M, N = 64, 64  # queries and keys of a block


class Item(NamedTuple):
    """A WorkItem of keys."""

    q_begin: int
    q_length: int
    k_begin: int
    k_length: int
    row: int
    q_blocks: int
    heads: int
    turn: int


def build_list(w: Workload, in_order: bool, seed: int) -> list[Item]:
    """The items of a batch; the attention kernel is not run."""
    spec = KernelSpec("bwd", "bf16", 32, 32, w.is_causal)
    variant = Variant("sm_90a", spec, Sm90BackwardConfig(M, N, 2, 2, "bulk", False, 1, "none", False, True))
    b = without_values(w)
    grads = Gradients(*map(torch.empty_like, b[:3]))
    torch.use_deterministic_algorithms(in_order)
    try:
        with emulated(2, seed=seed):
            kernel = cuda.load(kernels.artifact(variant), torch.device("cuda", 0))
            assert isinstance(kernel, CudaBackwardKernel)
            kernel._launch_next = lambda *_: None
            lse = torch.empty(w.num_heads, w.total_q)
            bottom_right = w.causal_alignment == "bottom_right"
            kernel.backward(*b[:5], torch.empty_like(b.q), lse, torch.empty_like(b.q), None, *grads, 0.1, bottom_right)
            (entry,) = work_list._ENTRIES.values()
    finally:
        torch.use_deterministic_algorithms(False)
    data = bytes(entry.built.buffer.numpy())
    (count,) = struct.unpack_from("<i", data)
    assert count <= entry.built.max_items
    begins = range(params.WORK_LIST_HEADER_BYTES, params.WORK_LIST_HEADER_BYTES + count * params.WORK_ITEM_BYTES, 32)
    items = [Item(*struct.unpack_from("<8i", data, begin)) for begin in begins]
    assert all(0 <= item.turn < entry.built.max_items for item in items)
    return items


def query_blocks(w: Workload, seq: int, row: int) -> int:
    """Blocks of queries that see a block of keys."""
    queries, keys = w.seqlens_q[seq], w.seqlens_k[seq]
    if not w.is_causal:
        return -(-queries // M)
    if w.causal_alignment == "bottom_right":
        queries, row = min(queries, keys), row - max(keys - queries, 0)
    return max(-(-queries // M) - max(row, 0) // M, 0) if row < queries else 0


def bucket_cost(cost: int) -> float:
    """The smallest cost that is sorted as this one is: four bits behind a float's first."""
    fraction, exponent = math.frexp(cost + 1)
    return math.ldexp(math.floor(fraction * 32) / 32, exponent) - 1


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("number", range(6))
def test_the_order_of_work(number: int, in_order: bool) -> None:
    rng = random.Random(number)
    batch = rng.choice((1, 40, 1100))
    longest = rng.choice((400, 8000)) if batch < 1000 else 130
    lengths = [tuple(rng.choice((0, 1, 65, rng.randint(1, longest))) for _ in range(batch)) for _ in "qk"]
    heads_kv, ratio = rng.choice(((1, 1), (8, 4), (24, 1), (2, 8)))
    alignment = rng.choice(("top_left", "bottom_right"))
    kind = (heads_kv * ratio, heads_kv, 32, 32, rng.random() < 0.7, alignment)
    w = Workload("list", (*lengths[0], 200), (*lengths[1], 200), *kind)
    assert_in_order_of_work(w, build_list(w, in_order, 50 + 2 * number + in_order), in_order)


@pytest.mark.parametrize(
    ("lengths", "heads", "in_order"),
    [
        ((2112, 2176) * 6, (1, 1), False),
        ((113 * 64, 114 * 64) * 4, (2, 2), False),
        ((113 * 64, 114 * 64) * 4, (8, 8), True),
        ((3584, 3648) * 4, (8, 1), False),
        ((3584, 3648) * 4, (8, 1), True),
    ],
)
def test_sequences_that_are_sorted_alike_share_places_though_their_tiles_differ(
    lengths: tuple[int, ...], heads: tuple[int, int], in_order: bool
) -> None:
    w = Workload("alike", lengths, lengths, *heads, 32, 32, False)
    assert_in_order_of_work(w, build_list(w, in_order, 7), in_order)


def assert_in_order_of_work(w: Workload, items: list[Item], in_order: bool) -> None:
    """Every key block once, the dearest sequences first, as many side by side as there should be."""
    heads_kv, ratio, batch = w.num_heads_kv, w.num_heads // w.num_heads_kv, w.batch
    begins = {begin: seq for seq, begin in enumerate(accumulate(w.seqlens_k, initial=0)) if seq < batch}
    begins = {begin: seq for begin, seq in begins.items() if w.seqlens_k[seq]}
    places = defaultdict(list)  # in the list, of each sequence
    for place, item in enumerate(items):
        places[begins[item.k_begin]].append(place)
        assert item.q_blocks == query_blocks(w, begins[item.k_begin], item.row)
    assert len({item.turn for item in items}) == len(items)
    assert sorted(places) == [seq for seq, length in enumerate(w.seqlens_k) if length]
    for seq, found in places.items():  # each key block once, one after the other
        assert [items[place].row for place in found] == list(range(0, w.seqlens_k[seq], N))
        assert [items[place].turn - items[found[0]].turn for place in found] == list(range(len(found)))

    steps = {seq: ratio * query_blocks(w, seq, 0) for seq in places}
    by_place = sorted(places, key=lambda seq: places[seq][0])
    ordered = [steps[seq] for seq in by_place]
    assert all(after + 1 <= (before + 1) * 17 / 16 for before, after in pairwise(ordered))
    # The last sequences of a causal list have more side by side: test_emulated_work_list.py.
    usual = len(by_place)
    while w.is_causal and usual and sum(len(places[seq]) for seq in by_place[usual:]) * heads_kv < 256:
        usual -= 1
    for seq in by_place[: max(usual, len(by_place) - 16)]:
        found = places[seq]
        least = max(bucket_cost(steps[seq]), 1)
        pairs = max(math.sqrt(16384 / least), 512 / least) if in_order else math.sqrt(1024 / least)
        together = {items[place].heads for place in found}
        assert len(together) == 1
        if pairs < heads_kv:  # by itself, some heads at a time
            assert found == list(range(found[0], found[0] + len(found)))
            assert max(1, pairs / 2) <= together.pop() <= pairs + 1
        else:  # with a few like it, all heads
            assert together == {heads_kv}
            others = {begins[item.k_begin] for item in items[found[0] : found[-1] + 1]}
            assert len(others) <= 2 * int(pairs / heads_kv + 0.51)
