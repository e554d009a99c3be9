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
from typing import cast

import torch

from jagtile.generator.oracle import errors, reference, tolerance, torch_dtype
from jagtile.generator.spec import DType, KernelSpec
from jagtile.generator.timing import Launch, Sampler, timer_for
from jagtile.generator.worker import Note
from jagtile.generator.workloads import JaggedBatch, Workload, checks
from jagtile.runtime.artifact import Artifact
from jagtile.runtime.device import device_id
from jagtile.runtime.kernel import ForwardKernel, Kernel
from jagtile.runtime.loader import load
from jagtile.tuning_db.schema import DeviceFacts

PREPARING = "prepare inputs of "  # begins the notes of work that no kernel can be blamed for

_GUARD_ROWS = 8  # of NaN around small inputs and every output
_ROW_BAR = 5  # times the tolerance: the worst row's bar; torch's own CPU kernels stay below 2 (D 16 to 128)
_ROW_BAR_MIN_DIM = 16  # shorter rows may cancel to nearly nothing
_LSE_BAR: dict[DType, float] = {"fp32": 2e-5, "bf16": 2e-3, "fp16": 2e-3}  # max abs
_CACHE_COVER = 2.5  # the rotating inputs are this many times the last-level cache
_MAX_SETS = 64

InputSet = tuple[JaggedBatch, torch.Tensor]  # inputs, output


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


class Trials:
    """The worker's object. ``device`` is a torch device string; ``seed`` shuffles the rounds."""

    def __init__(self, device: str, seed: int = 0) -> None:
        self.device = torch.device(device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device.index or 0)
        self._rng = random.Random(seed)
        self._timer = timer_for(self.device)
        self._kernels: dict[str, Kernel] = {}
        self._case = lru_cache(maxsize=8)(self._make_case)
        self._sets = lru_cache(maxsize=1)(self._make_sets)

    def facts(self, note: Note) -> WorkerFacts:
        """What the device is."""
        note("read the device's identity")
        return WorkerFacts(DeviceFacts(**asdict(device_id(self.device))), _driver(self.device), str(torch.__version__))

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
            self._case(case, spec.dtype, guarded)
            note(f"check {case.name}")
            reason, rel, max_abs = self._compare(kernel, spec, case, guarded)
            if reason:
                break
        return Verdict(reason, rel, max_abs, time.perf_counter() - begin)

    def time(
        self, candidates: Sequence[tuple[str, Artifact]], workload: Workload, plan: Plan, note: Note
    ) -> dict[str, list[float]]:
        """Microseconds a launch, one sample a round, of every candidate by its label; the notes are the labels.

        All candidates run once in each round, in shuffled order, but for those that fell far behind.
        """
        note(f"{PREPARING}{workload.name}")
        sets = self._sets(workload, KernelSpec.parse(candidates[0][1].meta.spec).dtype)
        samplers: dict[str, Sampler] = {}
        for label, artifact in candidates:
            note(label)
            launch = _launch(self._kernel(artifact), workload, sets)
            samplers[label] = self._timer.sampler(launch, len(sets), plan.sample_ms)
        samples: dict[str, list[float]] = {label: [] for label in samplers}
        live = list(samplers)
        for done in range(1, plan.rounds + 1):
            self._rng.shuffle(live)
            for label in live:
                note(label)
                samples[label].append(samplers[label]())
            if done == plan.drop_after:
                medians = {label: statistics.median(samples[label]) for label in live}
                live = [label for label in live if medians[label] <= plan.drop_ratio * min(medians.values())]
        return samples

    def _kernel(self, artifact: Artifact) -> ForwardKernel:
        key = artifact.meta.key
        if key not in self._kernels:
            self._kernels[key] = load(artifact, self.device)
        return cast(ForwardKernel, self._kernels[key])

    def _make_case(
        self, workload: Workload, dtype: DType, guarded: bool
    ) -> tuple[JaggedBatch, torch.Tensor, torch.Tensor]:
        batch = workload.make(self.device, dtype)
        out, lse = reference(*batch[:5], is_causal=workload.is_causal, causal_alignment=workload.causal_alignment)
        if guarded:
            batch = batch._replace(q=_guarded(batch.q), k=_guarded(batch.k), v=_guarded(batch.v))
        return batch, out, lse

    def _compare(
        self, kernel: ForwardKernel, spec: KernelSpec, workload: Workload, guarded: bool
    ) -> tuple[str, float, float]:
        """(what is wrong or "", rel, max abs) of a kernel on one workload."""
        batch, ref, ref_lse = self._case(workload, spec.dtype, guarded)
        out = _guarded(torch.full_like(ref, math.nan, dtype=batch.q.dtype))
        lse = torch.full_like(ref_lse, math.nan, dtype=torch.float32)
        kernel.forward(*batch[:5], out, lse, spec.head_dim**-0.5, workload.causal_alignment == "bottom_right")
        found, found_lse, bar = errors(out, ref), errors(lse, ref_lse), tolerance(spec.dtype)
        wrong = []
        if not found.rel <= bar:
            wrong.append(f"relative error {found.rel:.3g} above {bar:.3g}")
        elif spec.head_dim_v >= _ROW_BAR_MIN_DIM and not found.row_rel <= _ROW_BAR * bar:
            wrong.append(f"relative error of a row {found.row_rel:.3g} above {_ROW_BAR * bar:.3g}")
        if not found_lse.max_abs <= _LSE_BAR[spec.dtype]:
            wrong.append(f"lse off by {found_lse.max_abs:.3g}")
        if not _guards_intact(out):
            wrong.append("rows outside the output were written")
        return (f"{workload.name}: {', '.join(wrong)}" if wrong else ""), found.rel, found.max_abs

    def _make_sets(self, workload: Workload, dtype: DType) -> list[InputSet]:
        """Copies of inputs and output whose rotation leaves nothing of a launch's data in the cache."""
        element = torch_dtype(dtype).itemsize
        size = workload.input_bytes(element) + element * workload.total_q * workload.num_heads * workload.head_dim_v
        sets = []
        for seed in range(min(_MAX_SETS, max(1, math.ceil(_CACHE_COVER * self._timer.cache_bytes / size)))):
            batch = workload.make(self.device, dtype, seed)
            sets.append((batch, batch.q.new_empty((workload.total_q, workload.num_heads, workload.head_dim_v))))
        return sets


def _launch(kernel: ForwardKernel, workload: Workload, sets: Sequence[InputSet]) -> Launch:
    scale, bottom_right = workload.head_dim**-0.5, workload.causal_alignment == "bottom_right"

    def launch(index: int) -> None:
        batch, out = sets[index % len(sets)]
        kernel.forward(*batch[:5], out, None, scale, bottom_right)

    return launch


def _guarded(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with rows of NaN before and after it in memory."""
    whole = tensor.new_full((tensor.shape[0] + 2 * _GUARD_ROWS, *tensor.shape[1:]), math.nan)
    inner = whole[_GUARD_ROWS : _GUARD_ROWS + tensor.shape[0]]
    inner.copy_(tensor)
    return inner


def _guards_intact(tensor: torch.Tensor) -> bool:
    rows, row = tensor.shape[0], tensor.stride(0)
    whole = tensor.as_strided((rows + 2 * _GUARD_ROWS, row), (row, 1), 0)
    return bool(whole[:_GUARD_ROWS].isnan().all() and whole[_GUARD_ROWS + rows :].isnan().all())


def _driver(device: torch.device) -> str:
    """The GPU driver's version as its kernel module tells it; "" for a CPU or where it does not."""
    if device.type != "cuda":
        return ""
    try:
        match = re.search(r"\d+\.\d+(\.\d+)?", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        return ""
    return match[0] if match else ""
