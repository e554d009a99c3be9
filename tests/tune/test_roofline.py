"""The roofline model: its limits, what it must react to, and how well it ranks what was measured on the H200."""

from __future__ import annotations

import statistics
from dataclasses import replace

import pytest
from fakes import DEVICE, SPEC, TARGET

from jagtile.generator.roofline import CLOCK_GHZ, MMA_FLOPS, roofline
from jagtile.generator.roofline_check import agreements, rank_correlation
from jagtile.generator.spec import KernelSpec
from jagtile.generator.tile import Variant, parse_config, spaces_of
from jagtile.generator.workloads import Workload, representative
from jagtile.runtime.problem import REGIMES
from jagtile.tuning_db.store import Database

DEFAULT = Variant(TARGET, SPEC, spaces_of(TARGET, SPEC)[0].default(SPEC))
SQUARE = Workload("square", (8192,) * 4, (8192,) * 4, 16, 16, 128, 128)


@pytest.mark.parametrize("regime", REGIMES)
def test_no_prediction_is_below_what_the_tensor_cores_and_the_memory_can_do(regime):
    for workload in representative(SPEC, regime, TARGET):
        guess = roofline(DEFAULT, workload, DEVICE)
        peak = DEVICE.units * MMA_FLOPS * CLOCK_GHZ * 1e9
        assert guess.us >= workload.flops / peak * 1e6
        assert guess.us >= workload.input_bytes(2) / DEVICE.bandwidth_gbs / 1e3
        assert (guess.bound == "memory") == (workload.name == "cross:cross-d64")


def test_long_sequences_are_bound_by_the_tensor_cores_and_small_head_dims_by_exponentials():
    assert roofline(DEFAULT, SQUARE, DEVICE).bound == "tensor"
    spec = KernelSpec.parse("fwd_bf16_d32")
    narrow = Variant(TARGET, spec, spaces_of(TARGET, spec)[0].default(spec))
    assert roofline(narrow, replace(SQUARE, head_dim=32, head_dim_v=32), DEVICE).bound == "exp"


def test_masked_keys_cost_nothing_and_unused_rows_of_a_tile_do():
    full, masked = (roofline(DEFAULT, replace(SQUARE, is_causal=causal), DEVICE).us for causal in (False, True))
    assert 0.5 < masked / full < 0.6
    short = Workload("short", (65,) * 2000, (65,) * 2000, 16, 16, 128, 128)
    small, large = (
        roofline(Variant(TARGET, SPEC, parse_config(TARGET, f"persistent_m{m}_n80_s2_q1_c1")), short, DEVICE).us
        for m in (128, 192)
    )
    assert small < large


def test_fewer_multiprocessors_take_longer():
    half = type("Half", (), {name: getattr(DEVICE, name) for name in DEVICE.__struct_fields__} | {"units": 66})()
    assert roofline(DEFAULT, SQUARE, half).us > 1.9 * roofline(DEFAULT, SQUARE, DEVICE).us


def test_a_template_without_a_model_has_no_prediction():
    spec = KernelSpec.parse("fwd_fp32_d64")
    variant = Variant("cpu", spec, spaces_of("cpu", spec)[0].default(spec))
    assert roofline(variant, SQUARE, DEVICE) is None


def test_rank_correlation():
    assert rank_correlation([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 1, 2], [1, 1, 2]) == pytest.approx(1)
    assert rank_correlation([1, 1, 1], [1, 2, 3]) == 0


def test_it_ranks_the_shipped_records_as_docs_tuning_says(tmp_path):
    found = agreements(Database(tmp_path))
    dense = [each for each in found if each.regime in ("short", "medium", "long")]
    assert len(dense) >= 30
    assert statistics.median(each.correlation for each in dense) > 0.75
    assert statistics.median(each.correlation for each in found) > 0.7
    assert statistics.median(each.quarter for each in found) < 1.02
