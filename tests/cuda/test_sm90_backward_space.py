"""Legality of the Hopper backward's tiles: the arithmetic, its reasons, and what ptxas says to it."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from jagtile.generator.build import build
from jagtile.generator.render import render, render_unchecked
from jagtile.generator.spaces.sm90_backward import (
    Sm90BackwardConfig,
    Sm90BackwardSpace,
    dq_split,
    dq_stages,
    fragment_registers,
    num_threads,
    setmaxnreg,
    smem_layout,
)
from jagtile.generator.spec import KernelSpec
from jagtile.generator.tile import Variant, config_from_dict, legal_configs
from jagtile.runtime.errors import IllegalConfigError

SPACE = Sm90BackwardSpace()
D128 = KernelSpec.parse("bwd_bf16_d128")
BASE = Sm90BackwardConfig(64, 128, 2, 1, "bulk", overlap=False, kv_stages=1, held="none", late_dq=False, early_dv=True)
SPECS = [
    KernelSpec.parse(name)
    for name in (
        "bwd_bf16_d8",
        "bwd_fp16_d32_causal",
        "bwd_bf16_d64",
        "bwd_bf16_d72_dv40_causal",
        "bwd_bf16_d96_causal",
        "bwd_bf16_d64_dv128",
        "bwd_bf16_d128",
        "bwd_fp16_d128_causal",
    )
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_every_spec_has_a_legal_default_of_128_keys(spec: KernelSpec) -> None:
    config = SPACE.default(spec)
    assert isinstance(config, Sm90BackwardConfig)
    assert SPACE.rejection(spec, config) is None
    assert config.block_n == 128
    assert config.ctas_per_sm == 1


@pytest.mark.parametrize(
    ("name", "tile"),
    [
        ("d32", "m128_n128_s2_c1_dbulk_o0_k2_hkv_l1_e0"),
        ("d64", "m128_n128_s2_c1_dbulk_o0_k1_hnone_l1_e0_f1"),
        ("d72_dv40", "m64_n128_s2_c1_dbulk_o0_k1_hv_l1_e0_f1"),
        ("d96", "m64_n128_s2_c1_dbulk_o0_k1_hv_l1_e0_f1"),
        ("d128", "m64_n128_s2_c1_dbulk_o0_k1_hnone_l1_e0_f1"),
    ],
)
def test_the_default_takes_what_there_is_room_for(name: str, tile: str) -> None:
    assert SPACE.default(KernelSpec.parse(f"bwd_bf16_{name}")).name == f"keyblocks_{tile}"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"block_m": 96}, "block_m must be 64"),
        ({"block_m": 80}, "block_m 80: one buffer of dS"),
        ({"block_m": 128, "block_n": 64}, "as many as block_n, or 80"),
        ({"block_m": 128}, "shared memory"),
        ({"block_n": 96}, "block_n is 64 a math warpgroup"),
        ({"num_stages": 1}, "num_stages must be at least 2"),
        ({"dq": "atomic"}, "dq must be bulk or red"),
        ({"fused": True, "dq": "red"}, "dq must be bulk"),
        ({"claim_ahead": 9}, "claim_ahead must be 0 to 8, got 9"),
        ({"row_buffers": 3, "fused": True}, "row_buffers must be 2, or where fused 1 or 4, got 3"),
        ({"row_buffers": 1, "fused": True, "dq": "bulk", "block_n": 64}, "row_buffers: one is for where"),
        ({"row_buffers": 4}, "row_buffers must be 2, or where fused 1 or 4, got 4"),
        ({"row_warps": 1}, "row_warps must be 4, or where fused 1, got 1"),
        ({"row_warps": 2, "fused": True, "dq": "bulk"}, "row_warps must be 4, or where fused 1, got 2"),
        ({"row_warps": 1, "fused": True, "dq": "bulk", "kv_stages": 2}, "the warp that loads has 24 registers"),
        ({"late_dk": True}, "late_dk: every warpgroup must have a part of each dQ"),
        ({"late_dk": True, "early_dv": False, "block_n": 192}, "late_dk: every warpgroup must have a part of each dQ"),
        ({"skip_unseen": True, "block_n": 64}, "skip_unseen: of several math warpgroups"),
        ({"skip_unseen": True}, "does not meet them in each step: late_dq must be on"),
        ({"split_tail": True}, "split_tail: up to head_dim 128 it comes with rows beside the tiles: fused must be on"),
        ({"in_turn": True, "block_n": 192, "dq": "red"}, "in_turn: two math warpgroups (block_n 128)"),
        ({"in_turn": True, "late_dq": True}, "late_dq must be on, overlap and early_dv off"),
        ({"polynomial": 3}, "polynomial must be one of 0, 8, 4, 2, got 3"),
        ({"polynomial": 4}, "polynomial: a head dim of 128 > 64"),
        ({"ctas_per_sm": 2}, "64K registers"),
        ({"num_stages": 4}, "shared memory 265216 B > 232448 B"),
        ({"kv_stages": 4}, "kv_stages must be 1, 2 or 3"),
        ({"kv_stages": 2}, "shared memory 264192 B"),
        ({"held": "k"}, "held must be none, v or kv"),
        ({"held": "v"}, "242 registers a thread > 208"),
        ({"late_dq": True}, "242 registers a thread > 208"),
        ({"overlap": True}, "226 registers a thread > 208 with 2 math warpgroups"),
        ({"block_n": 64, "ctas_per_sm": 2}, "shared memory"),
        ({"block_n": 192, "dq": "red"}, "math warpgroups"),
    ],
)
def test_an_illegal_tile_is_refused_with_its_arithmetic(change: dict[str, int], reason: str) -> None:
    config = replace(BASE, **change)
    rejection = SPACE.rejection(D128, config)
    assert rejection is not None
    assert reason in rejection
    with pytest.raises(IllegalConfigError, match="d128"):
        render(Variant("sm_90a", D128, config))


def test_no_pieces_with_a_causal_mask() -> None:
    tile = replace(SPACE.default(D128), split_tail=True)
    assert SPACE.rejection(D128, tile) is None
    assert "last tiles are short" in (SPACE.rejection(replace(D128, causal=True), tile) or "")
    assert SPACE.knobs(replace(D128, causal=True))["split_tail"] == (False,)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("bwd_fp32_d128", "bf16 or fp16"),
        ("bwd_bf16_d100", "multiple of 8"),
        ("bwd_bf16_d64_dv20", "head_dim_v"),
        ("bwd_bf16_d136", "at most 128"),
    ],
)
def test_what_the_template_cannot_compute_is_said(name: str, reason: str) -> None:
    assert reason in str(SPACE.serves(KernelSpec.parse(name)))


def test_shared_memory_is_the_sum_of_its_regions() -> None:
    layout = smem_layout(D128, BASE)
    assert (layout.k_bytes, layout.v_bytes, layout.q_bytes, layout.dout_bytes) == (32768,) * 4
    assert (layout.ds_bytes, layout.dq_bytes, layout.stats_bytes) == (32768, 32768, 1024)
    assert SPACE.launch(D128, BASE)["smem_bytes"] == layout.total == 6 * 32768 + 2048
    assert smem_layout(D128, replace(BASE, dq="red")).total == layout.total - layout.dq_bytes
    assert smem_layout(D128, replace(BASE, late_dk=True)).q_bytes == layout.q_bytes * 3 // 2


@pytest.mark.parametrize(
    ("name", "block_m", "block_n", "split"),
    [
        ("d128", 64, 128, "columns"),
        ("d72", 64, 128, "columns"),
        ("d64", 64, 128, "alternate"),
        ("d64", 64, 192, "alternate"),
        ("d96", 64, 64, "rows"),
        ("d32", 128, 128, "rows"),
    ],
)
def test_how_warpgroups_share_dq(name: str, block_m: int, block_n: int, split: str) -> None:
    config = replace(BASE, block_m=block_m, block_n=block_n)
    assert dq_split(KernelSpec.parse(f"bwd_bf16_{name}"), config) == split


def test_warpgroups_that_take_turns_and_may_be_a_step_apart_have_a_buffer_of_dq_each() -> None:
    d64 = KernelSpec.parse("bwd_bf16_d64")
    assert dq_stages(d64, BASE) == 1
    assert dq_stages(d64, replace(BASE, late_dq=True)) == 2
    assert dq_stages(KernelSpec.parse("bwd_bf16_d72"), replace(BASE, late_dq=True)) == 1
    three = replace(BASE, block_n=192, late_dq=True, early_dv=False)
    assert dq_stages(d64, three) == 3


def test_beside_rows_three_warpgroups_share_two_buffers_of_dq() -> None:
    """So that shared memory has room for two buffers of K and V and two of rows."""
    d64 = KernelSpec.parse("bwd_bf16_d64")
    tile = replace(BASE, block_n=192, kv_stages=2, late_dq=True, early_dv=False, fused=True, row_warps=1)
    assert dq_stages(d64, tile) == 2
    assert SPACE.rejection(d64, tile) is None
    assert dq_stages(d64, replace(tile, late_dq=False)) == 1


def test_registers_where_the_most_are_alive() -> None:
    # dK, dV, S, dP, P packed, and where dK and dV leave through
    assert fragment_registers(D128, BASE) == 64 + 64 + 32 + 32 + 16 + 2
    assert (
        fragment_registers(D128, replace(BASE, block_n=64)) == 64 + 64 + 64 + 16 + 16 + 2
    )  # dK, dV, dQ, P and dS packed
    d64 = KernelSpec.parse("bwd_bf16_d64")
    assert fragment_registers(d64, BASE) == 32 + 32 + 32 + 32 + 16
    held = replace(BASE, kv_stages=2, held="kv")
    assert fragment_registers(d64, held) == 32 + 32 + 32 + 32 + 16 + 16 + 16
    assert fragment_registers(d64, replace(held, late_dq=True)) == fragment_registers(d64, held) + 32  # dQ too
    together = replace(BASE, block_m=128, early_dv=False)
    assert (
        fragment_registers(d64, together) == 32 + 32 + 64 + 64 + 10
    )  # P and dS are packed when S and dP are done with
    assert fragment_registers(d64, replace(together, late_dq=True)) == fragment_registers(d64, together)


def test_one_row_warp_leaves_math_warps_their_registers() -> None:
    eighty = replace(BASE, block_m=80, early_dv=False, fused=True, row_buffers=1)
    assert "216 registers a thread > 208" in str(SPACE.rejection(D128, eighty))
    among_feeding = replace(eighty, row_warps=1)
    assert SPACE.rejection(D128, among_feeding) is None
    assert num_threads(eighty) - num_threads(among_feeding) == 128
    assert setmaxnreg(among_feeding) == setmaxnreg(replace(among_feeding, fused=False, row_warps=4, row_buffers=2))
    assert SPACE.context(D128, among_feeding)["feeding_warps"] == 4


def test_rules_cut_off_nothing_that_is_legal() -> None:
    spec = KernelSpec.parse("bwd_bf16_d64")
    legal, rng, knobs = set(legal_configs(SPACE, spec)), random.Random(1), SPACE.knobs(spec)
    drawn = [SPACE.config_type(**{name: rng.choice(values) for name, values in knobs.items()}) for _ in range(20000)]
    assert {config for config in drawn if SPACE.rejection(spec, config) is None} == legal.intersection(drawn)
    assert len(legal.intersection(drawn)) > 100


def test_names_parse_back() -> None:
    for config in legal_configs(SPACE, D128):
        variant = Variant("sm_90a", D128, config)
        assert Variant.parse(variant.name) == variant
        assert config_from_dict("sm_90a", config.to_dict()) == config


@pytest.mark.parametrize("name", ["bwd_bf16_d64", "bwd_bf16_d128_causal"])
def test_rendering_is_reproducible_and_as_reviewed(name: str) -> None:
    spec = KernelSpec.parse(name)
    variant = Variant("sm_90a", spec, SPACE.default(spec))
    text = render(variant).text
    render_unchecked.cache_clear()
    assert render(variant).text == text
    golden = Path(__file__).parent / "golden" / f"{spec.name}.cu"
    assert text == golden.read_text(), f"the rendered source changed: review it, then write it to {golden}"


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"dq": "red"},
        {"block_n": 64, "num_stages": 3},
        {"kv_stages": 2, "held": "v", "late_dq": True},
        {"late_dq": True, "overlap": True, "early_dv": False},
        {"fused": True, "row_warps": 1, "claim_ahead": 2, "early_dv": False},
        {"late_dq": True, "overlap": False, "early_dv": False, "skip_unseen": True, "in_turn": True},
        {"block_n": 192, "late_dq": True, "early_dv": False, "fused": True, "row_warps": 1},
    ],
)
def test_rendered_lines_are_tidy(spec: KernelSpec, change: dict[str, int]) -> None:
    config = replace(SPACE.default(spec), **change)
    text = render_unchecked(Variant("sm_90a", spec, config)).text
    for line in text.splitlines():
        assert line == line.rstrip()
        assert len(line) <= 140
    assert "\n\n\n" not in text


# At the limits: of three warpgroups, of two with a late dQ, with overlap and with steps of 80, of two CTAs an SM.
AT_THE_LIMITS = (
    "bwd_bf16_d64/keyblocks_m64_n192_s2_c1_dbulk_o0_k1_hnone_l1_e0_f1_a5_w1",
    "bwd_bf16_d32/keyblocks_m64_n192_s2_c1_dbulk_o1_k2_hkv_l1_e0_f1_w1",
    "bwd_fp16_d112/keyblocks_m64_n128_s2_c1_dbulk_o0_k1_hv_l1_e0_f1_a2_w1",
    "bwd_fp16_d96_causal/keyblocks_m64_n128_s2_c1_dbulk_o0_k1_hkv_l1_e0_f1_w1",
    "bwd_fp16_d128/keyblocks_m64_n128_s2_c1_dbulk_o1_k1_hnone_l1_e0_f1_a5_w1",
    "bwd_bf16_d128_causal/keyblocks_m80_n128_s2_c1_dbulk_o0_k1_hnone_l0_e0_f1_r1_w1",
    "bwd_bf16_d64/keyblocks_m64_n64_s2_c2_dbulk_o1_k1_hkv_l1_e0_f1_w1",
    "bwd_bf16_d64/keyblocks_m64_n64_s2_c2_dbulk_o0_k1_hkv_l0_e0",
    "bwd_bf16_d64/keyblocks_m64_n192_s2_c1_dbulk_o0_k2_hnone_l1_e0_f1_a5_w1",
    "bwd_bf16_d64/keyblocks_m128_n128_s2_c1_dbulk_o0_k1_hnone_l1_e0_f1_i1",
    "bwd_fp16_d128_causal/keyblocks_m64_n128_s2_c1_dbulk_o0_k1_hnone_l1_e0_f1_a5_u1_i1",
    "bwd_bf16_d96/keyblocks_m64_n128_s2_c1_dbulk_o0_k1_hkv_l1_e0_f1_w1_i1",
)


def _matrix() -> list[Variant]:
    """Defaults, and other legal tiles at random."""
    rng = random.Random(7)
    variants = [Variant("sm_90a", spec, SPACE.default(spec)) for spec in (*SPECS[1:5], D128)]
    others = [Variant("sm_90a", spec, rng.choice(legal_configs(SPACE, spec))) for spec in SPECS[3::4]]
    wide_steps = replace(BASE, block_m=128, kv_stages=2, held="kv")
    together = replace(BASE, block_m=128, kv_stages=2, overlap=True, late_dq=True, early_dv=False)
    return [
        *variants,
        *others,
        Variant("sm_90a", KernelSpec.parse("bwd_fp16_d32_causal"), wide_steps),
        Variant("sm_90a", KernelSpec.parse("bwd_bf16_d64"), together),
        Variant("sm_90a", KernelSpec.parse("bwd_fp16_d64_causal"), replace(together, overlap=False, kv_stages=1)),
        Variant("sm_90a", D128, replace(BASE, late_dq=True, early_dv=False)),
        *(Variant.parse(f"sm_90a/{name}") for name in AT_THE_LIMITS),
    ]


@pytest.mark.nvcc
def test_a_matrix_of_legal_variants_compiles_clean() -> None:
    results = build(_matrix())
    assert {result.variant.name: result.reason for result in results if result.state != "ok"} == {}
    for result in results:
        assert result.report is not None
        assert result.report.spill_bytes == 0
        predicted = SPACE.predicted_registers(result.variant.spec, result.variant.config)
        assert result.report.registers == predicted
