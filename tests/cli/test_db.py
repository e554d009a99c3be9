"""``jagtile db``: lists and shows what was recorded and chosen."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from jagtile.generator.spec import KernelSpec
from jagtile.generator.tile import legal_configs, spaces_of
from jagtile.runtime.settings import settings
from jagtile.tuning_db.schema import ChoiceEntry, Choices, DeviceFacts, TuningRecord
from jagtile.tuning_db.store import Database

SPEC = KernelSpec.parse("fwd_bf16_d72_causal")
SLUG = "sm90-7sm"
FAST, SLOW, BAD = legal_configs(spaces_of("sm_90a", SPEC)[0], SPEC)[:3]


def _record(config, **fields):
    common = {"device": SLUG, "target": "sm_90a", "spec": SPEC.name, "regime": "long", "workload": "w", "state": "ok"}
    return TuningRecord(**{**common, "config": config.to_dict(), **fields})


@pytest.fixture(autouse=True)
def recorded(tmp_path: Path):
    """A user's overlay with three records and a choice."""
    device = DeviceFacts(
        slug=SLUG, label="Small GPU", target="sm_90a", units=7, bandwidth_gbs=100.0, compute_capability="9.0"
    )
    with settings.override(cache_dir=tmp_path):
        database = Database()
        with database.writer(SLUG, ship=False) as writer:
            writer.append(_record(SLOW, time_us=200.0, date="2026-01-02T00:00:00"))
            writer.append(_record(FAST, time_us=100.0, tflops=5.0, date="2026-01-03T00:00:00"))
            writer.append(_record(BAD, state="incorrect", reason="relative error 0.7", date="2026-01-01T00:00:00"))
        entry = ChoiceEntry(default=SLOW.to_dict(), regimes={"long": FAST.to_dict()})
        database.write_choices(Choices(device=device, specs={f"sm_90a/{SPEC.name}": entry}), ship=False)
        yield tmp_path


def test_list_has_a_row_for_each_device_and_spec(run, run_json):
    (row,) = (row for row in run_json("db", "list") if row["device"] == SLUG)
    assert row["spec"] == f"sm_90a/{SPEC.name}"
    assert row["label"] == "Small GPU"
    assert row["choices"] == "user"
    assert row["regimes"] == "long"
    assert row["records"] == 3
    assert row["stale"] == 3
    assert row["states"] == "1 incorrect, 2 ok"
    assert row["latest"] == "2026-01-03T00:00:00"
    assert SLUG in run("db", "list").stdout


def test_show_puts_the_fastest_first_and_failures_last_with_their_reason(run):
    shown = run("db", "show", SPEC.name, "--device", SLUG).stdout
    assert shown.index(FAST.name) < shown.index(SLOW.name) < shown.index(BAD.name)
    (chosen,) = (line for line in shown.splitlines() if FAST.name in line.split())
    assert " user " in chosen
    assert chosen.rstrip().endswith("stale")  # the record names no source
    assert "relative error 0.7" in shown


def test_show_prints_whole_records_as_json(run_json):
    records = run_json("db", "show", SPEC.name, "--device", SLUG, "--regime", "long")
    assert sorted(r["time_us"] or 0 for r in records) == [0, 100.0, 200.0]
    (failed,) = run_json("db", "show", SPEC.name, "--device", SLUG, "--failed")
    assert failed["config"] == BAD.to_dict()


def test_where_nothing_failed_that_is_said(run):
    assert "no failed records of" in run("db", "show", SPEC.name, "--regime", "short", "--failed", code=1).output


def test_show_limits_the_rows(run):
    shown = run("db", "show", SPEC.name, "--device", SLUG, "--limit", "1").stdout
    assert FAST.name in shown
    assert SLOW.name not in shown
    assert "3 configs" in shown


def test_a_config_of_an_older_space_is_still_shown(run):
    with Database().writer(SLUG, ship=False) as writer:
        writer.append(msgspec.structs.replace(_record(FAST), config={"algorithm": "gone", "block_m": 3}))
    assert "block_m=3" in run("db", "show", SPEC.name, "--device", SLUG).stdout


def test_a_damaged_line_is_a_warning_and_the_rest_is_shown(run, recorded):
    (path,) = (recorded / "tuning" / SLUG / "records").glob("*.jsonl")
    path.write_text("nonsense\n" + path.read_text())
    with pytest.warns(UserWarning, match="line 1 is no tuning record"):
        assert FAST.name in run("db", "show", SPEC.name, "--device", SLUG).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("show", "fwd"), "is not a name like"),
        (("show", "--regime", "vast"), "no regime 'vast'; there are tiny, short"),
        (("show", "--device", "../.."), "device slug"),
        (("show", "fwd_fp32_d3"), "no records of spec fwd_fp32_d3"),
        (("burn",), "No such command"),
    ],
)
def test_a_bad_request_exits_with_1_and_says_what_there_is(run, arguments, message):
    assert message in run("db", *arguments, code=1).output
