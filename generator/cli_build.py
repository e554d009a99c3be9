"""``jagtile build``: compile variants into the cache and show what the compiler said."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import click

from jagtile.generator.cli_common import (
    device_slug,
    json_option,
    parse_spec,
    parse_variant,
    print_json,
    print_table,
    serving_spaces,
    shortened,
    target_for,
)

if TYPE_CHECKING:
    from jagtile.generator.build import BuildResult
    from jagtile.generator.tile import Variant


@click.command()
@click.argument("names", nargs=-1, metavar="[SPEC|VARIANT]...")
@click.option("--target", help="Of the SPECs. [default: the first that serves each, GPUs before the CPU]")
@click.option(
    "--all",
    "every",
    is_flag=True,
    help="Every legal config of each SPEC, not its default alone. Without SPECs: every variant that the choices for "
    "the device name, which is all that calls of tuned specs take.",
)
@click.option(
    "--device",
    metavar="DEVICE",
    help="With --all and no SPECs: a slug of `jagtile db list`, cpu, cuda, ... [default: cuda where there is one]",
)
@click.option("--jobs", type=click.IntRange(1), help="Compilers side by side. [default: JAGTILE_JOBS]")
@json_option
def build(
    names: tuple[str, ...], target: str | None, every: bool, device: str | None, jobs: int | None, as_json: bool
) -> None:
    """Compile variants, or take them from the cache, and show registers, spills, shared memory and time.

    \b
    jagtile build fwd_fp32_d64 --target cpu
    jagtile build fwd_bf16_d128_causal --all
    jagtile build --all --device sm90-132sm
    """
    from rich.console import Console
    from rich.progress import Progress

    from jagtile.generator.build import build as run

    if (device or not names) and not (every and not names and target is None):
        raise click.UsageError("name SPECs or VARIANTs; or --all alone, or with --device, for all that was chosen")
    variants = [variant for name in names for variant in _variants(name, target, every)] or _chosen(device)
    with Progress(console=Console(stderr=True), transient=True, disable=as_json) as progress:
        task = progress.add_task("building", total=len(variants))
        results = run(variants, jobs=jobs, on_result=lambda result: progress.advance(task))
    if as_json:
        print_json([_as_json(result) for result in results])
    else:
        _print(results)
    named = {name for name in names if "/" in name}
    wanted = [result for result in results if not (every and names) or result.variant.name in named]
    failed = [result.variant.name for result in wanted if result.state != "ok"]
    if failed or all(result.state != "ok" for result in results):
        raise click.ClickException(f"not built: {', '.join(failed) or 'any'}")


def _variants(name: str, target: str | None, every: bool) -> list[Variant]:
    from jagtile.generator.tile import Variant, legal_configs
    from jagtile.runtime.dispatch import default_variant

    if "/" in name:
        return [parse_variant(name)]
    spec = parse_spec(name)
    target = target_for(spec, target)
    if not every:
        return [default_variant(spec, target)]
    spaces = serving_spaces(target, spec)
    return [Variant(target, spec, config) for space in spaces for config in legal_configs(space, spec)]


def _chosen(device: str | None) -> list[Variant]:
    """What dispatch takes on a device for every spec that has choices there."""
    from jagtile.generator.pack import plan_pack
    from jagtile.tuning_db.store import Database

    return list(plan_pack(device_slug(device), [], Database()).variants)


def _print(results: list[BuildResult]) -> None:
    rows = []
    for result in results:
        report, artifact = result.report, result.artifact
        rows.append(
            (
                result.variant.name,
                result.state,
                artifact.origin if artifact else "",
                report.registers or "" if report else "",
                report.spill_bytes if report else "",
                artifact.meta.launch.get("smem_bytes", "") if artifact else "",
                f"{report.seconds:.2f}" if report else "",
                shortened(result.reason.partition("\n")[0]),
            )
        )
    states = Counter(result.state for result in results)
    title = f"{len(results)} variants: {', '.join(f'{count} {state}' for state, count in sorted(states.items()))}"
    columns = ("variant", "state", "from", "registers", "spilled bytes", "shared memory", "seconds", "why")
    print_table(title, columns, rows, right=columns[3:7])


def _as_json(result: BuildResult) -> dict[str, object]:
    artifact = result.artifact
    return {
        "variant": result.variant.name,
        "state": result.state,
        "reason": result.reason,
        "report": result.report,
        "path": str(artifact.path) if artifact else None,
        "from": artifact.origin if artifact else None,
        "launch": artifact.meta.launch if artifact else None,
    }
