"""Searches replayed over recorded sweeps: regret with a quarter of the trials; how sweeps are made and kept."""

from __future__ import annotations

import statistics
from pathlib import Path

import msgspec
import pytest
import torch
from click.testing import CliRunner
from fakes import DEVICE, TARGET, FakeBuilder, FakeWorker, landscape

from jagtile.generator.replay import quarter, read_sweep, read_sweeps, replay, write_sweep
from jagtile.generator.roofline import predictor
from jagtile.generator.spec import KernelSpec
from jagtile.generator.sweep import legal_of, main, sweeps, values_of
from jagtile.generator.tile import spaces_of
from jagtile.generator.tune import Budget, tune
from jagtile.generator.workloads import representative
from jagtile.runtime.errors import DatabaseError
from jagtile.runtime.problem import regimes_for
from jagtile.runtime.settings import settings
from jagtile.tuning_db.store import Database

SWEEPS = {sweep.name: sweep for sweep in read_sweeps(Path(__file__).with_name("sweeps"))}
SEEDS = 3
SPEC = KernelSpec.parse("fwd_bf16_d256")
LEGAL = legal_of(TARGET, SPEC)


@pytest.mark.parametrize("name", SWEEPS)
def test_with_a_quarter_of_the_trials_the_choice_is_within_two_percent_of_the_best(name):
    sweep = SWEEPS[name]
    replays = [replay(sweep, quarter(sweep), seed=seed) for seed in range(SEEDS)]
    assert all(each.trials == quarter(sweep) for each in replays)
    assert statistics.mean(each.regret for each in replays) <= 0.02
    # Where two measurements of one config differ by as much, no search can tell apart what is within it.
    regrets, tolerance = [each.regret for each in replays], max(0.02, 2 * sweep.noise)
    assert max(regrets) <= tolerance
    assert (1 + max(regrets)) / (1 + min(regrets)) <= 1 + tolerance  # two tunes agree


def test_the_sweeps_are_of_gpus_and_cpus_forwards_and_backwards_and_all_regimes():
    pairs = {(sweep.target, sweep.spec, sweep.regime) for sweep in SWEEPS.values()}
    assert {target for target, _, _ in pairs} == {"sm_90a", "cpu"}
    hopper = {(spec, regime) for target, spec, regime in pairs if target == "sm_90a"}
    assert {spec[:3] for spec, _ in hopper} == {"fwd", "bwd"}
    assert {regime for _, regime in hopper} >= set(regimes_for("fwd", "sm_90a"))
    assert len(hopper) >= 15


def test_all_trials_find_the_best_and_the_same_seed_does_the_same():
    sweep = SWEEPS["sm90-132sm-fwd_bf16_d256-medium-vit-d64"]
    whole = replay(sweep, len(sweep.configs), noise=False)
    assert (whole.trials, whole.regret, whole.course[-1]) == (111, 0.0, 0.0)
    assert list(whole.course) == sorted(whole.course, reverse=True)
    assert replay(sweep, 9, seed=3) == replay(sweep, 9, seed=3)


def test_without_predictions_and_with_failures_a_replay_still_ends():
    sweep = SWEEPS["sm90-132sm-fwd_bf16_d256-medium-vit-d64"]
    rows = tuple((*config[:2], None if place % 2 else config[2], None) for place, config in enumerate(sweep.configs))
    half = msgspec.structs.replace(sweep, configs=rows)
    assert half.best == min(time for _, _, time, _ in rows if time)
    assert replay(half, len(rows)).regret == 0.0


@pytest.fixture
def database(tmp_path) -> Database:
    return Database(tmp_path / "cache" / "tuning", tmp_path / "shipped")


def _tune(database, trials, **behaviour):
    worker = FakeWorker(behaviour, noise=0.0)
    return tune(
        SPEC,
        torch.device("cuda"),
        ("medium",),
        budget=Budget(trials),
        database=database,
        build=FakeBuilder(),
        make_worker=lambda: worker,
    )


def _sweeps(database, coverage=1.0):
    return list(sweeps(database.records("user"), {DEVICE.slug: DEVICE}, coverage))


def test_an_exhaustive_tune_leaves_a_sweep(database):
    crashes = LEGAL[3]
    _tune(database, None, **{crashes.name: "crash"})
    (sweep,) = _sweeps(database)
    assert (sweep.device, sweep.spec, sweep.regime, sweep.noise) == (DEVICE.slug, SPEC.name, "medium", 0.0)
    by_values = {(config.algorithm, values_of(config)): config for config in LEGAL}
    guess = predictor(DEVICE, SPEC, representative(SPEC, "medium", TARGET))
    assert {by_values[algorithm, values] for algorithm, values, _, _ in sweep.configs} == set(LEGAL)
    control = landscape(spaces_of(TARGET, SPEC)[0].default(SPEC))
    for algorithm, values, time, predicted in sweep.configs:
        config = by_values[algorithm, values]
        assert predicted == guess(config)
        assert time == (None if config == crashes else pytest.approx(landscape(config) / control, rel=1e-4))
    assert replay(sweep, len(LEGAL)).regret == 0.0


def test_what_is_on_record_in_part_is_no_sweep_unless_that_is_asked_for(database):
    _tune(database, 20)
    assert _sweeps(database) == []
    (part,) = _sweeps(database, 20 / len(LEGAL))
    assert len(part.configs) == 20
    assert replay(part, 20, noise=False).regret == 0.0


def test_a_sweep_comes_back_as_it_was_written(tmp_path):
    sweep = next(iter(SWEEPS.values()))
    path = write_sweep(sweep, tmp_path)
    assert read_sweep(path) == sweep
    assert path.read_bytes() == (Path(__file__).with_name("sweeps") / path.name).read_bytes()
    path.write_text("{}")
    with pytest.raises(DatabaseError, match="holds no sweep"):
        read_sweep(path)


def test_the_command_writes_a_file_for_each_whole_sweep(database, tmp_path):
    _tune(database, None)
    with settings.override(cache_dir=tmp_path / "cache"):
        result = CliRunner().invoke(main, [str(tmp_path / "out"), "--spec", SPEC.name, "--device", DEVICE.slug])
    assert result.exit_code == 0, result.output
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert f"{DEVICE.slug}-{SPEC.name}-medium-vit-d64.json" in written
    assert f"{len(LEGAL)} configs" in result.output
