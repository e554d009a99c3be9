"""What a tune would try: every candidate with what is predicted of it, every rejected config with the reason."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jagtile.generator.roofline import Roofline, regime_roofline
from jagtile.generator.spec import KernelSpec
from jagtile.generator.tile import Variant, all_configs, spaces_of
from jagtile.generator.tune_types import Budget, check_tunable
from jagtile.generator.workloads import representative
from jagtile.runtime.device import Facts
from jagtile.runtime.errors import UnsupportedError
from jagtile.tuning_db.schema import DeviceFacts
from jagtile.tuning_db.store import Database


@dataclass(frozen=True)
class Candidate:
    """A legal config. ``smem_bytes`` (a CTA) and ``registers`` (a thread): None where the target has no such limit."""

    config: str
    smem_bytes: int | None
    registers: int | None
    predicted: Mapping[str, Roofline]  # by regime; none where there is no model


@dataclass(frozen=True)
class Rejected:
    """An illegal config and the rule it breaks."""

    config: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """What would be tried for one spec. Candidates in order of predicted time over all regimes."""

    spec: str
    target: str
    device: str
    trials: int  # at most, a regime
    seconds: float | None
    workloads: Mapping[str, Sequence[str]]  # by regime
    candidates: Sequence[Candidate]
    rejected: Sequence[Rejected]


def plan(spec: KernelSpec, device: Facts, regimes: Sequence[str], budget: Budget) -> Plan:
    """The plan for a spec on a device, which need not be here."""
    check_tunable(spec)
    candidates, rejected = [], []
    workloads = {regime: representative(spec, regime, device.target) for regime in regimes}
    for space in spaces_of(device.target, spec):
        for config in all_configs(space, spec):
            reason = space.rejection(spec, config)
            if reason is not None:
                rejected.append(Rejected(config.name, reason))
                continue
            variant = Variant(device.target, spec, config)
            guesses = {regime: regime_roofline(variant, each, device) for regime, each in workloads.items()}
            candidates.append(
                Candidate(
                    config=config.name,
                    smem_bytes=space.launch(spec, config).get("smem_bytes"),
                    registers=space.predicted_registers(spec, config) or None,
                    predicted={regime: guess for regime, guess in guesses.items() if guess is not None},
                )
            )
    candidates.sort(key=lambda each: sum(math.log(guess.us) for guess in each.predicted.values()))
    return Plan(
        spec=spec.name,
        target=device.target,
        device=device.slug,
        trials=len(candidates) if budget.trials is None else min(budget.trials, len(candidates)),
        seconds=budget.seconds,
        workloads={regime: [workload.name for workload in each] for regime, each in workloads.items()},
        candidates=candidates,
        rejected=rejected,
    )


def shipped_device(target: str, database: Database) -> DeviceFacts:
    """A device of a target, from what is shipped. UnsupportedError where nothing is."""
    known = database.devices("shipped")
    for facts in known:
        if facts.target == target:
            return facts
    there_are = ", ".join(sorted({facts.target for facts in known})) or "none"
    raise UnsupportedError(f"no device of target {target!r} has shipped records; there are some of {there_are}")
