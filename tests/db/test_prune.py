"""Pruning drops what serves nobody and never what somebody is writing."""

from __future__ import annotations

import multiprocessing

import pytest

from jagtile.runtime.errors import DatabaseError
from jagtile.tuning_db import prune as pruning
from jagtile.tuning_db.prune import prune
from jagtile.tuning_db.schema import TuningRecord
from jagtile.tuning_db.store import Database

SLUG = "cpu-avx2"


def record(date: str, **fields) -> TuningRecord:
    common = {"device": SLUG, "target": "cpu", "spec": "fwd_fp32_d64", "regime": "long", "workload": "w"}
    return TuningRecord(**{**common, "config": {"algorithm": "tiled"}, "state": "ok", "date": date, **fields})


@pytest.fixture
def database(tmp_path) -> Database:
    return Database(tmp_path / "user", tmp_path / "shipped")


def write(database, *records, ship=False):
    with database.writer(SLUG, ship) as writer:
        for each in records:
            writer.append(each)
    return writer.path


def is_old(record) -> bool:
    return record.reason == "old"


@pytest.mark.filterwarnings("ignore:.*is no tuning record")
def test_copies_broken_lines_and_unwanted_records_go_and_all_else_stays(database):
    write(database, record("0"), ship=True)
    one = write(database, record("0"), record("1"), record("2", reason="old"))
    other = write(database, record("1"), record("3"))
    other.write_text(other.read_text() + "nonsense\n")
    emptied = write(database, record("4", reason="old"))
    expected = [r for r in database.records() if not is_old(r)]
    would = prune(database, SLUG, is_old, dry_run=True)
    assert len(database.records()) == 5
    done = prune(database, SLUG, is_old)
    assert would == done
    assert sum(each.dropped for each in done) == 5
    assert database.records() == expected
    assert [r.date for r in expected] == ["0", "1", "3"]
    assert one.exists() or other.exists()
    assert not emptied.exists()
    assert sum(each.dropped for each in prune(database, SLUG, is_old)) == 0


def test_a_file_that_is_written_to_is_left_alone(database):
    with database.writer(SLUG, ship=False) as writer:
        writer.append(record("1", reason="old"))
        (done,) = prune(database, SLUG, is_old)
        assert done.in_use
        writer.append(record("2"))
    assert [r.date for r in database.records()] == ["1", "2"]
    assert [each.dropped for each in prune(database, SLUG, is_old)] == [1]


def _write_many(database: Database) -> None:
    for number in range(40):
        write(database, record(f"{number:02}"), record(f"{number:02}", reason="old"))


def test_pruning_while_others_write_loses_nothing(database):
    process = multiprocessing.get_context("fork").Process(target=_write_many, args=(database,))
    process.start()
    while process.is_alive():
        if database.slugs("user"):
            prune(database, SLUG, is_old)
    process.join()
    prune(database, SLUG, is_old)
    assert [r.date for r in database.records()] == [f"{number:02}" for number in range(40)]


def test_where_the_rest_can_not_be_written_the_file_stays_whole(database, monkeypatch):
    write(database, record("1"), record("2", reason="old"))

    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pruning, "replace_file", full)
    with pytest.raises(DatabaseError, match="No space left on device; it stays whole"):
        prune(database, SLUG, is_old)
    assert len(database.records()) == 2
