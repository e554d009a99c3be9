"""``jagtile db diff``, ``export``, ``import``, ``prune``."""

from __future__ import annotations

from pathlib import Path

import pytest

from jagtile.generator.choose import choose
from jagtile.generator.spec import KernelSpec
from jagtile.generator.tile import Variant, legal_configs, spaces_of
from jagtile.generator.trial import source_sha256
from jagtile.runtime.settings import settings
from jagtile.tuning_db.schema import Choices, DeviceFacts, TuningRecord
from jagtile.tuning_db.store import Database

SPEC = KernelSpec.parse("fwd_bf16_d72_causal")
KEY = f"sm_90a/{SPEC.name}"
FACTS = DeviceFacts(slug="sm90-7sm", label="", target="sm_90a", units=7, bandwidth_gbs=1.0, compute_capability="9.0")
DEFAULT, MINE, THEIRS, *_ = legal_configs(spaces_of("sm_90a", SPEC)[0], SPEC)


def _finals(best, time_us: float, source: str = "") -> list[TuningRecord]:
    return [
        TuningRecord(
            device=FACTS.slug,
            target="sm_90a",
            spec=SPEC.name,
            regime="long",
            workload="w",
            config=config.to_dict(),
            state="ok",
            phase="final",
            time_us=time,
            session=best.name,
            date="2026-01-01",
            source_sha256=source or source_sha256(Variant("sm_90a", SPEC, config)),
        )
        for config, time in ((best, time_us), (DEFAULT, 100.0))
    ]


def _tuned(folder: Path, records: list[TuningRecord]) -> None:
    with settings.override(cache_dir=folder):
        database = Database()
        with database.writer(FACTS.slug, ship=False) as writer:
            for record in records:
                writer.append(record)
        database.write_choices(choose(records, Choices(device=FACTS)), ship=False)


@pytest.fixture
def theirs(tmp_path, run) -> Path:
    """What someone else exported."""
    file = tmp_path / "theirs.jsonl"
    _tuned(tmp_path / "their cache", _finals(THEIRS, 70.0))
    with settings.override(cache_dir=tmp_path / "their cache"):
        assert "2 records of 1 devices" in run("db", "export", str(file)).stdout
    return file


@pytest.fixture(autouse=True)
def mine(tmp_path, theirs):
    _tuned(tmp_path / "cache", _finals(MINE, 80.0))
    with settings.override(cache_dir=tmp_path / "cache"):
        yield tmp_path / "cache"


def test_a_difference_is_shown_with_both_sides_times(run, run_json, theirs):
    rows = run_json("db", "diff", "user", str(theirs), "--device", FACTS.slug)
    assert [(row["regime"], row["left"], row["right"]) for row in rows] == [
        ("default", MINE.name, THEIRS.name),
        ("long", MINE.name, THEIRS.name),
    ]
    assert (rows[1]["left_us"], rows[1]["right_us"], rows[1]["ratio"]) == (80.0, 70.0, 0.875)
    assert THEIRS.name in run("db", "diff", "user", str(theirs), "--spec", SPEC.name).stdout
    assert "no choice of user and user differs" in run("db", "diff", "user", "user").stdout
    assert len(run_json("db", "diff", "user", "user", "--device", FACTS.slug, "--all")) == 2


def test_without_arguments_the_users_choices_are_compared_with_the_shipped_ones(run_json):
    rows = [row for row in run_json("db", "diff") if row["device"] == FACTS.slug]
    assert [(row["left"], row["right"]) for row in rows] == [("", MINE.name)] * 2


def test_an_import_keeps_the_better_and_says_whose_it_is(run, run_json, theirs):
    shown = run("db", "import", str(theirs)).stdout
    assert "2 records added, 0 on record already" in shown
    (change,) = (line for line in shown.splitlines() if THEIRS.name in line)
    assert change.split()[-3:] == [MINE.name, THEIRS.name, "theirs"]
    assert Database().choices("user", FACTS.slug).specs[KEY].regimes["long"] == THEIRS.to_dict()
    assert "by theirs" in run("db", "show", SPEC.name, "--device", FACTS.slug).stdout
    assert run_json("db", "import", str(theirs))["known"] == 2


def test_prune_drops_stale_records_only_when_told_to(run, run_json, mine):
    _tuned(mine, _finals(THEIRS, 60.0, source="old"))
    assert "0 lines of 2 files dropped" in run("db", "prune").stdout
    assert "2 lines of 2 files would go" in run("db", "prune", "--stale", "--dry-run").stdout
    assert sum(row["dropped"] for row in run_json("db", "prune", "--stale", "--device", FACTS.slug)) == 2
    assert len(Database().records(device=FACTS.slug)) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("export", "x.jsonl", "--spec", "fwd_fp32_d3"), "there are no such records (user)"),
        (("export", "x.jsonl", "--device", "../.."), "device slug"),
        (("export", "/nowhere/at/all", "--from", "all"), "/nowhere/at/all"),
        (("import", "/nowhere/at/all"), "/nowhere/at/all can't be read"),
        (("diff", "mine"), "mine can't be read"),
        (("prune", "--device", "../.."), "device slug"),
    ],
)
def test_a_bad_request_exits_with_1_and_says_what_is_wrong(run, arguments, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nowhere").write_text("in the way")
    arguments = tuple(a.replace("/nowhere", str(tmp_path / "nowhere")) for a in arguments)
    assert message.replace("/nowhere", str(tmp_path / "nowhere")) in run("db", *arguments, code=1).output
