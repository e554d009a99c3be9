"""What a caller of ``tune`` gives and gets: a budget, a progress listener, results."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from jagtile.generator.spec import KernelSpec
from jagtile.generator.tile import TileConfig
from jagtile.generator.workloads import Workload
from jagtile.runtime.errors import UnsupportedError
from jagtile.tuning_db.schema import Choices, TuningRecord

DEFAULT_TRIALS = 40


@dataclass(frozen=True)
class Budget:
    """Of one spec. ``trials``: distinct configs a regime, those on record included. ``seconds``: for everything.

    None means no limit of that kind; with neither, a regime's whole space is tried.
    """

    trials: int | None = DEFAULT_TRIALS
    seconds: float | None = None


DEFAULT_BUDGET = Budget()


def check_tunable(spec: KernelSpec) -> None:
    """UnsupportedError for what takes another spec's choices."""
    if spec.dropout:
        other = replace(spec, dropout=False)
        raise UnsupportedError(f"{spec.name} is not tuned: kernels with dropout take the choices of {other.name}")


class Progress(Protocol):
    """What is called as a tune goes on, from the thread that called ``tune``."""

    def regime_started(self, regime: str, workload: Workload, trials: int, known: int) -> None:
        """The search of a regime begins: up to ``trials`` configs, of which ``known`` are on record."""
        ...

    def recorded(self, record: TuningRecord) -> None:
        """A config was measured or failed (``record.phase``: in the search or in the finals)."""
        ...

    def finals_started(self, regime: str, configs: int) -> None:
        """The finalists of all regimes are about to be timed together on this regime's workload."""
        ...


class Silent:
    """A ``Progress`` that shows nothing."""

    def regime_started(self, regime: str, workload: Workload, trials: int, known: int) -> None:
        pass

    def recorded(self, record: TuningRecord) -> None:
        pass

    def finals_started(self, regime: str, configs: int) -> None:
        pass


@dataclass(frozen=True)
class RegimeResult:
    """What a tune found for one regime. Times are those of the finals, in microseconds a launch."""

    regime: str
    workload: str
    chosen: TileConfig
    chosen_us: float
    chosen_tflops: float
    incumbent: TileConfig  # what dispatch would have used before
    incumbent_us: float | None  # None where it does not work
    best_us: float
    noise: float  # A/A spread of the control in the finals
    states: dict[str, int]  # how many configs ended how, in this regime or by failing in another


@dataclass(frozen=True)
class TuneResult:
    """Outcome of ``tune``."""

    spec: KernelSpec
    choices: Choices
    path: Path  # of the choices
    regimes: tuple[RegimeResult, ...]
    records: tuple[TuningRecord, ...]  # of this run
    seconds: float
    disturbances: tuple[str, ...] = ()  # what made timings doubtful: others on the device, lowered clocks
