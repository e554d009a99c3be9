"""One batch of configs on one workload: built, checked, timed together with the control; a record for each.

Whatever becomes of a config becomes its record's state; only a missing compiler or an interrupt is an exception. What
took the worker down is given a second try, alone in a fresh one, before that is held against it.
"""

from __future__ import annotations

import datetime
import logging
import statistics
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, cast

import jagtile
from jagtile.generator.measure import PREPARING, Plan, Verdict, WorkerFacts, iqr
from jagtile.generator.render import render
from jagtile.generator.spec import KernelSpec
from jagtile.generator.tile import TileConfig, Variant
from jagtile.generator.worker import STARTING, WorkerFailure
from jagtile.generator.workloads import Workload
from jagtile.runtime.artifact import Artifact
from jagtile.runtime.errors import TuningError
from jagtile.tuning_db.schema import Cost, Phase, State, TuningRecord

if TYPE_CHECKING:
    from jagtile.generator.build import BuildResult

Build = Callable[[Sequence[Variant]], "Iterable[BuildResult]"]
Emit = Callable[[TuningRecord], None]

log = logging.getLogger("jagtile")

_CONTROL = ("control A", "control B")  # labels of the control's two runs


class Caller(Protocol):
    """What a ``Worker`` does."""

    def call(self, method: str, *arguments: object, timeout: float) -> object: ...


@dataclass(frozen=True)
class Job:
    """What a batch is measured for."""

    regime: str
    workload: Workload
    phase: Phase
    plan: Plan


@dataclass(frozen=True)
class Batch:
    """Outcome of a batch: time over the control's by config, None where it failed; the control in force now.

    A control that failed is among the ratios even where it was none of the batch.
    """

    ratios: dict[TileConfig, float | None]
    control: TileConfig | None


@dataclass
class TrialRunner:
    """Runs batches of one spec. ``emit`` is given every record as soon as it exists."""

    target: str
    spec: KernelSpec
    worker: Caller
    facts: WorkerFacts
    build: Build
    emit: Emit
    timeout: float  # seconds without a sign of life from the worker
    _built: dict[TileConfig, BuildResult] = field(default_factory=dict)
    _verdicts: dict[tuple[TileConfig, str], Verdict | WorkerFailure] = field(default_factory=dict)

    def variant(self, config: TileConfig) -> Variant:
        """The variant of a config."""
        return Variant(self.target, self.spec, config)

    def prepare(self, configs: Iterable[TileConfig]) -> None:
        """Build what is not built yet."""
        missing = [config for config in dict.fromkeys(configs) if config not in self._built]
        if missing:
            for result in self.build([self.variant(config) for config in missing]):
                self._built[result.variant.config] = result

    def works(self, config: TileConfig, workload: Workload) -> bool:
        """Whether a config builds and computes the workload rightly."""
        self.prepare([config])
        result = self._built[config]
        if result.artifact is None:
            return False
        verdict = self._check(config, result.artifact, workload)
        return isinstance(verdict, Verdict) and not verdict.reason

    def run(self, job: Job, configs: Sequence[TileConfig], control: TileConfig | None) -> Batch:
        """Measure configs; ``control`` must work. Without one, or where it fails now, a config that works becomes it.

        Raises TuningError where the failure can't be a config's: the inputs or the worker itself.
        """
        self.prepare(configs if control is None else [*configs, control])
        ratios: dict[TileConfig, float | None] = dict.fromkeys(configs)
        working = [config for config in ratios if self._passes(job, config)]
        excused: set[TileConfig] = set()  # blamed once, but all right alone
        while working:
            control = control or working[0]
            try:
                samples = self._time(job, working, control)
            except WorkerFailure as failure:
                culprit = control if failure.note in _CONTROL else _named(working, failure.note)
                if culprit is None:
                    raise _not_the_config(job.workload, failure) from failure
                confirmed = failure if culprit in excused else self._failure_alone(job, culprit, failure)
                if confirmed is None:
                    excused.add(culprit)
                    continue
                self._fail(job, culprit, confirmed.state, confirmed.reason)
                ratios[culprit] = None
                working = [config for config in working if config != culprit]
                control = None if culprit == control else control
                continue
            ratios.update(self._record_times(job, working, control, samples))
            break
        return Batch(ratios, control)

    def _passes(self, job: Job, config: TileConfig) -> bool:
        result = self._built[config]
        if result.artifact is None:
            self._fail(job, config, cast(State, result.state), result.reason)
            return False
        verdict = self._check(config, result.artifact, job.workload)
        if isinstance(verdict, WorkerFailure):
            self._fail(job, config, verdict.state, f"{verdict.note}: {verdict.reason}")
        elif verdict.reason:
            self._fail(job, config, "incorrect", verdict.reason)
        else:
            return True
        return False

    def _check(self, config: TileConfig, artifact: Artifact, workload: Workload) -> Verdict | WorkerFailure:
        key = (config, workload.name)
        if key not in self._verdicts:
            verdict = self._try_check(artifact, workload)
            if isinstance(verdict, WorkerFailure):
                _log_second_try(config, verdict)
                verdict = self._try_check(artifact, workload)
            self._verdicts[key] = verdict
        return self._verdicts[key]

    def _try_check(self, artifact: Artifact, workload: Workload) -> Verdict | WorkerFailure:
        try:
            return cast(Verdict, self.worker.call("check", artifact, workload, timeout=self.timeout))
        except WorkerFailure as failure:
            if failure.note == STARTING or failure.note.startswith(PREPARING):
                raise _not_the_config(workload, failure) from failure
            return failure

    def _failure_alone(self, job: Job, config: TileConfig, before: WorkerFailure) -> WorkerFailure | None:
        """How a config that was blamed for a failure fails when it is timed by itself, None where it does not."""
        _log_second_try(config, before)
        try:
            alone = [(config.name, self._artifact(config))]
            self.worker.call("time", alone, job.workload, job.plan, timeout=self.timeout)
        except WorkerFailure as failure:
            if failure.note != config.name:
                raise _not_the_config(job.workload, failure) from failure
            return failure
        return None

    def _time(self, job: Job, working: Sequence[TileConfig], control: TileConfig) -> Mapping[str, Sequence[float]]:
        """Samples by label: the configs' names, but the control's two labels for it."""
        labelled = [(label, self._artifact(control)) for label in _CONTROL]
        labelled += [(config.name, self._artifact(config)) for config in working if config != control]
        samples = self.worker.call("time", labelled, job.workload, job.plan, timeout=self.timeout)
        return cast("Mapping[str, Sequence[float]]", samples)

    def _record_times(
        self,
        job: Job,
        working: Sequence[TileConfig],
        control: TileConfig,
        samples: Mapping[str, Sequence[float]],
    ) -> Iterable[tuple[TileConfig, float]]:
        session = uuid.uuid4().hex[:12]
        first, second = (statistics.median(samples[label]) for label in _CONTROL)
        both = [sample for label in _CONTROL for sample in samples[label]]
        control_us = statistics.median(both)
        for config in working:
            own = both if config == control else samples[config.name]
            median = statistics.median(own)
            verdict = self._verdicts[config, job.workload.name]
            assert isinstance(verdict, Verdict)
            record = self._record(
                job,
                config,
                state="ok",
                session=session,
                time_us=median,
                iqr_us=iqr(own),
                samples=len(own),
                tflops=job.workload.flops_of(self.spec.direction) / median / 1e6,
                ratio=median / control_us,
                control=control.name,
                aa_spread=abs(first - second) / min(first, second),
                error_rel=verdict.rel,
                error_abs=verdict.max_abs,
                cost_s=self._cost(config, verdict.seconds, sum(own) / 1e6),
            )
            self.emit(record)
            yield config, median / control_us

    def _fail(self, job: Job, config: TileConfig, state: State, reason: str) -> None:
        self.emit(self._record(job, config, state=state, reason=reason, cost_s=self._cost(config)))

    def _record(self, job: Job, config: TileConfig, **known: object) -> TuningRecord:
        result = self._built[config]
        common = {
            "device": self.facts.device.slug,
            "target": self.target,
            "spec": self.spec.name,
            "regime": job.regime,
            "workload": job.workload.name,
            "config": config.to_dict(),
            "phase": job.phase,
            "source_sha256": source_sha256(self.variant(config)),
            "compiler": result.compiler,
            "driver": self.facts.driver,
            "torch": self.facts.torch,
            "jagtile": jagtile.__version__,
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="microseconds"),
        }
        return TuningRecord(**common, **known)  # type: ignore[arg-type]

    def _cost(self, config: TileConfig, check: float = 0.0, time: float = 0.0) -> Cost:
        report = self._built[config].report
        return Cost(build=report.seconds if report else 0.0, check=check, time=time)

    def _artifact(self, config: TileConfig) -> Artifact:
        artifact = self._built[config].artifact
        assert artifact is not None  # only what was built gets this far
        return artifact


def source_sha256(variant: Variant) -> str:
    """Of the variant's rendered source, "" for an illegal variant: what a record is valid for."""
    return "" if variant.space.rejection(variant.spec, variant.config) else render(variant).sha256


def _log_second_try(config: TileConfig, failure: WorkerFailure) -> None:
    log.info("%s: %s (%s); trying it once more, alone", config.name, failure.state, failure.reason)


def _named(configs: Iterable[TileConfig], name: str) -> TileConfig | None:
    return next((config for config in configs if config.name == name), None)


def _not_the_config(workload: Workload, failure: WorkerFailure) -> TuningError:
    return TuningError(
        f"{workload.name} can't be measured here ({failure.state} while it said {failure.note!r}): {failure.reason}"
    )
