"""benchmarks/tuner_quality.py on a made-up device: sweeps, two tunes a regime, and what is said of them."""

from __future__ import annotations

import json

import pytest
import torch
from fakes import TARGET, FakeBuilder, FakeWorker, landscape
from tuner_quality import examine_all, verdict

from jagtile.generator.replay import read_sweeps
from jagtile.generator.spec import KernelSpec
from jagtile.generator.sweep import legal_of

SPEC = KernelSpec.parse("bwd_bf16_d128")
LEGAL = legal_of(TARGET, SPEC)


def test_each_regime_is_swept_and_tuned_twice_and_what_is_on_record_is_not_measured_again(tmp_path):
    workers = []

    def examine():
        workers.append(FakeWorker(noise=0.0005))
        arguments = ([SPEC], ("medium", "huge"), torch.device("cuda"), tmp_path, lambda: workers[-1])
        return examine_all(*arguments, build=FakeBuilder())

    found = examine()
    best = min(LEGAL, key=landscape)
    assert [(each.regime, each.configs, each.trials) for each in found] == [
        (regime, len(LEGAL), len(LEGAL) // 4) for regime in ("medium", "huge")
    ]
    for each in found:
        assert each.best == best.name
        own = {config.name: landscape(config) / landscape(best) - 1 for config in LEGAL}
        assert each.regrets == pytest.approx([own[name] for name in each.chosen], abs=0.002)
        assert each.worst == max(*each.regrets, each.apart)
    assert json.loads((tmp_path / "quality.json").read_text())[0]["spec"] == SPEC.name
    # huge has two workloads
    assert [len(sweep.configs) for sweep in read_sweeps(tmp_path / "sweeps")] == [len(LEGAL)] * 3

    again = examine()
    assert [(each.regime, each.chosen) for each in again] == [(each.regime, each.chosen) for each in found]
    assert len(workers[1].timed) < len(workers[0].timed) / 2


def test_sweeps_of_knobs_with_defaults_are_examined_too(tmp_path):
    spec = KernelSpec.parse("fwd_bf16_d256")  # what a record leaves out, a sweep says
    arguments = ([spec], ("medium",), torch.device("cuda"), tmp_path, lambda: FakeWorker(noise=0.0005))
    (found,) = examine_all(*arguments, build=FakeBuilder())
    assert found.configs == len(legal_of(TARGET, spec))
    assert found.worst < 0.02


def test_a_spec_is_examined_in_the_regimes_that_it_has(tmp_path):
    found = examine_all(
        [SPEC], ("few", "medium"), torch.device("cuda"), tmp_path, lambda: FakeWorker(noise=0.0005), build=FakeBuilder()
    )
    assert [each.regime for each in found] == ["medium"]  # no backward is few


def test_regrets_refer_to_the_best_and_the_distance_to_the_faster_choice():
    one, two, three = LEGAL[:3]
    judged = verdict(SPEC, "long", 18, 4, [two, three], {one: 1.0, two: 1.01, three: 1.03})
    assert (judged.best, judged.regrets, judged.worst) == (one.name, (0.01, 0.03), 0.03)
    assert judged.apart == pytest.approx(1.03 / 1.01 - 1, abs=1e-5)
    same = verdict(SPEC, "long", 18, 4, [one, one], {one: 1.0, two: 1.01})
    assert (same.regrets, same.apart, same.worst) == ((0.0, 0.0), 0.0, 0.0)
