"""A tune of all chosen specs: one worker, one budget, interrupted and resumed, on a made-up device."""

from __future__ import annotations

import contextlib

import pytest
import torch
from fakes import DEVICE, TARGET, FakeBuilder, FakeWorker

from jagtile.generator import tune_all as module
from jagtile.generator.spec import KernelSpec
from jagtile.generator.tile import spaces_of
from jagtile.generator.tune_all import chosen_specs, tune_all
from jagtile.generator.tune_types import Budget, Silent
from jagtile.generator.worker import STARTING, WorkerFailure
from jagtile.runtime.errors import TuningError
from jagtile.tuning_db.schema import ChoiceEntry, Choices, DeviceFacts
from jagtile.tuning_db.store import Database

SPECS = [KernelSpec.parse(name) for name in ("fwd_bf16_d192", "fwd_bf16_d256", "fwd_bf16_d256_causal")]
RELATIVE = DeviceFacts(
    slug="sm90-114sm", label="PCIe", target=TARGET, units=114, bandwidth_gbs=2000.0, compute_capability="9.0"
)


@pytest.fixture
def database(tmp_path) -> Database:
    made = Database(tmp_path / "user", tmp_path / "shipped")
    made.write_choices(choices(DEVICE, SPECS), ship=True)
    return made


def choices(device, specs):
    defaults = {f"{TARGET}/{spec.name}": spaces_of(TARGET, spec)[0].default(spec) for spec in specs}
    entries = {key: ChoiceEntry(default=config.to_dict()) for key, config in defaults.items()}
    return Choices(device=device, specs=entries)


class Workers:
    """Makes the worker, and counts."""

    def __init__(self) -> None:
        self.made: list[FakeWorker] = []

    def __call__(self) -> FakeWorker:
        self.made.append(FakeWorker())
        return self.made[-1]


class Interrupt(Silent):
    """Ends a tune at the given record."""

    def __init__(self, at: int) -> None:
        self.left = at

    def recorded(self, record) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


def run(database, workers, regimes=("medium", "short"), trials=8, **more):
    more = {"budget": Budget(trials), "build": FakeBuilder(), **more}
    return tune_all(torch.device("cuda"), regimes, database=database, make_worker=workers, **more)


def test_every_chosen_spec_is_tuned_with_one_worker(database):
    workers = Workers()
    outcomes = list(run(database, workers))
    assert [outcome.spec for outcome in outcomes] == SPECS
    assert all(outcome.result is not None for outcome in outcomes)
    assert len(workers.made) == 1
    assert database.choices("user", DEVICE.slug).specs.keys() == {f"{TARGET}/{spec.name}" for spec in SPECS}


def test_interrupted_half_way_the_same_call_goes_on_where_it_was(database):
    progress = {spec: Silent() for spec in SPECS} | {SPECS[1]: Interrupt(5)}
    first = run(database, Workers(), progress_of=lambda spec: contextlib.nullcontext(progress[spec]))
    assert next(first).spec == SPECS[0]
    with pytest.raises(KeyboardInterrupt):
        next(first)
    before = database.records()
    assert {record.spec for record in before} == {SPECS[0].name, SPECS[1].name}

    again = list(run(database, Workers()))
    assert [(outcome.spec, outcome.result is None, outcome.failure) for outcome in again] == [
        (SPECS[0], True, ""),
        (SPECS[1], False, ""),
        (SPECS[2], False, ""),
    ]
    records = database.records()
    assert records[: len(before)] == before
    searched = [(r.spec, r.workload, str(r.config)) for r in records if r.phase == "search"]
    assert len(searched) == len(set(searched))  # nothing twice
    assert len({(r.spec, r.regime, str(r.config)) for r in records if r.phase == "search"}) == len(SPECS) * 2 * 8
    assert [outcome.result for outcome in run(database, Workers())] == [None] * 3
    assert all(outcome.result is not None for outcome in run(database, Workers(), resume=False))


def test_a_regime_that_was_not_tuned_leaves_a_spec_undone(database):
    list(run(database, Workers(), regimes=("medium",)))
    assert all(outcome.result is None for outcome in run(database, Workers(), regimes=("medium",)))
    assert all(outcome.result is not None for outcome in run(database, Workers(), regimes=("medium", "short")))


def test_few_is_tuned_for_the_specs_that_have_it(database):
    backward = KernelSpec.parse("bwd_bf16_d64")
    database.write_choices(choices(DEVICE, [*SPECS[:1], backward]), ship=True)
    (outcome,) = run(database, Workers(), regimes=("few",))
    assert (outcome.spec, [found.regime for found in outcome.result.regimes]) == (SPECS[0], ["few"])
    assert [outcome.result for outcome in run(database, Workers(), regimes=("few",))] == [None]


def test_each_spec_gets_an_even_share_of_the_time_that_is_left(database, monkeypatch):
    now, shares = [100.0], []

    def tune(spec, device, regimes, *, budget, **_):
        shares.append(budget)
        now[0] += {1: 30.0, 2: 5.0, 3: 0.0}[len(shares)]  # the first overruns its share, the second is soon done

    monkeypatch.setattr(module, "tune", tune)
    list(run(database, Workers(), budget=Budget(7, 60.0), clock=lambda: now[0]))
    assert shares == [Budget(7, 20.0), Budget(7, 15.0), Budget(7, 25.0)]


def test_a_spec_that_nothing_works_for_is_told_and_the_others_are_tuned(database):
    class Picky(FakeBuilder):
        def __call__(self, variants):
            self.states = {v.config.name: "compile" for v in variants if v.spec == SPECS[0]}
            return super().__call__(variants)

    first, *others = run(database, Workers(), build=Picky())
    assert first.result is None
    assert "none of" in first.failure
    assert all(outcome.result is not None for outcome in others)


def test_a_new_device_tunes_what_its_nearest_relative_has_chosen(tmp_path):
    database = Database(tmp_path / "user", tmp_path / "shipped")
    with pytest.raises(TuningError, match="no choices for sm90-132sm or a relative"):
        list(run(database, Workers()))
    database.write_choices(choices(RELATIVE, SPECS[:1]), ship=True)
    assert chosen_specs(DEVICE, database) == SPECS[:1]
    (outcome,) = run(database, Workers())
    assert outcome.result.choices.device == DEVICE


def test_a_device_that_can_not_be_used_is_told(database):
    class Lost(FakeWorker):
        def _facts(self):
            raise WorkerFailure("crash", "the device is lost", STARTING)

    with pytest.raises(TuningError, match="cuda can't be used: the device is lost"):
        list(run(database, Lost))
