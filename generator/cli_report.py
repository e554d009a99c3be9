"""``jagtile report``: what is on record, and results of ``bench``, as one page to look at."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from jagtile.generator.bench_types import BenchReport


@click.command()
@click.argument(
    "results", nargs=-1, type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="[RESULTS]..."
)
@click.option("--device", "slugs", multiple=True, help="Only the device of this slug (repeatable). [default: all]")
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("jagtile-report.html"),
    show_default=True,
    help="Where the page goes.",
)
def report(results: tuple[Path, ...], slugs: tuple[str, ...], output: Path) -> None:
    """Write a page of plots: fractions of the roofline, ratios to peers, tuning histories, what the time hangs on.

    RESULTS are files of `jagtile bench -o`. The page is one HTML file that needs nothing else, and the same for the
    same records and results.

    \b
    jagtile bench u4k-d128 -o results.json
    jagtile report results.json -o report.html
    """
    from jagtile.generator.report import collect
    from jagtile.generator.report_page import page
    from jagtile.tuning_db.store import Database, replace_file

    benches = [_read(path) for path in results]
    database = Database()
    known = {facts.slug for origin in ("shipped", "user") for facts in database.devices(origin)}
    known |= {bench.device.slug for bench in benches}
    unknown = sorted(set(slugs) - known)
    if unknown:
        there_are = ", ".join(sorted(known)) or "none"
        raise click.UsageError(f"no device {', '.join(unknown)} is on record or in RESULTS; there are {there_are}")
    devices = collect(database, benches, list(dict.fromkeys(slugs)))
    if not devices:
        raise click.ClickException("nothing is on record yet: `jagtile tune SPEC` records, `jagtile bench -o` compares")
    replace_file(output, page(devices).encode())
    click.echo(f"{', '.join(each.device.slug for each in devices)}: {output}")


def _read(path: Path) -> BenchReport:
    import msgspec

    from jagtile.generator.bench_types import BenchReport

    try:
        return msgspec.json.decode(path.read_bytes(), type=BenchReport)
    except (msgspec.DecodeError, UnicodeDecodeError, OSError) as error:
        raise click.UsageError(f"{path} holds no results of `jagtile bench -o`: {error}") from None
