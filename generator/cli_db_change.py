"""``jagtile db diff``, ``export``, ``import``, ``prune``: comparing, handing on and clearing up what is on record."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from jagtile.generator.cli_common import json_option, parse_spec, print_json, print_table

if TYPE_CHECKING:
    from jagtile.tuning_db.schema import Choices, Config, TuningRecord
    from jagtile.tuning_db.store import Database, Origin

file_argument = click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
spec_option = click.option("--spec", help="Only this spec. [default: all]")
device_option = click.option("--device", help="Only the device of this slug (`jagtile db list`). [default: all]")


@click.command()
@file_argument
@spec_option
@device_option
@click.option(
    "--from",
    "origin",
    type=click.Choice(["user", "shipped", "all"]),
    default="user",
    show_default=True,
    help="Which records.",
)
@click.option("--by", default="", help="Whose records they are, for those who import them.")
def export(file: Path, spec: str | None, device: str | None, origin: str, by: str) -> None:
    """Write records to FILE, for another machine or person: `jagtile db import FILE` there."""
    from jagtile.tuning_db.exchange import write_export
    from jagtile.tuning_db.store import ORIGINS, Database

    database = Database()
    records = _records(database, () if origin == "all" else (next(o for o in ORIGINS if o == origin),), spec, device)
    if not records:
        raise click.ClickException(f"there are no such records ({origin}); `jagtile db list` shows what there is")
    slugs = {record.device for record in records}
    devices = {facts.slug: facts for o in ORIGINS for facts in database.devices(o) if facts.slug in slugs}
    write_export(file, devices.values(), records, by)
    click.echo(f"{len(records)} records of {len(slugs)} devices: {file}")


@click.command("import")
@file_argument
@click.option("--by", help="Whose records they are, where they do not say. [default: FILE's name]")
@json_option
def import_(file: Path, by: str | None, as_json: bool) -> None:
    """Add the records of FILE to the user's, and take over the choices that turn out better.

    Nothing on record is lost or overwritten; what is on record already is left out.
    """
    from jagtile.generator.merge import merge
    from jagtile.tuning_db.exchange import read_export
    from jagtile.tuning_db.store import Database

    merged = merge(Database(), read_export(file), by or file.stem)
    if as_json:
        print_json(merged)
        return
    click.echo(f"{merged.added} records added, {merged.known} on record already")
    if merged.changes:
        rows = [
            (c.device, c.key, c.regime, _name(c.key, c.before), _name(c.key, c.after), c.by, "stale" if c.stale else "")
            for c in merged.changes
        ]
        print_table("Choices that changed", ("device", "spec", "regime", "before", "now", "by", ""), rows)


@click.command()
@click.argument("left", default="shipped")
@click.argument("right", default="user")
@spec_option
@device_option
@click.option("--all", "show_all", is_flag=True, help="Also choices that are the same.")
@json_option
def diff(left: str, right: str, spec: str | None, device: str | None, show_all: bool, as_json: bool) -> None:
    """Compare the choices of LEFT and RIGHT: `shipped`, `user`, or a file of `jagtile db export`.

    A file's choices are those that follow from its records alone. Times are each side's own.
    """
    sides = [_side(name, spec, device) for name in (left, right)]
    rows = []
    for place in sorted(set().union(*(side.chosen for side in sides))):
        here, there = (side.chosen.get(place) for side in sides)
        times = [side.time_us(place) for side in sides]
        if here != there or show_all:
            slug, key, regime = place
            rows.append(
                {
                    "device": slug,
                    "spec": key,
                    "regime": regime,
                    "left": _name(key, here),
                    "left_us": times[0],
                    "right": _name(key, there),
                    "right_us": times[1],
                    "ratio": times[1] / times[0] if times[0] and times[1] else None,
                }
            )
    if as_json:
        print_json(rows)
        return
    if not rows:
        click.echo(f"no choice of {left} and {right} differs")
        return
    columns = ("device", "spec", "regime", left, "us", right, "us", "ratio")
    print_table(f"{left} and {right}", columns, [list(row.values()) for row in rows], right=("us", "ratio"))


@click.command()
@device_option
@click.option("--stale", is_flag=True, help="Also records of sources that are no more.")
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@json_option
def prune(device: str | None, stale: bool, dry_run: bool, as_json: bool) -> None:
    """Drop second copies and unreadable lines from the user's records.

    Files that a tuner has open are left alone; choices and shipped records are never touched.
    """
    from jagtile.generator.resume import is_stale
    from jagtile.tuning_db import prune as pruning
    from jagtile.tuning_db.store import Database

    database = Database()
    done = []
    for slug in [device] if device else database.slugs("user"):
        try:
            done += pruning.prune(database, slug, is_stale if stale else lambda record: False, dry_run=dry_run)
        except ValueError as error:
            raise click.UsageError(str(error)) from None
    if as_json:
        print_json([{**vars(each), "path": str(each.path)} for each in done])
        return
    touched = [each for each in done if each.dropped or each.in_use]
    rows = [(each.path, each.kept, each.dropped, "in use, left alone" if each.in_use else "") for each in touched]
    if rows:
        print_table("Would be pruned" if dry_run else "Pruned", ("file", "kept", "dropped", ""), rows)
    dropped = sum(each.dropped for each in done)
    click.echo(f"{dropped} lines of {len(done)} files {'would go' if dry_run else 'dropped'}")


@dataclass(frozen=True)
class _Side:
    """What one side of a comparison chose, by (device, target/spec, regime)."""

    chosen: Mapping[tuple[str, str, str], Config]
    records: Iterable[TuningRecord]

    def time_us(self, place: tuple[str, str, str]) -> float | None:
        """The latest time of the chosen config, finals before searches."""
        config = self.chosen.get(place)
        wanted = (*place, config, "ok")
        timed = [r for r in self.records if (r.device, f"{r.target}/{r.spec}", r.regime, r.config, r.state) == wanted]
        return sorted(timed, key=lambda r: (r.phase == "final", r.date))[-1].time_us if timed else None


def _side(name: str, spec: str | None, device: str | None) -> _Side:
    from jagtile.tuning_db.exchange import read_export
    from jagtile.tuning_db.store import ORIGINS, Database

    database = Database()
    if name in ORIGINS:
        origin: Origin = "user" if name == "user" else "shipped"
        choices = [database.choices(origin, slug) for slug in database.slugs(origin)]
        records = _records(database, ORIGINS if origin == "user" else ("shipped",), spec, device)
    else:
        from jagtile.generator.choose import choose
        from jagtile.tuning_db.schema import Choices

        export = read_export(Path(name))
        records = [r for r in export.records if r.spec == (spec or r.spec) and r.device == (device or r.device)]
        choices = [choose(records, Choices(device=facts)) for facts in export.devices.values()]
    return _Side(dict(_places(choices, spec, device)), records)


def _places(
    choices: Iterable[Choices | None], spec: str | None, device: str | None
) -> Iterable[tuple[tuple[str, str, str], Config]]:
    for each in choices:
        for key, entry in each.specs.items() if each else ():
            if each and each.device.slug == (device or each.device.slug) and key.endswith(f"/{spec}" if spec else ""):
                yield (each.device.slug, key, "default"), entry.default
                for regime, config in entry.regimes.items():
                    yield (each.device.slug, key, regime), config


def _records(
    database: Database, origins: tuple[Origin, ...], spec: str | None, device: str | None
) -> list[TuningRecord]:
    filters = {"spec": parse_spec(spec).name if spec else None, "device": device}
    try:
        return database.records(*origins, **{name: value for name, value in filters.items() if value is not None})
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def _name(key: str, config: Config | None) -> str:
    from jagtile.generator.cli_db import config_name

    return config_name(key.partition("/")[0], config) if config else ""
