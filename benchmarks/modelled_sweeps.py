"""Sweeps of spaces that are on record in part only, completed by a model: to compare samplers where no sweep is whole.

    python benchmarks/modelled_sweeps.py FOLDER --device sm90-132sm fwd_bf16_d128:long fwd_bf16_d64:short
    python benchmarks/samplers.py FOLDER

A config on record keeps its measured time. Another gets what the roofline model predicts, times how far the measured
ones are from their predictions, the likest ones counting most (by e for each knob that is the same). The searches see
no predictions of these sweeps. They show how methods compare in such a space, not how far from the best a choice is.
"""

from __future__ import annotations

import math
from pathlib import Path

import click
import msgspec

from jagtile.generator.replay import Sweep, write_sweep
from jagtile.generator.roofline import predictor
from jagtile.generator.spec import KernelSpec
from jagtile.generator.sweep import legal_of, sweeps, values_of
from jagtile.generator.tile import TileConfig, config_from_dict, space_for
from jagtile.generator.workloads import representative
from jagtile.tuning_db.schema import DeviceFacts
from jagtile.tuning_db.store import ORIGINS, Database


def completed(part: Sweep, facts: DeviceFacts) -> Sweep:
    """The sweep over all legal configs of its space."""
    spec = KernelSpec.parse(part.spec)
    predict = predictor(facts, spec, representative(spec, part.regime, part.target))
    measured = {_config(part, name, values): time for name, values, time, _ in part.configs}
    ratios = {config: math.log(time / (predict(config) or 1.0)) for config, time in measured.items() if time}

    def modelled(config: TileConfig) -> float:
        weights = {other: math.exp(_alike(config, other)) for other in ratios}
        shift = sum(weights[other] * ratios[other] for other in ratios) / sum(weights.values())
        return round((predict(config) or 1.0) * math.exp(shift), 5)

    configs = [config for config in legal_of(part.target, spec) if config.algorithm in part.algorithms]
    rows = [(c.algorithm, values_of(c), measured[c] if c in measured else modelled(c), None) for c in configs]
    knobs = {name: dict(space_for(part.target, name).knobs(spec)) for name in part.algorithms}
    return msgspec.structs.replace(part, algorithms=knobs, configs=tuple(rows))


def _config(sweep: Sweep, algorithm: str, values: tuple[object, ...]) -> TileConfig:
    known = dict(zip(sweep.algorithms[algorithm], values, strict=True))
    return config_from_dict(sweep.target, {"algorithm": algorithm, **known})


def _alike(one: TileConfig, other: TileConfig) -> int:
    return sum(a == b for a, b in zip(values_of(one), values_of(other), strict=False))


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.argument("studies", nargs=-1, required=True, metavar="SPEC:REGIME...")
@click.option("--device", required=True, help="Slug of a device with records.")
def main(folder: Path, studies: tuple[str, ...], device: str) -> None:
    """Write to FOLDER a completed sweep of each SPEC:REGIME."""
    database = Database()
    devices = {facts.slug: facts for origin in ORIGINS for facts in database.devices(origin)}
    for part in sweeps(database.records(device=device), devices, coverage=0.0):
        if f"{part.spec}:{part.regime}" in studies:
            click.echo(write_sweep(completed(part, devices[device]), folder))


if __name__ == "__main__":
    main()
