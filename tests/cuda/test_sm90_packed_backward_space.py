"""Legality of the backward's tiles for short sequences: the arithmetic, its reasons, and what ptxas says to it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from jagtile.generator.build import build
from jagtile.generator.render import render, render_unchecked
from jagtile.generator.spaces.sm90 import FIVE_WARP_REGISTERS
from jagtile.generator.spaces.sm90_packed_backward import (
    Sm90PackedBackwardConfig,
    Sm90PackedBackwardSpace,
    registers,
    smem_layout,
)
from jagtile.generator.spec import KernelSpec
from jagtile.generator.tile import Variant, config_from_dict, legal_configs, spaces_of
from jagtile.runtime.dispatch import default_variant
from jagtile.runtime.errors import IllegalConfigError
from jagtile.runtime.problem import REGIMES

SPACE = Sm90PackedBackwardSpace()
D64 = KernelSpec.parse("bwd_bf16_d64")
BASE = Sm90PackedBackwardConfig(block_n=64, num_stages=2, ctas_per_sm=2)
SPECS = [
    KernelSpec.parse(name)
    for name in (
        "bwd_bf16_d8",
        "bwd_fp16_d32_causal",
        "bwd_bf16_d64_causal",
        "bwd_fp16_d72_dv40",
        "bwd_bf16_d96_causal",
        "bwd_fp16_d64_dv128",
        "bwd_bf16_d16_dv112",
        "bwd_bf16_d104_dv64",
        "bwd_bf16_d128",
    )
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_every_spec_has_a_legal_default_and_few_tiles(spec: KernelSpec) -> None:
    assert SPACE.rejection(spec, SPACE.default(spec)) is None
    assert 5 <= len(legal_configs(SPACE, spec)) <= 50


@pytest.mark.parametrize("dim", range(8, 129, 8))
def test_every_head_dim_up_to_128_is_served(dim: int) -> None:
    for dim_v in (dim, 8, 128):
        spec = KernelSpec("bwd", "bf16", dim, dim_v, True)
        assert SPACE.serves(spec) is None
        assert SPACE.rejection(spec, SPACE.default(spec)) is None


def test_it_is_the_default_of_tiny_sequences_only() -> None:
    first, *others = [space.algorithm for space in spaces_of("sm_90a", D64)]
    assert (first, others) == ("keyblocks", [SPACE.algorithm])
    taken = {regime: default_variant(D64, "sm_90a", regime).space.algorithm for regime in REGIMES}
    assert taken == {regime: SPACE.algorithm if regime == "tiny" else first for regime in REGIMES}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"block_n": 72}, "multiple of 16"),
        ({"block_n": 272}, "multiple of 16"),
        ({"num_stages": 4}, "1 to 3"),
        ({"ctas_per_sm": 4}, "1 to 3"),
        ({"num_stages": 3, "ctas_per_sm": 3}, "shared memory 103168 B > 76800 B a CTA with 3 an SM"),
        ({"ctas_per_sm": 3}, "128 registers a thread > 88 with 3 CTAs"),
        ({"block_n": 80}, "144 registers a thread > 128 with 2 CTAs"),
    ],
)
def test_an_illegal_tile_is_refused_with_its_arithmetic(change: dict[str, int], reason: str) -> None:
    config = replace(BASE, **change)
    assert reason in str(SPACE.rejection(D64, config))
    with pytest.raises(IllegalConfigError, match="d64"):
        render(Variant("sm_90a", D64, config))


def test_wide_heads_are_refused() -> None:
    assert "at most 128" in str(SPACE.serves(KernelSpec.parse("bwd_bf16_d136_dv64")))


def test_shared_memory_is_the_sum_of_its_regions() -> None:
    layout = smem_layout(D64, BASE)
    assert (layout.tile_bytes, layout.block_bytes) == (2 * 64 * 256, 2 * 64 * 256)
    assert SPACE.launch(D64, BASE)["smem_bytes"] == layout.total == 65536 + 3200


def test_names_parse_back() -> None:
    for config in legal_configs(SPACE, D64):
        variant = Variant("sm_90a", D64, config)
        assert Variant.parse(variant.name) == variant
        assert config_from_dict("sm_90a", config.to_dict()) == config


def test_rendering_is_as_reviewed() -> None:
    text = render(Variant("sm_90a", D64, BASE)).text
    golden = Path(__file__).parent / "golden" / "bwd_bf16_d64_packed.cu"
    assert text == golden.read_text(), f"the rendered source changed: review it, then write it to {golden}"


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
@pytest.mark.parametrize("change", [{}, {"num_stages": 1}])
def test_rendered_lines_are_tidy(spec: KernelSpec, change: dict[str, int]) -> None:
    text = render_unchecked(Variant("sm_90a", spec, replace(SPACE.default(spec), **change))).text
    for line in text.splitlines():
        assert line == line.rstrip()
        assert len(line) <= 120
    assert "\n\n\n" not in text


def _widest() -> list[Variant]:
    """Of every spec the default and, for each number of CTAs an SM, a tile nearest to the limit."""
    variants = []
    for spec in SPECS:
        by_ctas: dict[int, Sm90PackedBackwardConfig] = {}
        for config in legal_configs(SPACE, spec):
            assert isinstance(config, Sm90PackedBackwardConfig)
            known = by_ctas.get(config.ctas_per_sm)
            if known is None or registers(spec, config) > registers(spec, known):
                by_ctas[config.ctas_per_sm] = config
        variants += [Variant("sm_90a", spec, config) for config in {SPACE.default(spec), *by_ctas.values()}]
    return variants


@pytest.mark.nvcc
def test_a_matrix_of_legal_variants_compiles_clean() -> None:
    results = build(_widest())
    assert {result.variant.name: result.reason for result in results if result.state != "ok"} == {}
    for result in results:
        assert result.report is not None
        assert result.report.spill_bytes == 0
        config = result.variant.config
        assert isinstance(config, Sm90PackedBackwardConfig)
        assert result.report.registers <= FIVE_WARP_REGISTERS[config.ctas_per_sm]
