"""What is written down: records (facts, one a measured or failed config) and choices (derived from records)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import msgspec

SCHEMA = 1  # of records and choices; a file of another schema is not read

State = Literal["ok", "illegal", "compile", "spill", "rejected", "incorrect", "crash", "timeout"]
Phase = Literal["search", "final"]
Config = dict[str, int | str | bool]  # TileConfig.to_dict()


class DeviceFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A kind of device; the slug is its identity, the label only its marketing name."""

    slug: str
    label: str
    target: str
    units: int  # multiprocessors, or CPUs
    bandwidth_gbs: float  # 0 where unknown
    compute_capability: str  # "9.0"; for a CPU its instruction set


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds that a trial took, by what they were spent on."""

    build: float = 0.0
    check: float = 0.0
    time: float = 0.0


class TuningRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One config of one spec on one workload of one regime: what became of it.

    Numbers that the state leaves meaningless are None. Records of one ``session`` were timed interleaved in one run and
    may be compared with each other directly; across sessions compare ``ratio`` where ``control`` is the same.
    """

    schema: int = SCHEMA
    device: str  # slug
    target: str
    spec: str
    regime: str
    workload: str
    config: Config
    state: State
    reason: str = ""  # of a state other than ok
    phase: Phase = "search"
    session: str = ""
    time_us: float | None = None  # median of a launch
    iqr_us: float | None = None
    samples: int = 0
    tflops: float | None = None  # of unmasked elements
    ratio: float | None = None  # time over the control's in this session
    control: str = ""  # name of the config that ran twice in this session, as its own control
    aa_spread: float | None = None  # |difference| of the control's two medians over the smaller
    error_rel: float | None = None  # ‖out − ref‖ / ‖ref‖ on this workload
    error_abs: float | None = None
    source_sha256: str = ""
    compiler: str = ""
    driver: str = ""
    torch: str = ""
    jagtile: str = ""
    date: str = ""  # UTC, ISO 8601
    by: str = ""  # whose record it is, where it was imported
    cost_s: Cost = Cost()


class ChoiceEntry(msgspec.Struct, frozen=True, kw_only=True):
    """The configs that dispatch uses for a spec: per regime, and for regimes without an entry of their own."""

    default: Config
    regimes: dict[str, Config] = {}

    def serving(self, look_up: Sequence[str]) -> Iterator[tuple[str, Config]]:
        """What serves regimes that are asked for in this order (``runtime.problem.look_up_of``): (regime, config) of
        each that has an entry, then ("", the default).
        """
        yield from ((regime, self.regimes[regime]) for regime in look_up if regime in self.regimes)
        yield "", self.default

    def config(self, look_up: Sequence[str]) -> Config:
        """The first of these."""
        return next(self.serving(look_up))[1]


class Choices(msgspec.Struct, frozen=True, kw_only=True):
    """The choices of one device."""

    schema: int = SCHEMA
    device: DeviceFacts
    specs: dict[str, ChoiceEntry] = {}  # by "target/spec", e.g. "sm_90a/fwd_bf16_d128"
