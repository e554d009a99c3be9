"""The split Hopper forward's tiles: defaults, launch facts, the rendered source, and what ptxas says to it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from jagtile.generator.build import build
from jagtile.generator.render import render
from jagtile.generator.spaces.sm90_forward import Sm90ForwardSpace
from jagtile.generator.spaces.sm90_split import Sm90SplitConfig, Sm90SplitSpace
from jagtile.generator.spec import KernelSpec
from jagtile.generator.tile import Variant, config_from_dict, legal_configs, remark_on

SPACE = Sm90SplitSpace()
CAUSAL = KernelSpec.parse("fwd_bf16_d128_causal")
SPECS = [
    KernelSpec.parse(name)
    for name in (
        "fwd_bf16_d8",
        "fwd_fp16_d32_causal",
        "fwd_bf16_d64",
        "fwd_bf16_d96_causal",
        "fwd_bf16_d128",
        "fwd_fp16_d128_causal",
        "fwd_bf16_d192_dv128_causal",
        "fwd_bf16_d256_causal",
    )
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_every_spec_has_a_legal_default(spec: KernelSpec) -> None:
    assert SPACE.rejection(spec, SPACE.default(spec)) is None


def test_what_is_legal_is_so_for_the_persistent_forward_and_has_its_shared_memory() -> None:
    persistent = Sm90ForwardSpace()
    for config in legal_configs(SPACE, CAUSAL):
        assert persistent.rejection(CAUSAL, config) is None
        facts = SPACE.launch(CAUSAL, config)
        assert facts["partial_bytes"] == 4 * (64 * 128 + 2 * 64)
        more = {"partial_bytes": facts["partial_bytes"], "pack_sequences": int(config.pack_sequences)}
        assert {**persistent.launch(CAUSAL, config), **more} == facts


def test_only_tiles_of_one_warpgroup_hold_packed_sequences() -> None:
    one, two = (Sm90SplitConfig(rows, 32, 2, 1, 1, pack_sequences=True) for rows in (64, 128))
    assert SPACE.rejection(CAUSAL, one) is None
    assert SPACE.rejection(CAUSAL, two) == ("pack_sequences: tiles of one math warpgroup: block_m must be 64, got 128")


def test_names_parse_back() -> None:
    for config in legal_configs(SPACE, CAUSAL):
        variant = Variant("sm_90a", CAUSAL, config)
        assert Variant.parse(variant.name) == variant
        assert config_from_dict("sm_90a", config.to_dict()) == config


def test_it_says_how_many_heads_share_a_tile() -> None:
    assert remark_on(SPACE, 32, 8) == "rows of 4 of a kv head's 4 query heads in a tile, long keys split over CTAs"
    assert remark_on(SPACE, 192, 2) == "rows of 48 of a kv head's 96 query heads in a tile, long keys split over CTAs"
    assert remark_on(SPACE, 8, 8) == "rows of one query head in a tile, long keys split over CTAs"
    assert remark_on(Sm90ForwardSpace(), 32, 8) == ""


def test_the_rendered_source_is_as_reviewed() -> None:
    text = render(Variant("sm_90a", CAUSAL, SPACE.default(CAUSAL))).text
    golden = Path(__file__).parent / "golden" / "fwd_bf16_d128_causal_split.cu"
    assert text == golden.read_text(), f"the rendered source changed: review it, then write it to {golden}"


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_rendered_lines_are_tidy(spec: KernelSpec) -> None:
    for config in (SPACE.default(spec), Sm90SplitConfig(64, 64, 2, 2, 1)):
        text = render(Variant("sm_90a", spec, config)).text
        assert "\n\n\n" not in text
        for line in text.splitlines():
            assert line == line.rstrip()


def _matrix() -> list[Variant]:
    """The defaults, and tiles nearest to each limit."""
    rng = random.Random(7)
    variants = [Variant("sm_90a", spec, SPACE.default(spec)) for spec in SPECS[2::3]]
    for spec in SPECS[1::2]:
        by_shape: dict[tuple[int, int], Sm90SplitConfig] = {}
        for config in legal_configs(SPACE, spec):
            assert isinstance(config, Sm90SplitConfig)
            shape = (config.block_m, config.ctas_per_sm)
            if shape not in by_shape or config.block_n > by_shape[shape].block_n:
                by_shape[shape] = config
        variants.append(Variant("sm_90a", spec, rng.choice(sorted(by_shape.values()))))
    return variants


@pytest.mark.nvcc
def test_a_matrix_of_legal_variants_compiles_clean() -> None:
    results = build(_matrix())
    assert {result.variant.name: result.reason for result in results if result.state != "ok"} == {}
    for result in results:
        assert result.report is not None
        assert result.report.registers == SPACE.predicted_registers(result.variant.spec, result.variant.config)
