"""Claims and results in a shared storage: one holder a key, losses noticed, budgets kept, on every kind of storage."""

from __future__ import annotations

import multiprocessing
import time
from multiprocessing.synchronize import Barrier

import pytest
from fakes import DEVICE, SPEC, TARGET, landscape
from postgres import server

from jagtile.generator.fleet import Fleet
from jagtile.generator.search import Search
from jagtile.generator.shared_search import SharedSearch
from jagtile.runtime.errors import TuningError
from jagtile.tuning_db.schema import TuningRecord

SEARCH = Search(TARGET, SPEC, trials=1)
LEGAL = SEARCH.legal
POINTS = {config.name: SEARCH.point(config) for config in LEGAL[:6]}
A, B, C, *_ = POINTS


@pytest.fixture(scope="module")
def postgres():
    pytest.importorskip("psycopg", reason="needs psycopg: pip install 'jagtile[fleet]'")
    with server() as url:
        yield url


@pytest.fixture(params=["sqlite", "journal", "postgresql"])
def url(request, tmp_path) -> str:
    if request.param == "postgresql":
        return request.getfixturevalue("postgres")
    return f"{request.param}:///{tmp_path / 'study'}"


@pytest.fixture
def journal(tmp_path) -> str:
    return f"journal:///{tmp_path / 'study.log'}"


def record(config, **fields) -> TuningRecord:
    common = {"device": DEVICE.slug, "target": TARGET, "spec": SPEC.name, "regime": "long", "workload": "w"}
    return TuningRecord(**{**common, "config": config.to_dict(), "state": "ok", "time_us": 0.1 + 0.2, **fields})


def take(points, *names):
    return {name: points[name] for name in names}


def test_a_key_has_one_holder_and_its_result_is_everyones(url, request):
    name = request.node.name
    with Fleet(url, name) as one, Fleet(url, name) as other:
        assert one.ledger("l").claim(take(POINTS, A, B)) == {A, B}
        assert other.ledger("l").claim(take(POINTS, B, C)) == {C}
        assert other.ledger("l").read().claimed == {A, B}
        one.ledger("l").tell(A, 1.25, [record(LEGAL[0])])
        one.ledger("l").tell(B, None, [])
        view = other.ledger("l").read()
        assert view.results[A].value == 1.25
        assert view.results[A].records == (record(LEGAL[0]),)
        assert view.results[B].value is None
        assert one.ledger("l").claim(take(POINTS, A)) == set()
        assert other.ledger("another").claim(take(POINTS, A)) == {A}


def test_a_tuner_that_falls_silent_loses_its_claims_and_one_that_is_late_changes_nothing(journal):
    with Fleet(journal, "n", grace=60) as living, Fleet(journal, "n", grace=1) as observer:
        silent = Fleet(journal, "n", grace=60)  # counts every 10 s only, so that the observer takes it for gone
        assert silent.ledger("l").claim(take(POINTS, A)) == {A}
        observer._seen.clear()
        assert observer.ledger("l").read().claimed == {A}
        time.sleep(1.3)
        assert observer.ledger("l").read().claimed == set()
        assert living.ledger("l").claim(take(POINTS, A)) == {A}
        silent.ledger("l").tell(A, 9.0, [])
        living.ledger("l").tell(A, 2.0, [])
        assert observer.ledger("l").read().results[A].value == 2.0
        silent.__exit__(None, None, None)


def test_who_leaves_gives_back_what_it_claimed_and_that_is_no_loss(journal):
    with Fleet(journal, "n") as staying:
        for _ in range(5):
            with Fleet(journal, "n") as leaving:
                assert leaving.ledger("l").claim(take(POINTS, A)) == {A}
        assert staying.ledger("l").read().claimed == set()
        assert staying.ledger("l").claim(take(POINTS, A)) == {A}


def test_a_key_that_takes_its_tuner_down_again_and_again_is_given_up(journal):
    with Fleet(journal, "n", grace=1) as observer:
        for _ in range(3):
            victim = Fleet(journal, "n")
            assert victim.ledger("l").claim(take(POINTS, A)) == {A}
            observer.gone()
            observer._seen[victim.worker] = (observer._seen[victim.worker][0], -1e9)
            assert observer.ledger("l").read().claimed == set()
            victim._stopped.set()
        assert observer.ledger("l").read().results[A].value is None


def test_work_is_shared_until_all_of_it_is_done(journal):
    with Fleet(journal, "n", grace=1) as one, Fleet(journal, "n", grace=1) as other:
        mine = one.ledger("f").share(("x", "y"))
        assert next(mine) == "x"
        theirs = other.ledger("f").share(("x", "y"))
        assert next(theirs) == "y"
        one.ledger("f").tell("x", 0.0, [])
        other.ledger("f").tell("y", 0.0, [])
        assert list(mine) == list(theirs) == []


def _search(url: str, name: str, trials: int, together: Barrier) -> None:
    with Fleet(url, name, grace=5) as fleet:
        search = SharedSearch(
            TARGET,
            SPEC,
            trials=trials,
            seeds=LEGAL[:3],
            seed=fleet.number,
            ledger=fleet.ledger("l"),
            regime="long",
            workloads=(),
            recorded=[],
        )
        batch = search.ask(3)
        together.wait(60)  # else one may be done with all of it before another has asked
        while batch:
            time.sleep(0.01)
            for config in batch:
                search.tell(config, landscape(config))
            batch = search.ask(3)
        while search.elsewhere:
            time.sleep(0.05)
            search.sync()
        assert len(search.results) == trials


def test_many_tuners_together_measure_each_config_once_and_keep_the_budget(url, request):
    name, context = request.node.name, multiprocessing.get_context("fork")
    together = context.Barrier(4)
    tuners = [context.Process(target=_search, args=(url, name, 16, together)) for _ in range(4)]
    for process in tuners:
        process.start()
    for process in tuners:
        process.join(60)
    assert [process.exitcode for process in tuners] == [0] * 4
    with Fleet(url, name) as fleet:
        trials = fleet.ledger("l")._trials()
    done = [trial for trial in trials if trial.state.name == "COMPLETE"]
    assert len(done) == len({trial.user_attrs["key"] for trial in done}) == 16
    assert len({trial.user_attrs["worker"] for trial in done}) > 1
    assert {trial.state.name for trial in trials} <= {"COMPLETE", "FAIL"}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("nonsense", "'nonsense' is no URL.*postgresql://USER@HOST"),
        ("oracle-of://delphi", "oracle-of"),
        ("postgresql://me:secret@127.0.0.1:1/x", r"me:\*\*\*@127"),
        ("sqlite:////nowhere/at/all.db", "unable to open"),
        ("journal:////nowhere/at/all.log", "No such file"),
    ],
)
def test_a_storage_that_can_not_be_used_is_named_without_its_password(bad, message):
    if bad.startswith("postgresql"):
        pytest.importorskip("psycopg")
    with pytest.raises(TuningError, match=message) as error:
        Fleet(bad, "n")
    assert "secret" not in str(error.value)
    assert "on record" in str(error.value)
