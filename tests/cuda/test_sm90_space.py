"""Legality of the Hopper forward's tiles: the arithmetic, its reasons, and what ptxas says to it."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from jagtile.generator.build import build
from jagtile.generator.render import render, render_unchecked
from jagtile.generator.spaces.sm90_forward import Sm90ForwardConfig, Sm90ForwardSpace, smem_layout
from jagtile.generator.spaces.sm90_packed import Sm90PackedSpace
from jagtile.generator.spaces.sm90_split import Sm90SplitSpace
from jagtile.generator.spec import KernelSpec
from jagtile.generator.tile import Variant, config_from_dict, legal_configs, parse_config
from jagtile.runtime.errors import IllegalConfigError

SPACE = Sm90ForwardSpace()
D128 = KernelSpec.parse("fwd_bf16_d128")
BASE = Sm90ForwardConfig(
    block_m=128,
    block_n=128,
    num_stages=2,
    q_stages=1,
    ctas_per_sm=1,
)
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
        "fwd_bf16_d256",
        "fwd_bf16_d1",
        "fwd_fp16_d33_causal",
        "fwd_bf16_d100_dv50_causal",
        "fwd_bf16_d250",
    )
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_every_spec_has_a_legal_default(spec: KernelSpec) -> None:
    assert SPACE.rejection(spec, SPACE.default(spec)) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"block_m": 96}, "block_m is 64 a math warpgroup"),
        ({"block_n": 120}, "block_n must be a multiple of 16"),
        ({"block_n": 272}, "block_n must be a multiple of 16"),
        ({"num_stages": 1}, "num_stages must be at least 2"),
        ({"q_stages": 4}, "q_stages 1 to 3"),
        ({"q_stages": 3}, "q_stages 3: one math warpgroup"),
        ({"ctas_per_sm": 2}, "64K registers"),
        ({"num_stages": 4}, "shared memory 295936 B > 232448 B"),
        ({"block_m": 192}, "160 registers a thread > 132"),
        ({"block_n": 208, "num_stages": 1}, "num_stages"),
        ({"block_m": 64, "ctas_per_sm": 2}, "shared memory"),
        ({"epilogue": "late"}, "epilogue must be one of"),
        ({"tensor_sums": True}, "tensor_sums: head_dim_v 128 > 64"),
        ({"polynomial": 5}, "polynomial must be one of 0, 8, 4"),
        ({"polynomial": 4}, "polynomial: a head dim of 128 > 64"),
        ({"alternate": True}, "alternate: all rows of a tile see as many keys"),
        ({"cluster": 4}, "cluster must be 1 or 2"),
        ({"cluster": 2, "block_m": 64, "block_n": 64}, "cluster: pairs are of CTAs with several math warpgroups"),
    ],
)
def test_an_illegal_tile_is_refused_with_its_arithmetic(change: dict[str, int | str], reason: str) -> None:
    config = replace(BASE, **change)
    rejection = SPACE.rejection(D128, config)
    assert rejection is not None
    assert reason in rejection
    with pytest.raises(IllegalConfigError, match="d128"):
        render(Variant("sm_90a", D128, config))


@pytest.mark.parametrize(
    ("name", "reason"),
    [("fwd_fp32_d128", "bf16 or fp16"), ("fwd_fp32_d20", "bf16 or fp16")],
)
def test_what_the_template_cannot_compute_is_said(name: str, reason: str) -> None:
    assert reason in str(SPACE.serves(KernelSpec.parse(name)))


@pytest.mark.parametrize(
    ("name", "reason"),
    [("fwd_bf16_d100", "head_dim must be a multiple of 8"), ("fwd_bf16_d64_dv20", "head_dim_v must")],
)
@pytest.mark.parametrize("space", [Sm90SplitSpace(), Sm90PackedSpace()], ids=lambda space: space.algorithm)
def test_rows_that_tma_cannot_address_are_for_the_persistent_forward(
    name: str, reason: str, space: Sm90SplitSpace | Sm90PackedSpace
) -> None:
    assert reason in str(space.serves(KernelSpec.parse(name)))
    assert SPACE.serves(KernelSpec.parse(name)) is None


def test_warps_that_copy_rows_take_registers_from_the_math_warpgroups() -> None:
    d127, d128 = KernelSpec.parse("fwd_bf16_d127"), D128
    config = replace(BASE, block_n=192, q_stages=1)
    assert SPACE.context(d127, config)["producer_registers"] == 56
    assert SPACE.rejection(d128, config) is None
    assert "208 registers a thread > 184" in str(SPACE.rejection(d127, config))
    assert "64K registers" in str(SPACE.rejection(d127, replace(BASE, block_m=256, block_n=16)))


def test_any_head_dim_has_a_legal_default() -> None:
    for head_dim in range(1, 257):
        for head_dim_v in {1, 37, 64, 255, 256, head_dim}:
            spec = KernelSpec("fwd", "bf16", head_dim, head_dim_v, causal=False)
            assert SPACE.serves(spec) is None
            SPACE.default(spec)


def test_rows_are_copied_only_where_tma_cannot_address_them() -> None:
    for name, copied in (("d64", 0), ("d64_dv20", 1), ("d20_dv64", 1), ("d33", 1), ("d256", 0)):
        spec = KernelSpec.parse(f"fwd_bf16_{name}")
        config = SPACE.default(spec)
        assert SPACE.launch(spec, config)["by_rows"] == copied
        text = render(Variant("sm_90a", spec, config)).text
        assert ("tma_" in text, "load_rows" in text) == (not copied, bool(copied))


def test_shared_memory_is_the_sum_of_its_regions() -> None:
    layout = smem_layout(D128, BASE)
    assert (layout.q_bytes, layout.k_bytes, layout.v_bytes) == (49152, 65536, 65536)  # two Q buffers and a spare one
    assert SPACE.launch(D128, BASE)["smem_bytes"] == layout.total == 181248


def test_names_parse_back() -> None:
    for config in legal_configs(SPACE, D128):
        variant = Variant("sm_90a", D128, config)
        assert Variant.parse(variant.name) == variant
        assert config_from_dict("sm_90a", config.to_dict()) == config


def test_an_epilogue_that_is_not_named_is_the_first_there_was() -> None:
    assert parse_config("sm_90a", "persistent_m128_n128_s2_q1_c1") == BASE
    assert config_from_dict("sm_90a", BASE.to_dict()) == BASE
    direct = replace(BASE, epilogue="direct")
    assert parse_config("sm_90a", "persistent_m128_n128_s2_q1_c1_edirect") == direct
    assert config_from_dict("sm_90a", {**BASE.to_dict(), "epilogue": "direct"}) == direct
    for name in ("persistent_m128_n128_s2_q1", "persistent_m128_n128_s2_q1_c1_y1", "persistent_m128_edirect"):
        with pytest.raises(ValueError, match=r"not of the form persistent_.*_c<ctas_per_sm>_\[e<epilogue>\]"):
            parse_config("sm_90a", name)


def test_sums_that_are_not_named_are_those_of_registers() -> None:
    tensor = replace(BASE, tensor_sums=True)
    assert tensor.name == f"{BASE.name}_t1"
    assert parse_config("sm_90a", tensor.name) == tensor
    both = replace(tensor, epilogue="direct")
    assert both.name == f"{BASE.name}_edirect_t1"
    assert parse_config("sm_90a", both.name) == both
    assert config_from_dict("sm_90a", {**BASE.to_dict(), "tensor_sums": True}) == tensor


def test_products_sum_up_rows_of_narrow_values_that_tma_loads() -> None:
    for name, legal in (("d64", True), ("d192_dv64", True), ("d32_dv72", False), ("d33", False), ("d128", False)):
        spec = KernelSpec.parse(f"fwd_bf16_{name}")
        config = replace(BASE, block_n=64, tensor_sums=True)
        rejection = SPACE.rejection(spec, config)
        assert (rejection is None) == legal, rejection
        assert SPACE.knobs(spec)["tensor_sums"] == ((False, True) if legal else (False,))


def test_ones_lie_behind_whole_panels_of_values_where_the_instruction_may_be_as_wide() -> None:
    for name, change, apart in (
        ("d64", {}, False),
        ("d64", {"block_m": 64, "ctas_per_sm": 4, "block_n": 48}, True),  # 36 accumulators > 32
        ("d64_dv32", {}, True),
    ):
        spec = KernelSpec.parse(f"fwd_bf16_{name}")
        config = replace(BASE, **{"tensor_sums": True, **change})  # type: ignore[arg-type]
        text = render(Variant("sm_90a", spec, config)).text
        assert SPACE.context(spec, config)["sums_apart"] == apart
        assert ("multiply_ones(" in text, "descriptor_before_ones(" in text) == (apart, not apart)


def test_a_kernel_that_products_sum_up_has_an_entry_for_lse() -> None:
    spec = KernelSpec.parse("fwd_bf16_d64")
    config = replace(BASE, tensor_sums=True)
    variant = Variant("sm_90a", spec, config)
    text = render(variant).text
    assert SPACE.launch(spec, config)["lse_entry"] == 1
    assert SPACE.launch(spec, BASE)["lse_entry"] == 0
    assert [f"\n{symbol}(const" in text for symbol in (variant.symbol, f"{variant.symbol}_lse")] == [True, True]
    ones = SPACE.launch(spec, config)["smem_bytes"] - SPACE.launch(spec, BASE)["smem_bytes"]
    assert ones == 16 * 128


def test_warpgroups_of_causal_tiles_alternate() -> None:
    causal, config = KernelSpec.parse("fwd_bf16_d128_causal"), replace(BASE, alternate=True)
    assert config.name == f"{BASE.name}_a1"
    assert parse_config("sm_90a", config.name) == config
    assert SPACE.rejection(causal, config) is None
    assert "one math warpgroup" in str(SPACE.rejection(causal, replace(config, block_m=64, block_n=64)))
    assert [SPACE.knobs(spec)["alternate"] for spec in (causal, D128)] == [(False, True), (False,)]


def test_pairs_of_ctas_load_by_tma() -> None:
    config = replace(BASE, cluster=2)
    assert config.name == f"{BASE.name}_x2"
    assert parse_config("sm_90a", config.name) == config
    assert SPACE.rejection(D128, config) is None
    assert SPACE.launch(D128, config)["cluster"] == 2
    rows = KernelSpec.parse("fwd_bf16_d33")
    assert "TMA cannot address" in str(SPACE.rejection(rows, replace(config, block_n=64)))
    assert [SPACE.knobs(spec)["cluster"] for spec in (D128, rows)] == [(1, 2), (1,)]


def test_exponentials_of_narrow_heads_may_be_a_polynomial() -> None:
    for name, legal in (("d64", True), ("d32", True), ("d33", True), ("d64_dv72", False), ("d192_dv64", False)):
        spec = KernelSpec.parse(f"fwd_bf16_{name}")
        config = replace(BASE, block_n=32, polynomial=8)
        rejection = SPACE.rejection(spec, config)
        assert (rejection is None) == legal, rejection
        assert SPACE.knobs(spec)["polynomial"] == ((0, 8) if name == "d32" else (0,))
        assert "polynomial" not in render(Variant("sm_90a", spec, replace(config, polynomial=0))).text
    config = replace(BASE, polynomial=4)
    assert config.name == f"{BASE.name}_p4"
    assert parse_config("sm_90a", config.name) == config
    assert config_from_dict("sm_90a", config.to_dict()) == config
    narrow = KernelSpec.parse("fwd_bf16_d32")
    assert "4 pairs of a block's scores < 8" in str(SPACE.rejection(narrow, replace(BASE, block_n=16, polynomial=8)))
    wide_block = replace(BASE, block_m=64, block_n=256)
    assert SPACE.rejection(narrow, wide_block) is None
    assert "208 registers a thread > 200" in str(SPACE.rejection(narrow, replace(wide_block, polynomial=8)))


def test_rows_that_are_stored_from_registers_anyway_have_one_epilogue() -> None:
    assert "as it is" in str(SPACE.rejection(KernelSpec.parse("fwd_bf16_d33"), replace(BASE, epilogue="direct")))


@pytest.mark.parametrize("name", ["fwd_bf16_d128_causal", "fwd_fp16_d33_causal"])
def test_rendering_is_reproducible_and_as_reviewed(name: str) -> None:
    variant = Variant("sm_90a", KernelSpec.parse(name), replace(BASE, q_stages=2))
    text = render(variant).text
    render_unchecked.cache_clear()
    assert render(variant).text == text
    golden = Path(__file__).parent / "golden" / f"{name}.cu"
    assert text == golden.read_text(), f"the rendered source changed: review it, then write it to {golden}"


@pytest.mark.parametrize(
    ("name", "knob", "value"),
    [
        ("fwd_bf16_d64", "tensor_sums", True),
        ("fwd_bf16_d32", "polynomial", 4),
        ("fwd_bf16_d128_causal", "alternate", True),
        ("fwd_bf16_d128_causal", "cluster", 2),
    ],
)
def test_what_a_knob_changes_is_rendered_as_reviewed(name: str, knob: str, value: bool | int) -> None:
    config = replace(BASE, **{knob: value})  # type: ignore[arg-type]
    text = render(Variant("sm_90a", KernelSpec.parse(name), config)).text
    golden = Path(__file__).parent / "golden" / f"{name}_{knob}.cu"
    assert text == golden.read_text(), f"the rendered source changed: review it, then write it to {golden}"


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
@pytest.mark.parametrize("change", [{}, {"block_m": 64}, {"num_stages": 3, "q_stages": 2}, {"tensor_sums": True}])
def test_rendered_lines_are_tidy(spec: KernelSpec, change: dict[str, int]) -> None:
    config = replace(SPACE.default(spec), **change)
    text = render_unchecked(Variant("sm_90a", spec, config)).text
    for line in text.splitlines():
        assert line == line.rstrip()
    assert "\n\n\n" not in text


def _matrix() -> list[Variant]:
    """Defaults, and tiles nearest to a limit: where a rule that is too generous would show. With all that may be on."""
    rng = random.Random(7)
    variants = [Variant("sm_90a", spec, SPACE.default(spec)) for spec in SPECS[2::4]]
    for spec in (*SPECS[1:8:2], *SPECS[4::4], *SPECS[9::2], *SPECS[1:3]):
        by_shape: dict[tuple[int, int], Sm90ForwardConfig] = {}
        for config in legal_configs(SPACE, spec):
            assert isinstance(config, Sm90ForwardConfig)
            shape = (config.block_m, config.ctas_per_sm)
            if shape not in by_shape or config.block_n > by_shape[shape].block_n:
                by_shape[shape] = config
        config = rng.choice(sorted(by_shape.values()))
        for knob, value in (("tensor_sums", True), ("alternate", True), ("polynomial", 4)):
            twin = replace(config, **{knob: value})
            config = config if SPACE.rejection(spec, twin) else twin
        variants.append(Variant("sm_90a", spec, config))
    return variants


@pytest.mark.nvcc
def test_a_matrix_of_legal_variants_compiles_clean() -> None:
    results = build(_matrix())
    assert {result.variant.name: result.reason for result in results if result.state != "ok"} == {}
    for result in results:
        assert result.report is not None
        assert result.report.spill_bytes == 0
        predicted = SPACE.predicted_registers(result.variant.spec, result.variant.config)
        assert result.report.registers == predicted


@pytest.mark.nvcc
def test_one_step_over_the_register_limit_is_rejected_by_ptxas() -> None:
    config = replace(BASE, block_m=192, block_n=96)
    variant = Variant("sm_90a", D128, config)
    assert SPACE.rejection(D128, config) is not None
    assert "C7512" in _compile_unchecked(variant)


def _compile_unchecked(variant: Variant) -> str:
    import subprocess
    import tempfile

    from jagtile.generator.render import TEMPLATES
    from jagtile.generator.toolchain import find_nvcc

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.cu"
        source.write_text(render_unchecked(variant).text)
        command = [find_nvcc().path, "-cubin", "-gencode=arch=compute_90a,code=sm_90a", "-std=c++17", "-I", TEMPLATES]
        done = subprocess.run(
            [*command, source, "-o", source.with_suffix(".cubin")], check=True, capture_output=True, text=True
        )
    return done.stdout + done.stderr
