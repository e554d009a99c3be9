"""Parent side of the model benchmark: a worker process for each way to run a model; checked, then timed in turns.

A worker that fails, hangs or runs out of memory costs itself only. Workers start side by side, since most of that is
compiling; what is measured runs one at a time. Starting and checking have a limit of their own: the time that is for
timing begins when all has been compiled and has run.
"""

from __future__ import annotations

import datetime
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory

import msgspec
import numpy as np
import torch
from model_forms import FORMS, REFERENCE
from model_text import Model, TextFacts, facts_of, text_batches
from model_worker import Array, Evidence, Mode, Refused, Runner, Task, Way

from jagtile.generator.bench_types import State
from jagtile.generator.oracle import torch_dtype
from jagtile.generator.spec import DType
from jagtile.generator.trial import Caller
from jagtile.generator.worker import Worker, WorkerFailure

OURS = "jagtile-njt"  # to whose time the others' are compared
# By how much features or gradients may differ from those in float32 with a dense call for each sequence: relative, in
# norm. Twelve layers in bf16, of whatever form, are 9e-3 and 5e-3 off.
AGREEMENT: dict[DType, float] = {"fp32": 1e-5, "bf16": 3e-2}
_START_SHARE = 0.8  # of the patience; the rest is for checks
_MIN_SAMPLES = 3  # unless the time is up
_TURN_TIMEOUT = 30.0  # at least

MakeWorker = Callable[..., AbstractContextManager[Caller]]


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Of a part."""

    patience: float  # seconds until all have started and are checked
    budget: float  # seconds of timing
    rounds: int  # samples of each at most


class ModelResult(msgspec.Struct, frozen=True, kw_only=True):
    """One form in a part. Numbers that the state leaves meaningless are None."""

    form: str
    state: State
    reason: str = ""  # of a state other than ok
    note: str = ""
    ms: float | None = None  # median, for all batches
    iqr_ms: float | None = None
    samples: int = 0
    tokens_per_s: float | None = None  # padding does not count
    ratio: float | None = None  # its time over that of jagtile on nested tensors in the same part
    peak_mib: float | None = None  # weights, optimizer and all; see model_worker.Evidence
    error: float | None = None  # of features or gradients, relative
    start_s: float | None = None  # of the process, the model, kernels and compilation, beside the others'
    compile_s: float | None = None  # of that and of the check, in torch.compile


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """A task of a model in one mode. Its forms were timed in turns, and are compared with each other only."""

    model: Model
    mode: Mode
    task: Task
    text: TextFacts
    limits: Limits
    date: str  # UTC, ISO 8601
    start_s: float  # until all had started, compilation and all
    check_s: float
    timing_s: float
    seconds: float  # that all of it took
    results: tuple[ModelResult, ...]

    @property
    def name(self) -> str:
        return f"{self.model.name}, {self.mode}, {self.task}"

    @property
    def forms(self) -> frozenset[str]:
        return frozenset(result.form for result in self.results)


@dataclass
class _Entrant:
    """A way, its worker, and what is known of it."""

    way: Way
    worker: Caller
    evidence: Evidence | None = None
    start_s: float | None = None
    error: float | None = None
    end: tuple[State, str] | None = None  # why it is out of the race
    seconds: list[float] = field(default_factory=list)

    def ask(self, method: str, timeout: float) -> object:
        """The worker's answer; a refusal or a loss of the worker ends the race for it."""
        try:
            answer = self.worker.call(method, timeout=max(1.0, timeout))
        except WorkerFailure as failure:
            answer = Refused("failed", f"{failure.state}: {failure.reason} ({failure.note})")
        if isinstance(answer, Refused):
            self.end = answer.state, answer.reason
        return answer

    def start(self, timeout: float) -> None:
        begin = time.monotonic()
        self.ask("start", timeout)
        self.start_s = time.monotonic() - begin

    def check(self, timeout: float) -> None:
        answer = self.ask("check", timeout)
        if isinstance(answer, Evidence):
            self.evidence = answer

    def compare(self, expected: Array, bar: float) -> None:
        """Out of the race with what is further off than the bar."""
        if self.evidence is not None:
            self.error = relative_error(self.evidence.found, expected)
            if not self.error <= bar:
                what = "features" if self.way.task == "inference" else "gradients"
                self.end = "incorrect", f"{what} are {self.error:.2g} off, over {bar:g}"

    def result(self, tokens: int) -> ModelResult:
        evidence = self.evidence
        peak = None if evidence is None else evidence.peak_bytes
        state, reason = self.end or (("ok", "") if self.seconds else ("failed", "no time was left to time it"))
        result = ModelResult(
            form=self.way.form,
            state=state,
            reason=reason,
            note="" if evidence is None else evidence.note,
            start_s=self.start_s,
            compile_s=None if evidence is None else evidence.compile_s,
            error=self.error,
            peak_mib=None if peak is None else peak / 2**20,
        )
        if state != "ok":
            return result
        times = [1e3 * seconds for seconds in self.seconds]
        quarters = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
        return msgspec.structs.replace(
            result,
            ms=statistics.median(times),
            iqr_ms=quarters[2] - quarters[0],
            samples=len(times),
            tokens_per_s=1e3 * tokens / statistics.median(times),
        )


def relative_error(found: Array, expected: Array) -> float:
    """‖found − expected‖ / ‖expected‖ of the worst of several matrices (n, ., .); infinite where shapes differ."""
    if found.shape != expected.shape:
        return math.inf
    difference, size = (np.linalg.norm(x.astype(float), axis=(1, 2)) for x in (found - expected, expected))
    return float(np.max(difference / size))


def race(
    model: Model,
    mode: Mode,
    task: Task,
    forms: Sequence[str],
    dtype: DType,
    device: torch.device,
    limits: Limits,
    *,
    make_worker: MakeWorker = Worker,
) -> Part:
    """Run a task of a model in several forms.

    WorkerFailure where the reference fails, a dense call for each sequence in float32: nothing can be compared.
    """
    begin, texts = time.monotonic(), text_batches(model)
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    found: dict[str, ModelResult] = {}
    for form in forms:
        if reason := FORMS[form].refuses(model.is_causal, torch_dtype(dtype), device, mode == "compiled"):
            found[form] = ModelResult(form=form, state="refused", reason=reason)
    with ExitStack() as stack:
        # Linux ends a worker with the thread that started it: the threads must outlive the workers.
        threads = 2 * (os.cpu_count() or 1)
        pool = stack.enter_context(ThreadPoolExecutor(threads))

        def entrant(way: Way, dtype: DType) -> _Entrant:
            folder = stack.enter_context(TemporaryDirectory(prefix="jagtile-models-", ignore_cleanup_errors=True))
            worker = make_worker(Runner, way, model, texts, dtype, str(device), folder)
            return _Entrant(way, stack.enter_context(worker))

        reference = entrant(Way(REFERENCE, "eager", task), "fp32")
        racing = [entrant(Way(form, mode, task), dtype) for form in forms if form not in found]
        starting = [reference, *racing]
        at_start = time.monotonic()
        patience = _START_SHARE * limits.patience / math.ceil(len(starting) / threads)
        list(pool.map(lambda each: each.start(patience), starting))
        at_check = time.monotonic()
        _check([each for each in starting if each.end is None], at_start + limits.patience)
        if reference.evidence is None:
            raise WorkerFailure("crash", f"there is nothing to compare {task} with: {reference.end}", REFERENCE)
        for each in racing:
            each.compare(reference.evidence.found, AGREEMENT[dtype])
        at_timing = time.monotonic()
        _time([each for each in racing if each.end is None], at_timing + limits.budget, limits.rounds)
        at_end = time.monotonic()
    text = facts_of(texts)
    found.update((each.way.form, each.result(text.tokens)) for each in racing)
    return Part(
        model=model,
        mode=mode,
        task=task,
        text=text,
        limits=limits,
        date=date,
        start_s=at_check - at_start,
        check_s=at_timing - at_check,
        timing_s=at_end - at_timing,
        seconds=time.monotonic() - begin,
        results=tuple(_with_ratio(found[form], found.get(OURS)) for form in forms),
    )


def _check(started: Sequence[_Entrant], end: float) -> None:
    """One after the other: one that is too slow does not take the others' time."""
    for done, each in enumerate(started):
        each.check((end - time.monotonic()) / (len(started) - done))


def _time(racing: Sequence[_Entrant], end: float, rounds: int) -> None:
    """Rounds in shuffled order until the time is up; who has spent a fair share of it has no more turns."""
    rng = random.Random(0)
    spent = dict.fromkeys(range(len(racing)), 0.0)
    allowance = (end - time.monotonic()) / max(1, len(racing))
    for done in range(rounds):
        order = [index for index in spent if done < _MIN_SAMPLES or spent[index] < allowance]
        rng.shuffle(order)
        for index in order:
            each, begin = racing[index], time.monotonic()
            if each.end is not None or (done and begin > end):
                continue
            answer = each.ask("turn", max(end - begin, _TURN_TIMEOUT))
            if isinstance(answer, float):
                each.seconds.append(answer)
            spent[index] += time.monotonic() - begin


def _with_ratio(result: ModelResult, ours: ModelResult | None) -> ModelResult:
    if result.ms is None or ours is None or ours.ms is None:
        return result
    return msgspec.structs.replace(result, ratio=result.ms / ours.ms)
