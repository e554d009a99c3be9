"""``jagtile doctor``: what is found here, and what to do about what is missing."""

from __future__ import annotations

from collections import Counter
from itertools import groupby

import click

from jagtile.generator.cli_common import json_option, print_json, print_table


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Report devices, driver, compilers, versions, settings, caches, packs and the tuning database.

    Changes nothing. What is not all right comes with what helps. Good to paste into a bug report.
    """
    from jagtile.generator.doctor import examine

    findings = examine()
    if as_json:
        print_json(findings)
        return
    for topic, group in groupby(findings, key=lambda finding: finding.topic):
        rows = [
            (f.name, "" if f.state == "ok" else f.state, f"{f.value}. {f.advice}" if f.advice else f.value)
            for f in group
        ]
        print_table(topic, ("what", "", "found"), rows)
    counts = Counter(finding.state for finding in findings)
    click.echo(f"{counts['ok']} ok, {counts['missing']} missing, {counts['wrong']} wrong")
