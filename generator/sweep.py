"""Records of an exhaustive tune -> sweeps to replay searches over: `python -m jagtile.generator.sweep FOLDER`.

    jagtile tune fwd_bf16_d128 --regime long --exhaustive
    python -m jagtile.generator.sweep tests/tune/sweeps --device sm90-132sm

writes a file for every spec and regime whose legal configs are all on record.
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path

import click

from jagtile.generator.replay import Sweep, write_sweep
from jagtile.generator.resume import variant_of
from jagtile.generator.roofline import predictor
from jagtile.generator.spec import KernelSpec
from jagtile.generator.tile import Knob, TileConfig, legal_configs, spaces_of
from jagtile.generator.workloads import representative
from jagtile.tuning_db.schema import DeviceFacts, TuningRecord
from jagtile.tuning_db.store import ORIGINS, Database


def sweeps(
    records: Sequence[TuningRecord], devices: Mapping[str, DeviceFacts], coverage: float = 1.0
) -> Iterator[Sweep]:
    """A sweep of each device, spec, regime and workload of which at least ``coverage`` of today's legal configs are on
    record. Where a config was searched more than once its latest record counts; finals do not, being timed among the
    best only. What failed in any regime failed in all.
    """
    searched: dict[tuple[str, str, str], dict[TileConfig, TuningRecord]] = defaultdict(dict)
    failed: dict[str, set[TileConfig]] = defaultdict(set)
    for record in records:
        variant = variant_of(record)
        if variant is None:
            continue
        study = "/".join((record.device, record.target, record.spec))
        if record.state != "ok":
            failed[study].add(variant.config)
        elif record.phase == "search":
            searched[study, record.regime, record.workload][variant.config] = record
    for (study, regime, workload), found in sorted(searched.items()):
        device, target, spec = study.split("/")
        legal = legal_of(target, KernelSpec.parse(spec))
        made = _sweep(found, failed[study], regime, workload, devices[device], legal)
        if len(made.configs) >= coverage * len(legal):
            yield made


def legal_of(target: str, spec: KernelSpec) -> list[TileConfig]:
    """All legal configs of a spec, of every algorithm."""
    return [config for space in spaces_of(target, spec) for config in legal_configs(space, spec)]


def _sweep(
    found: Mapping[TileConfig, TuningRecord],
    failed: set[TileConfig],
    regime: str,
    workload: str,
    facts: DeviceFacts,
    legal: Sequence[TileConfig],
) -> Sweep:
    some = next(iter(found.values()))
    spec = KernelSpec.parse(some.spec)
    control = Counter(record.control for record in found.values()).most_common(1)[0][0]
    reference = statistics.median(r.time_us / r.ratio for r in found.values() if r.time_us and r.ratio)
    guess = predictor(facts, spec, representative(spec, regime, some.target))
    rows: list[tuple[str, tuple[Knob, ...], float | None, float | None]] = []
    for config in legal:
        record = found.get(config)
        if config in failed or record is not None:
            time = None if config in failed or record is None else _time(record, control, reference)
            rows.append((config.algorithm, values_of(config), time, guess(config)))
    return Sweep(
        device=some.device,
        target=some.target,
        spec=some.spec,
        regime=regime,
        workload=workload,
        noise=round(statistics.median(record.aa_spread or 0.0 for record in found.values()), 5),
        algorithms={
            space.algorithm: dict(space.knobs(spec))
            for space in spaces_of(some.target, spec)
            if any(algorithm == space.algorithm for algorithm, *_ in rows)
        },
        configs=tuple(rows),
    )


def values_of(config: TileConfig) -> tuple[Knob, ...]:
    """The values of a config's knobs, in order."""
    return tuple(getattr(config, knob.name) for knob in fields(config))


def _time(record: TuningRecord, control: str, reference: float) -> float | None:
    """Over the control's, in its own session where it was the control there."""
    if record.time_us is None:
        return None
    own = record.ratio if record.control == control and record.ratio else record.time_us / reference
    return round(own, 5)


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--device", help="Only the device of this slug. [default: all]")
@click.option("--spec", "specs", multiple=True, help="Only this spec (repeatable). [default: all]")
@click.option(
    "--coverage", type=click.FloatRange(0, 1), default=1.0, show_default=True, help="Share of the legal configs."
)
def main(folder: Path, device: str | None, specs: tuple[str, ...], coverage: float) -> None:
    """Write to FOLDER each sweep that the records on disk hold whole (`jagtile tune --exhaustive` makes such)."""
    database = Database()
    records = database.records(**({"device": device} if device else {}))
    devices = {facts.slug: facts for origin in ORIGINS for facts in database.devices(origin)}
    wanted = [r for r in records if r.device in devices and (not specs or r.spec in specs)]
    for sweep in sweeps(wanted, devices, coverage):
        click.echo(f"{write_sweep(sweep, folder)}: {len(sweep.configs)} configs")


if __name__ == "__main__":
    main()
