"""Parent side of the model benchmark: a worker process for each way to run a model; checked, then timed in turns.

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
from typing import Literal

import msgspec
import numpy as np
import torch
from model_forms import FORMS, REFERENCE
from model_text import Model, text_batches
from model_worker import Array, Evidence, Refused, Runner, Task, Way

from jagtile.generator.bench_types import State
from jagtile.generator.oracle import torch_dtype
from jagtile.generator.spec import DType
from jagtile.generator.trial import Caller
from jagtile.generator.worker import Worker, WorkerFailure

OURS = "jagtile-njt"  # to whose time the others' are compared
# By how much features or gradients may differ from those in float32 with a dense call for each sequence: relative, in
# norm. Twelve layers in bf16, of whatever form, are 9e-3 and 5e-3 off.
AGREEMENT: dict[DType, float] = {"fp32": 1e-5, "bf16": 3e-2}
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


@dataclass
class _Entrant:
    """A way, its worker, and what is known of it."""

    way: Way
    worker: Caller
    evidence: Evidence | None = None
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

    def result(self, model: str, tokens: int) -> ModelResult:
        peak = None if self.evidence is None else self.evidence.peak_bytes
        state, reason = self.end or (("ok", "") if self.seconds else ("failed", "no time was left to time it"))
        result = ModelResult(
            model=model,
            task=self.way.task,
            form=self.way.form,
            mode=self.way.mode,
            state=state,
            reason=reason,
            note="" if self.evidence is None else self.evidence.note,
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
    ways: Sequence[Way],
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
    begin, texts = time.monotonic(), text_batches(model)
    found: dict[Way, ModelResult] = {}
    for way in ways:
        reason = FORMS[way.form].refuses(model.is_causal, torch_dtype(dtype), device, way.compiled)
        if reason:
            found[way] = ModelResult(
                model=model.name, task=way.task, form=way.form, mode=way.mode, state="refused", reason=reason
            )
    with ExitStack() as stack:
        # Linux ends a worker with the thread that started it: the threads must outlive the workers.
        threads = 2 * (os.cpu_count() or 1)
        pool = stack.enter_context(ThreadPoolExecutor(threads))

        def entrant(way: Way, dtype: DType) -> _Entrant:
            folder = stack.enter_context(TemporaryDirectory(prefix="jagtile-models-", ignore_cleanup_errors=True))
            worker = make_worker(Runner, way, model, texts, dtype, str(device), folder)
            return _Entrant(way, stack.enter_context(worker))

        references = {
            task: entrant(Way(REFERENCE, False, task), "fp32") for task in dict.fromkeys(way.task for way in ways)
        }
        racing = [entrant(way, dtype) for way in ways if way not in found]
        starting = [*references.values(), *racing]
        patience = _START_SHARE * seconds / math.ceil(len(starting) / threads)
        list(pool.map(lambda each: each.ask("start", patience), starting))
        end = begin + seconds
        _check([each for each in starting if each.end is None], end)
        for task, reference in references.items():
            if reference.evidence is None:
                raise WorkerFailure("crash", f"there is nothing to compare {task} with: {reference.end}", REFERENCE)
        for each in racing:
            each.compare(references[each.way.task].evidence.found, AGREEMENT[dtype])
        _time(racing, end, rounds)
    tokens = sum(text.tokens for text in texts)
    found.update((each.way, each.result(model.name, tokens)) for each in racing)
    return tuple(_with_ratio(found[way], found) for way in ways)


def _check(started: Sequence[_Entrant], end: float) -> None:
    """One after the other, in half of the time that is left: one that is too slow does not take the others' time."""
    now = time.monotonic()
    half = now + (end - now) / 2
    for done, each in enumerate(started):
        each.check((half - time.monotonic()) / (len(started) - done))


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


def _with_ratio(result: ModelResult, found: Mapping[Way, ModelResult]) -> ModelResult:
    ours = found.get(Way(OURS, result.mode == "compiled", result.task))
    if result.ms is None or ours is None or ours.ms is None:
        return result
    return msgspec.structs.replace(result, ratio=result.ms / ours.ms)
