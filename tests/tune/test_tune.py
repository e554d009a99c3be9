"""Tuning as a whole, on a made-up device: states, resumption, budgets, incumbents, finals, and a kill half-way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch
from fakes import COMPILER, DEVICE, SPEC, TARGET, FakeBuilder, FakeWorker, landscape

from jagtile.generator import resume
from jagtile.generator.search import Search
from jagtile.generator.spec import KernelSpec
from jagtile.generator.tile import config_from_dict, spaces_of
from jagtile.generator.tune import Budget, Silent, tune
from jagtile.generator.worker import WorkerFailure
from jagtile.generator.workloads import named, representative
from jagtile.runtime.device import DeviceId
from jagtile.runtime.dispatch import choose_for_regime
from jagtile.runtime.errors import DatabaseError, TuningError, UnsupportedError
from jagtile.runtime.problem import REGIMES
from jagtile.tuning_db.schema import ChoiceEntry, Choices
from jagtile.tuning_db.store import Database

KEY = f"{TARGET}/{SPEC.name}"
LEGAL = Search(TARGET, SPEC, trials=1).legal
DEFAULT = spaces_of(TARGET, SPEC)[0].default(SPEC)


@pytest.fixture
def database(tmp_path) -> Database:
    return Database(tmp_path / "user", tmp_path / "shipped")


def run(database, worker=None, builder=None, regimes=("medium",), trials=24, device="cuda", **more):
    worker, builder = worker or FakeWorker(), builder or FakeBuilder()
    return tune(
        SPEC,
        torch.device(device),
        regimes,
        budget=more.pop("budget", Budget(trials=trials)),
        database=database,
        build=builder,
        make_worker=lambda: worker,
        **more,
    )


def searched(records):
    return [r for r in records if r.phase == "search"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_it_finds_records_and_chooses_what_dispatch_then_takes(database, device):
    result = run(database, device=device, trials=len(LEGAL) // 8, regimes=("medium", "decode"))
    decided = choose_for_regime(SPEC, "medium", DeviceId(**msgspec.structs.asdict(DEVICE)), database)
    assert decided.source == "user"
    better = [config for config in LEGAL if landscape(config) < landscape(decided.variant.config)]
    assert len(better) < len(LEGAL) / 100  # how far apart the best few are is the landscape's luck
    assert [r.regime for r in result.regimes] == ["medium", "decode"]
    assert decided.variant.config == result.regimes[0].chosen
    assert result.regimes[0].incumbent == DEFAULT
    assert result.regimes[0].chosen_us <= result.regimes[0].incumbent_us
    assert database.records() == sorted(result.records, key=lambda r: r.date)
    assert result.path == database.user_root / DEVICE.slug / "choices.json"


def test_a_record_holds_what_is_needed_to_judge_it(database):
    record = run(database, trials=4).records[0]
    assert record.state == "ok"
    assert (record.device, record.target, record.spec) == (DEVICE.slug, TARGET, SPEC.name)
    assert (record.workload, record.compiler, record.driver) == ("medium:vit-d64", "fake 1.0", "580.0")
    assert record.control == DEFAULT.name
    assert record.ratio == 1.0  # the control itself comes first
    assert record.samples == 14  # both runs of it
    pairs = sum(length**2 for length in named()["vit-d64"].seqlens_q)
    assert record.tflops == pytest.approx(pairs * 4 * 128 * 8 / record.time_us / 1e6)
    assert len(record.source_sha256) == 64
    assert 0 < record.aa_spread < 0.05
    assert record.error_rel == 2e-3


def test_each_state_costs_its_config_only_and_is_recorded_with_its_reason(database):
    victims = [c.name for c in LEGAL if c != DEFAULT][:8]
    states = ("compile", "spill", "rejected", "illegal")
    builder = FakeBuilder(dict(zip(victims, states, strict=False)))
    behaviour = dict(zip(victims[4:], ("incorrect", "crash", "timeout", "crash while timed"), strict=True))
    result = run(database, FakeWorker(behaviour), builder, trials=None)
    found = {config_from_dict(TARGET, r.config).name: r for r in searched(result.records) if r.state != "ok"}
    assert {name: r.state for name, r in found.items()} == {
        **builder.states,
        **behaviour,
        victims[7]: "crash",
    }
    assert found[victims[0]].reason == "because of compile"
    assert "edges" in found[victims[4]].reason
    assert found[victims[7]].reason == "killed by SIGSEGV"
    assert Counter(result.regimes[0].states) == {
        "ok": len(LEGAL) - 8,
        "crash": 2,
        "timeout": 1,
        "incorrect": 1,
        **dict.fromkeys(states, 1),
    }
    assert result.regimes[0].chosen.name not in victims


def test_what_failed_in_one_regime_is_not_tried_in_the_next(database):
    victim = next(c.name for c in LEGAL if c != DEFAULT)
    worker = FakeWorker({victim: "timeout"})
    run(database, worker, regimes=("short", "medium", "long"), trials=None)
    assert worker.checked.count(victim) == 2  # the second time to confirm the first
    assert victim not in worker.timed


def test_a_wrong_config_is_never_timed(database):
    wrong = {config.name: "incorrect" for config in LEGAL if config.block_n != DEFAULT.block_n}
    worker = FakeWorker(wrong)
    result = run(database, worker)
    assert not set(worker.timed) & set(wrong)
    assert result.regimes[0].chosen.block_n == DEFAULT.block_n


@pytest.mark.parametrize("kind", ["incorrect", "crash", "timeout", "crash while timed"])
def test_an_incumbent_that_fails_is_replaced(database, kind):
    result = run(database, FakeWorker({DEFAULT.name: kind}))
    assert result.regimes[0].incumbent == DEFAULT
    assert result.regimes[0].incumbent_us is None
    assert result.regimes[0].chosen != DEFAULT


@pytest.mark.parametrize("kind", ["crash once", "crash once while timed"])
def test_a_config_that_is_all_right_by_itself_is_not_condemned(database, kind):
    victims = {DEFAULT.name: kind, next(c.name for c in LEGAL if c != DEFAULT): kind}
    result = run(database, FakeWorker(victims), trials=None)
    assert {r.state for r in result.records} == {"ok"}
    assert {config_from_dict(TARGET, r.config).name for r in searched(result.records)} == {c.name for c in LEGAL}
    assert {r.control for r in result.records} == {DEFAULT.name}
    assert result.regimes[0].incumbent_us is not None


def test_a_config_that_crashes_in_company_every_time_is_given_up(database):
    victim = next(c.name for c in LEGAL if c != DEFAULT)
    worker = FakeWorker({victim: "crash in company"})
    result = run(database, worker, trials=None)
    assert [(config_from_dict(TARGET, r.config).name, r.state) for r in result.records if r.state != "ok"] == [
        (victim, "crash")
    ]
    assert worker.timed.count(victim) == 3  # in company, alone, in company


@pytest.mark.parametrize("kind", ["crash", "crash while timed"])
def test_measuring_anew_refutes_a_crash_on_record(database, kind):
    run(database, FakeWorker({DEFAULT.name: kind}))
    loved = FakeWorker(time_of=lambda config, workload: 50.0 if config == DEFAULT else 100.0)
    assert run(database, loved).regimes[0].chosen != DEFAULT
    run(database, resume=False)
    assert run(database, loved).regimes[0].chosen == DEFAULT


def test_a_lost_device_ends_the_tune_and_condemns_nobody(database):
    with pytest.raises(TuningError, match="the device is lost"):
        run(database, FakeWorker({config.name: "no worker" for config in LEGAL}))
    assert database.records() == []


def test_a_device_that_can_not_be_used_is_told(database):
    class Unusable(FakeWorker):
        def _facts(self):
            raise WorkerFailure("crash", "no kernel image", "read the device's identity")

    with pytest.raises(TuningError, match="cuda can't be used: no kernel image"):
        run(database, Unusable())


def test_where_nothing_works_the_error_counts_the_ends(database):
    worker = FakeWorker({config.name: "incorrect" for config in LEGAL})
    with pytest.raises(TuningError, match=r"none of 12 configs works \(12 incorrect\).*reason: edges"):
        run(database, worker, trials=12)
    assert len(database.records(state="incorrect")) == 12
    assert database.choices("user", DEVICE.slug) is None


def test_a_second_run_measures_only_the_finals(database):
    first = run(database)
    worker, builder = FakeWorker(), FakeBuilder()
    second = run(database, worker, builder)
    assert searched(second.records) == []
    assert len(set(builder.built)) <= 5
    assert second.regimes[0].chosen == first.regimes[0].chosen


def test_a_larger_budget_adds_to_what_is_known(database):
    run(database, trials=12)
    assert len(searched(run(database, trials=20).records)) == 8


def test_resume_can_be_refused(database):
    run(database, trials=12)
    assert len(searched(run(database, trials=12, resume=False).records)) == 12


def test_records_of_another_source_are_not_taken(database):
    run(database, trials=12)
    for path in (database.user_root / DEVICE.slug / "records").iterdir():
        path.write_text(path.read_text().replace('"source_sha256":"', '"source_sha256":"old'))
    assert len(searched(run(database, trials=12).records)) == 12


@pytest.mark.parametrize(("compiler", "again"), [(COMPILER, False), ("another 2.0", True)])
def test_what_one_compiler_refused_is_tried_again_with_another(database, monkeypatch, compiler, again):
    monkeypatch.setattr(resume, "compiler_at_hand", lambda target: compiler)
    run(database, builder=FakeBuilder({DEFAULT.name: "spill"}))
    assert {r.compiler for r in database.records() if r.state == "spill"} == {COMPILER}
    builder = FakeBuilder()
    run(database, builder=builder)
    assert (DEFAULT.name in builder.built) == again


def test_shipping_writes_beside_the_code_and_not_to_the_user(database):
    result = run(database, ship=True)
    assert result.path == database.shipped_root / DEVICE.slug / "choices.json"
    assert (database.shipped_root / DEVICE.slug / "records.jsonl").exists()
    assert not database.user_root.exists()


def test_shipping_compares_with_what_is_shipped_though_a_user_has_a_choice(database):
    shipped = run(database, ship=True).choices.specs[KEY].regimes["medium"]
    for records in (database.shipped_root / DEVICE.slug).glob("records*"):
        records.write_text(records.read_text().replace('"source_sha256":"', '"source_sha256":"old'))
    slow = FakeWorker(time_of=lambda config, workload: 300 - landscape(config))
    assert run(database, slow).choices.specs[KEY].regimes["medium"] != shipped
    result = run(database, slow, ship=True)
    assert shipped in [record.config for record in result.records if record.phase == "final"]
    assert result.choices.specs[KEY].regimes["medium"] != shipped


def test_tuning_one_regime_leaves_the_shipped_choices_of_the_others_in_force(database):
    shipped = run(database, regimes=("short", "medium"), trials=24, ship=True).choices.specs[KEY]
    (records,) = database.shipped_root.glob("*/records.jsonl")
    records.write_text(records.read_text().replace('"source_sha256":"', '"source_sha256":"old'))
    slow = FakeWorker(time_of=lambda config, workload: 300 - landscape(config))
    entry = run(database, slow, regimes=("short",), trials=24).choices.specs[KEY]
    assert entry.regimes["short"] != shipped.regimes["short"]
    assert entry.regimes["medium"] == shipped.regimes["medium"]
    assert entry.regimes.keys() == set(REGIMES) - {"few", "huge"}  # which follow their neighbours until they are tuned


def test_few_is_tuned_for_forwards_and_no_backward(database):
    result = run(database, regimes=("few", "medium"), trials=12)
    assert [found.regime for found in result.regimes] == ["few", "medium"]
    assert {record.workload for record in result.records if record.regime == "few"} == {
        w.name for w in representative(SPEC, "few", TARGET)
    }
    assert {"few", "medium"} <= result.choices.specs[KEY].regimes.keys()
    with pytest.raises(ValueError, match=r"regimes of bwd_bf16_d128 on cuda must be some of tiny, .*, huge; got few"):
        tune(KernelSpec.parse("bwd_bf16_d128"), torch.device("cuda"), ("few",), database=database)


def test_a_choice_that_follows_from_another_tuners_later_finals_is_told_with_its_time(database):
    first = run(database)
    other = next(r for r in first.records if r.phase == "final" and r.time_us != first.regimes[0].chosen_us)
    with database.writer(DEVICE.slug, ship=False) as writer:
        writer.append(msgspec.structs.replace(other, session="later", date="2999", time_us=1.5, aa_spread=0.0))
    found = run(database, FakeWorker({config.name: "crash" for config in LEGAL if config.to_dict() == other.config}))
    assert found.regimes[0].chosen.to_dict() == other.config
    assert found.regimes[0].chosen_us == 1.5


def test_the_incumbent_stays_within_the_noise(database):
    flat = FakeWorker(time_of=lambda config, workload: 100.0)
    assert run(database, flat).regimes[0].chosen == DEFAULT


def test_the_recorded_choice_is_the_next_runs_incumbent_and_control(database):
    first = run(database)
    second = run(database, trials=30)
    assert second.regimes[0].incumbent == first.regimes[0].chosen
    assert {r.control for r in second.records} == {first.regimes[0].chosen.name}


def test_a_new_device_starts_from_what_its_nearest_relative_chose(database):
    good = min(LEGAL, key=landscape)
    for units, config in ((130, good), (78, LEGAL[-1])):
        facts = msgspec.structs.replace(DEVICE, slug=f"sm90-{units}sm", units=units)
        entry = ChoiceEntry(default=config.to_dict())
        database.write_choices(Choices(device=facts, specs={KEY: entry}), ship=True)
    worker = FakeWorker()
    result = run(database, worker, trials=6)
    assert (worker.timed[0], result.regimes[0].incumbent) == (good.name, good)
    assert {record.control for record in result.records} == {good.name}
    assert result.regimes[0].chosen == good


def test_drift_of_the_device_does_not_mislead(database):
    calls = iter(range(10**6))

    def drifting(config, workload):
        return landscape(config) * (1 + 0.01 * (next(calls) // 7))

    result = run(database, FakeWorker(time_of=drifting, noise=0.0), trials=len(LEGAL))
    assert landscape(result.regimes[0].chosen) <= 1.03 * min(map(landscape, LEGAL))


def test_finalists_of_all_regimes_are_timed_in_every_regime(database):
    def crossed(config, workload):
        return landscape(config, seed=1 if workload.startswith("short") else 2)

    result = run(database, FakeWorker(time_of=crossed, noise=0.0), regimes=("short", "medium"), trials=None)
    finals = {
        regime: {str(r.config) for r in result.records if r.phase == "final" and r.regime == regime}
        for regime in ("short", "medium")
    }
    assert finals["short"] == finals["medium"]
    assert len(finals["short"]) >= 3
    workloads = len(representative(SPEC, "short", TARGET))  # their times are added up
    assert result.regimes[0].best_us == pytest.approx(workloads * min(landscape(c, 1) for c in LEGAL))


def test_the_same_seed_tunes_the_same_way(tmp_path):
    def asked(name, seed):
        database = Database(tmp_path / name, tmp_path / "none")
        return [r.config for r in searched(run(database, FakeWorker(noise=0.0), seed=seed).records)]

    assert asked("a", 1) == asked("b", 1)
    assert asked("c", 2) != asked("d", 1)


def test_a_budget_of_seconds_ends_the_search(database):
    begin = time.monotonic()
    worker = FakeWorker(delay=0.02)
    result = run(database, worker, regimes=("short", "medium"), budget=Budget(trials=None, seconds=2.0))
    assert len(searched(result.records)) < 2 * len(LEGAL)
    assert {r.regime for r in searched(result.records)} == {"short", "medium"}
    assert time.monotonic() - begin < 60


def test_progress_is_told(database):
    told = []

    class Listener(Silent):
        def regime_started(self, regime, workload, trials, known):
            told.append((regime, workload.name, trials, known))

        def recorded(self, record):
            told.append(record.phase)

        def finals_started(self, regime, configs):
            told.append(("finals", regime))

    result = run(database, trials=10, progress=Listener())
    assert told[0] == ("medium", "medium:vit-d64", 10, 0)
    assert told[1:12] == ["search"] * 10 + [("finals", "medium")]
    assert len(told) == len(result.records) + 2


@pytest.mark.parametrize(("regimes", "message"), [((), "got none"), (("vast",), "got vast")])
def test_unknown_regimes_are_refused(database, regimes, message):
    with pytest.raises(ValueError, match=message):
        run(database, regimes=regimes)


def test_a_place_that_can_not_be_written_to_is_told_before_anything_is_measured(tmp_path):
    (tmp_path / "file").write_text("")
    worker = FakeWorker()
    with pytest.raises(DatabaseError):
        run(Database(tmp_path / "file", tmp_path), worker)
    assert worker.checked == []


def test_a_spec_with_dropout_is_refused_for_it_takes_anothers_choices(database):
    with pytest.raises(UnsupportedError, match=r"fwd_bf16_d128_drop is not tuned: .* choices of fwd_bf16_d128$"):
        tune(replace(SPEC, dropout=True), torch.device("cpu"), database=database)


def test_a_spec_that_no_template_serves_is_refused(database):
    worker = FakeWorker()
    with pytest.raises(UnsupportedError):
        tune(
            type(SPEC)("fwd", "fp32", 77, 33, False),
            torch.device("cuda"),
            database=database,
            build=FakeBuilder(),
            make_worker=lambda: worker,
        )


SCRIPT = """
import signal
import sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background ignores it, and so would we
sys.path.insert(0, sys.argv[1])
import torch
from fakes import SPEC, FakeBuilder, FakeWorker
from jagtile.generator.tune import Budget, tune
from jagtile.tuning_db.store import Database
from pathlib import Path

tune(SPEC, torch.device("cuda"), ("medium",), budget=Budget(trials=None), build=FakeBuilder(),
     make_worker=lambda: FakeWorker(delay=0.05), database=Database(Path(sys.argv[2]), Path(sys.argv[3])))
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_ending_a_tune_half_way_loses_nothing_and_the_next_run_goes_on(database, tmp_path, how):
    package = Path(__file__).parents[2] / ".pkg"
    arguments = [str(Path(__file__).parent), str(database.user_root), str(database.shipped_root)]
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *arguments],
        env={**os.environ, "PYTHONPATH": str(package)},
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while len(database.records()) < 10 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(how)
    process.wait(60)
    kept = len(database.records())
    assert 10 <= kept < len(LEGAL)
    builder = FakeBuilder()
    result = run(database, builder=builder, trials=None)
    assert len(searched(result.records)) == len(LEGAL) - kept


def test_where_nothing_ever_worked_all_is_tried_anew(database):
    with pytest.raises(TuningError):
        run(database, FakeWorker({config.name: "crash" for config in LEGAL}), trials=12)
    assert len(searched(run(database, trials=12).records)) == 12
