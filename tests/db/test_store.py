"""Records and choices on disk survive what disks and other processes do to them."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import tempfile
import time
from pathlib import Path

import msgspec
import pytest

from jagtile.runtime.errors import DatabaseError, JagtileWarning
from jagtile.tuning_db.schema import ChoiceEntry, Choices, DeviceFacts, TuningRecord
from jagtile.tuning_db.store import Database

FACTS = DeviceFacts(slug="cpu-avx2", label="A CPU", target="cpu", units=2, bandwidth_gbs=0.0, compute_capability="avx2")


def record(**fields) -> TuningRecord:
    common = {"device": FACTS.slug, "target": "cpu", "spec": "fwd_fp32_d64", "regime": "long", "workload": "w"}
    return TuningRecord(**{**common, "config": {"algorithm": "tiled", "block_m": 4}, "state": "ok", **fields})


def choices(**configs: int) -> Choices:
    entries = {f"cpu/{spec}": ChoiceEntry(default={"block_m": m, "algorithm": "tiled"}) for spec, m in configs.items()}
    return Choices(device=FACTS, specs=entries)


@pytest.fixture
def database(tmp_path) -> Database:
    return Database(tmp_path / "user", tmp_path / "shipped")


def write(database: Database, *records: TuningRecord, ship: bool = False) -> Path:
    with database.writer(FACTS.slug, ship) as writer:
        for each in records:
            writer.append(each)
    return writer.path


def test_records_come_back_filtered_and_merged_from_user_and_shipped(database):
    write(database, record(time_us=1.5, date="2"), record(state="crash", reason="SIGSEGV", date="3"))
    write(database, record(spec="fwd_fp32_d32", date="1"), ship=True)
    assert [r.date for r in database.records()] == ["1", "2", "3"]
    assert database.records(state="crash")[0].reason == "SIGSEGV"
    assert database.records(spec="fwd_fp32_d64", state="ok")[0].time_us == 1.5
    assert database.records(device="cpu-avx512") == []
    with pytest.raises(ValueError, match="no field colour"):
        database.records(colour="red")


def test_every_record_is_on_disk_before_the_writer_is_closed(database):
    writer = database.writer(FACTS.slug, ship=False)
    writer.append(record())
    assert len(database.records()) == 1
    writer.close()


def test_a_writer_that_wrote_nothing_leaves_no_file(database):
    path = write(database)
    assert not path.exists()


def test_a_truncated_line_costs_itself_only_and_is_named(database):
    path = write(database, record(date="1"), record(date="2"), record(date="3"))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:40] + b"\n" + lines[2])
    with pytest.warns(JagtileWarning, match=rf"{path.name}, line 2 is no tuning record"):
        assert [r.date for r in database.records()] == ["1", "3"]


def test_a_line_cut_off_by_a_kill_does_not_swallow_the_next_writers_first_record(database):
    path = write(database, record(date="1"), record(date="2"), ship=True)
    path.write_bytes(path.read_bytes()[:-30])
    write(database, record(date="3"), ship=True)
    with pytest.warns(JagtileWarning, match="line 2"):
        assert [r.date for r in database.records()] == ["1", "3"]


@pytest.mark.parametrize(
    "garbage", [b"\x00\xff\xfe not json", b'{"state": "ok"}', b'{"schema": "one"}', b"[]"], ids=repr
)
def test_garbage_among_records_is_skipped_with_a_warning(database, garbage):
    path = write(database, record())
    path.with_name("garbage.jsonl").write_bytes(garbage)
    with pytest.warns(JagtileWarning, match=r"garbage\.jsonl, line 1"):
        assert len(database.records()) == 1


def test_a_record_of_another_schema_or_state_is_skipped_with_a_warning(database):
    path = write(database, record())
    later = json.loads(msgspec.json.encode(record()))
    path.with_name("later.jsonl").write_text(json.dumps({**later, "schema": 99}) + "\n")
    path.with_name("odd.jsonl").write_text(json.dumps({**later, "state": "melted"}) + "\n")
    with pytest.warns(JagtileWarning) as warned:
        assert len(database.records()) == 1
    assert {"schema 99" in str(w.message) for w in warned} == {True, False}


def test_choices_come_back_and_their_device_is_listed(database):
    database.write_choices(choices(fwd_fp32_d64=4), ship=False)
    assert database.choices("user", FACTS.slug) == choices(fwd_fp32_d64=4)
    assert database.choices("shipped", FACTS.slug) is None
    assert database.devices("user") == [FACTS]
    assert database.devices("shipped") == []


def test_choices_are_written_sorted_so_that_a_retune_changes_only_its_own_lines(database):
    path = database.write_choices(choices(b=4, a=4), ship=True)
    before = path.read_text().splitlines()
    assert database.write_choices(choices(a=4, b=4), ship=True).read_text().splitlines() == before
    after = database.write_choices(choices(a=4, b=8), ship=True).read_text().splitlines()
    assert sum(old != new for old, new in zip(before, after, strict=True)) == 1
    assert path == database.shipped_root / FACTS.slug / "choices.json"


def test_corrupt_choices_of_the_user_are_set_aside_and_can_be_rewritten(database):
    path = database.write_choices(choices(a=4), ship=False)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.warns(JagtileWarning, match=rf"{path.name} is corrupt .* set aside"):
        assert database.choices("user", FACTS.slug) is None
    assert len(list(path.parent.glob("choices.json.bad-*"))) == 1
    assert database.choices("user", FACTS.slug) is None
    database.write_choices(choices(a=8), ship=False)
    assert database.choices("user", FACTS.slug) == choices(a=8)


def test_corrupt_shipped_choices_stay_where_they_are(database):
    path = database.write_choices(choices(a=4), ship=True)
    path.write_text("{")
    with pytest.warns(JagtileWarning, match="is ignored"):
        assert database.choices("shipped", FACTS.slug) is None
    assert path.exists()


def test_choices_of_another_schema_are_ignored(database):
    path = database.write_choices(choices(a=4), ship=False)
    path.write_text(path.read_text().replace('"schema": 1', '"schema": 2'))
    with pytest.warns(JagtileWarning, match="schema 2"):
        assert database.choices("user", FACTS.slug) is None
    assert path.exists()


def test_no_folder_means_no_records_and_no_choices(tmp_path):
    database = Database(tmp_path / "nowhere", tmp_path / "nowhere either")
    assert database.records() == []
    assert database.devices("user") == []
    assert database.choices("user", "cpu-avx2") is None


def test_where_nothing_can_be_written_the_error_names_the_place_and_the_way_out(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    database = Database(blocked, blocked)
    with pytest.raises(DatabaseError, match=r"file.*JAGTILE_CACHE_DIR"):
        database.writer(FACTS.slug, ship=False)
    with pytest.raises(DatabaseError, match=r"choices\.json"):
        database.write_choices(choices(a=1), ship=True)
    assert database.records() == []
    assert database.choices("user", FACTS.slug) is None


def _in_a_process(function, *arguments) -> None:
    """Run a function in a process of its own; it fails here if it fails there."""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    process.join(60)
    assert process.exitcode == 0


def _read_but_not_write(database: Database) -> None:
    if os.geteuid() == 0:
        os.seteuid(65534)  # root may write anywhere
    assert len(database.records()) == 1
    assert database.choices("user", FACTS.slug) == choices(a=4)
    with pytest.raises(DatabaseError, match="Permission denied"):
        database.writer(FACTS.slug, ship=False)
    with pytest.raises(DatabaseError, match="Permission denied"):
        database.write_choices(choices(a=8), ship=False)


def test_a_read_only_folder_is_read_and_refused_for_writing():
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are not open to others
        database = Database(Path(folder) / "user", Path(folder) / "shipped")
        path = write(database, record())
        database.write_choices(choices(a=4), ship=False)
        folders = (path.parent, path.parent.parent, Path(folder))
        for each in folders:
            each.chmod(0o555)
        try:
            _in_a_process(_read_but_not_write, database)
        finally:
            for each in folders:
                each.chmod(0o755)
        assert database.choices("user", FACTS.slug) == choices(a=4)


def _fill(database: Database, ship: bool) -> None:
    """Write until there is no room, then make room."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with database.writer(FACTS.slug, ship) as writer:
        records = [record(date=f"{number:03}", reason="x" * 300) for number in range(100)]
        with pytest.raises(DatabaseError, match=r"jsonl: .*JAGTILE_CACHE_DIR"):
            list(map(writer.append, records))
        with pytest.raises(DatabaseError):
            database.write_choices(choices(**{f"s{number}": 4 for number in range(100)}), ship=ship)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        writer.append(record(date="later"))


@pytest.mark.filterwarnings("ignore:.*is no tuning record")  # of a shared file the torn line can't be taken back
@pytest.mark.parametrize("ship", [False, True])
def test_a_full_disk_costs_only_what_did_not_fit(database, ship):
    database.write_choices(choices(a=4), ship=ship)
    _in_a_process(_fill, database, ship)
    dates = [each.date for each in database.records()]
    assert dates == [*(f"{number:03}" for number in range(len(dates) - 1)), "later"]
    assert len(dates) > 3
    origin = "shipped" if ship else "user"
    assert database.choices(origin, FACTS.slug) == choices(a=4)
    assert list(database.folder(origin, FACTS.slug).glob(".*")) == []


def test_a_full_device_is_told(monkeypatch, database):
    with database.writer(FACTS.slug, ship=False) as writer:
        full = os.open("/dev/full", os.O_RDWR)
        with monkeypatch.context() as patched:
            patched.setattr(writer, "_fd", full)
            with pytest.raises(DatabaseError, match="No space left"):
                writer.append(record())
        os.close(full)


def test_copies_of_a_record_are_one(database):
    one = record(time_us=0.1 + 0.2, date="1")
    write(database, one)
    write(database, one, msgspec.structs.replace(one, by="someone"))
    write(database, one, ship=True)
    assert database.records() == [one]
    assert len(database.records("user")) == len(database.records("shipped")) == 1


@pytest.mark.parametrize("slug", ["", "../up", "a/b", ".hidden"])
def test_a_slug_that_is_no_file_name_is_refused(database, slug):
    with pytest.raises(ValueError, match="slug"):
        database.choices("user", slug)


def _append(user: Path, shipped: Path, writer: int, ship: bool) -> None:
    with Database(user, shipped).writer(FACTS.slug, ship) as out:
        for number in range(50):
            out.append(record(reason="x" * 500, session=f"{writer}/{number}"))


@pytest.mark.parametrize("ship", [False, True])
def test_concurrent_writers_lose_and_mix_nothing(database, ship):
    context = multiprocessing.get_context("fork")
    writers = [
        context.Process(target=_append, args=(database.user_root, database.shipped_root, number, ship))
        for number in range(4)
    ]
    for process in writers:
        process.start()
    for process in writers:
        process.join()
    assert {r.session for r in database.records()} == {f"{w}/{n}" for w in range(4) for n in range(50)}


def test_a_shipping_writer_with_nothing_to_write_leaves_anothers_records_alone(database):
    with database.writer(FACTS.slug, ship=True) as busy:
        write(database, ship=True)
        busy.append(record())
    assert len(database.records()) == 1


def _choose(user: Path, shipped: Path, number: int) -> None:
    database = Database(user, shipped)
    for step in range(10):
        with database.changing_choices(FACTS.slug, ship=True):
            before = database.choices("shipped", FACTS.slug) or Choices(device=FACTS)
            time.sleep(0.002)
            new = choices(**{f"spec{number}_{step}": 4}).specs
            database.write_choices(msgspec.structs.replace(before, specs={**before.specs, **new}), ship=True)


def test_choices_changed_by_several_processes_at_once_are_all_kept(database):
    context = multiprocessing.get_context("fork")
    arguments = [(database.user_root, database.shipped_root, number) for number in range(3)]
    processes = [context.Process(target=_choose, args=each) for each in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert len(database.choices("shipped", FACTS.slug).specs) == 30
