"""Parent side of the model benchmark: a worker process for each form, eager and compiled; checked, then timed in turns.

A worker that fails, hangs or runs out of memory costs itself only. Workers start side by side, since most of that is
compiling; what is measured runs one at a time.
"""

from __future__ import annotations

import math
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np
import torch
from model_forms import FORMS, REFERENCE
from model_text import Model, text_batches
from model_worker import Array, Evidence, Refused, Runner, Task

from jagtile.generator.bench_types import State
from jagtile.generator.oracle import torch_dtype
from jagtile.generator.spec import DType
from jagtile.generator.trial import Caller
from jagtile.generator.worker import Worker, WorkerFailure

OURS = "jagtile-njt"  # to whose time the others' are compared
# By how much a task may differ from the same in float32 with a dense call for each sequence (relative, in norm).
AGREEMENT: dict[tuple[DType, Task], float] = {
    ("fp32", "inference"): 1e-5,
    ("fp32", "training"): 1e-4,
    ("bf16", "inference"): 3e-2,
    ("bf16", "training"): 1e-1,
}
_START_SHARE = 0.6  # of the time
_MIN_SAMPLES = 3  # unless the time is up
_TURN_TIMEOUT = 30.0  # at least

MakeWorker = Callable[..., AbstractContextManager[Caller]]


class ModelResult(msgspec.Struct, frozen=True, kw_only=True):
    """One way to run a task of a model. Numbers that the state leaves meaningless are None."""

    model: str
    task: Task
    form: str
    mode: Literal["eager", "compiled"]
    state: State
    reason: str = ""  # of a state other than ok
    note: str = ""
    ms: float | None = None  # median, for all batches
    iqr_ms: float | None = None
    samples: int = 0
    tokens_per_s: float | None = None  # padding does not count
    ratio: float | None = None  # its time over that of jagtile on nested tensors in the same mode
    peak_mib: float | None = None  # weights, optimizer and all; see model_worker.Evidence
    error: float | None = None  # of features or gradients, relative


class Way(NamedTuple):
    """How a model is run."""

    form: str
    compiled: bool

    @property
    def mode(self) -> Literal["eager", "compiled"]:
        return "compiled" if self.compiled else "eager"


@dataclass
class _Entrant:
    """A way, its worker, and what is known of its tasks."""

    way: Way
    worker: Caller
    running: list[Task]
    lost: dict[Task, Refused] = field(default_factory=dict)
    wrong: dict[Task, str] = field(default_factory=dict)
    evidence: dict[Task, Evidence] = field(default_factory=dict)
    errors: dict[Task, float] = field(default_factory=dict)
    seconds: dict[Task, list[float]] = field(default_factory=dict)

    def ask(self, method: str, task: Task, deadline: float) -> Any:
        """The worker's answer; a refusal ends the task, a lost worker all tasks."""
        try:
            answer = self.worker.call(method, task, timeout=max(1.0, deadline - time.monotonic()))
        except WorkerFailure as failure:
            answer = Refused("failed", f"{failure.state}: {failure.reason} ({failure.note})")
            self.lost.update((other, answer) for other in self.running)
            self.running.clear()
        if isinstance(answer, Refused) and task in self.running:
            self.lost[task] = answer
            self.running.remove(task)
        return answer

    def start(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        for task in tuple(self.running):
            if task in self.running:
                self.ask("start", task, deadline)

    def check(self, deadline: float) -> None:
        for task in tuple(self.running):
            if task in self.running:
                answer = self.ask("check", task, deadline)
                if isinstance(answer, Evidence):
                    self.evidence[task] = answer

    def compare(self, task: Task, expected: Array, bar: float) -> None:
        """Out of the race with what is further off than the bar."""
        found = self.evidence[task].found
        self.errors[task] = error = relative_error(found, expected)
        if not error <= bar:
            self.wrong[task] = f"{'features' if task == 'inference' else 'gradients'} are {error:.2g} off, over {bar:g}"
            self.running.remove(task)

    def result(self, model: str, task: Task, tokens: int) -> ModelResult:
        common = {"model": model, "task": task, "form": self.way.form, "mode": self.way.mode}
        if task in self.lost:
            return ModelResult(**common, state=self.lost[task].state, reason=self.lost[task].reason)
        evidence = self.evidence[task]
        seen = {
            **common,
            "note": evidence.note,
            "error": self.errors[task],
            "peak_mib": None if evidence.peak_bytes is None else evidence.peak_bytes / 2**20,
        }
        if task in self.wrong:
            return ModelResult(**seen, state="incorrect", reason=self.wrong[task])
        times = [1e3 * seconds for seconds in self.seconds.get(task, [])]
        if not times:
            return ModelResult(**seen, state="failed", reason="no time was left to time it")
        quarters = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
        median = statistics.median(times)
        return ModelResult(
            **seen,
            state="ok",
            ms=median,
            iqr_ms=quarters[2] - quarters[0],
            samples=len(times),
            tokens_per_s=1e3 * tokens / median,
        )


def relative_error(found: Array, expected: Array) -> float:
    """‖found − expected‖ / ‖expected‖; infinite where the shapes differ."""
    if found.shape != expected.shape:
        return math.inf
    return float(np.linalg.norm((found - expected).astype(float)) / np.linalg.norm(expected.astype(float)))


def race(
    model: Model,
    ways: Sequence[Way],
    tasks: Sequence[Task],
    dtype: DType,
    device: torch.device,
    *,
    seconds: float,
    rounds: int,
    make_worker: MakeWorker = Worker,
) -> tuple[ModelResult, ...]:
    """Run a model in all ways for about that many seconds, at most so many times each.

    WorkerFailure where the reference fails, a dense call for each sequence in float32: nothing can be compared.
    """
    begin = time.monotonic()
    texts = text_batches(model)
    refused = {
        way: reason
        for way in ways
        if (reason := FORMS[way.form].refuses(model.is_causal, torch_dtype(dtype), device, way.compiled))
    }
    with ExitStack() as stack:
        # Linux ends a worker with the thread that started it: the threads must outlive the workers.
        threads = max(1, (os.cpu_count() or 1) * 3 // 4)
        pool = stack.enter_context(ThreadPoolExecutor(threads))

        def entrant(way: Way, dtype: DType) -> _Entrant:
            folder = stack.enter_context(TemporaryDirectory(prefix="jagtile-models-", ignore_cleanup_errors=True))
            worker = make_worker(Runner, way.form, way.compiled, model, texts, dtype, str(device), folder)
            return _Entrant(way, stack.enter_context(worker), list(tasks))

        reference = entrant(Way(REFERENCE, False), "fp32")
        racing = [entrant(way, dtype) for way in ways if way not in refused]
        patience = _START_SHARE * seconds / math.ceil((1 + len(racing)) / threads)
        list(pool.map(lambda each: each.start(patience), [reference, *racing]))
        end = begin + seconds
        reference.check(end)
        for task, reason in reference.lost.items():
            raise WorkerFailure("crash", f"there is nothing to compare {task} with: {reason.reason}", REFERENCE)
        for each in racing:
            each.check(end)
            for task in tuple(each.running):
                each.compare(task, reference.evidence[task].found, AGREEMENT[dtype, task])
        _time(racing, end, rounds)
    tokens = sum(text.tokens for text in texts)
    found = {(each.way, task): each.result(model.name, task, tokens) for each in racing for task in tasks}
    for way, reason in refused.items():
        common = {"model": model.name, "form": way.form, "mode": way.mode, "state": "refused", "reason": reason}
        found.update(((way, task), ModelResult(task=task, **common)) for task in tasks)
    return tuple(_with_ratio(found[way, task], found) for task in tasks for way in ways)


def _time(racing: Sequence[_Entrant], end: float, rounds: int) -> None:
    """Rounds in shuffled order until the time is up; who has spent a fair share of it has no more turns."""
    rng = random.Random(0)
    turns = [(each, task) for each in racing for task in each.running]
    spent = dict.fromkeys(range(len(turns)), 0.0)
    allowance = (end - time.monotonic()) / max(1, len(turns))
    for done in range(rounds):
        order = [index for index in spent if done < _MIN_SAMPLES or spent[index] < allowance]
        rng.shuffle(order)
        for index in order:
            each, task = turns[index]
            begin = time.monotonic()
            if task not in each.running or (done and begin > end):
                continue
            answer = each.ask("turn", task, max(end, begin + _TURN_TIMEOUT))
            if isinstance(answer, float):
                each.seconds.setdefault(task, []).append(answer)
            spent[index] += time.monotonic() - begin


def _with_ratio(result: ModelResult, found: Mapping[tuple[Way, Task], ModelResult]) -> ModelResult:
    ours = found.get((Way(OURS, result.mode == "compiled"), result.task))
    if result.ms is None or ours is None or ours.ms is None:
        return result
    return msgspec.structs.replace(result, ratio=result.ms / ours.ms)
