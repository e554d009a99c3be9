"""Worker side of a trial: a kernel is checked on poisoned outputs, then timed in interleaved rounds. Owns the device.

Only picklable values cross the process border: artifacts and workloads in, verdicts and samples out.
"""

from __future__ import annotations

import math
import random
import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from jagtile.generator.company import Conditions, conditions
from jagtile.generator.oracle import torch_dtype
from jagtile.generator.passes import pass_of
from jagtile.generator.spec import Direction, DType, KernelSpec
from jagtile.generator.timing import Sampler, timer_for
from jagtile.generator.worker import Note
from jagtile.generator.workloads import Workload, checks
from jagtile.runtime.artifact import Artifact
from jagtile.runtime.device import device_id
from jagtile.runtime.kernel import Kernel
from jagtile.runtime.loader import load
from jagtile.tuning_db.schema import DeviceFacts

PREPARING = "prepare inputs of "  # begins the notes of work that no kernel can be blamed for

_CACHE_COVER = 2.5  # the rotating inputs are this many times the last-level cache
_MAX_SETS = 64
_HEAVY_FLOPS = 2e10  # of a forward: 25 µs at 800 TFLOP/s; launches of so many are timed apart


@dataclass(frozen=True)
class WorkerFacts:
    """The device that the worker owns."""

    device: DeviceFacts
    driver: str
    torch: str


@dataclass(frozen=True)
class Verdict:
    """Whether a kernel computes what it should. rel and max_abs are those of the last workload compared."""

    reason: str  # "" where it is right
    rel: float
    max_abs: float
    seconds: float


@dataclass(frozen=True)
class Plan:
    """How long to time."""

    rounds: int
    sample_ms: float  # of launches, in each round, of each candidate
    drop_after: int = 3  # rounds, after which a candidate far behind is dropped ...
    drop_ratio: float = 1.3  # ... where its median is this many times the best one's
    max_spread: float = 0.05  # interquartile range over the median: where a candidate has more, all are timed again


class Trials:
    """The worker's object. ``device`` is a torch device string; ``seed`` shuffles the rounds."""

    def __init__(self, device: str, seed: int = 0) -> None:
        self.device = torch.device(device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device.index or 0)
        self._rng = random.Random(seed)
        self._timer = timer_for(self.device)
        self._kernels: dict[str, Kernel] = {}
        self._case = lru_cache(maxsize=16)(self._make_case)
        self._sets = lru_cache(maxsize=1)(self._make_sets)

    def facts(self, note: Note) -> WorkerFacts:
        """What the device is."""
        note("read the device's identity")
        return WorkerFacts(DeviceFacts(**asdict(device_id(self.device))), _driver(self.device), str(torch.__version__))

    def conditions(self, note: Note) -> Conditions:
        """Whether others use the device."""
        note("ask how busy the device is")
        return conditions(self.device, idle=not self._kernels)

    def check(self, artifact: Artifact, workload: Workload, note: Note) -> Verdict:
        """Compare a kernel with the oracle, on small nasty workloads and then on the one to be timed."""
        begin = time.perf_counter()
        spec = KernelSpec.parse(artifact.meta.spec)
        note("load")
        kernel = self._kernel(artifact)
        reason, rel, max_abs = "", math.inf, math.inf
        for case in (*checks(spec), workload):
            guarded = case is not workload
            note(f"{PREPARING}{case.name}")
            given = self._case(spec.direction, case, spec.dtype, guarded)
            note(f"check {case.name}")
            wrong, rel, max_abs = pass_of(spec.direction).compare(kernel, spec, case, given)
            if wrong:
                reason = f"{case.name}: {wrong}"
                break
        return Verdict(reason, rel, max_abs, time.perf_counter() - begin)

    def time(
        self, candidates: Sequence[tuple[str, Artifact]], workload: Workload, plan: Plan, note: Note
    ) -> dict[str, list[float]]:
        """Microseconds a launch, one sample a round, of every candidate by its label; the notes are the labels.

        All candidates run once in each round, in shuffled order, but for those that fell far behind. Where the samples
        of one that did not are spread too widely there are as many rounds again, once.
        """
        note(f"{PREPARING}{workload.name}")
        spec = KernelSpec.parse(candidates[0][1].meta.spec)
        kind, sets = pass_of(spec.direction), self._sets(spec.direction, workload, spec.dtype)
        apart = workload.flops >= _HEAVY_FLOPS
        samplers: dict[str, Sampler] = {}
        for label, artifact in candidates:
            note(label)
            kernel = self._kernel(artifact)

            def launch(index: int, kernel: Kernel = kernel) -> None:
                kind.launch(kernel, workload, sets[index % len(sets)])

            samplers[label] = self._timer.sampler(launch, len(sets), plan.sample_ms, apart=apart)
        samples: dict[str, list[float]] = {label: [] for label in samplers}
        live = list(samplers)
        rounds = plan.rounds
        while len(samples[live[0]]) < rounds:
            self._rng.shuffle(live)
            for label in live:
                note(label)
                samples[label].append(samplers[label]())
            done = len(samples[live[0]])
            if done == plan.drop_after:
                medians = {label: statistics.median(samples[label]) for label in live}
                live = [label for label in live if medians[label] <= plan.drop_ratio * min(medians.values())]
            if done == plan.rounds and any(spread(samples[label]) > plan.max_spread for label in live):
                rounds = 2 * plan.rounds
        return samples

    def _kernel(self, artifact: Artifact) -> Kernel:
        key = artifact.meta.key
        if key not in self._kernels:
            self._kernels[key] = load(artifact, self.device)
        return self._kernels[key]

    def _make_case(self, direction: Direction, workload: Workload, dtype: DType, guarded: bool) -> Any:
        return pass_of(direction).case(workload, dtype, self.device, guarded)

    def _make_sets(self, direction: Direction, workload: Workload, dtype: DType) -> list[Any]:
        """Copies of inputs and outputs whose rotation leaves nothing of a launch's data in the cache."""
        kind = pass_of(direction)
        size = kind.set_bytes(workload, torch_dtype(dtype).itemsize)
        count = min(_MAX_SETS, max(1, math.ceil(_CACHE_COVER * self._timer.cache_bytes / size)))
        return [kind.make_set(workload, dtype, self.device, seed) for seed in range(count)]


def iqr(samples: Sequence[float]) -> float:
    """The interquartile range, 0 of less than two."""
    if len(samples) < 2:
        return 0.0
    quarters = statistics.quantiles(samples, n=4, method="inclusive")
    return quarters[2] - quarters[0]


def spread(samples: Sequence[float]) -> float:
    """The interquartile range in proportion to the median."""
    return iqr(samples) / statistics.median(samples)


def _driver(device: torch.device) -> str:
    """The GPU driver's version as its kernel module tells it; "" for a CPU or where it does not."""
    if device.type != "cuda":
        return ""
    try:
        match = re.search(r"\d+\.\d+(\.\d+)?", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        return ""
    return match[0] if match else ""
