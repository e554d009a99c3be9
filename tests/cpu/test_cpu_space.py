"""Legality of the CPU forward's tiles with its reasons, names, defaults, and the text of a rendered source."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path

import pytest
from kernels import BACKWARD, BACKWARD_VARIANTS, SPACE, VARIANTS

from jagtile.generator.render import render, render_unchecked
from jagtile.generator.spaces import cpu, cpu_backward, cpu_forward
from jagtile.generator.spaces.cpu import INSTRUCTION_SETS, CpuTileConfig
from jagtile.generator.spaces.cpu_backward import CpuBackwardConfig
from jagtile.generator.spaces.cpu_forward import CpuForwardConfig
from jagtile.generator.spec import DTYPES, KernelSpec
from jagtile.generator.tile import Variant, config_from_dict, legal_configs, refusal, spaces_of
from jagtile.runtime.errors import IllegalConfigError
from jagtile.runtime.isa import ISAS, host_isa, supports, x86_isa

D64 = KernelSpec.parse("fwd_bf16_d64")
GENERIC = CpuForwardConfig("generic", block_m=64, block_n=64, vectors=2, rows=6)
GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("isa", ISAS)
def test_every_spec_has_a_legal_default_on_every_machine(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "host_isa", lambda: isa)
    for space, dtype in itertools.product((SPACE, BACKWARD), DTYPES):
        for head_dim in (1, 63, 64, 65, 128, 200, 256):
            for head_dim_v in (1, 64, 129, 256):
                spec = KernelSpec(space.direction, dtype, head_dim, head_dim_v, causal=True)
                assert refusal(space, spec) is None
                assert space.rejection(spec, space.default(spec)) is None


def test_a_space_serves_its_own_direction_only() -> None:
    for name, space in (("fwd_fp32_d64", SPACE), ("bwd_fp32_d64", BACKWARD)):
        assert [type(found) for found in spaces_of("cpu", KernelSpec.parse(name))] == [type(space)]
    assert spaces_of("sm_90a", KernelSpec.parse("bwd_fp32_d64")) == ()
    assert refusal(BACKWARD, D64) == "it computes bwd specs only"
    with pytest.raises(IllegalConfigError, match="it computes fwd specs only"):
        render(Variant("cpu", KernelSpec.parse("bwd_bf16_d64"), GENERIC))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"isa": "sse9"}, "isa must be one of avx512bf16, avx512, avx2, neon, generic, got 'sse9'"),
        ({"vectors": 0}, "at least 1"),
        ({"block_m": 60}, "multiple of a tile's 2 x 4 rows, got 60"),
        ({"block_n": 63}, "block_n must be even"),
        ({"rows": 7}, "17 registers > 16"),
        ({"vectors": 1, "rows": 15}, "17 registers > 16"),
        ({"block_n": 2048}, "B of L1"),
        ({"block_m": 4096}, "B of L2"),
    ],
)
def test_an_illegal_tile_is_refused_with_its_arithmetic(change: dict[str, int], reason: str) -> None:
    config = replace(GENERIC, **change)
    rejection = SPACE.rejection(D64, config)
    assert rejection is not None
    assert reason in rejection
    with pytest.raises(IllegalConfigError, match="fwd_bf16_d64"):
        render(Variant("cpu", D64, config))


def test_a_tile_for_another_machine_is_refused_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "host_isa", lambda: "avx2")
    assert SPACE.rejection(D64, replace(GENERIC, isa="avx2")) is None
    assert "does not run neon" in str(SPACE.rejection(D64, replace(GENERIC, isa="neon")))


def test_a_spec_with_dropout_has_a_name_of_its_own_and_a_space_must_know_it() -> None:
    for name in ("fwd_bf16_d64_drop", "bwd_fp32_d192_dv128_causal_drop"):
        spec = KernelSpec.parse(name)
        assert spec.dropout
        assert spec.name == name
        assert replace(spec, dropout=False).name == name.removesuffix("_drop")
        assert len(spaces_of("cpu", spec)) == 1
    assert spaces_of("sm_90a", KernelSpec.parse("fwd_bf16_d64_drop")) == ()


@pytest.mark.parametrize("name", ["fwd_fp32_d64", "fwd_bf16_d129_dv31_causal", "fwd_fp16_d256", "bwd_bf16_d64_dv32"])
def test_every_legal_tile_has_a_name_of_its_own_that_parses_back(name: str) -> None:
    spec = KernelSpec.parse(name)
    (space,) = spaces_of("cpu", spec)
    variants = [Variant("cpu", spec, config) for config in legal_configs(space, spec)]
    assert len(variants) > 20
    assert len({variant.name for variant in variants}) == len(variants)
    for variant in variants:
        assert Variant.parse(variant.name) == variant
        assert config_from_dict("cpu", variant.config.to_dict()) == variant.config
        assert re.fullmatch(r"[a-z][a-z0-9_]*", variant.symbol)


def test_the_grid_offers_only_instruction_sets_that_the_machine_runs() -> None:
    assert all(supports(host_isa(), str(isa)) for isa in SPACE.knobs(D64)["isa"])


@pytest.mark.parametrize("variant", VARIANTS + BACKWARD_VARIANTS, ids=lambda variant: variant.name)
def test_the_scratch_of_the_header_adds_up(variant: Variant) -> None:
    space = cpu_forward if variant.spec.direction == "fwd" else cpu_backward
    text = render_unchecked(variant).text
    table = [int(n) for n in re.findall(r"^//   (?:[QO]\^T|Q, dO|dQ\^T|K|V|K, V|scores) +(\d+)", text, re.MULTILINE)]
    assert sum(table) == space.scratch_of(variant.spec, variant.config).total


def test_rendering_twice_gives_the_same_bytes_without_traces_of_the_machine() -> None:
    variant = Variant("cpu", D64, GENERIC)
    first = render_unchecked(variant)
    render_unchecked.cache_clear()
    again = render_unchecked(variant)
    assert (first.text, first.sha256) == (again.text, again.sha256)
    assert str(Path.home()) not in first.text
    assert "{{" not in first.text
    assert "{%" not in first.text
    assert all(line == line.rstrip() for line in first.text.splitlines())


@pytest.mark.parametrize(
    "name",
    [
        "cpu/fwd_bf16_d64_causal/tiled_avx512bf16_m256_n128_v2_r13",
        "cpu/fwd_fp16_d72_dv40/tiled_generic_m64_n64_v2_r6",
        "cpu/bwd_bf16_d64_causal/recompute_avx512bf16_m128_n96_v4_r6",
        "cpu/bwd_fp32_d72_dv40/recompute_generic_m64_n48_v2_r6",
        "cpu/fwd_bf16_d64_causal_drop/tiled_avx512bf16_m256_n128_v2_r13",
        "cpu/bwd_fp32_d72_dv40_drop/recompute_generic_m64_n48_v2_r6",
    ],
)
def test_a_rendered_source_is_the_reviewed_one(name: str) -> None:
    variant = Variant.parse(name)
    text = render_unchecked(variant).text
    golden = GOLDEN / f"{variant.spec.name}-{variant.config.name}.cpp"
    assert text == golden.read_text(), f"review the change, then write the new text to {golden.name}"


@pytest.mark.parametrize(
    ("spec", "config"),
    [("fwd_bf16_d64", GENERIC), ("bwd_bf16_d64", CpuBackwardConfig("generic", 64, 64, 2, 6))],
    ids=["forward", "backward"],
)
def test_the_portable_code_names_no_instruction(spec: str, config: CpuTileConfig) -> None:
    variants = [Variant("cpu", KernelSpec.parse(spec), replace(config, isa=isa)) for isa in ("generic", "neon")]
    sources = [render_unchecked(variant) for variant in variants]
    for source in sources:
        for _, text in (("source", source.text), *source.headers):
            assert not re.search(r"\b_mm\d*_|immintrin|__m\d{3}", text)


@pytest.mark.parametrize(
    ("flags", "isa"),
    [
        ("sse2", "generic"),
        ("sse2 avx2 fma", "generic"),
        ("sse2 avx2 fma f16c", "avx2"),
        ("avx2 fma f16c avx512f avx512bw avx512dq avx512vl", "avx512"),
        ("avx2 fma f16c avx512f avx512bw avx512dq avx512vl avx512_bf16", "avx512bf16"),
        ("avx2 fma f16c avx512_bf16", "avx2"),
    ],
)
def test_the_level_of_a_cpu_follows_from_its_flags(flags: str, isa: str) -> None:
    assert x86_isa(frozenset(flags.split())) == isa


def test_levels_run_the_kernels_of_those_below() -> None:
    for host, below in ISAS.items():
        assert below[0] == host
        for isa in below:
            assert set(ISAS[isa]) <= set(below)
            assert set(INSTRUCTION_SETS[isa].flags) <= set(INSTRUCTION_SETS[host].flags)
    with pytest.raises(ValueError, match="'mmx' is not one of"):
        supports("mmx", "avx2")
