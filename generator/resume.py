"""What records on disk are still worth: those of today's sources spare a tune, older ones tell where to begin."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache

from jagtile.generator.spec import KernelSpec
from jagtile.generator.targets import TARGETS
from jagtile.generator.tile import TileConfig, Variant, config_from_dict
from jagtile.generator.trial import source_sha256
from jagtile.generator.workloads import Workload
from jagtile.tuning_db.schema import TuningRecord
from jagtile.tuning_db.store import Database


def current_records(
    database: Database, slug: str, target: str, spec: KernelSpec
) -> list[tuple[TileConfig, TuningRecord]]:
    """A spec's records on a device whose source is still what their config renders to, oldest first.

    Without crashes and timeouts that a later measurement on the same workload refutes, and without the verdicts of
    another compiler than the one at hand. None where nothing has ever worked: then the fault is hardly the configs',
    and all may be tried anew.
    """
    current = []
    for record in database.records(device=slug, target=target, spec=spec.name):
        variant = variant_of(record)
        if variant is not None and record.source_sha256 == source_of(variant) and not _is_foreign_verdict(record):
            current.append((variant.config, record))
    return _standing(current) if any(record.state == "ok" for _, record in current) else []


def is_stale(record: TuningRecord) -> bool:
    """Whether the record's config renders to another source today, or to none."""
    variant = variant_of(record)
    return variant is None or source_of(variant) != record.source_sha256


def best_of_old(
    database: Database, slug: str, target: str, spec: KernelSpec, regime: str, count: int
) -> list[TileConfig]:
    """The configs that were fastest in a regime with other sources than today's; they may be fast still."""
    timed = database.records(device=slug, target=target, spec=spec.name, regime=regime, state="ok")
    old = sorted((r for r in timed if is_stale(r)), key=lambda r: r.time_us or math.inf)
    variants = (variant_of(record) for record in old)
    return list(dict.fromkeys(variant.config for variant in variants if variant is not None))[:count]


def variant_of(record: TuningRecord) -> Variant | None:
    """The record's variant, None where today's spaces do not know its config."""
    try:
        config = config_from_dict(record.target, record.config)
        return Variant(record.target, KernelSpec.parse(record.spec), config)
    except ValueError:
        return None


source_of = lru_cache(maxsize=4096)(source_sha256)


def _is_foreign_verdict(record: TuningRecord) -> bool:
    """Whether another compiler refused the config: this one may not. Records of old do not name theirs."""
    if record.state not in ("compile", "spill", "rejected") or not record.compiler:
        return False
    return record.compiler != compiler_at_hand(record.target)


def compiler_at_hand(target: str) -> str:
    """The version of a target's compiler on this machine."""
    return TARGETS[target].find().version


def _standing(records: list[tuple[TileConfig, TuningRecord]]) -> list[tuple[TileConfig, TuningRecord]]:
    worked = {(config, r.workload): place for place, (config, r) in enumerate(records) if r.state == "ok"}
    return [
        (config, record)
        for place, (config, record) in enumerate(records)
        if record.state not in ("crash", "timeout") or worked.get((config, record.workload), -1) < place
    ]


def known_ratios(
    records: Sequence[tuple[TileConfig, TuningRecord]],
    regime: str,
    workloads: Sequence[Workload],
    control: TileConfig | None,
) -> Iterator[tuple[TileConfig, float]]:
    """Configs on record for all of a regime's workloads, with their time over the control's."""
    latest = {(config, r.workload): r for config, r in records if r.regime == regime and r.state == "ok"}
    for config in dict.fromkeys(config for config, _ in latest):
        ratios = [_ratio(latest, config, workload.name, control) for workload in workloads]
        known = [ratio for ratio in ratios if ratio is not None]
        if len(known) == len(workloads):
            yield config, math.prod(known) ** (1 / len(known))


def _ratio(
    latest: Mapping[tuple[TileConfig, str], TuningRecord], config: TileConfig, workload: str, control: TileConfig | None
) -> float | None:
    record = latest.get((config, workload))
    if record is None or control is None:
        return None
    if record.control == control.name:
        return record.ratio
    reference = latest.get((control, workload))
    return record.time_us / reference.time_us if reference and reference.time_us and record.time_us else None
