"""Tune every spec that is chosen for a device, within one budget of time, one after another with one worker.

Interrupted, the next run leaves out the specs that are done and goes on with the others' records.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch

from jagtile.generator.resume import current_records
from jagtile.generator.spec import KernelSpec
from jagtile.generator.tile import spaces_of
from jagtile.generator.trial import Caller
from jagtile.generator.tune import facts_of, tune, worker_for
from jagtile.generator.tune_types import DEFAULT_BUDGET, Budget, Progress, Silent, TuneResult
from jagtile.runtime.device import relatives
from jagtile.runtime.errors import TuningError
from jagtile.runtime.problem import REGIMES, regimes_for
from jagtile.tuning_db.schema import DeviceFacts
from jagtile.tuning_db.store import ORIGINS, Database

log = logging.getLogger("jagtile")

ProgressOf = Callable[[KernelSpec], AbstractContextManager[Progress]]


@dataclass(frozen=True)
class Outcome:
    """What became of one spec. ``result`` is None where it was done already or failed; ``failure`` says why."""

    spec: KernelSpec
    result: TuneResult | None
    failure: str = ""


def tune_all(
    device: torch.device,
    regimes: Sequence[str] = REGIMES,
    *,
    budget: Budget = DEFAULT_BUDGET,
    database: Database | None = None,
    seed: int = 0,
    timeout: float = 30.0,
    resume: bool = True,
    progress_of: ProgressOf = lambda spec: nullcontext(Silent()),
    make_worker: Callable[[], AbstractContextManager[Caller]] | None = None,
    clock: Callable[[], float] = time.monotonic,
    **options: object,
) -> Iterator[Outcome]:
    """An outcome for each spec that is chosen for the device, as it is tuned.

    Specs that have none of ``regimes`` are left out. ``budget.seconds`` is for all specs together: each gets an even
    share of what is left when its turn comes.
    ``resume``: specs whose finals are on record with today's sources, for all of ``regimes``, are done. ``options`` and
    the rest as in ``tune``. A spec that nothing works for ends nothing; TuningError where the device can't be used.
    """
    database, begin = database or Database(), clock()
    with (make_worker or worker_for(device, seed))() as worker:
        facts = facts_of(worker, device, timeout).device
        specs = chosen_specs(facts, database)
        specs = [spec for spec in specs if set(regimes).intersection(regimes_for(spec.direction, facts.target))]
        if not specs:
            raise TuningError(f"no choices for {facts.slug} or a relative say which specs matter: name the specs")
        done = [spec for spec in specs if resume and is_done(spec, facts, regimes, database)]
        yield from (Outcome(spec, None) for spec in done)
        left = [spec for spec in specs if spec not in done]
        for place, spec in enumerate(left):
            share = budget
            if budget.seconds is not None:
                share = replace(budget, seconds=max(0.0, begin + budget.seconds - clock()) / (len(left) - place))
            try:
                with progress_of(spec) as progress:
                    result = tune(
                        spec,
                        device,
                        regimes,
                        budget=share,
                        database=database,
                        seed=seed,
                        timeout=timeout,
                        resume=resume,
                        progress=progress,
                        make_worker=lambda: nullcontext(worker),
                        **options,  # type: ignore[arg-type]
                    )
            except TuningError as error:
                log.warning("%s: %s", spec.name, error)
                yield Outcome(spec, None, str(error))
            else:
                yield Outcome(spec, result)


def chosen_specs(device: DeviceFacts, database: Database) -> list[KernelSpec]:
    """The specs that have choices for the device, for lack of any those of its nearest relative that has some."""
    known = {facts.slug: facts for origin in ORIGINS for facts in database.devices(origin)}
    for slug in (device.slug, *(relative.slug for relative in relatives(device, known.values()))):
        chosen = [choices for origin in ORIGINS if (choices := database.choices(origin, slug)) is not None]
        keys = {key for choices in chosen for key in choices.specs}
        specs = sorted(KernelSpec.parse(key.partition("/")[2]) for key in keys if key.startswith(f"{device.target}/"))
        if served := [spec for spec in specs if spaces_of(device.target, spec)]:
            return served
    return []


def is_done(spec: KernelSpec, device: DeviceFacts, regimes: Sequence[str], database: Database) -> bool:
    """Whether the finals of all regimes that the spec has are on record with today's sources."""
    wanted = set(regimes).intersection(regimes_for(spec.direction, device.target))
    current = current_records(database, device.slug, device.target, spec)
    return {record.regime for _, record in current if record.phase == "final" and record.state == "ok"} >= wanted
