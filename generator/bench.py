"""Ours against every peer on the same inputs, in one interleaved run with a cold cache.

The measuring happens in a worker process (bench_worker.py): a peer that crashes, hangs or ruins the CUDA context costs
itself only.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import cast

import torch
from msgspec.structs import replace

import jagtile
from jagtile.generator.bench_types import BenchReport, Plan, WorkloadResult, describe, failure
from jagtile.generator.bench_worker import Bencher
from jagtile.generator.measure import WorkerFacts
from jagtile.generator.spec import DType
from jagtile.generator.trial import Caller
from jagtile.generator.worker import Worker, WorkerFailure
from jagtile.generator.workloads import Workload


def bench(
    workloads: Sequence[Workload],
    device: torch.device,
    dtype: DType,
    peers: Sequence[str],
    *,
    plan: Plan | None = None,
    seed: int = 0,
    timeout: float = 240.0,
    on_peer: Callable[[str, str], None] = lambda workload, peer: None,
    on_result: Callable[[BenchReport], None] = lambda so_far: None,
    make_worker: Callable[[], AbstractContextManager[Caller]] | None = None,
) -> BenchReport:
    """Time the peers (by name, see peers.py) on the workloads, one workload after the other.

    ``timeout``: seconds without a sign of life after which a peer is given up. ``on_peer(workload, peer)`` tells of a
    workload that begins (peer "") or of a peer that was lost, ``on_result`` gives all that is measured after each
    workload. ``make_worker`` stands in for the worker process, in tests. Whatever a peer does becomes its result;
    WorkerFailure is raised where the device itself can't be used.
    """
    with (make_worker or (lambda: Worker(Bencher, str(device), seed)))() as worker:
        facts = cast(WorkerFacts, worker.call("facts", timeout=timeout))
        report = BenchReport(
            device=facts.device,
            driver=facts.driver,
            torch=facts.torch,
            jagtile=jagtile.__version__,
            date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            plan=plan or Plan(),
            seed=seed,
            workloads=(),
        )
        for workload in workloads:
            on_peer(workload.name, "")
            result = _one(worker, workload, dtype, tuple(dict.fromkeys(peers)), report.plan, timeout, on_peer)
            report = replace(report, workloads=(*report.workloads, result))
            on_result(report)
    return report


def _one(
    worker: Caller,
    workload: Workload,
    dtype: DType,
    peers: Sequence[str],
    plan: Plan,
    timeout: float,
    on_peer: Callable[[str, str], None],
) -> WorkloadResult:
    """A workload; a peer that takes the worker down is left out of the next try."""
    begin = time.monotonic()
    lost: dict[str, str] = {}
    while True:
        left = [name for name in peers if name not in lost]
        try:
            result = cast(WorkloadResult, worker.call("run", workload, dtype, left, plan, timeout=timeout))
            break
        except WorkerFailure as error:
            reason = f"{error.state}: {error.reason}"
            if error.note not in left:  # the inputs do not fit, or the like: nobody's in particular
                lost.update((name, f"{error.note}: {reason}") for name in left)
                result = describe(workload, dtype)
                break
            lost[error.note] = reason
            on_peer(workload.name, error.note)
    found = {peer.peer: peer for peer in result.peers}
    found |= {name: failure(name, reason) for name, reason in lost.items()}
    return replace(result, peers=tuple(found[name] for name in peers), seconds=time.monotonic() - begin)
