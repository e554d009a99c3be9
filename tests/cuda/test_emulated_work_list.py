"""Work lists as an emulated device builds them, by one CTA and by a cluster, against lists built on the host."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
import torch
from emulator import kernels
from emulator.driver import EmulatorError, emulated
from emulator.schedules import next_seed

from jagtile.generator import list_oracle
from jagtile.generator.spaces.sm90_backward import Sm90BackwardConfig
from jagtile.generator.spec import KernelSpec
from jagtile.generator.tile import Variant
from jagtile.runtime import cuda
from jagtile.runtime.artifact import Artifact
from jagtile.runtime.cuda import list_builder, params, work_list

SPLIT = "fwd_bf16_d64_causal/split_m64_n32_s2_q1_c1"
PERSISTENT = "fwd_bf16_d64/persistent_m64_n64_s2_q1_c1"
PACKING = "fwd_bf16_d64_causal/split_m64_n48_s2_q1_c1_k1"
NAMES = [SPLIT, PERSISTENT, PACKING]
CAUSAL_NAMES = [
    "fwd_bf16_d64_causal/split_m192_n64_s2_q1_c1",
    "fwd_bf16_d64_causal/persistent_m192_n64_s2_q1_c1",
    "fwd_bf16_d64_causal/persistent_m128_n64_s2_q1_c1_x2",
]
KEY_BLOCKS = Sm90BackwardConfig(64, 64, 2, 2, "bulk", False, 1, "none", False, True)
CHUNK = 2048  # sequences that a CTA looks at at a time


@cache
def built(name: str, *edit: str) -> Artifact:
    return kernels.artifact(Variant.parse(f"sm_90a/{name}"), kernels.substitution(*edit) if edit else None)


def assert_right(
    artifact: Artifact,
    queries: Sequence[int],
    keys: Sequence[int],
    heads: int = 2,
    bottom_right: bool = False,
    tokens: int | None = None,
    processors: int = 3,
    ratio: int = 1,
) -> None:
    """Build the list of a batch whose q has so many tokens, without running the attention kernel."""
    cu_q, cu_k = (torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32) for lengths in (queries, keys))
    q = torch.zeros(tokens or max(sum(queries), 1), heads, 64, dtype=torch.bfloat16)
    k = torch.zeros(sum(keys), heads // ratio, 64, dtype=torch.bfloat16)
    with emulated(processors, seed=next_seed()):
        kernel = cuda.load(artifact, torch.device("cuda", 0))
        launch, attention = kernel._launch, kernel._kernel
        kernel._launch = lambda function, *more: None if function is attention else launch(function, *more)
        kernel.forward(q, k, k, cu_q, cu_k, torch.empty_like(q), None, 0.1, bottom_right)
        (entry,) = work_list._ENTRIES.values()
        scalars = params.SCALARS.unpack_from(kernel._block.data, params.SCALARS_OFFSET)
        split = params.SPLIT_SCALARS.unpack_from(kernel._block.data, params.SPLIT_OFFSET)
    block = dict(zip([*params.POINTERS, *params.INTEGERS], scalars, strict=False))
    rows = block["causal_rows"]
    packs = bool(artifact.meta.launch.get("pack_sequences"))
    how = list_oracle.Blocking(block["block_m"], block["block_n"], rows > 0, bottom_right, rows or 64, packs)
    list_oracle.assert_right_queries(
        list_oracle.read(bytes(entry.built.buffer.numpy()), block["max_items"]),
        *(cu.numpy().astype(np.int64) for cu in (cu_q, cu_k)),
        how,
        extra_items=split[1] if "split" in artifact.meta.symbol else None,
    )


@pytest.fixture(params=["one CTA", "a cluster"])
def builders(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who builds every list of the test, whatever its length: one CTA those of up to 1024 sequences."""
    monkeypatch.setattr(list_builder, "MOST_ALONE", 1 << 30 if request.param == "one CTA" else 0)


def lengths(batch: int, longest: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.choice((0, 1, 64, 65, rng.randint(1, longest))) for _ in range(batch)]


@pytest.mark.usefixtures("builders")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch", [1, 9, 1023, 2049])
def test_any_number_of_sequences(name: str, batch: int) -> None:
    queries, keys = (lengths(batch, 130, batch + which) for which in (0, 1))
    assert_right(built(name), [*queries, 3], [*keys, 3], bottom_right=batch % 2 == 0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch", [1024, 1025])
def test_lists_around_the_length_from_which_a_cluster_builds_them(name: str, batch: int) -> None:
    ones = [1] * batch
    assert_right(built(name), ones, ones, tokens=64)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch", [8 * CHUNK - 3, 8 * CHUNK + 5])
def test_more_sequences_than_fit_into_the_shared_memory_of_a_cluster(name: str, batch: int) -> None:
    some = lengths(batch, 70, batch)
    assert_right(built(name), some, some)


@pytest.mark.usefixtures("builders")
@pytest.mark.parametrize("name", NAMES)
def test_one_long_sequence_among_thousands_of_single_tokens(name: str) -> None:
    skewed = [*[1] * 500, 100_000, *[1] * 400]
    assert_right(built(name), skewed, skewed)
    assert_right(built(name), [1] * len(skewed), skewed, bottom_right=True)


@pytest.mark.usefixtures("builders")
@pytest.mark.parametrize("name", NAMES)
def test_sequences_that_are_empty_and_batches_of_them(name: str) -> None:
    assert_right(built(name), [0] * 1000, [1] * 1000)
    assert_right(built(name), [0] * 1000, [0] * 999 + [5])
    assert_right(built(name), [*[0] * 600, 70, *[0] * 300], [1] * 901)


@pytest.mark.usefixtures("builders")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("keys", [200, 2000])
def test_tiles_beyond_the_room_that_wrong_offsets_promise_are_left_out(name: str, keys: int) -> None:
    assert_right(built(name), [200] * 300, [keys] * 300, tokens=3000)
    assert_right(built(name), [50, 60_000, 70], [keys, 900, keys], tokens=3000)


@pytest.mark.usefixtures("builders")
@pytest.mark.parametrize("heads", [1, 4])
def test_short_neighbours_share_a_tile_as_far_as_they_fit(heads: int) -> None:
    """48 keys, and 64 tokens or with four heads in a tile's rows 16."""
    rng = random.Random(heads)
    short = [rng.choice((0, 1, 2, 5, 16, 17, 30, 48, 49, 63, 64, 65, 200)) for _ in range(500)]
    assert_right(built(PACKING), short, short, heads=heads, ratio=heads)
    assert_right(built(PACKING), short, short[::-1], heads=heads, ratio=heads, bottom_right=True)
    for batch in (1, 2, 7, 8, 9, 15):
        assert_right(built(PACKING), [3] * batch, [5] * batch, heads=heads, ratio=heads)


@pytest.mark.usefixtures("builders")
@pytest.mark.parametrize("ratio", [1, 3, 7, 33])
@pytest.mark.parametrize("name", CAUSAL_NAMES)
def test_causal_blocks_of_several_warpgroups_whatever_rows_these_have(name: str, ratio: int) -> None:
    """With heads that share a tile a warpgroup has 64, 21, 9 or 1 tokens."""
    edges = [0, 1, 20, 21, 22, 42, 63, 64, 65, 127, 128, 129, 192, 256, 257, 700]
    assert_right(built(name), edges, edges[::-1], heads=ratio, bottom_right=True, ratio=ratio)
    assert_right(built(name), edges, edges, heads=ratio, ratio=ratio)
    assert_right(built(name), edges, [9000, *edges[1:]], heads=ratio, bottom_right=True, processors=30, ratio=ratio)


@pytest.mark.usefixtures("builders")
def test_keys_are_cut_in_a_long_list_too() -> None:
    queries, keys = lengths(1000, 90, 5), lengths(1000, 300, 6)
    keys[::150] = [9000] * 7
    assert_right(built(SPLIT), queries, keys, heads=1, processors=30)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("longest", [70, 20_000])
@pytest.mark.parametrize("processors", [3, 30])
def test_every_cta_of_a_cluster_goes_through_several_chunks(
    name: str, longest: int, processors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 64 sequences; with and without long ones, which are cut and sorted with all others."""
    monkeypatch.setattr(list_builder, "CLUSTER_THREADS", (32, 32))
    queries, keys = (lengths(1500, 70, which) for which in (7, 8))
    queries[700:705], keys[700:705] = [1, 65, 16, 70, 300], [longest] * 5
    assert_right(built(name), queries, keys, bottom_right=True, processors=processors)
    assert_right(built(name), keys, queries, processors=processors)
    assert_right(built(name), queries, keys, bottom_right=True, tokens=sum(queries[:1000]), processors=processors)


@pytest.mark.usefixtures("builders")
@pytest.mark.parametrize("name", NAMES)
def test_sequences_of_tiles_beyond_those_held_are_searched_for(name: str) -> None:
    artifact = built(name, "kHeldTiles = 2 * kMostThreads + 1024;", "kHeldTiles = 64;")
    some = lengths(1000, 200, 9)
    assert_right(artifact, some, some)


# --- of a backward


def assert_right_of_keys(
    queries: Sequence[int],
    keys: Sequence[int],
    heads: tuple[int, int] = (2, 2),
    in_order: bool = False,
    causal: bool = False,
    bottom_right: bool = False,
    tokens: int | None = None,
) -> None:
    """Build the list of a batch whose tensors have so many tokens; it is not looked at where offsets promise more."""
    variant = Variant("sm_90a", KernelSpec("bwd", "bf16", 32, 32, causal), KEY_BLOCKS)
    cu_q, cu_k = (torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32) for lengths in (queries, keys))
    q = torch.zeros(tokens or sum(queries), heads[0], 32, dtype=torch.bfloat16)
    k = torch.zeros(tokens or sum(keys), heads[1], 32, dtype=torch.bfloat16)
    torch.use_deterministic_algorithms(in_order)
    try:
        with emulated(3, seed=next_seed()):
            kernel = cuda.load(kernels.artifact(variant), torch.device("cuda", 0))
            kernel._launch_next = lambda *_: None
            lse = torch.empty(heads[0], len(q))
            kernel.backward(q, k, k, cu_q, cu_k, q, lse, q, None, q, k, k, 0.1, bottom_right)
            (entry,) = work_list._ENTRIES.values()
    finally:
        torch.use_deterministic_algorithms(False)
    if tokens is not None:
        return
    list_oracle.assert_right_keys(
        bytes(entry.built.buffer.numpy()),
        entry.built.max_items,
        len(q),
        *(cu.numpy().astype(np.int64) for cu in (cu_q, cu_k)),
        list_oracle.Blocking(KEY_BLOCKS.block_m, KEY_BLOCKS.block_n, causal, bottom_right),
        list_oracle.Heads(*heads, in_order),
    )


@pytest.mark.usefixtures("builders")
@pytest.mark.parametrize("batch", [1, 9, 1023, 2049])
@pytest.mark.parametrize("in_order", [False, True])
def test_key_blocks_of_any_number_of_sequences(batch: int, in_order: bool) -> None:
    queries, keys = (lengths(batch, 200, batch + which) for which in (0, 1))
    heads = ((1, 1), (8, 2))[batch % 2]
    assert_right_of_keys([*queries, 3], [*keys, 3], heads, in_order, batch % 3 == 0, bottom_right=True)


@pytest.mark.usefixtures("builders")
@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("heads", [(1, 1), (8, 8), (40, 20), (256, 256)])
@pytest.mark.parametrize(
    "keys", [[700] * 9, [1500, 900, 0, 640, 640, 65, 640], [2000], [2000, 2000, 64, 5, 64], [2800, 1400, 933]]
)
def test_causal_lists_end_with_short_tiles(keys: list[int], heads: tuple[int, int], in_order: bool) -> None:
    """Of several sequences in turn, or of more heads of the last long one."""
    assert_right_of_keys(keys, keys, heads, in_order, causal=True)
    assert_right_of_keys(keys[::-1], keys, heads, in_order, causal=True, bottom_right=True)


@pytest.mark.parametrize("batch", [8 * CHUNK - 3, 8 * CHUNK + 5])
def test_key_blocks_of_more_sequences_than_fit_into_the_shared_memory_of_a_cluster(batch: int) -> None:
    some = lengths(batch, 70, batch)
    assert_right_of_keys(some, some, causal=True)


@pytest.mark.usefixtures("builders")
@pytest.mark.parametrize("heads", [(1, 1), (24, 8)])
def test_key_blocks_of_a_long_sequence_among_thousands_of_single_tokens(heads: tuple[int, int]) -> None:
    skewed = [*[1] * 500, 30_000, *[1] * 400]
    assert_right_of_keys(skewed, skewed, heads, causal=True)
    assert_right_of_keys([1] * len(skewed), skewed, heads, causal=True, bottom_right=True)
    assert_right_of_keys(skewed, [1] * len(skewed), heads, causal=True, bottom_right=True)


@pytest.mark.usefixtures("builders")
def test_key_blocks_of_sequences_that_are_empty() -> None:
    assert_right_of_keys([*[0] * 999, 5], [*[0] * 998, 1, 0])
    assert_right_of_keys([1] * 1000, [*[0] * 999, 70])


@pytest.mark.usefixtures("builders")
def test_nothing_is_written_beyond_the_room_for_key_blocks() -> None:
    assert_right_of_keys([200] * 300, [200] * 300, tokens=3000)
    assert_right_of_keys([50, 60_000, 70], [70, 50_000, 10], tokens=3000, causal=True)
    # Sequences that share places, of which the first has more key blocks than there is room for.
    assert_right_of_keys([64] * 3, [50_000] * 3, (1, 1), tokens=3000)


# --- what goes wrong


@pytest.mark.parametrize(
    ("old", "new", "report"),
    [
        ("      cluster_arrive();\n      cluster_wait();\n", "", "may not have begun yet|is not ordered after"),
        ("    if (kCtas > 1) cluster_wait();\n", "", "the end of the CTA by .* is not ordered after the read"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_the_emulator_finds_missing_barriers_of_the_cluster(name: str, old: str, new: str, report: str) -> None:
    some = lengths(2000, 90, 2)
    artifact = built(name, old, new)
    with pytest.raises(EmulatorError, match=report):
        assert_right(artifact, some, some)
