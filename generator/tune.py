"""Tune a spec on a device: search every regime, time the finalists of all regimes together, derive the choices.

This process never creates a CUDA context: all that touches the device happens in the worker. Every result is on disk as
soon as it exists; a later run with the same sources takes it from there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, cast

import torch

from jagtile.generator.choose import SLACK
from jagtile.generator.fleet import GRACE_SECONDS, Fleet
from jagtile.generator.measure import Trials, WorkerFacts
from jagtile.generator.spec import KernelSpec
from jagtile.generator.tile import Variant
from jagtile.generator.trial import Build, Caller, TrialRunner
from jagtile.generator.tune_session import Found, TuneSession
from jagtile.generator.tune_types import (
    DEFAULT_BUDGET,
    Budget,
    Progress,
    RegimeResult,
    Silent,
    TuneResult,
    check_tunable,
)
from jagtile.generator.worker import Worker, WorkerFailure
from jagtile.runtime.errors import TuningError
from jagtile.runtime.problem import REGIMES, regimes_for
from jagtile.tuning_db.schema import TuningRecord
from jagtile.tuning_db.store import Database

if TYPE_CHECKING:
    from jagtile.generator.build import BuildResult

__all__ = ["DEFAULT_BUDGET", "Budget", "Progress", "RegimeResult", "Silent", "TuneResult", "tune"]


def tune(
    spec: KernelSpec,
    device: torch.device,
    regimes: Sequence[str] = REGIMES,
    *,
    budget: Budget = DEFAULT_BUDGET,
    ship: bool = False,
    seed: int = 0,
    database: Database | None = None,
    progress: Progress | None = None,
    storage: str | None = None,
    grace: float = GRACE_SECONDS,
    slack: float = SLACK,
    timeout: float = 30.0,
    resume: bool = True,
    build: Build | None = None,
    make_worker: Callable[[], AbstractContextManager[Caller]] | None = None,
) -> TuneResult:
    """Find and record the best configs of a spec for some regimes on a device, and choose.

    ``regimes``: those of them that the spec has there, one at least.
    ``ship``: write to tuning_db/ rather than to the user's overlay. ``storage``: URL of a storage through which several
    tuners share the work (docs/fleet.md); one that vanishes is missed after ``grace`` seconds. ``slack``: see
    ``choose``. ``timeout``: seconds after which a config that shows no sign of life is given up. ``resume``: take
    configs on record with the same source as measured. ``build`` and ``make_worker`` stand in for the builder and the
    worker, in tests.

    Raises UnsupportedError where no template serves the spec or it has dropout, DatabaseError where nothing can be
    written, CompilerNotFoundError, and TuningError where the device or the storage can't be used or no config works.
    """
    begin = time.monotonic()
    check_tunable(spec)
    unknown = [regime for regime in regimes if regime not in REGIMES]
    has = regimes_for(spec.direction, device.type)
    wanted = [regime for regime in regimes if regime in has]
    if unknown or not wanted:
        got = ", ".join(unknown or regimes) or "none"
        raise ValueError(f"regimes of {spec.name} on {device.type} must be some of {', '.join(has)}; got {got}")
    database = database or Database()
    progress = progress or Silent()
    with (make_worker or worker_for(device, seed))() as worker:
        facts = facts_of(worker, device, timeout)
        name = f"{facts.device.slug}/{facts.device.target}/{spec.name}"
        with (
            database.writer(facts.device.slug, ship) as writer,
            ThreadPoolExecutor(1) as builder,
            Fleet(storage, name, grace) if storage else nullcontext() as fleet,
        ):
            records: list[TuningRecord] = []

            def emit(record: TuningRecord) -> None:
                writer.append(record)
                records.append(record)
                progress.recorded(record)

            runner = TrialRunner(facts.device.target, spec, worker, facts, build or _build, emit, timeout)
            tuner = TuneSession(
                runner,
                database,
                device.type,
                budget,
                seed,
                fleet,
                resume,
                progress,
                builder,
                begin,
                records,
                writer.append,
            )
            tuner.look_around()
            found: list[Found] = []
            for index, regime in enumerate(wanted):
                found.append(tuner.search(regime, len(wanted) - index, found))
                tuner.look_around()
            found = tuner.settle(found)
            tuner.finals(found, ship)
            tuner.look_around()
            return tuner.conclude(found, ship, slack)


def worker_for(device: torch.device, seed: int) -> Callable[[], AbstractContextManager[Caller]]:
    """What makes the worker that owns a device."""
    return lambda: Worker(Trials, str(device), seed, cap_memory=device.type == "cpu")


def facts_of(worker: Caller, device: torch.device, timeout: float) -> WorkerFacts:
    """What a worker's device is. TuningError where it can't be used."""
    try:
        return cast(WorkerFacts, worker.call("facts", timeout=max(timeout, 120.0)))
    except WorkerFailure as failure:
        raise TuningError(f"{device} can't be used: {failure.reason}") from None


def _build(variants: Sequence[Variant]) -> Sequence[BuildResult]:
    from jagtile.generator.build import build

    return build(variants)
