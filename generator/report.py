"""Records, choices and results of ``bench`` -> what ``jagtile report`` shows. Pure functions; report_page.py draws."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from jagtile.generator.bench_types import BenchReport, WorkloadResult
from jagtile.generator.importance import as_key, importances
from jagtile.generator.peers import OURS
from jagtile.generator.resume import is_stale, variant_of
from jagtile.generator.roofline import speed_of_light
from jagtile.generator.spec import KernelSpec
from jagtile.generator.workloads import Workload, representative
from jagtile.runtime.problem import REGIMES, look_up_of
from jagtile.tuning_db.schema import Config, DeviceFacts, TuningRecord
from jagtile.tuning_db.store import Database


@dataclass(frozen=True)
class Achieved:
    """The chosen config of a spec and regime, as it was last timed."""

    spec: str
    regime: str
    workload: str
    config: str
    us: float
    tflops: float | None
    bound: str  # what the roofline is made of there; "" where it is not known
    fraction: float | None  # of the roofline
    stale: bool  # timed with an older source


@dataclass(frozen=True)
class Trial:
    """A config that a search tried."""

    config: str
    us: float | None  # None: it failed
    best_us: float | None  # of the trials so far, this one included


@dataclass(frozen=True)
class History:
    """The trials of one spec, regime and workload in the order in which they were first recorded."""

    spec: str
    regime: str
    workload: str
    trials: tuple[Trial, ...]
    importances: Mapping[str, float]  # by knob

    @property
    def best_us(self) -> float | None:
        """Of all trials."""
        return self.trials[-1].best_us if self.trials else None


@dataclass(frozen=True)
class PeerRow:
    """One workload of a bench: each peer's time over jagtile's, or why there is none."""

    workload: str
    spec: str
    ours_ms: float | None
    ours_tflops: float | None
    fraction: float | None
    ratios: Mapping[str, float | str]  # by peer


@dataclass(frozen=True)
class Bench:
    """One file of results."""

    torch: str
    driver: str
    date: str
    peers: tuple[str, ...]
    rows: tuple[PeerRow, ...]


@dataclass(frozen=True)
class DeviceReport:
    """All that is known of one kind of device."""

    device: DeviceFacts
    records: int
    achieved: tuple[Achieved, ...]
    benches: tuple[Bench, ...]
    histories: tuple[History, ...]

    @property
    def knobs(self) -> tuple[str, ...]:
        """Those that some history tells the importance of, in alphabetical order."""
        return tuple(sorted({knob for history in self.histories for knob in history.importances}))


def collect(database: Database, benches: Sequence[BenchReport], slugs: Sequence[str] = ()) -> list[DeviceReport]:
    """A report for each device of ``slugs`` (all that have choices, records or results, where it is empty), by slug."""
    known = {bench.device.slug: bench.device for bench in benches}
    known |= {facts.slug: facts for origin in ("shipped", "user") for facts in database.devices(origin)}
    wanted = slugs or sorted(known)
    return [_of_device(known[slug], database, [b for b in benches if b.device.slug == slug]) for slug in wanted]


def _of_device(device: DeviceFacts, database: Database, benches: Iterable[BenchReport]) -> DeviceReport:
    records = database.records(device=device.slug)
    return DeviceReport(
        device=device,
        records=len(records),
        achieved=tuple(_achieved(device, database, records)),
        benches=tuple(_bench(bench) for bench in sorted(benches, key=lambda bench: bench.date)),
        histories=tuple(_histories(records)),
    )


def _achieved(device: DeviceFacts, database: Database, records: Iterable[TuningRecord]) -> Iterable[Achieved]:
    latest: dict[tuple[str, str, object], TuningRecord] = {}
    for record in records:
        key = (f"{record.target}/{record.spec}", record.regime, as_key(record.config))
        if record.state == "ok" and not (key in latest and latest[key].phase == "final" and record.phase == "search"):
            latest[key] = record
    for spec, regime, config in _chosen(device, database):
        timed = latest.get((spec, regime, as_key(config)))
        if timed is not None and timed.time_us:
            yield _as_achieved(device, timed)


def _chosen(device: DeviceFacts, database: Database) -> Iterable[tuple[str, str, Config]]:
    """(target/spec, regime, config) as dispatch would find them: the user's entry of a spec hides the shipped one."""
    entries = {}
    for origin in ("shipped", "user"):
        choices = database.choices(origin, device.slug)
        entries.update(choices.specs if choices else {})
    for key, entry in sorted(entries.items(), key=lambda item: _spec_order(item[0].partition("/")[2])):
        for regime in REGIMES:
            yield key, regime, entry.config(look_up_of(regime))


def _as_achieved(device: DeviceFacts, record: TuningRecord) -> Achieved:
    spec, variant = KernelSpec.parse(record.spec), variant_of(record)
    workload = _workload(spec, record)
    light = None
    if workload is not None:
        flops = workload.flops_of(spec.direction)
        rows_q, rows_k = workload.total_q * workload.num_heads, workload.total_k * workload.num_heads_kv
        light = speed_of_light(spec, flops, rows_q, rows_k, device)
    return Achieved(
        spec=record.spec,
        regime=record.regime,
        workload=record.workload,
        config=variant.config.name if variant else _plain_name(record.config),
        us=record.time_us or math.inf,
        tflops=record.tflops,
        bound=light.bound if light else "",
        fraction=light.us / record.time_us if light and record.time_us else None,
        stale=is_stale(record),
    )


def _workload(spec: KernelSpec, record: TuningRecord) -> Workload | None:
    """What a record was timed on, None where the workloads have changed since."""
    try:
        each = representative(spec, record.regime, record.target)
    except ValueError:
        return None
    return next((workload for workload in each if workload.name == record.workload), None)


def _histories(records: Iterable[TuningRecord]) -> Iterable[History]:
    studies: dict[tuple[str, str, str], list[TuningRecord]] = defaultdict(list)
    for record in records:
        if record.phase == "search":
            studies[record.spec, record.regime, record.workload].append(record)
    for (spec, regime, workload), own in sorted(studies.items(), key=lambda item: _study_order(*item[0])):
        first: dict[tuple[tuple[str, object], ...], TuningRecord] = {}
        for record in own:
            first.setdefault(as_key(record.config), record)
        trials, best = [], math.inf
        for record in first.values():
            best = min(best, record.time_us or math.inf)
            name = _plain_name(record.config)
            trials.append(Trial(name, record.time_us, best if best < math.inf else None))
        times = {key: record.time_us for key, record in first.items() if record.time_us}
        yield History(spec, regime, workload, tuple(trials), importances(times))


def _bench(bench: BenchReport) -> Bench:
    peers = dict.fromkeys(peer.peer for result in bench.workloads for peer in result.peers if peer.peer != OURS[0])
    return Bench(
        torch=bench.torch,
        driver=bench.driver,
        date=bench.date,
        peers=tuple(peers),
        rows=tuple(_peer_row(result, bench.device) for result in bench.workloads),
    )


def _peer_row(result: WorkloadResult, device: DeviceFacts) -> PeerRow:
    ours = result.of(OURS[0])
    ms = ours.ms if ours else None
    light = speed_of_light(
        KernelSpec.parse(result.spec),
        result.flops,
        result.total_q * result.num_heads,
        result.total_k * result.num_heads_kv,
        device,
    )
    return PeerRow(
        workload=result.workload,
        spec=result.spec,
        ours_ms=ms,
        ours_tflops=ours.tflops if ours else None,
        fraction=light.us / ms / 1e3 if light and ms else None,
        ratios={
            peer.peer: peer.state if peer.ratio is None else peer.ratio for peer in result.peers if peer.peer != OURS[0]
        },
    )


def _plain_name(config: Config) -> str:
    """A config that today's spaces may not know."""
    return " ".join(str(v) if k == "algorithm" else f"{k}={v}" for k, v in config.items())


def _spec_order(name: str) -> tuple[object, ...]:
    spec = KernelSpec.parse(name)
    return spec.direction != "fwd", spec.dtype, spec.head_dim, spec.head_dim_v, spec.causal


def _study_order(spec: str, regime: str, workload: str) -> tuple[object, ...]:
    return _spec_order(spec), REGIMES.index(regime) if regime in REGIMES else len(REGIMES), workload
