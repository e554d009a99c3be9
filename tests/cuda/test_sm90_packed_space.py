"""Legality of the tiles for short sequences: the arithmetic, its reasons, and what ptxas says to it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from jagtile.generator.build import build
from jagtile.generator.render import render, render_unchecked
from jagtile.generator.spaces.sm90 import FIVE_WARP_REGISTERS
from jagtile.generator.spaces.sm90_forward import Sm90ForwardSpace
from jagtile.generator.spaces.sm90_packed import Sm90PackedConfig, Sm90PackedSpace, smem_layout
from jagtile.generator.spec import KernelSpec
from jagtile.generator.tile import Variant, config_from_dict, legal_configs, spaces_of
from jagtile.runtime.errors import IllegalConfigError

SPACE = Sm90PackedSpace()
D64 = KernelSpec.parse("fwd_bf16_d64")
BASE = Sm90PackedConfig(block_n=96, num_stages=2, ctas_per_sm=3)
SPECS = [
    KernelSpec.parse(name)
    for name in (
        "fwd_bf16_d8",
        "fwd_fp16_d32_causal",
        "fwd_bf16_d64_causal",
        "fwd_bf16_d96_causal",
        "fwd_bf16_d128",
        "fwd_fp16_d128_causal",
        "fwd_bf16_d192_dv128_causal",
        "fwd_bf16_d64_dv256",
        "fwd_bf16_d256_causal",
    )
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_every_spec_has_a_legal_default_and_few_tiles(spec: KernelSpec) -> None:
    assert SPACE.rejection(spec, SPACE.default(spec)) is None
    assert 5 <= len(legal_configs(SPACE, spec)) <= 50


@pytest.mark.parametrize("dim", range(8, 257, 8))
def test_every_head_dim_is_served(dim: int) -> None:
    for dim_v in (dim, 8, 256):
        spec = KernelSpec("fwd", "bf16", dim, dim_v, True)
        assert SPACE.serves(spec) is None
        assert SPACE.rejection(spec, SPACE.default(spec)) is None


def test_the_measured_algorithm_stays_the_default() -> None:
    first, *others = [space.algorithm for space in spaces_of("sm_90a", D64)]
    assert first == Sm90ForwardSpace.algorithm
    assert SPACE.algorithm in others


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"block_n": 72}, "multiple of 16"),
        ({"block_n": 272}, "multiple of 16"),
        ({"num_stages": 4}, "1 to 3"),
        ({"ctas_per_sm": 5}, "1 to 4"),
        ({"num_stages": 3}, "shared memory 100096 B > 76800 B a CTA with 3 an SM"),
        ({"block_n": 128, "num_stages": 1}, "96 registers a thread > 88 with 3 CTAs"),
        ({"block_n": 224, "num_stages": 1, "ctas_per_sm": 1}, "S, P and O take 200 registers a thread > 192"),
    ],
)
def test_an_illegal_tile_is_refused_with_its_arithmetic(change: dict[str, int], reason: str) -> None:
    config = replace(BASE, **change)
    assert reason in str(SPACE.rejection(D64, config))
    with pytest.raises(IllegalConfigError, match="d64"):
        render(Variant("sm_90a", D64, config))


def test_shared_memory_is_the_sum_of_its_regions() -> None:
    layout = smem_layout(D64, BASE)
    assert (layout.q_bytes, layout.k_bytes, layout.v_bytes) == (16384, 24576, 24576)
    assert SPACE.launch(D64, BASE)["smem_bytes"] == layout.total == 16384 + 2 * 24576 + 1152


def test_names_parse_back() -> None:
    for config in legal_configs(SPACE, D64):
        variant = Variant("sm_90a", D64, config)
        assert Variant.parse(variant.name) == variant
        assert config_from_dict("sm_90a", config.to_dict()) == config


def test_rendering_is_as_reviewed() -> None:
    text = render(Variant("sm_90a", D64, BASE)).text
    golden = Path(__file__).parent / "golden" / "fwd_bf16_d64_packed.cu"
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
    """Of every other spec the default and, for each number of CTAs an SM, the tile nearest to the limits."""
    variants = []
    for spec in SPECS[::2]:
        by_ctas: dict[int, Sm90PackedConfig] = {}
        for config in legal_configs(SPACE, spec):
            assert isinstance(config, Sm90PackedConfig)
            ctas = config.ctas_per_sm
            if ctas not in by_ctas or (config.block_n, config.num_stages) > (
                by_ctas[ctas].block_n,
                by_ctas[ctas].num_stages,
            ):
                by_ctas[ctas] = config
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
        assert isinstance(config, Sm90PackedConfig)
        assert result.report.registers <= FIVE_WARP_REGISTERS[config.ctas_per_sm]
