"""The generated Hopper backward on the emulator: gradients against the float64 oracle, under several schedules."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import gradient_checks
import pytest
import torch
from emulator import kernels
from emulator.backward_checks import assert_right, loaded
from emulator.driver import emulated

from jagtile.generator.oracle import errors, reference
from jagtile.generator.oracle_gradients import Gradients, gradient_tolerance, reference_gradients
from jagtile.generator.spaces.sm90_backward import Sm90BackwardConfig, Sm90BackwardSpace
from jagtile.generator.spec import KernelSpec
from jagtile.generator.tile import Variant
from jagtile.generator.workloads import CausalAlignment, JaggedBatch, Workload
from jagtile.runtime import cuda
from jagtile.runtime.artifact import Artifact
from jagtile.runtime.cuda import backward_params


def config(
    dq: str, keys: int = 128, stages: int = 2, ctas: int = 1, kv: int = 1, **knobs: bool | int | str
) -> Sm90BackwardConfig:
    return replace(Sm90BackwardConfig(64, keys, stages, ctas, dq, False, kv, "none", False, True), **knobs)


# Every mechanism of the template once.
CASES: tuple[tuple[str, Sm90BackwardConfig], ...] = (
    ("bwd_bf16_d64", config("bulk", stages=3, kv=2, held="kv", late_dq=True)),
    ("bwd_bf16_d128_causal", config("red")),
    ("bwd_fp16_d64_causal", config("red", kv=2, held="v", late_dq=True)),
    ("bwd_bf16_d72_dv40_causal", config("bulk", stages=3, overlap=True, held="v", late_dq=True)),
    ("bwd_bf16_d96", config("red")),
    ("bwd_bf16_d32_causal", config("bulk", keys=64, ctas=2, kv=3)),
    ("bwd_fp16_d24_dv32", config("bulk", keys=192, late_dq=True)),
    ("bwd_fp16_d32_causal", config("bulk", kv=2, held="v", block_m=128)),
    ("bwd_bf16_d64_causal", config("bulk", overlap=True, kv=2, held="kv")),
    ("bwd_bf16_d32", config("red", block_m=128)),
    (
        "bwd_bf16_d64_causal",
        config("bulk", kv=2, block_m=128, overlap=True, late_dq=True, early_dv=False),
    ),
    ("bwd_bf16_d128_causal", config("bulk", late_dq=True, early_dv=False)),
    ("bwd_fp16_d64", config("red", stages=3, kv=2, held="kv", late_dq=True, early_dv=False)),
    ("bwd_bf16_d64", config("bulk", block_m=128, early_dv=False)),
    ("bwd_bf16_d96_causal", config("bulk")),
    ("bwd_fp16_d64_causal", config("bulk", block_m=128, early_dv=False, polynomial=4)),
    ("bwd_bf16_d32", config("bulk", keys=64, ctas=2, polynomial=2)),
    ("bwd_bf16_d64_causal", config("bulk", block_m=128, early_dv=False, late_dk=True)),
    ("bwd_fp16_d96", config("bulk", early_dv=False, held="v", late_dk=True)),
    ("bwd_bf16_d24_dv32", config("red", keys=64, ctas=2, kv=2, early_dv=False, late_dk=True, polynomial=4)),
    ("bwd_bf16_d128", config("bulk", block_m=80, early_dv=False)),
    ("bwd_fp16_d96_dv72_causal", config("bulk", block_m=80, early_dv=False, fused=True, row_buffers=1)),
    ("bwd_bf16_d72_dv24", config("bulk", block_m=80, early_dv=False, overlap=True)),
)
# Where warpgroups take turns at products, or share buffers of dQ.
TURNS: tuple[tuple[str, Sm90BackwardConfig], ...] = (
    (
        "bwd_bf16_d64",
        config("bulk", keys=192, kv=2, late_dq=True, early_dv=False, fused=True, row_warps=1, claim_ahead=5),
    ),
    ("bwd_bf16_d64_causal", config("bulk", block_m=128, late_dq=True, early_dv=False, fused=True, in_turn=True)),
    (
        "bwd_fp16_d96",
        config("bulk", held="kv", late_dq=True, early_dv=False, fused=True, row_warps=1, split_tail=True, in_turn=True),
    ),
    ("bwd_bf16_d24_dv32_causal", config("red", kv=2, late_dq=True, early_dv=False, polynomial=4, in_turn=True)),
)
# Where a warpgroup's keys may be nobody's.
SKIPS: tuple[tuple[str, Sm90BackwardConfig], ...] = (
    ("bwd_bf16_d128_causal", config("bulk", late_dq=True, early_dv=False, fused=True, skip_unseen=True)),
    ("bwd_fp16_d64", config("bulk", block_m=128, late_dq=True, early_dv=False, skip_unseen=True)),
    ("bwd_bf16_d32_causal", config("red", keys=192, kv=2, held="kv", late_dq=True, early_dv=False, skip_unseen=True)),
    ("bwd_bf16_d72_dv40_causal", config("bulk", overlap=True, held="v", late_dq=True, skip_unseen=True)),
    ("bwd_bf16_d64_causal", config("bulk", kv=2, late_dq=True, early_dv=False, skip_unseen=True, in_turn=True)),
)
LENGTHS = (0, 1, 63, 0, 65, 129)
QUERIES, KEYS = (5, 0, 130, 1, 64, 140), (150, 70, 0, 1, 20, 70)


@cache
def built(name: str, tile: Sm90BackwardConfig) -> Artifact:
    return kernels.artifact(Variant("sm_90a", KernelSpec.parse(name), tile))


def workload(
    name: str,
    queries: tuple[int, ...],
    keys: tuple[int, ...],
    heads: tuple[int, int] = (2, 1),
    alignment: CausalAlignment = "top_left",
) -> Workload:
    spec = KernelSpec.parse(name)
    return Workload("emulated", queries, keys, *heads, spec.head_dim, spec.head_dim_v, spec.causal, alignment)


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("name", "tile"), [*CASES, *TURNS], ids=lambda x: x if isinstance(x, str) else x.name)
def test_gradients_match_the_oracle(name: str, tile: Sm90BackwardConfig) -> None:
    assert_right(built(name, tile), workload(name, LENGTHS, LENGTHS))


@pytest.mark.parametrize("alignment", ["top_left", "bottom_right"])
@pytest.mark.parametrize("case", [CASES[2], CASES[8], CASES[10], CASES[11]], ids=lambda case: case[1].name)
def test_queries_without_keys_and_keys_without_queries(
    case: tuple[str, Sm90BackwardConfig], alignment: CausalAlignment
) -> None:
    assert_right(built(*case), workload(case[0], QUERIES, KEYS, (1, 1), alignment), with_dlse=False)


@pytest.mark.parametrize(("name", "tile"), SKIPS, ids=lambda value: getattr(value, "name", value))
def test_warpgroups_leave_products_of_keys_out_that_no_query_sees(name: str, tile: Sm90BackwardConfig) -> None:
    lengths = (0, 63, 200, 65, 0, 129, 300)
    assert_right(built(name, tile), workload(name, lengths, lengths), launches=2)
    for alignment in ("top_left", "bottom_right") if KernelSpec.parse(name).causal else ("top_left",):
        assert_right(built(name, tile), workload(name, QUERIES, KEYS, (4, 2), alignment), with_dlse=False)


def test_warpgroups_that_are_a_step_apart() -> None:
    for case in (CASES[0], CASES[10], CASES[12], *TURNS):
        for seed in range(8):  # each under another schedule
            w = workload(case[0], (200, 3), (300, 130), (2, 1))
            assert_right(built(*case), w, seed, with_dlse=False)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_a_scale_that_is_not_positive(scale: float) -> None:
    assert_right(built(*CASES[2]), workload("bwd_fp16_d64_causal", (65,), (65,), (1, 1)), scale=scale)


def test_each_launch_makes_the_list_ready_for_the_next() -> None:
    assert_right(built(*CASES[0]), workload("bwd_bf16_d64", (65, 3), (129, 3), (2, 2)), launches=3)


@pytest.mark.parametrize(
    "tile",
    [
        config("bulk", keys=64, ctas=2),
        config("red", keys=64, ctas=2),
        config("red"),
        config("red", late_dq=True),
        config("bulk", kv=2, held="kv", late_dq=True),
        config("bulk", kv=2, held="kv", block_m=128, overlap=True, late_dq=True, early_dv=False),
        config("red", block_m=128, late_dq=True, early_dv=False),
        config("bulk", kv=2, held="kv", late_dq=True, early_dv=False, fused=True),
        config("red", late_dq=True, early_dv=False, in_turn=True),
        config("bulk", kv=2, held="kv", late_dq=True, early_dv=False, fused=True, in_turn=True),
        config("bulk", keys=192, late_dq=True, early_dv=False, fused=True, row_warps=1),
    ],
    ids=lambda tile: tile.name,
)
def test_in_order_additions_come_out_the_same_whatever_the_schedule(tile: Sm90BackwardConfig) -> None:
    w = workload("bwd_bf16_d32", (40, 100), (500, 330), (1, 1))
    b = w.make("cpu", "bf16", 3)
    b.k.add_(500.0)  # a softmax does not mind, and what blocks of keys add to dQ nearly cancels: its order shows
    dout = torch.randn(b.q.shape, generator=torch.Generator().manual_seed(1)).to(b.q.dtype)

    def runs() -> list[torch.Tensor]:
        found = []
        for seed in range(1, 5):
            with emulated(processors=seed + 1, seed=seed):
                kernel = cuda.load(built("bwd_bf16_d32", tile), torch.device("cuda", 0))
                assert isinstance(kernel, cuda.CudaBackwardKernel)
                found.append(gradient_checks.gradients(kernel, w, b, dout).dq)
        return found

    first, *others = runs()
    assert not all(torch.equal(first, other) for other in others)
    torch.use_deterministic_algorithms(True)
    try:
        first, *others = runs()
        assert all(torch.equal(first, other) for other in others)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("alignment", ["top_left", "bottom_right"])
@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[8], CASES[10], CASES[11]], ids=lambda case: case[1].name)
def test_gradients_in_order_match_the_oracle(
    deterministic: None, case: tuple[str, Sm90BackwardConfig], alignment: CausalAlignment
) -> None:
    assert_right(built(*case), workload(case[0], QUERIES, KEYS, (4, 2), alignment), launches=2)


@pytest.mark.parametrize(("in_order", "heads"), [(False, (35, 35)), (True, (528, 33))])
def test_heads_of_a_sequence_in_groups_that_are_not_alike(in_order: bool, heads: tuple[int, int]) -> None:
    w = workload("bwd_bf16_d32", (5,), (70,), heads)
    torch.use_deterministic_algorithms(in_order)
    try:
        assert_right(built("bwd_bf16_d32", config("bulk", keys=64, ctas=2)), w)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("case", [CASES[0], CASES[2]], ids=lambda case: case[1].name)
def test_sums_are_for_queries_whose_keys_are_in_several_blocks(
    case: tuple[str, Sm90BackwardConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    queries, keys = (70, 3, 129, 64, 200, 1), (128, 0, 129, 100, 70, 1)
    w = workload(case[0], queries, keys, (2, 1), "bottom_right")
    scratch: list[torch.Tensor] = []

    def new_empty(like: torch.Tensor, size: int, dtype: torch.dtype) -> torch.Tensor:
        scratch.append(torch.full((size,), float("nan"), dtype=dtype))
        return scratch[-1]

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    assert_right(built(*case), w, with_dlse=False)
    (numbers,) = scratch
    used = ~numbers[: w.total_q * 2 * 64].view(2, w.total_q, 64).isnan()
    expected = torch.zeros(w.total_q, dtype=torch.bool)
    expected[73 : 73 + 129] = True
    assert torch.equal(used, expected[None, :, None].expand_as(used))


def test_tiles_with_and_without_sums_take_turns() -> None:
    lengths = (70, 300, 1, 129, 128, 260, 5, 64)
    for case in (CASES[0], CASES[3], CASES[6], CASES[9], CASES[10], CASES[12]):
        assert_right(built(*case), workload(case[0], lengths, lengths, (3, 1)), with_dlse=False)


# --- passes over rows beside the tiles

FUSED = tuple(
    (name, fused)
    for name, tile in CASES
    for fused in (replace(tile, fused=True),)
    if Sm90BackwardSpace().rejection(KernelSpec.parse(name), fused) is None
)
ONE_WARPGROUP = (
    "bwd_fp16_d64_causal",
    config("bulk", keys=64, ctas=2, held="v", late_dq=True, early_dv=False, fused=True),
)
THREE_KV_STAGES = ("bwd_bf16_d32_causal", config("bulk", kv=3, late_dq=True, early_dv=False, fused=True))
# Rows worked on by one of the warps that feed, lse and delta copied by the one that loads.
ONE_ROW_WARP = tuple(
    (name, replace(tile, early_dv=False, fused=True, row_warps=1))
    for name, tile in (
        ("bwd_bf16_d128_causal", config("bulk", block_m=80, row_buffers=1)),
        ("bwd_fp16_d32", config("bulk", keys=192, kv=2, held="kv", late_dq=True)),
        ("bwd_bf16_d64_causal", config("bulk", keys=64, ctas=2, held="kv", overlap=True)),
        ("bwd_bf16_d64", config("bulk", keys=192, stages=3, late_dq=True)),
        ("bwd_fp16_d128_causal", config("bulk", overlap=True, late_dq=True)),
        ("bwd_fp16_d96_causal", config("bulk", keys=64, late_dk=True)),
    )
)
FUSED += (
    ("bwd_fp16_d96_causal", config("bulk", early_dv=False, late_dk=True, fused=True, row_buffers=1)),
    ("bwd_bf16_d32", config("bulk", keys=192, kv=2, early_dv=False, fused=True)),
    ONE_WARPGROUP,
    THREE_KV_STAGES,
    *ONE_ROW_WARP,
)
CAUSAL_FUSED = tuple(case for case in FUSED if KernelSpec.parse(case[0]).causal)


def test_every_mechanism_has_a_case_with_rows_beside_the_tiles() -> None:
    tiles = [tile for _, tile in FUSED]
    assert {tile.block_n for tile in tiles} == {64, 128, 192}
    assert {tile.ctas_per_sm for tile in tiles} == {1, 2}
    assert {tile.kv_stages for tile in tiles} == {1, 2, 3}
    assert {tile.late_dq for tile in tiles} == {tile.early_dv for tile in tiles} == {True, False}


@pytest.mark.parametrize("case", FUSED, ids=lambda case: case[1].name)
def test_rows_are_prepared_and_finished_beside_tiles(case: tuple[str, Sm90BackwardConfig]) -> None:
    assert_right(built(*case), workload(case[0], LENGTHS, LENGTHS), launches=2)


@pytest.mark.parametrize("name", ["bwd_bf16_d8_dv16", "bwd_fp16_d40_dv24", "bwd_bf16_d104_dv72"])
def test_rows_of_odd_head_dims_beside_tiles(name: str) -> None:
    tile = config("bulk", keys=64, late_dq=True, early_dv=False, fused=True)
    assert_right(built(name, tile), workload(name, LENGTHS, LENGTHS, (2, 2)))


@pytest.mark.parametrize("alignment", ["top_left", "bottom_right"])
@pytest.mark.parametrize("case", CAUSAL_FUSED, ids=lambda case: case[1].name)
def test_rows_that_no_tile_has_are_zeros(case: tuple[str, Sm90BackwardConfig], alignment: CausalAlignment) -> None:
    assert_right(built(*case), workload(case[0], QUERIES, KEYS, (4, 2), alignment), with_dlse=False)


@pytest.mark.parametrize("case", [*FUSED[2:4], *ONE_ROW_WARP[:2]], ids=lambda case: case[1].name)
def test_slices_of_long_sequences_whatever_the_schedule(case: tuple[str, Sm90BackwardConfig]) -> None:
    for seed in range(3):
        assert_right(built(*case), workload(case[0], (500, 20, 130), (400, 260, 70), (3, 1)), seed, with_dlse=False)


def test_slices_of_fewer_tiles_than_processors() -> None:
    name, tile = FUSED[0]
    w = workload(name, (64, *(0,) * 8), (200, *(0,) * 8), (1, 1))
    for seed in range(8):
        with loaded(built(name, tile), processors=8) as kernel:
            gradient_checks.assert_right(kernel, w, seed, with_dlse=False)


# The last tiles in pieces: early and late dQ, blocks of 128 queries, products left out, both ways to work on rows.
TAILS = tuple(
    (name, replace(tile, early_dv=False, fused=True, split_tail=True))
    for name, tile in (
        ("bwd_bf16_d32", config("bulk", late_dq=True, skip_unseen=True)),
        ("bwd_bf16_d64", config("bulk", block_m=128, claim_ahead=2)),
        ("bwd_fp16_d40_dv24", config("bulk", keys=64, ctas=2, kv=2)),
        ("bwd_bf16_d96", config("bulk", held="kv", late_dq=True, row_warps=1)),
        ("bwd_fp16_d96_dv72", config("bulk", block_m=80, row_buffers=1)),
        ("bwd_fp16_d32", config("bulk", keys=192, kv=2, held="kv", late_dq=True, row_warps=1)),
        ("bwd_bf16_d64", config("bulk", keys=64, ctas=2, overlap=True, held="kv", row_warps=1)),
    )
)


@pytest.mark.parametrize("case", TAILS, ids=lambda case: case[1].name)
@pytest.mark.parametrize(
    ("processors", "queries", "keys", "heads"),
    [
        (8, (1100,), (300,), (1, 1)),  # all tiles but the first
        (7, (1100,), (100,), (2, 1)),  # of all keys
        (4, (700, 20, 0, 600), (200, 500, 30, 260), (2, 2)),
        (3, (1500,), (500,), (1, 1)),
        (4, (40, 700, 550) * 2, (300, 900, 800) * 2, (2, 2)),  # more than ten tiles a CTA
    ],
)
def test_last_tiles_in_pieces(
    case: tuple[str, Sm90BackwardConfig],
    processors: int,
    queries: tuple[int, ...],
    keys: tuple[int, ...],
    heads: tuple[int, int],
) -> None:
    with loaded(built(*case), processors) as kernel:
        gradient_checks.assert_right(kernel, workload(case[0], queries, keys, heads), launches=2)


@pytest.mark.parametrize(("in_order", "most_blocks"), [(False, 100), (True, 100), (False, 10)])
def test_no_pieces_where_additions_have_an_order(
    in_order: bool, most_blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where pieces nearly cancel out, dV of their tile has the same bits in every run only if there are none. Nor where
    there are more blocks of queries than a piece's place has room for.
    """
    monkeypatch.setattr(backward_params, "MOST_TAIL_BLOCKS", most_blocks)
    whole = in_order or most_blocks == 10
    w = workload(TAILS[0][0], (1100,), (100,), (1, 1))  # one tile, in four pieces
    b = w.make("cpu", "bf16", 3)
    b.q.zero_()  # all queries see all keys alike
    generator = torch.Generator().manual_seed(1)
    dout = torch.randn(b.q.shape, generator=generator) * 2.0 ** torch.randint(-12, 8, b.q.shape, generator=generator)
    dout[550:] = 0.01 * torch.randn(dout[550:].shape, generator=generator) - dout[:550]
    dout = dout.to(b.q.dtype)
    found = []
    torch.use_deterministic_algorithms(in_order)
    try:
        for _ in range(4):  # each under another schedule
            with loaded(built(*TAILS[0]), processors=8) as kernel:
                found.append(gradient_checks.gradients(kernel, w, b, dout))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(found[0].dv, other.dv) for other in found[1:]) == whole
    assert not whole or all(torch.equal(x, y) for other in found[1:] for x, y in zip(found[0], other, strict=True))


# Tiles claimed some blocks of queries early, more than most tiles have; four buffers of rows.
EAGER = tuple(
    (name, replace(tile, **knobs))
    for (name, tile), knobs in (
        (CASES[0], {"claim_ahead": 2}),
        (CASES[1], {"claim_ahead": 5}),
        (FUSED[0], {"claim_ahead": 2}),
        (ONE_WARPGROUP, {"claim_ahead": 5}),
        # Tiles and barriers of most bytes.
        (THREE_KV_STAGES, {"claim_ahead": 2, "row_buffers": 4, "num_stages": 4, "block_n": 64}),
        (ONE_ROW_WARP[2], {"claim_ahead": 5}),
    )
)


@pytest.mark.parametrize("case", EAGER, ids=lambda case: case[1].name)
@pytest.mark.parametrize("in_order", [False, True])
def test_tiles_that_are_claimed_early(case: tuple[str, Sm90BackwardConfig], in_order: bool) -> None:
    torch.use_deterministic_algorithms(in_order)
    try:
        assert_right(built(*case), workload(case[0], QUERIES, KEYS, (4, 2), "bottom_right"), with_dlse=False)
        for seed in range(3):
            w = workload(case[0], (500, 20, 130, 0), (400, 260, 70, 5), (3, 1))
            assert_right(built(*case), w, seed, with_dlse=False, launches=2)
    finally:
        torch.use_deterministic_algorithms(False)


def test_slices_beside_additions_in_order(deterministic: None) -> None:
    for case in (*FUSED[:2], ONE_ROW_WARP[0]):
        assert_right(built(*case), workload(case[0], (300, 200, 5), (300, 400, 70), (2, 2)), with_dlse=False)


# --- the launcher


def call(
    machine_seed: int,
    w: Workload,
    b: JaggedBatch,
    dout: torch.Tensor,
    calls: int = 1,
    case: tuple[str, Sm90BackwardConfig] = CASES[0],
) -> tuple[Gradients, list[str]]:
    """The gradients of the last of some calls, and the kernels that all of them launched."""
    out, lse = reference(*b[:5], is_causal=w.is_causal)
    grads = Gradients(*(torch.full_like(x, float("nan")) for x in b[:3]))
    with emulated(processors=2, seed=machine_seed) as machine:
        kernel = cuda.load(built(*case), torch.device("cuda", 0))
        assert isinstance(kernel, cuda.CudaBackwardKernel)
        for _ in range(calls):
            kernel.backward(*b[:5], out.to(b.q.dtype), lse.float(), dout, None, *grads, w.head_dim**-0.5, False)
    return grads, [name for name, *_ in machine.launches]


def assert_close(found: Gradients, w: Workload, b: JaggedBatch, dout: torch.Tensor) -> None:
    for name, grad, want in zip(Gradients._fields, found, reference_gradients(*b[:5], dout), strict=True):
        assert errors(grad, want).rel <= gradient_tolerance(grad.dtype), name


SMALL = workload("bwd_bf16_d64", (3, 20), (3, 20), (2, 2))


def test_one_call_is_three_launches_and_a_list_for_the_batch() -> None:
    b = SMALL.make("cpu", "bf16")
    _, names = call(1, SMALL, b, torch.randn_like(b.q), calls=2)
    passes = ["jagtile_backward_prepare", built(*CASES[0]).meta.symbol, "jagtile_backward_finish"]
    assert names == ["jagtile_build_work_list", *passes, *passes]


def test_rows_beside_the_tiles_are_one_launch_less() -> None:
    b = SMALL.make("cpu", "bf16")
    case = (CASES[0][0], replace(CASES[0][1], early_dv=False, num_stages=2, kv_stages=1, fused=True))
    found, names = call(1, SMALL, b, dout := torch.randn_like(b.q), calls=2, case=case)
    assert names == ["jagtile_build_work_list", *2 * ("jagtile_backward_prepare", built(*case).meta.symbol)]
    assert_close(found, SMALL, b, dout)


@pytest.mark.parametrize("fused", [False, True])
def test_offsets_that_promise_more_keys_than_there_are_leave_no_row_of_dq_unwritten(fused: bool) -> None:
    w = workload("bwd_bf16_d64", (100, 100, 100), (200, 400, 300), (1, 1))
    b = w.make("cpu", "bf16", 4)
    tile = config("bulk", held="kv", late_dq=True, early_dv=False, fused=fused)
    out, lse = reference(*b[:5])
    grads = Gradients(*(torch.full_like(x, float("nan")) for x in b[:3]))
    with emulated(processors=2, seed=3):
        kernel = cuda.load(built("bwd_bf16_d64", tile), torch.device("cuda", 0))
        assert isinstance(kernel, cuda.CudaBackwardKernel)
        few = (b.q, b.k[:300], b.v[:300], b.cu_seqlens_q, b.cu_seqlens_k)
        given = (out.to(b.q.dtype), lse.float(), torch.randn_like(b.q), None)
        kernel.backward(*few, *given, grads.dq, grads.dk[:300], grads.dv[:300], w.head_dim**-0.5, False)
    assert not grads.dq.isnan().any()


@pytest.mark.parametrize("in_order", [False, True])
def test_layers_of_other_heads_share_offsets_and_no_list(in_order: bool) -> None:
    lengths = (130,) * 4
    few, many = (workload("bwd_bf16_d64", lengths, lengths, heads) for heads in ((2, 2), (8, 8)))
    b = few.make("cpu", "bf16", 6)
    batches = (b, many.make("cpu", "bf16", 7)._replace(cu_seqlens_q=b.cu_seqlens_q, cu_seqlens_k=b.cu_seqlens_k))
    torch.use_deterministic_algorithms(in_order)
    try:
        with emulated(processors=3, seed=5):
            kernel = cuda.load(built(*CASES[0]), torch.device("cuda", 0))
            assert isinstance(kernel, cuda.CudaBackwardKernel)
            for w, batch in zip((few, many), batches, strict=True):
                out, lse = reference(*batch[:5])
                dout = torch.randn_like(batch.q)
                grads = Gradients(*(torch.full_like(x, float("nan")) for x in batch[:3]))
                given = (out.to(dout.dtype), lse.float(), dout, None)
                kernel.backward(*batch[:5], *given, *grads, w.head_dim**-0.5, False)
                assert_close(grads, w, batch, dout)
    finally:
        torch.use_deterministic_algorithms(False)


def test_layouts_that_tma_cannot_address_are_copied() -> None:
    b = SMALL.make("cpu", "bf16", 2)
    dout = torch.randn(1, 1, 64).to(b.q.dtype).expand(b.q.shape)  # as the gradient of a sum
    odd = torch.zeros(b.q.numel() + b.q.shape[0] * 6 + 1, dtype=b.q.dtype)[1:].view(b.q.shape[0], 2, 67)[..., :64]
    strange = b._replace(q=odd.copy_(b.q), k=b.k[:, :1].expand(b.k.shape))
    found, _ = call(2, SMALL, strange, dout)
    assert_close(found, SMALL, strange, dout)


def test_int64_and_mixed_offsets() -> None:
    b = SMALL.make("cpu", "bf16", 3)
    dout = torch.randn_like(b.q)
    mixed = b._replace(cu_seqlens_q=b.cu_seqlens_q.long())
    for seed, batch in enumerate((mixed, mixed._replace(cu_seqlens_k=b.cu_seqlens_k.long()))):
        found, _ = call(10 + seed, SMALL, batch, dout)
        assert_close(found, SMALL, batch, dout)


def test_without_keys_gradients_are_zeros_and_nothing_is_launched() -> None:
    w = workload("bwd_bf16_d64", (3, 20), (0, 0), (2, 2))
    b = w.make("cpu", "bf16")
    found, names = call(1, w, b, torch.randn_like(b.q))
    assert not names
    assert all(not grad.any() for grad in found)


def test_tokens_of_no_sequence_have_no_gradient_by_queries_and_touch_nobody() -> None:
    b = SMALL.make("cpu", "bf16", 4)
    dout = torch.randn_like(b.q)
    offsets = torch.tensor([2, 9, 20], dtype=torch.int32)
    shifted = b._replace(cu_seqlens_q=offsets, cu_seqlens_k=offsets)
    for x in (shifted.q, shifted.k, shifted.v):
        x[:2], x[20:] = float("nan"), float("nan")
    found, _ = call(5, SMALL, shifted, dout)
    want = reference_gradients(*shifted[:5], dout)
    assert not found.dq[:2].any()
    assert not found.dq[20:].any()
    for grad, truth in zip(found, want, strict=True):
        assert errors(grad[2:20], truth[2:20]).rel <= gradient_tolerance(grad.dtype)


def test_the_same_offsets_of_more_tokens() -> None:
    """The list has room for some bits of each query and an item for each block of keys."""
    b = SMALL.make("cpu", "bf16", 6)
    assert b.q.shape[0] == 23
    with emulated(processors=2, seed=6):
        kernel = cuda.load(built(*CASES[0]), torch.device("cuda", 0))
        assert isinstance(kernel, cuda.CudaBackwardKernel)
        for queries, keys in ((23, 23), (300, 300), (300, 3000)):
            totals = (queries, keys, keys)
            q, k, v = (
                torch.cat([x, x.new_full((tokens - 23, *x.shape[1:]), float("nan"))])
                for x, tokens in zip(b[:3], totals, strict=True)
            )
            out, lse = reference(q, k, v, *b[3:5])
            dout = torch.randn(q.shape, generator=torch.Generator().manual_seed(queries)).to(q.dtype)
            grads = Gradients(*(torch.full_like(x, float("nan")) for x in (q, k, v)))
            kernel.backward(
                *(q, k, v, *b[3:5], out.to(q.dtype), lse.float(), dout, None, *grads), SMALL.head_dim**-0.5, False
            )
            assert not grads.dq[23:].any()
            want = reference_gradients(q, k, v, *b[3:5], dout)
            for grad, truth in zip(grads, want, strict=True):
                assert errors(grad[:23], truth[:23]).rel <= gradient_tolerance(grad.dtype)
