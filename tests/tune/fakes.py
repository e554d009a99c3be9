"""A tuner without compiler and device: a builder and a worker that answer from a made-up landscape of times."""

from __future__ import annotations

import hashlib
import itertools
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jagtile.generator.company import Conditions
from jagtile.generator.measure import Verdict, WorkerFacts
from jagtile.generator.spec import KernelSpec
from jagtile.generator.tile import TileConfig, Variant, parse_config
from jagtile.generator.worker import STARTING, WorkerFailure
from jagtile.runtime.artifact import Artifact, ArtifactMeta, CompileReport
from jagtile.tuning_db.schema import DeviceFacts

TARGET = "sm_90a"
COMPILER = "fake 1.0"
SPEC = KernelSpec.parse("fwd_bf16_d128")
DEVICE = DeviceFacts(
    slug="sm90-132sm", label="Fake", target=TARGET, units=132, bandwidth_gbs=4800.0, compute_capability="9.0"
)


@dataclass
class FakeBuildResult:
    variant: Variant
    state: str
    artifact: Artifact | None
    reason: str = ""
    report: CompileReport = field(default_factory=CompileReport)
    compiler: str = COMPILER


def artifact(variant: Variant) -> Artifact:
    meta = ArtifactMeta(
        abi=1,
        key=variant.name,
        target=variant.target,
        spec=variant.spec.name,
        config=variant.config.to_dict(),
        symbol=variant.symbol,
        file="x",
        size=0,
        sha256="",
        source_sha256="",
        compiler=COMPILER,
        launch={},
        report=CompileReport(),
    )
    return Artifact(meta, Path("x"), "built")


@dataclass
class FakeBuilder:
    """Builds everything but what ``states`` gives another end."""

    states: dict[str, str] = field(default_factory=dict)  # by config name
    built: list[str] = field(default_factory=list)

    def __call__(self, variants: Sequence[Variant]) -> list[FakeBuildResult]:
        results = []
        for variant in variants:
            self.built.append(variant.config.name)
            state = self.states.get(variant.config.name, "ok")
            made = artifact(variant) if state == "ok" else None
            results.append(FakeBuildResult(variant, state, made, "" if state == "ok" else f"because of {state}"))
        return results


def landscape(config: TileConfig, seed: int = 0) -> float:
    """Microseconds of a config: every knob's value has a factor of its own, every pair of knobs a smaller one."""
    values = sorted(config.to_dict().items())
    total = 100.0
    for knob, value in values:
        total *= 1 + 0.15 * _fraction(seed, knob, value)
    for one, other in itertools.pairwise(values):
        total *= 1 + 0.05 * _fraction(seed, *one, *other)
    return total


def _fraction(*parts: object) -> float:
    return int(hashlib.md5(repr(parts).encode()).hexdigest()[:8], 16) / 0xFFFFFFFF


@dataclass
class FakeWorker:
    """Answers as ``Trials`` in a ``Worker`` would. ``check`` and ``time`` behave by config name:
    "incorrect", "crash", "timeout" or "crash while timed"; "crash once" and "crash once while timed" are all right the
    next time, "crash in company" only by itself; with "no worker" not even a process can be had.
    """

    behaviour: dict[str, str] = field(default_factory=dict)
    time_of: Callable[[TileConfig, str], float] = lambda config, workload: landscape(config)
    noise: float = 0.002
    delay: float = 0.0
    timed: list[str] = field(default_factory=list)
    checked: list[str] = field(default_factory=list)
    conditions: list[Conditions] = field(default_factory=list)
    _rng: random.Random = field(default_factory=lambda: random.Random(0))
    _crashed: set[str] = field(default_factory=set)

    def _is_first(self, name: str, kind: str) -> bool:
        first = self.behaviour.get(name) == kind and name not in self._crashed
        self._crashed |= {name} if first else set()
        return first

    def __enter__(self) -> FakeWorker:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def call(self, method: str, *arguments: object, timeout: float) -> object:
        time.sleep(self.delay)
        return getattr(self, f"_{method}")(*arguments)

    def _facts(self) -> WorkerFacts:
        return WorkerFacts(DEVICE, "580.0", "2.11")

    def _conditions(self) -> Conditions:
        return self.conditions.pop(0) if self.conditions else Conditions()

    def _check(self, made, workload) -> Verdict:
        name = made.meta.key.rpartition("/")[2]
        self.checked.append(name)
        kind = self.behaviour.get(name, "")
        if kind == "no worker":
            raise WorkerFailure("crash", "the device is lost", STARTING)
        if kind in ("crash", "timeout") or self._is_first(name, "crash once"):
            state = "timeout" if kind == "timeout" else "crash"
            raise WorkerFailure(state, f"died of {state}", "check edges")
        return Verdict("edges: relative error 0.5 above 0.0028" if kind == "incorrect" else "", 2e-3, 1e-2, 0.1)

    def _time(self, candidates, workload, plan) -> dict[str, list[float]]:
        samples = {}
        for label, made in candidates:
            name = made.meta.key.rpartition("/")[2]
            self.timed.append(name)
            crashes = self.behaviour.get(name) == "crash while timed" or self._is_first(name, "crash once while timed")
            if crashes or (self.behaviour.get(name) == "crash in company" and len(candidates) > 1):
                raise WorkerFailure("crash", "killed by SIGSEGV", label)
            mean = self.time_of(parse_config(TARGET, name), workload.name)
            samples[label] = [mean * self._rng.gauss(1, self.noise) for _ in range(plan.rounds)]
        return samples
