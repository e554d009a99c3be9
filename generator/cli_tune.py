"""``jagtile tune``: measure the configs of specs on a device, record them, choose."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import click

from jagtile.generator.cli_common import (
    device_option,
    json_option,
    parse_budget,
    parse_spec,
    print_json,
    print_table,
    serving_spaces,
    torch_device,
)

if TYPE_CHECKING:
    import torch

    from jagtile.generator.dry_run import Plan
    from jagtile.generator.spec import KernelSpec
    from jagtile.generator.tune_all import Outcome
    from jagtile.generator.tune_types import Budget, Progress, TuneResult
    from jagtile.runtime.device import Facts

_SHOWN_CANDIDATES = 40
_SHOWN_REJECTED = 20


@click.command()
@click.argument("specs", nargs=-1, metavar="[SPEC]...")
@click.option(
    "--all",
    "every",
    is_flag=True,
    help="Every spec that has choices for the device, or for its nearest relative; what is done already is left out.",
)
@device_option
@click.option("--regime", "regimes", multiple=True, help="Only this regime (repeatable). [default: all]")
@click.option(
    "--budget",
    multiple=True,
    metavar="BUDGET",
    help="Of each spec: trials a regime (40), time for everything (90s, 5m, 1h30m), or both (40,5m); with --all "
    "the time is for all specs together. [default: 40]",
)
@click.option("--exhaustive", is_flag=True, help="Try every legal config instead, for a sweep (docs/tuning.md).")
@click.option("--ship", is_flag=True, help="Write to jagtile's own tuning_db/ instead of the user's overlay.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the search and of the order of turns.")
@click.option(
    "--storage",
    metavar="URL",
    help="Share the work with every tuner that names the same storage: postgresql://USER@HOST/DATABASE for several "
    "machines, sqlite:///FILE or journal:///FILE for one (docs/fleet.md).",
)
@click.option(
    "--grace",
    type=click.FloatRange(1),
    default=60.0,
    show_default=True,
    help="With --storage: seconds of silence after which a tuner is taken for gone and its trials are retried.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(1),
    default=30.0,
    show_default=True,
    help="Seconds without a sign of life after which a config is given up.",
)
@click.option("--fresh", is_flag=True, help="Measure anew what is on record with the same source.")
@click.option(
    "--dry-run",
    is_flag=True,
    help="List the candidates with predicted shared memory, registers and time, and what is illegal; measure nothing.",
)
@click.option("--target", help="With --dry-run: for a device that is not here (sm_90a), by its shipped facts.")
@json_option
def tune(
    specs: tuple[str, ...],
    every: bool,
    device: str | None,
    regimes: tuple[str, ...],
    budget: tuple[str, ...],
    exhaustive: bool,
    ship: bool,
    seed: int,
    storage: str | None,
    grace: float,
    timeout: float,
    fresh: bool,
    dry_run: bool,
    target: str | None,
    as_json: bool,
) -> None:
    """Find the best configs of SPECs for every regime, record what was measured, and choose.

    Each config is built, checked against the oracle and timed beside the others in a process of its own. Results are on
    disk as they come: interrupted, the same command goes on where it stopped.

    \b
    jagtile tune fwd_bf16_d128 fwd_bf16_d128_causal --budget 10m
    jagtile tune fwd_fp32_d64 --device cpu --regime medium --budget 12
    jagtile tune fwd_bf16_d128 --dry-run --target sm_90a
    jagtile tune --all --budget 30m
    """
    from jagtile.generator.tune_types import DEFAULT_BUDGET, Budget
    from jagtile.runtime.problem import REGIMES

    wanted = [parse_spec(name) for name in dict.fromkeys(specs)]
    if every == bool(wanted) or (every and (dry_run or storage)):
        raise click.UsageError("name SPECs; or --all without them, --dry-run and --storage")
    unknown = [name for name in regimes if name not in REGIMES]
    if unknown:
        raise click.UsageError(f"no regime {', '.join(unknown)}; there are {', '.join(REGIMES)}")
    if exhaustive and budget:
        raise click.UsageError("--exhaustive has no --budget")
    trials, seconds = parse_budget(budget)
    limits = Budget(trials, seconds) if budget or exhaustive else DEFAULT_BUDGET
    chosen = tuple(dict.fromkeys(regimes)) or REGIMES
    if target is not None and (device is not None or not dry_run):
        raise click.UsageError("--target goes with --dry-run and without --device")
    if dry_run:
        _dry_run(wanted, _facts(device, target), chosen, limits, as_json)
        return
    options = {"ship": ship, "seed": seed, "timeout": timeout, "resume": not fresh}
    where = torch_device(device)
    results, failures = [], []
    with _interruptible():
        if every:
            outcomes = _tune_all(where, chosen, limits, options)
        else:
            outcomes = _tune(wanted, where, chosen, limits, {**options, "storage": storage, "grace": grace})
        for outcome in outcomes:
            if outcome.failure:
                failures.append(f"{outcome.spec.name}: {outcome.failure}")
            elif outcome.result is None:
                click.echo(f"{outcome.spec.name}: done already (--fresh measures it anew)", err=True)
            else:
                results.append(outcome.result)
                if not as_json:
                    _print_result(outcome.result)
    if as_json:
        print_json([_as_json(result) for result in results])
    if failures:
        raise click.ClickException("; ".join(failures))


def _tune(
    specs: Sequence[KernelSpec],
    device: torch.device,
    regimes: Sequence[str],
    budget: Budget,
    options: Mapping[str, Any],
) -> Iterator[Outcome]:
    from jagtile.generator.tune import tune as run
    from jagtile.generator.tune_all import Outcome

    wanted = {spec: _regimes_of(spec, regimes, device.type) for spec in specs}
    for spec, own in wanted.items():
        with _progress(spec, len(own)) as progress:
            result = run(spec, device, own, budget=budget, progress=progress, **options)
        yield Outcome(spec, result)


def _tune_all(
    device: torch.device, regimes: Sequence[str], budget: Budget, options: Mapping[str, Any]
) -> Iterator[Outcome]:
    from jagtile.generator.tune_all import tune_all

    def progress_of(spec: KernelSpec) -> AbstractContextManager[Progress]:
        return _progress(spec, len(_regimes_of(spec, regimes, device.type)))

    return tune_all(device, regimes, budget=budget, progress_of=progress_of, **options)


def _regimes_of(spec: KernelSpec, regimes: Sequence[str], device: str) -> Sequence[str]:
    """Those of the regimes that a spec has on a kind of device, or target."""
    from jagtile.runtime.problem import regimes_for

    has = regimes_for(spec.direction, device)
    if own := [regime for regime in regimes if regime in has]:
        return own
    raise click.UsageError(f"{spec.name} on {device} has no regime {', '.join(regimes)}; it has {', '.join(has)}")


@contextmanager
def _interruptible() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        click.echo("\nWhat was measured is on record; the same command goes on from there.", err=True)
        raise


@contextmanager
def _progress(spec: KernelSpec, regimes: int) -> Iterator[Progress]:
    """A live bar on a terminal, a line a regime elsewhere; both on stderr."""
    from jagtile.generator.cli_progress import TuneProgress

    with TuneProgress(spec.name, regimes) as progress:
        yield progress


def _print_result(result: TuneResult) -> None:
    rows = [
        (
            r.regime,
            r.chosen.name,
            r.chosen_us,
            r.chosen_tflops,
            None if r.incumbent_us is None else f"{r.incumbent_us / r.chosen_us:.3f}x",
            f"{r.chosen_us / r.best_us:.3f}x",
            f"{100 * r.noise:.1f} %",
            ", ".join(f"{count} {state}" for state, count in sorted(r.states.items())),
        )
        for r in result.regimes
    ]
    columns = ("regime", "chosen", "us", "TFLOP/s", "gain", "over best", "noise", "configs")
    title = (
        f"{result.spec.name} on {result.choices.device.label} ({result.choices.device.slug}), {result.seconds:.0f} s"
    )
    print_table(title, columns, rows, right=columns[2:7])
    for disturbance in result.disturbances:
        click.echo(f"timings are doubtful: {disturbance}")
    click.echo(f"choices: {result.path}")


def _as_json(result: TuneResult) -> dict[str, object]:
    regimes = [
        {
            "regime": r.regime,
            "workload": r.workload,
            "chosen": r.chosen.name,
            "chosen_us": r.chosen_us,
            "chosen_tflops": r.chosen_tflops,
            "incumbent": r.incumbent.name,
            "incumbent_us": r.incumbent_us,
            "best_us": r.best_us,
            "noise": r.noise,
            "states": r.states,
        }
        for r in result.regimes
    ]
    return {
        "spec": result.spec.name,
        "device": result.choices.device,
        "choices": str(result.path),
        "seconds": result.seconds,
        "disturbances": result.disturbances,
        "regimes": regimes,
        "records": len(result.records),
    }


def _dry_run(specs: Sequence[KernelSpec], device: Facts, regimes: Sequence[str], budget: Budget, as_json: bool) -> None:
    from jagtile.generator.dry_run import plan

    for spec in specs:
        serving_spaces(device.target, spec)
    plans = [plan(spec, device, _regimes_of(spec, regimes, device.target), budget) for spec in specs]
    if as_json:
        print_json(plans)
        return
    for each in plans:
        _print_plan(each)


def _print_plan(plan: Plan) -> None:
    limit = f", at most {plan.seconds:g} s in all" if plan.seconds else ""
    head = f"{plan.target}/{plan.spec} on {plan.device}: up to {plan.trials} configs a regime{limit}"
    print_table(head, ("regime", "timed on"), [(r, ", ".join(names)) for r, names in plan.workloads.items()])
    regimes = [regime for regime in plan.workloads if any(regime in each.predicted for each in plan.candidates)]
    rows = [
        (
            each.config,
            each.smem_bytes,
            each.registers,
            *(f"{each.predicted[regime].us:.0f} {each.predicted[regime].bound}" for regime in regimes),
        )
        for each in plan.candidates[:_SHOWN_CANDIDATES]
    ]
    columns = ("config", "smem B", "registers", *(f"{regime} us, bound by" for regime in regimes))
    order = "fastest first by the roofline model" if regimes else "no roofline model for this target"
    print_table(f"{len(plan.candidates)} candidates ({order})", columns, rows, right=columns[1:])
    _say_more(len(plan.candidates) - _SHOWN_CANDIDATES)
    refused = [(each.config, each.reason) for each in plan.rejected[:_SHOWN_REJECTED]]
    if refused:
        print_table(f"{len(plan.rejected)} illegal", ("config", "reason"), refused)
        _say_more(len(plan.rejected) - _SHOWN_REJECTED)


def _say_more(count: int) -> None:
    if count > 0:
        click.echo(f"... and {count} more (--json lists them all)")


def _facts(device: str | None, target: str | None) -> Facts:
    """The device that a dry run is about: the one of ``device``, or one of ``target`` that has shipped records."""
    from jagtile.runtime.device import device_id

    if target in (None, "cpu"):
        return device_id(torch_device(target or device))
    from jagtile.generator.dry_run import shipped_device
    from jagtile.tuning_db.store import Database

    return shipped_device(target, Database())
