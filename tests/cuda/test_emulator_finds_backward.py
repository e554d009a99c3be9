"""Mistakes put into the generated backward, one at a time, where CTAs wait for each other: the emulator finds each."""

from __future__ import annotations

import re
from dataclasses import replace

import gradient_checks
import pytest
from emulator import kernels
from emulator.backward_checks import loaded, poison_scratch
from emulator.driver import EmulatorError

from jagtile.generator.spaces.sm90_backward import Sm90BackwardConfig
from jagtile.generator.spec import KernelSpec
from jagtile.generator.tile import Variant
from jagtile.generator.workloads import Workload

SPEC = KernelSpec.parse("bwd_bf16_d32")
FUSED = Sm90BackwardConfig(64, 64, 2, 1, "bulk", False, 1, "none", True, early_dv=False, fused=True)
LATE_DK = Sm90BackwardConfig(64, 64, 2, 1, "bulk", False, 1, "none", False, early_dv=False, late_dk=True)
ROW_WARP = replace(FUSED, row_warps=1)
SKIPS = Sm90BackwardConfig(64, 128, 2, 1, "bulk", False, 1, "none", True, early_dv=False, skip_unseen=True)
TAIL = replace(FUSED, split_tail=True)
IN_TURN = replace(FUSED, block_n=128, skip_unseen=True, in_turn=True)
MEETS = replace(FUSED, late_dq=False)
SHARED_DQ = replace(ROW_WARP, block_n=192)
LENGTHS = ((300, 40, 0, 0, 200), (300, 40, 0, 150, 200))  # of queries, of keys: tiles without steps, too
LAST_DQ = "      wgmma_wait<0>();\n      pin_registers(dq);\n"
MISTAKES: dict[str, tuple[str, str, str]] = {
    "the first tile adds to sums that nobody has zeroed": (
        "  if (item.row == 0) {\n    bulk_store",
        "  if (false) {\n    bulk_store",
        "race on global|^wrong$",
    ),
    "other tiles do not wait until the first has stored": (
        "before = item.row == 0 ? 0x7fffffff : 0;",
        "before = 0x7fffffff;",
        "race on global",
    ),
    "steps are told before they are stored": (
        "    tma_store_wait();\n    add_release(own",
        "    add_release(own",
        "race on global",
    ),
    "a tile is told to be complete before its additions are": (
        "        tma_store_wait();\n        fence_async_proxy_global();\n        control.rows.end_adding();",
        "        control.rows.end_adding();",
        "race on global",
    ),
    "rows are finished before all tiles have added": (
        "load_acquire(&progress->pair(to_finish.pair).added) < to_finish.tiles",
        "false",
        "race on global",
    ),
    "a tile's rows are said to be prepared before they are": (
        "load_acquire(&progress->pair(awaited_pair).prepared) < awaited",
        "false",
        "race on global",
    ),
    "delta is read of a tile that is known, not prepared": (
        "for_each_tile(tiles, ",
        "for_each_tile(control, ",
        "race on global",
    ),
    "the rest's next slice is claimed where this one is read": (
        "control.rows.rest[warpgroup][turn]",
        "control.rows.rest[warpgroup][0]",
        "race on shared",
    ),
    "the rest's slices are left to their first warp": (
        "int part = thread / 32; part < parts",
        "int part = thread / 32; part < min(parts, 1)",
        "^wrong$",
    ),
    "dQ is added without a proxy fence": (
        "            fence_async_proxy();  // here, or math warps would wait for their stores\n            put_part(",
        "            put_part(",
        "a bulk store reads .* without fence.proxy.async",
    ),
    "dK and dV leave without a proxy fence": (
        "      fence_async_proxy();\n      if (first_key < item.k_length) {",
        "      if (first_key < item.k_length) {",
        "a tensor store reads .* without fence.proxy.async",
    ),
    "dS^T is staged where a warp's panel of dK or dV is leaving": (
        "if (lane == 0) tma_store_wait_read();\n      named_barrier_sync",
        "if (leader) tma_store_wait_read();\n      named_barrier_sync",
        "race on shared",
    ),
    "zeros are staged where dK and dV of the tile before are leaving": (
        "    await_stores();  // where no query sees this tile\n",
        "",
        "race on shared",
    ),
    "K is handed back while the last dQ is multiplied": (
        f"{LAST_DQ}      if (leader) {{\n        control.ds.arrive_empty(ds_before);\n        free_keys();\n      }}\n",
        f"      if (leader) free_keys();\n{LAST_DQ}      if (leader) control.ds.arrive_empty(ds_before);\n",
        "race on shared",
    ),
    "K of a tile without steps is not handed back": (
        "    if (leader && steps == 0) free_keys();\n",
        "",
        "livelock|waits|deadlock",
    ),
    "rows are told to be prepared by the first warp that is done": (
        "awaited = Units::kWarps * pair_tiles",
        "awaited = pair_tiles",
        "race on global",
    ),
    "rows are copied into a buffer that is worked on": (
        "rows.slice.ended() || !control.row_units.is_empty(at)",
        "rows.slice.ended()",
        "not ordered after|arrivals more than",
    ),
}
LATE_DK_MISTAKES: dict[str, tuple[str, str, str]] = {
    "dK is multiplied from the dS^T that is being made": (
        "(left + 1) % 2 * kDsBytes",
        "left % 2 * kDsBytes",
        "race on|wrong",
    ),
    "dP is read while it is multiplied": (
        "<1>();\n      pin_registers(dp)",
        "<2>();\n      pin_registers(dp)",
        "wgmma|wrong",
    ),
    "Q is handed back before dK is made of it": (
        "      probabilities_of_scores(first_half(scores)",
        "      if (leader) control.q.arrive_empty(q_before);\n      probabilities_of_scores(first_half(scores)",
        "race on|arrivals more than|wrong",
    ),
}
MEETS_MISTAKES: dict[str, tuple[str, str, str]] = {
    "dQ is multiplied from dS^T that is not fenced": (
        "has been read\n      fence_async_proxy();\n",
        "has been read\n",
        "wgmma A reads .* without fence.proxy.async",
    ),
}
ROW_WARP_MISTAKES: dict[str, tuple[str, str, str]] = {
    "delta is read of a tile that is known, not prepared": (
        "for_each_tile(tiles, ",
        "for_each_tile(control, ",
        "race on global",
    ),
    "a unit is counted while lanes look for it": (
        "++control.rows.worked;\n      __syncwarp();\n",
        "++control.rows.worked;\n",
        "race on|polls|wrong",
    ),
    "a unit is counted before all lanes have handed it back": (
        "      __syncwarp();\n      if (lane_here() == 0) ++control.rows.worked;\n",
        "      if (lane_here() == 0) ++control.rows.worked;\n",
        "race on|polls|wrong",
    ),
    "lse is passed on to steps that still read the one before": (
        "          control.stats.wait_empty(at);\n",
        "",
        "race on|livelock",
    ),
}
BEFORE = "      if (add_before) {\n        float dq[16];\n"
FENCE = "fence_async_proxy();  // what all warps wrote\n"
PRODUCT = "        issue_dq(dq, ds_tiles + ds_before.slot * kDsBytes, k_tile);\n        wgmma_wait<0>();\n"
SKIPS_MISTAKES: dict[str, tuple[str, str, str]] = {
    "a block whose queries see keys is left out": ("- first / kBlockM + 1)", "- first / kBlockM)", "^wrong$"),
    "dS^T of keys that are left out stays as it was": (
        "      const uint32_t ds[kStepsM][4] = {};\n"
        "      stage_fragments<kKVPanelBytes>(ds, ds_tile + warpgroup * kRowsBytes, warp, lane);\n",
        "",
        "race on|^wrong$",
    ),
    "dQ is multiplied from dS^T that is not there yet": (
        f"{BEFORE}        control.ds.wait_full(ds_before);\n        {FENCE}{PRODUCT}",
        f"{BEFORE}        {FENCE}{PRODUCT}",
        "race on|wrong|without fence",
    ),
    "dQ is multiplied from dS^T that is not fenced": (
        f"{BEFORE}        control.ds.wait_full(ds_before);\n        {FENCE}{PRODUCT}",
        f"{BEFORE}        control.ds.wait_full(ds_before);\n{PRODUCT}",
        "wgmma A reads .* without fence.proxy.async",
    ),
}
IN_TURN_MISTAKES: dict[str, tuple[str, str, str]] = {
    "nobody has the first turn": ("  Turns::begin(warpgroup);\n", "", "waits|livelock"),
    "a turn is not passed on where keys are left out": (
        "      Turns::await(warpgroup);\n      Turns::pass(warpgroup);\n",
        "      Turns::await(warpgroup);\n",
        "waits|livelock",
    ),
    "dS of queries that a key does not see is left as it is": (
        "        mask_packed(ds, upper_limit, lower_limit);\n",
        "",
        "^wrong$",
    ),
    "lse is passed on to steps that still read the one before": (
        "          control.dout.wait_empty(at);\n          float* slot",
        "          float* slot",
        "race on|arrivals more than|livelock|waits",
    ),
}
SHARED_DQ_MISTAKES: dict[str, tuple[str, str, str]] = {
    "a buffer of dQ is free before it has been read": (
        "          tma_store_wait_read<0>();\n          control.dq[0].arrive_empty(at);",
        "          control.dq[0].arrive_empty(at);",
        "race on|^wrong$",
    ),
    "blocks of tiles before are not counted": (
        "if (!has_all_keys) dq_blocks += steps;",
        "",
        "race on|waits|livelock|wrong",
    ),
}
TAIL_MISTAKES: dict[str, tuple[str, str, str]] = {
    "sums of pieces are used as they were": (
        "  zero_tail_sums<Tail, kTailTiles, kRowThreads>(p);\n",
        "",
        "livelock|race on|^wrong$",
    ),
    "sums are read before all pieces are there": (
        "is_last = atomicAdd(&sums.multiplied[kPart], 1) == piece.pieces - 1;",
        "is_last = atomicAdd(&sums.multiplied[kPart], 1) == piece.pieces - 2;",
        "race on|^wrong$",
    ),
    "a piece is counted before all of its sums are there": (
        "  named_barrier_sync(barrier, kThreads);\n  if (thread == 0) {\n    __threadfence();",
        "  if (thread == 0) {\n    __threadfence();",
        "race on|^wrong$",
    ),
    "a tile's additions are complete with its first piece's": (
        "== piece.pieces - 1;\n  __threadfence();\n  return last;",
        "== 0;\n  __threadfence();\n  return last;",
        "race on|^wrong$",
    ),
    "a piece waits for steps of the piece before": (
        "control.turns.added = control.turns.passed = TailPiece::of(item).blocks_before * p.gqa_ratio;",
        "control.turns.added = control.turns.passed = 0;",
        "race on",
    ),
    "a tile that others follow is in pieces": (
        "is_followed = item.row == 0 && item.k_length > kBlockN",
        "is_followed = false",
        "race on|^wrong$|waits",
    ),
    "a block of queries is in two pieces": ("first + 1) * kBlockM;", "first + 2) * kBlockM;", "^wrong$|race on|waits"),
}


@pytest.fixture(autouse=True)
def poisoned_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_scratch(monkeypatch)


def outcome(mistake: tuple[str, str] | None, tile: Sm90BackwardConfig = FUSED) -> str | None:
    """What the emulator reports of two launches; None, if nothing; "wrong", if nothing but the numbers are."""
    change = kernels.substitution(*mistake) if mistake is not None else None
    spec = replace(SPEC, causal=tile.skip_unseen)
    (queries, keys), processors = (((1100,), (150,)), 8) if tile.split_tail else (LENGTHS, 2)
    w = Workload("some", queries, keys, 2, 1, spec.head_dim, spec.head_dim_v, spec.causal)
    try:
        artifact = kernels.artifact(Variant("sm_90a", spec, tile), change)
        with loaded(artifact, processors) as kernel:
            gradient_checks.assert_right(kernel, w, launches=2)
    except EmulatorError as error:
        return str(error)
    except AssertionError:
        return "wrong"
    return None


def test_nothing_is_found_in_the_kernel_as_it_is() -> None:
    assert [outcome(None, tile) for tile, _ in ALL for _ in range(4)] == [None] * (4 * len(ALL))


ALL = (
    (FUSED, MISTAKES),
    (LATE_DK, LATE_DK_MISTAKES),
    (MEETS, MEETS_MISTAKES),
    (ROW_WARP, ROW_WARP_MISTAKES),
    (SKIPS, SKIPS_MISTAKES),
    (TAIL, TAIL_MISTAKES),
    (IN_TURN, IN_TURN_MISTAKES),
    (SHARED_DQ, SHARED_DQ_MISTAKES),
)


@pytest.mark.parametrize(
    ("tile", "mistake"),
    [pytest.param(tile, mistake, id=name) for tile, mistakes in ALL for name, mistake in mistakes.items()],
)
def test_it_is_found(tile: Sm90BackwardConfig, mistake: tuple[str, str, str]) -> None:
    old, new, report = mistake
    found = outcome((old, new), tile)
    assert found is not None
    assert re.search(report, found, re.DOTALL), found


@pytest.mark.parametrize("meet", [True, False])
def test_warps_that_come_late_to_tiles_without_steps(meet: bool) -> None:
    spec = KernelSpec.parse("bwd_bf16_d96")
    tile = Sm90BackwardConfig(64, 128, 2, 1, "bulk", False, 1, "none", True, early_dv=False)
    lines = "    named_barrier_sync(kMathBarrier, 128 * kWarpgroups);\n", "    if (leader && steps == 0) free_keys();\n"
    sooner = kernels.substitution("".join(lines), "".join(reversed(lines)))
    w = Workload("few queries", (20, *[0] * 99), (20, *[5] * 99), 1, 1, 96, 96, False)
    with loaded(kernels.artifact(Variant("sm_90a", spec, tile), None if meet else sooner), 2) as kernel:
        if meet:
            gradient_checks.assert_right(kernel, w, launches=12)
        else:
            with pytest.raises(EmulatorError, match=r"deadlock|race on shared"):
                gradient_checks.assert_right(kernel, w, launches=12)
