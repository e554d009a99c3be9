"""Worker side of ``bench``: owns the device; checks the peers of a workload, then times them in interleaved rounds.

Before each timed call a buffer larger than the last-level cache is written. On a GPU a time is that between CUDA events
around one call, and the device is kept busy until the host has enqueued all of it: the time is the device's own.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from msgspec.structs import replace

from jagtile.generator.bench_types import PeerResult, Plan, State, WorkloadResult, describe, failure
from jagtile.generator.measure import PREPARING, Trials, WorkerFacts
from jagtile.generator.oracle import tolerance
from jagtile.generator.peer import Peer, Prepared
from jagtile.generator.peers import OURS, PEERS
from jagtile.generator.spec import DType
from jagtile.generator.spot_check import BUDGET_FLOPS, SpotCheck, spot_check
from jagtile.generator.timing import FLUSH_COVER, timer_for
from jagtile.generator.worker import Note
from jagtile.generator.workloads import JaggedBatch, Workload
from jagtile.runtime.device import device_id
from jagtile.runtime.dispatch import choose
from jagtile.runtime.errors import UnsupportedError
from jagtile.tuning_db.store import Database

_CYCLES_PER_US = 2000  # at the highest clocks there are
_HIDDEN_SHARE = 1.5  # of a call's host time, for which the device is kept busy before it, and a little more
_HIDDEN_EXTRA_US = 50.0
_MOST_HIDDEN_US = 20000.0
_PEER_BAR = 4  # times our own tolerance: a peer that is further off computes something else


class Sample(NamedTuple):
    """One timed call. ``host_us``: until it returned; None where that is the same."""

    ms: float
    host_us: float | None


class ColdClock:
    """Times one call at a time with none of its data in the last-level cache."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        size = FLUSH_COVER * timer_for(device).cache_bytes
        self._flushed = torch.zeros(size // 4, dtype=torch.int32, device=device)

    def sample(self, call: Callable[[], object], hidden_us: float) -> Sample:
        """Of one call. On a GPU it is enqueued while the flush runs and ``hidden_us`` before that pass."""
        if self._device.type == "cpu":
            self._flushed.add_(1)
            start = time.perf_counter()
            call()
            return Sample((time.perf_counter() - start) * 1e3, None)
        begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        torch.cuda.synchronize(self._device)
        if hidden_us:
            torch.cuda._sleep(int(hidden_us * _CYCLES_PER_US))  # type: ignore[no-untyped-call]
        self._flushed.add_(1)
        begin.record()
        start = time.perf_counter()
        kept = call()
        host = time.perf_counter() - start
        end.record()
        end.synchronize()
        del kept  # only now: freeing it must not be timed
        return Sample(float(begin.elapsed_time(end)), host * 1e6)


class Bencher:
    """The worker's object."""

    def __init__(self, device: str, seed: int = 0) -> None:
        self.device = torch.device(device)
        self._seed = seed
        self._rng = random.Random(seed)
        self._trials = Trials(device, seed)
        self._clock = ColdClock(self.device)
        if self.device.type == "cuda":
            torch.backends.cuda.enable_cudnn_sdp(False)  # its NJT backend has ended in an illegal memory access

    def facts(self, note: Note) -> WorkerFacts:
        """What the device is."""
        return self._trials.facts(note)

    @torch.no_grad()
    def run(self, workload: Workload, dtype: DType, names: Sequence[str], plan: Plan, note: Note) -> WorkloadResult:
        """Check and time the peers of these names on a workload; a note is the name of the peer at work."""
        note(f"{PREPARING}{workload.name}")
        batch = workload.make(self.device, dtype, self._seed)
        oracle = spot_check(batch, workload, BUDGET_FLOPS[self.device.type])
        run = _Run(self.device, self._clock, self._rng, workload, dtype, batch, oracle, note)
        for name in names:
            run.admit(PEERS[name])
        run.time(plan)
        note(f"look up the variant for {workload.name}")
        variant, source = self._variant(workload, dtype)
        return describe(
            workload, dtype, peers=run.concluded(), checked_share=oracle.share, variant=variant, source=source
        )

    def _variant(self, workload: Workload, dtype: DType) -> tuple[str, str]:
        try:
            decision = choose(workload.problem(dtype), device_id(self.device), Database())
        except UnsupportedError:
            return "", ""
        return decision.variant.name, decision.source


class _Run:
    """One workload: the peers still in the race, their samples, and everybody's results."""

    def __init__(
        self,
        device: torch.device,
        clock: ColdClock,
        rng: random.Random,
        workload: Workload,
        dtype: DType,
        batch: JaggedBatch,
        oracle: SpotCheck,
        note: Note,
    ) -> None:
        self._device, self._clock, self._rng, self._note = device, clock, rng, note
        self._workload, self._dtype, self._batch, self._oracle = workload, dtype, batch, oracle
        self._results: dict[str, PeerResult] = {}
        self._racing: dict[str, Prepared] = {}
        self._samples: dict[str, list[Sample]] = {}
        self._hidden_us: dict[str, float] = {}

    def admit(self, peer: Peer) -> None:
        """Prepare a peer and compare an output of it; it races where that is right."""
        self._note(peer.name)
        missing = peer.missing(self._device)
        reason = missing or peer.refuses(self._workload, self._dtype, self._device)
        if reason:
            state: State = "missing" if missing else "refused"
            self._results[peer.name] = PeerResult(peer=peer.name, state=state, reason=reason)
            return
        with self._surviving(peer.name):
            prepared = peer.prepare(self._workload, self._batch)
            prepared.call()  # loads, builds, compiles
            with _poisoned_outputs() if peer.name in OURS else contextlib.nullcontext():
                out = prepared.packed(prepared.call())
            self._results[peer.name] = self._judged(peer.name, out)
            if self._results[peer.name].state == "ok":
                self._racing[peer.name] = prepared

    def _judged(self, name: str, out: torch.Tensor) -> PeerResult:
        found = self._oracle.errors(out)
        bar = tolerance(self._dtype) * (1 if name in OURS else _PEER_BAR)
        right = found.rel <= bar
        return PeerResult(
            peer=name,
            state="ok" if right else "incorrect",
            reason="" if right else f"relative error {found.rel:.3g} above {bar:.3g}",
            error_rel=found.rel,
            error_abs=found.max_abs,
        )

    def time(self, plan: Plan) -> None:
        """Rounds in which every peer whose turn it is runs once; slow ones have fewer turns, spread over the run."""
        turns = {}
        for name in tuple(self._racing):
            self._sample(name)
            if name in self._racing:
                # The first sample tells how long a call takes, and does not count where there are more.
                first = self._samples.pop(name)[0]
                turns[name] = _turns(first, plan)
                if first.host_us is not None and not plan.idle_device:
                    self._hidden_us[name] = min(_HIDDEN_SHARE * first.host_us + _HIDDEN_EXTRA_US, _MOST_HIDDEN_US)
        rounds = max(turns.values(), default=0)
        for index in range(rounds):
            now = [name for name in self._racing if (index + 1) * turns[name] // rounds > index * turns[name] // rounds]
            self._rng.shuffle(now)
            for name in now:
                self._sample(name)

    def _sample(self, name: str) -> None:
        self._note(name)
        with self._surviving(name):
            self._samples.setdefault(name, []).append(
                self._clock.sample(self._racing[name].call, self._hidden_us.get(name, 0.0))
            )

    @contextlib.contextmanager
    def _surviving(self, name: str) -> Iterator[None]:
        """Turn a peer's exception into its result. What ruined the CUDA context raises again and ends the worker."""
        try:
            yield
        except Exception as error:
            self._racing.pop(name, None)
            self._results[name] = failure(name, f"{type(error).__name__}: {error}")
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
                torch.cuda.empty_cache()

    def concluded(self) -> tuple[PeerResult, ...]:
        """Everybody's result, with the times of those that ran to the end."""
        medians = {name: statistics.median(s.ms for s in self._samples[name]) for name in self._racing}
        ours = medians.get(OURS[0])
        for name, median in medians.items():
            samples = self._samples[name]
            times = [sample.ms for sample in samples]
            host = [sample.host_us for sample in samples if sample.host_us is not None]
            quarters = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else [median] * 3
            self._results[name] = replace(
                self._results[name],
                ms=median,
                iqr_ms=quarters[2] - quarters[0],
                host_us=statistics.median(host) if host else None,
                samples=len(times),
                tflops=self._workload.flops / median / 1e9,
                ratio=median / ours if ours else None,
            )
        return tuple(self._results.values())


def _turns(first: Sample, plan: Plan) -> int:
    return min(plan.max_samples, max(plan.min_samples, int(plan.seconds * 1e3 / max(first.ms, 1e-3))))


@contextlib.contextmanager
def _poisoned_outputs() -> Iterator[None]:
    """Memory that torch hands out is NaN (its deterministic mode fills it), so that what stays unwritten is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before, warn_only=warn_only)
