"""``jagtile db``: what is on record and what was chosen; what changes it is in cli_db_change.py."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

import click

from jagtile.generator.cli_common import json_option, parse_spec, print_json, print_table, shortened
from jagtile.generator.cli_db_change import diff, export, import_, prune

if TYPE_CHECKING:
    from jagtile.tuning_db.schema import Config, TuningRecord
    from jagtile.tuning_db.store import Database


@click.group()
def db() -> None:
    """The tuning database: the user's records and choices over the shipped ones."""


for _command in (diff, export, import_, prune):
    db.add_command(_command)


@db.command("list")
@json_option
def list_(as_json: bool) -> None:
    """List the devices and specs that have records or choices."""
    from jagtile.tuning_db.store import Database

    database = Database()
    rows = _overview(database)
    if as_json:
        print_json(rows)
        return
    columns = ("device", "label", "spec", "choices", "regimes", "records", "stale", "states", "latest")
    cells = [[row[name] for name in columns] for row in rows]
    print_table("Tuning database", columns, cells, right=("records", "stale"))
    click.echo(f"user's: {database.user_root}\nshipped: {database.shipped_root}")
    if not rows:
        click.echo("Nothing is recorded yet: `jagtile tune SPEC` does so.")


@db.command()
@click.argument("spec", required=False)
@click.option("--device", help="Slug of a device (`jagtile db list`). [default: all]")
@click.option("--regime", help="Only this regime.")
@click.option("--failed", is_flag=True, help="Only configs that failed, with the reasons.")
@click.option("--limit", type=click.IntRange(1), default=10, show_default=True, help="Rows a spec and regime.")
@json_option
def show(spec: str | None, device: str | None, regime: str | None, failed: bool, limit: int, as_json: bool) -> None:
    """Show the records of SPEC (all specs without one), the fastest first, and which configs were chosen.

    --json prints every record that matches, whole.
    """
    from jagtile.runtime.problem import REGIMES
    from jagtile.tuning_db.store import Database

    if regime is not None and regime not in REGIMES:
        raise click.UsageError(f"no regime {regime!r}; there are {', '.join(REGIMES)}")
    filters = {"spec": parse_spec(spec).name if spec else None, "device": device, "regime": regime}
    database = Database()
    try:
        records = database.records(**{name: value for name, value in filters.items() if value is not None})
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    if failed:
        records = [record for record in records if record.state != "ok"]
    if as_json:
        print_json(records)
        return
    if not records:
        wanted = ", ".join(f"{name} {value}" for name, value in filters.items() if value is not None)
        kind = "failed records" if failed else "records"
        raise click.ClickException(
            f"no {kind}{' of ' + wanted if wanted else ''}; `jagtile db list` shows what there is"
        )
    for group in _groups(records):
        _show_group(database, group, limit)


def _overview(database: Database) -> list[dict[str, object]]:
    """A row for each device and spec that has choices or records."""
    from jagtile.generator.resume import is_stale

    labels: dict[str, str] = {}
    chosen: dict[tuple[str, str], dict[str, list[str]]] = {}
    for origin in ("shipped", "user"):
        for facts in database.devices(origin):
            labels[facts.slug] = facts.label
            choices = database.choices(origin, facts.slug)
            for key, entry in choices.specs.items() if choices else ():
                chosen.setdefault((facts.slug, key), {})[origin] = sorted(entry.regimes)
    records: dict[tuple[str, str], list[TuningRecord]] = {}
    for record in database.records():
        records.setdefault((record.device, f"{record.target}/{record.spec}"), []).append(record)
    rows: list[dict[str, object]] = []
    for slug, key in sorted({*chosen, *records}):
        own, origins = records.get((slug, key), []), chosen.get((slug, key), {})
        states = Counter(record.state for record in own)
        rows.append(
            {
                "device": slug,
                "label": labels.get(slug, ""),
                "spec": key,
                "choices": ", ".join(origins),
                "regimes": ", ".join(dict.fromkeys(regime for regimes in origins.values() for regime in regimes)),
                "records": len(own),
                "stale": sum(map(is_stale, own)),
                "states": ", ".join(f"{count} {state}" for state, count in sorted(states.items())),
                "latest": max((record.date[:19] for record in own), default=""),
            }
        )
    return rows


def _groups(records: list[TuningRecord]) -> list[list[TuningRecord]]:
    """Records by device, spec and regime."""
    groups: dict[tuple[str, str, str, str], list[TuningRecord]] = {}
    for record in records:
        groups.setdefault((record.device, record.target, record.spec, record.regime), []).append(record)
    return [groups[key] for key in sorted(groups)]


def _show_group(database: Database, group: list[TuningRecord], limit: int) -> None:
    """The latest record of each config: the fastest first, those that failed last."""
    from jagtile.generator.resume import is_stale

    first = group[0]
    latest = {(config_name(first.target, r.config), r.workload): r for r in group}
    ordered = sorted(latest.items(), key=lambda item: math.inf if item[1].time_us is None else item[1].time_us)
    chosen = _chosen(database, first)
    rows = [
        (
            name,
            record.state,
            record.time_us,
            record.iqr_us,
            record.tflops,
            record.error_rel,
            record.phase,
            record.date[:19],
            ", ".join(origin for origin, config in chosen.items() if config == name) or shortened(record.reason),
            ", ".join(filter(None, ("stale" if is_stale(record) else "", record.by and f"by {record.by}"))),
        )
        for (name, _), record in ordered[:limit]
    ]
    title = f"{first.device} {first.target}/{first.spec}, {first.regime} ({first.workload}): {len(latest)} configs"
    columns = ("config", "state", "us", "IQR", "TFLOP/s", "error", "phase", "date", "chosen by, or why not", "remarks")
    print_table(title, columns, rows, right=columns[2:6])


def _chosen(database: Database, record: TuningRecord) -> dict[str, str]:
    """Name of the config that each origin's choices hold for a record's regime."""
    from jagtile.runtime.problem import look_up_of

    found: dict[str, str] = {}
    for origin in ("user", "shipped"):
        choices = database.choices(origin, record.device)
        entry = choices.specs.get(f"{record.target}/{record.spec}") if choices else None
        if entry is not None:
            found[origin] = config_name(record.target, entry.config(look_up_of(record.regime)))
    return found


def config_name(target: str, config: Config) -> str:
    """A config's name; its knobs as they are where today's space does not know them."""
    from jagtile.generator.tile import config_from_dict

    try:
        return config_from_dict(target, config).name
    except ValueError:
        return " ".join(f"{knob}={value}" for knob, value in config.items())
