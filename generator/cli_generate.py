"""``jagtile generate``: print or write a kernel's source, or list the configs of a spec."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from jagtile.generator.cli_common import (
    json_option,
    parse_spec,
    parse_variant,
    print_json,
    print_table,
    serving_spaces,
    target_for,
)

if TYPE_CHECKING:
    from jagtile.generator.spec import KernelSpec
    from jagtile.generator.tile import Variant


@click.command()
@click.argument("name", metavar="SPEC|VARIANT")
@click.option("--target", help="Of a SPEC. [default: the first that serves it, GPUs before the CPU]")
@click.option("--config", help="Of a SPEC. [default: the one used where nothing is recorded]")
@click.option("-o", "--output", help="Write to this file, or into this folder (FOLDER/).")
@click.option("--print", "also_print", is_flag=True, help="Print the source even where it is written too.")
@click.option("--list", "listing", is_flag=True, help="List every config of the SPEC, legal or not, with the reasons.")
@json_option
def generate(
    name: str,
    target: str | None,
    config: str | None,
    output: str | None,
    also_print: bool,
    listing: bool,
    as_json: bool,
) -> None:
    """Print the source of a kernel, or write it.

    \b
    jagtile generate fwd_bf16_d128_causal
    jagtile generate fwd_fp32_d64 --target cpu -o build/
    jagtile generate fwd_bf16_d128 --list
    """
    if listing:
        spec = parse_spec(name)
        _list(spec, target_for(spec, target), as_json)
        return
    from jagtile.generator.render import render

    variant = _variant(name, target, config)
    source = render(variant)
    if output is not None:
        path = Path(output)
        if path.is_dir() or output.endswith("/"):
            path /= f"{variant.symbol}{source.suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source.text)
        click.echo(f"{variant.name} -> {path}", err=True)
    if as_json:
        headers = [path for path, _ in source.headers]
        known = {"variant": variant.name, "sha256": source.sha256, "suffix": source.suffix, "headers": headers}
        print_json({**known, "source": source.text})
    elif output is None or also_print:
        click.echo(source.text, nl=not source.text.endswith("\n"))


def _variant(name: str, target: str | None, config: str | None) -> Variant:
    if "/" in name:
        if target or config:
            raise click.UsageError(f"{name} names its target and config: leave --target and --config out")
        return parse_variant(name)
    spec = parse_spec(name)
    target = target_for(spec, target)
    if config is not None:
        return parse_variant(f"{target}/{spec.name}/{config}")
    from jagtile.runtime.dispatch import default_variant

    return default_variant(spec, target)


def _list(spec: KernelSpec, target: str, as_json: bool) -> None:
    from jagtile.generator.tile import all_configs

    rows: list[tuple[str, str, str]] = []
    for index, space in enumerate(serving_spaces(target, spec)):
        for config in all_configs(space, spec):
            reason = space.rejection(spec, config)
            default = "the default" if index == 0 and config == space.default(spec) else ""
            rows.append((config.name, "illegal" if reason else "legal", reason or default))
    rows.sort(key=lambda row: row[1] != "legal")
    if as_json:
        print_json([{"config": name, "legal": state == "legal", "note": note} for name, state, note in rows])
        return
    legal = sum(state == "legal" for _, state, _ in rows)
    print_table(f"{target}/{spec.name}: {legal} legal configs of {len(rows)}", ("config", "state", "why"), rows)
