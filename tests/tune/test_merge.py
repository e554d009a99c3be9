"""Two people's records together: all of them, the better choices, whose they are; old ones serve, and are marked."""

from __future__ import annotations

import json

import msgspec
import pytest
from fakes import DEVICE, SPEC, TARGET

from jagtile.generator.choose import choose
from jagtile.generator.merge import merge
from jagtile.generator.search import Search
from jagtile.generator.tile import Variant
from jagtile.generator.trial import source_sha256
from jagtile.runtime.errors import DatabaseError
from jagtile.tuning_db.exchange import Export, read_export, write_export
from jagtile.tuning_db.schema import Choices, TuningRecord
from jagtile.tuning_db.store import Database

DEFAULT, MINE, THEIRS, *_ = Search(TARGET, SPEC, trials=1).legal
KEY = f"{TARGET}/{SPEC.name}"
NONE = Choices(device=DEVICE)


def record(config, time_us: float | None, session: str, date: str, **fields) -> TuningRecord:
    return TuningRecord(
        **{
            "device": DEVICE.slug,
            "target": TARGET,
            "spec": SPEC.name,
            "regime": "long",
            "workload": "w",
            "config": config.to_dict(),
            "state": "ok",
            "phase": "final",
            "time_us": time_us,
            "session": session,
            "date": date,
            "aa_spread": 0.001,
            "source_sha256": source_sha256(Variant(TARGET, SPEC, config)),
            **fields,
        }
    )


def finals(best, best_us: float, default_us: float, date: str, **fields) -> list[TuningRecord]:
    return [record(best, best_us, date, date, **fields), record(DEFAULT, default_us, date, date, **fields)]


@pytest.fixture
def database(tmp_path) -> Database:
    return Database(tmp_path / "user", tmp_path / "shipped")


def have(database, records) -> None:
    with database.writer(DEVICE.slug, ship=False) as writer:
        for each in records:
            writer.append(each)
    database.write_choices(choose(records, NONE), ship=False)


def chosen(database):
    return database.choices("user", DEVICE.slug).specs[KEY].regimes["long"]


def given(*records) -> Export:
    return Export({DEVICE.slug: DEVICE}, records)


# Their GPU is 30 % slower, so that only what is timed beside the same config can be compared.
@pytest.mark.parametrize(("their_best", "better"), [(100.0, THEIRS), (127.0, MINE)])
@pytest.mark.parametrize("theirs_is_later", [False, True])
def test_the_better_of_two_peoples_choices_is_kept_whoever_came_later(database, their_best, better, theirs_is_later):
    have(database, finals(MINE, 90.0, 100.0, "2026-01-02"))
    theirs = finals(THEIRS, their_best, 130.0, "2026-01-03" if theirs_is_later else "2026-01-01")
    merged = merge(database, given(*theirs), by="ada")
    assert (merged.added, merged.known) == (2, 0)
    assert chosen(database) == better.to_dict()
    assert [(c.regime, c.before, c.after, c.by, c.stale) for c in merged.changes] == (
        [("long", MINE.to_dict(), THEIRS.to_dict(), "ada", False)] if better == THEIRS else []
    )
    assert {r.by for r in database.records()} == {"", "ada"}


def test_merging_again_or_ones_own_adds_nothing(database):
    mine = finals(MINE, 90.0, 100.0, "2026-01-02")
    have(database, mine)
    theirs = given(*finals(THEIRS, 80.0, 100.0, "2026-01-01"))
    merge(database, theirs, "ada")
    before = database.records(), database.choices("user", DEVICE.slug)
    assert merge(database, theirs, "ada").added == 0
    assert merge(database, given(*mine), "me").added == 0
    assert (database.records(), database.choices("user", DEVICE.slug)) == before


def test_two_people_who_exchange_their_records_have_the_same_choices(tmp_path):
    ours = {"a": finals(MINE, 90.0, 100.0, "2026-01-02"), "b": finals(THEIRS, 100.0, 130.0, "2026-01-01")}
    for own, other in ("ab", "ba"):
        database = Database(tmp_path / own, tmp_path / "none")
        have(database, ours[own])
        merge(database, given(*ours[other]), by=other)
        assert chosen(database) == THEIRS.to_dict()


def test_what_failed_elsewhere_is_chosen_no_more(database):
    have(database, finals(MINE, 90.0, 100.0, "2026-01-02"))
    merge(database, given(record(MINE, None, "", "2026-01-03", state="incorrect")), "ada")
    assert chosen(database) == DEFAULT.to_dict()


def test_records_of_an_older_source_serve_where_there_is_nothing_else_and_are_marked(database):
    old = finals(THEIRS, 80.0, 100.0, "2026-01-01", source_sha256="old")
    (change,) = merge(database, given(*old), "ada").changes
    assert change.stale
    assert chosen(database) == THEIRS.to_dict()
    have(database, finals(MINE, 99.0, 100.0, "2026-01-02"))
    assert merge(database, given(*old), "ada").changes == ()
    assert chosen(database) == MINE.to_dict()


def test_shipped_choices_stay_in_force_until_something_is_better(database):
    shipped = choose(finals(MINE, 90.0, 100.0, "2026-01-01"), NONE)
    database.write_choices(shipped, ship=True)
    with database.writer(DEVICE.slug, ship=True) as writer:
        for each in finals(MINE, 90.0, 100.0, "2026-01-01"):
            writer.append(each)
    merge(database, given(*finals(THEIRS, 95.0, 100.0, "2026-01-02")), "ada")
    assert database.choices("user", DEVICE.slug) is None
    merge(database, given(*finals(THEIRS, 80.0, 100.0, "2026-01-03")), "ada")
    assert chosen(database) == THEIRS.to_dict()


def test_an_export_comes_back_whole_and_signed(tmp_path):
    records = finals(MINE, 90.0, 100.0, "2026-01-02") + finals(THEIRS, 1.0, 2.0, "2026-01-01", by="bob")
    path = tmp_path / "records.jsonl"
    write_export(path, [DEVICE], records, by="ada")
    export = read_export(path)
    assert export.devices == {DEVICE.slug: DEVICE}
    assert [r.by for r in export.records] == ["ada", "ada", "bob", "bob"]
    assert [msgspec.structs.replace(r, by="") for r in export.records[:2]] == records[:2]


def test_a_damaged_line_of_an_export_costs_itself_only(tmp_path):
    path = tmp_path / "records.jsonl"
    write_export(path, [DEVICE], finals(MINE, 90.0, 100.0, "2026-01-02"))
    path.write_text(path.read_text().replace('"state":"ok"', '"state":"fine"', 1))
    with pytest.warns(UserWarning, match="line 2 is no tuning record"):
        assert len(read_export(path).records) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "can't be read: No such file"),
        ("", "was not written by `jagtile db export`"),
        ('{"kind": "cooking recipes", "schema": 1}\n', "holds 'cooking recipes' of schema 1"),
        (json.dumps({"kind": "jagtile tuning records", "schema": 99}), "schema 99; this jagtile reads"),
    ],
)
def test_a_file_that_is_no_export_is_refused(tmp_path, content, message):
    path = tmp_path / "x"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DatabaseError, match=message):
        read_export(path)
