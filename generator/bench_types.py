"""What ``bench`` is told and what it tells."""

from __future__ import annotations

from typing import Literal

import msgspec

from jagtile.generator.peers import OURS
from jagtile.generator.spec import DType
from jagtile.generator.workloads import Workload
from jagtile.tuning_db.schema import DeviceFacts

State = Literal["ok", "incorrect", "failed", "missing", "refused"]

_REASON_CHARACTERS = 1000


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How long to time."""

    seconds: float = 1.0  # of calls, of each peer on each workload
    min_samples: int = 5
    max_samples: int = 50
    idle_device: bool = False  # calls start on an idle GPU: what the flush does not hide of the host's time counts


class PeerResult(msgspec.Struct, frozen=True, kw_only=True):
    """One peer on one workload. Numbers that the state leaves meaningless are None."""

    peer: str
    state: State
    reason: str = ""  # of a state other than ok
    ms: float | None = None  # median of a call
    iqr_ms: float | None = None
    host_us: float | None = None  # median time until the call returns to the host, on a GPU
    samples: int = 0
    tflops: float | None = None  # of unmasked elements
    ratio: float | None = None  # its time over jagtile's: above 1 jagtile is faster
    error_rel: float | None = None  # ‖out − ref‖ / ‖ref‖ against float64
    error_abs: float | None = None


class WorkloadResult(msgspec.Struct, frozen=True, kw_only=True):
    """All peers on one workload."""

    workload: str
    spec: str
    sequences: int
    total_q: int
    total_k: int
    num_heads: int
    num_heads_kv: int
    causal_alignment: str  # "" where not causal
    flops: int
    checked_share: float  # of the output elements, that were compared with the oracle
    variant: str  # that jagtile ran
    source: str  # of the choice: "user", "shipped", "relative:<slug>", "default"
    peers: tuple[PeerResult, ...]
    seconds: float  # that all of it took

    def of(self, name: str) -> PeerResult | None:
        """A peer's result by its name."""
        return next((peer for peer in self.peers if peer.peer == name), None)


class BenchReport(msgspec.Struct, frozen=True, kw_only=True):
    """A run of ``bench``."""

    device: DeviceFacts
    driver: str
    torch: str
    jagtile: str
    date: str  # UTC, ISO 8601
    plan: Plan
    seed: int
    workloads: tuple[WorkloadResult, ...]

    def ours(self, state: State) -> tuple[str, ...]:
        """The workloads on which jagtile, packed or nested, ended in a state."""
        return tuple(
            result.workload
            for result in self.workloads
            if any(peer.peer in OURS and peer.state == state for peer in result.peers)
        )


def failure(peer: str, reason: str) -> PeerResult:
    """The result of a peer that raised, crashed or hung; the end of a long reason says most."""
    reason = reason.strip()
    shown = reason if len(reason) <= _REASON_CHARACTERS else f"... {reason[-_REASON_CHARACTERS:]}"
    return PeerResult(peer=peer, state="failed", reason=shown)


def describe(
    workload: Workload,
    dtype: DType,
    *,
    peers: tuple[PeerResult, ...] = (),
    checked_share: float = 0.0,
    variant: str = "",
    source: str = "",
) -> WorkloadResult:
    """The result of a workload, but for the time it took."""
    return WorkloadResult(
        workload=workload.name,
        spec=workload.spec(dtype).name,
        sequences=workload.batch,
        total_q=workload.total_q,
        total_k=workload.total_k,
        num_heads=workload.num_heads,
        num_heads_kv=workload.num_heads_kv,
        causal_alignment=workload.causal_alignment if workload.is_causal else "",
        flops=workload.flops,
        checked_share=checked_share,
        variant=variant,
        source=source,
        peers=peers,
        seconds=0.0,
    )
