"""Legality of the tiles of the Hopper backward of wide heads: the arithmetic, its reasons, what ptxas says to it."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from jagtile.generator.build import build
from jagtile.generator.render import render, render_unchecked
from jagtile.generator.spaces.sm90_backward_wide import (
    PerWarpgroup,
    Sm90BackwardWideConfig,
    Sm90BackwardWideSpace,
    accumulators,
    dq_buffers,
    ds_in_registers,
    math_registers,
    smem_layout,
)
from jagtile.generator.spec import KernelSpec
from jagtile.generator.tile import Knob, Variant, config_from_dict, legal_configs, spaces_of
from jagtile.runtime.errors import IllegalConfigError

SPACE = Sm90BackwardWideSpace()
D192 = KernelSpec.parse("bwd_bf16_d192")
D256 = KernelSpec.parse("bwd_bf16_d256")
BASE = Sm90BackwardWideConfig(block_n=80, q_stages=2, dout_stages=1, dq_panels=2, dq="red")
DEFAULTS = {  # the most keys that each has room for
    "bwd_bf16_d256": (80, 2, 1, 0, "bulk"),
    "bwd_fp16_d256_causal": (80, 2, 1, 0, "bulk"),
    "bwd_bf16_d192": (96, 2, 1, 0, "bulk"),
    "bwd_bf16_d192_dv128_causal": (112, 2, 2, 0, "bulk"),
    "bwd_fp16_d128_dv192": (112, 2, 2, 0, "bulk"),
    "bwd_bf16_d136_causal": (96, 2, 1, 0, "bulk"),
    "bwd_bf16_d224": (80, 2, 1, 0, "bulk"),
    "bwd_fp16_d64_dv256_causal": (80, 2, 2, 0, "bulk"),
    "bwd_bf16_d256_dv8": (80, 2, 2, 0, "bulk"),
}
SPECS = [KernelSpec.parse(name) for name in DEFAULTS]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_defaults(spec: KernelSpec) -> None:
    default = SPACE.default(spec)
    assert SPACE.rejection(spec, default) is None
    assert default == Sm90BackwardWideConfig(*DEFAULTS[spec.name])


def test_every_wide_head_has_a_legal_default_and_is_served_by_this_backward_alone() -> None:
    for dim in range(8, 257, 8):
        for dim_v in range(8, 257, 8):
            spec = KernelSpec("bwd", "bf16", dim, dim_v, causal=True)
            wide = max(dim, dim_v) > 128
            assert (SPACE.serves(spec) is None) == wide
            assert len(spaces_of("sm_90a", spec)) == (1 if wide else 2)
            if wide:
                assert SPACE.rejection(spec, SPACE.default(spec)) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"block_n": 72}, "block_n must be a multiple of 16"),
        ({"block_n": 272}, "block_n must be a multiple of 16"),
        ({"q_stages": 1}, "q_stages must be at least 2"),
        ({"dout_stages": 0}, "dout_stages at least 1"),
        ({"dout_stages": 2}, "shared memory 246784 B > 232448 B"),
        ({"dq_panels": 4}, "dq_panels must leave one of 4"),
        ({"dq": "green"}, "dq must be bulk or red"),
        ({"dq": "bulk"}, "dq_panels must be 0, got 2"),
        ({"fused": True}, "fused: the warp that adds dQ by bulk copies tells of complete tiles: dq must be bulk"),
        ({"dq": "bulk", "dq_panels": 0, "fused": True}, "shared memory 246784 B > 232448 B"),
        ({"dq": "bulk", "dq_panels": 0, "q_stages": 3}, "shared memory 263168 B > 232448 B"),
        ({"block_n": 96}, "dV and S take 240 registers a thread, dK and dP 240"),
        ({"split_tail": True}, "split_tail: the warp that adds dQ by bulk copies knows of pieces: dq must be bulk"),
    ],
)
def test_an_illegal_tile_is_refused_with_its_arithmetic(change: dict[str, Knob], reason: str) -> None:
    config = replace(BASE, **change)
    rejection = SPACE.rejection(D256, config)
    assert rejection is not None
    assert reason in rejection
    with pytest.raises(IllegalConfigError, match="d256"):
        render(Variant("sm_90a", D256, config))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("bwd_fp32_d256", "bf16 or fp16"),
        ("bwd_bf16_d140", "multiple of 8"),
        ("bwd_bf16_d192_dv20", "head_dim_v"),
        ("bwd_bf16_d128", "above 128"),
    ],
)
def test_what_the_template_cannot_compute_is_said(name: str, reason: str) -> None:
    assert reason in str(SPACE.serves(KernelSpec.parse(name)))


def test_causal_tiles_are_not_in_pieces() -> None:
    tile = replace(SPACE.default(D192), split_tail=True)
    assert SPACE.rejection(D192, tile) is None
    assert SPACE.launch(D192, tile)["tail_columns"] == 64 * (3 + 3)
    causal = replace(D192, causal=True)
    assert SPACE.rejection(causal, tile) == "split_tail: with a causal mask the last tiles are short"
    assert SPACE.knobs(causal)["split_tail"] == (False,)


def test_shared_memory_is_the_sum_of_its_regions() -> None:
    layout = smem_layout(D256, BASE)
    assert (layout.k_bytes, layout.v_bytes, layout.q_bytes, layout.dout_bytes) == (40960, 40960, 65536, 32768)
    assert layout.p_bytes == 16384  # and as much of dS
    assert SPACE.launch(D256, BASE)["smem_bytes"] == layout.total == 214016
    bulk = smem_layout(D256, replace(BASE, dq="bulk", dq_panels=0))
    assert (bulk.dq_bytes, bulk.total) == (16384, 230400)


def test_dq_has_as_many_buffers_as_fit_and_a_step_fills() -> None:
    tile = SPACE.default(D192)
    assert dq_buffers(D192, tile) == (64, 3)
    assert dq_buffers(D192, replace(tile, block_n=32)) == (64, 3)
    assert dq_buffers(D192, replace(tile, dout_stages=2)) == (32, 3)  # one panel of 64 would fit
    assert dq_buffers(D256, SPACE.default(D256)) == (32, 2)
    assert dq_buffers(D256, BASE) == (64, 0)


def test_registers_go_to_the_warpgroup_that_needs_them() -> None:
    uneven = KernelSpec.parse("bwd_bf16_d192_dv128")
    assert accumulators(D256, BASE) == (200, 200)
    assert math_registers(PerWarpgroup(200, 200)) == (232, 232)
    assert accumulators(uneven, SPACE.default(uneven)) == (168, 224)
    assert math_registers(PerWarpgroup(168, 224)) == (208, 256)
    assert math_registers(PerWarpgroup(224, 168)) == (256, 208)
    assert math_registers(PerWarpgroup(224, 184)) is None
    assert accumulators(D192, SPACE.default(D192)) == (192, 208)  # dS beside a panel of dQ
    assert math_registers(PerWarpgroup(192, 208)) == (224, 240)
    assert ds_in_registers(D192, SPACE.default(D192))
    assert not ds_in_registers(uneven, SPACE.default(uneven))
    one_panel = replace(SPACE.default(uneven), dq="red", dq_panels=1)
    assert "dq_panels must be 0 or 2" in str(SPACE.rejection(uneven, one_panel))


def test_names_parse_back() -> None:
    for config in legal_configs(SPACE, D256):
        variant = Variant("sm_90a", D256, config)
        assert Variant.parse(variant.name) == variant
        assert config_from_dict("sm_90a", config.to_dict()) == config


def test_rendering_is_reproducible_and_as_reviewed() -> None:
    spec = KernelSpec.parse("bwd_bf16_d192_dv128_causal")
    variant = Variant("sm_90a", spec, SPACE.default(spec))
    text = render(variant).text
    render_unchecked.cache_clear()
    assert render(variant).text == text
    golden = Path(__file__).parent / "golden" / f"{spec.name}.cu"
    assert text == golden.read_text(), f"the rendered source changed: review it, then write it to {golden}"


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
@pytest.mark.parametrize(
    "change", [{}, {"block_n": 32, "q_stages": 3}, {"dq": "red"}, {"block_n": 32, "dout_stages": 1, "fused": True}]
)
def test_rendered_lines_are_tidy(spec: KernelSpec, change: dict[str, Knob]) -> None:
    config = replace(SPACE.default(spec), **change)
    text = render_unchecked(Variant("sm_90a", spec, config)).text
    for line in text.splitlines():
        assert line == line.rstrip()
    assert "\n\n\n" not in text


def test_a_tile_that_spills_is_refused() -> None:
    tile = Sm90BackwardWideConfig(96, 2, 2, 0, "bulk", fused=True)
    two_panels = KernelSpec.parse("bwd_bf16_d192_dv128")
    assert "dK's warpgroup spills" in str(SPACE.rejection(two_panels, tile))
    assert SPACE.rejection(two_panels, replace(tile, fused=False)) is None
    assert SPACE.rejection(two_panels, replace(tile, dout_stages=1)) is None


def _matrix() -> list[Variant]:
    """Defaults, additions from registers, rows beside the tiles, and a legal tile at random."""
    rng = random.Random(7)
    variants = [Variant("sm_90a", spec, SPACE.default(spec)) for spec in (SPECS[0], *SPECS[2:8:2], SPECS[3])]
    variants += [Variant("sm_90a", D256, BASE), Variant("sm_90a", D192, replace(BASE, block_n=96, dq_panels=1))]
    variants += [Variant("sm_90a", D192, Sm90BackwardWideConfig(96, 2, 1, 0, "bulk", fused=True))]
    return [*variants, Variant("sm_90a", SPECS[3], rng.choice(legal_configs(SPACE, SPECS[3])))]


@pytest.mark.nvcc
def test_a_matrix_of_legal_variants_compiles_clean() -> None:
    results = build(_matrix())
    assert {result.variant.name: result.reason for result in results if result.state != "ok"} == {}
    for result in results:
        assert result.report is not None
        assert result.report.spill_bytes == 0
        predicted = SPACE.predicted_registers(result.variant.spec, result.variant.config)
        assert result.report.registers == predicted
