"""A real tune on the CPU: templates, compiler, worker, clock, database and dispatch, with a tiny budget."""

from __future__ import annotations

import pytest
import torch

from jagtile.generator.spec import KernelSpec
from jagtile.generator.toolchain import find_cxx
from jagtile.generator.tune import Budget, tune
from jagtile.runtime.device import device_id
from jagtile.runtime.dispatch import choose_for_regime
from jagtile.runtime.errors import CompilerNotFoundError
from jagtile.tuning_db.store import Database

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["fwd_fp32_d32_causal", "bwd_fp32_d32_causal"])
def test_a_real_tune_on_the_cpu(name, tmp_path):
    spec = KernelSpec.parse(name)
    try:
        find_cxx()
    except CompilerNotFoundError as error:
        pytest.skip(str(error))
    database = Database(tmp_path / "user", tmp_path / "shipped")
    result = tune(spec, CPU, ("short",), budget=Budget(trials=2), database=database)

    ok = [record for record in result.records if record.state == "ok"]
    assert {record.regime for record in ok if record.phase == "final"} == {"short"}
    for record in ok:
        assert record.time_us > 0
        assert record.error_rel < 2e-6
        assert record.compiler
    for found in result.regimes:
        decided = choose_for_regime(spec, found.regime, device_id(CPU), database)
        assert decided.source == "user"
        assert decided.variant.config == found.chosen

    again = tune(spec, CPU, ("short",), budget=Budget(trials=2), database=database)
    assert {record.phase for record in again.records} == {"final"}
