"""Searches replayed over a recorded sweep: the regret of a method, without a device.

A sweep is every legal config of one spec and regime with its measured time, as ``jagtile tune --exhaustive`` records
it; sweep.py makes one of records. It carries its own space, so that it stays valid when templates change.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, make_dataclass
from functools import cached_property
from pathlib import Path

import msgspec

from jagtile.generator.search import DEFAULT_METHOD, Method, Search
from jagtile.generator.spec import KernelSpec
from jagtile.generator.tile import Knob, TileConfig
from jagtile.runtime.errors import DatabaseError
from jagtile.tuning_db.store import replace_file

_FINALISTS = 3  # timed again at the end, as tune does
_BATCH = 6  # asked together, one batch ahead of the measurements, as tune does on a GPU


class Sweep(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """Every legal config of a spec and regime on one device, and its time."""

    device: str
    target: str
    spec: str
    regime: str
    workload: str
    how: str = ""  # it was timed, where not by ``tune``
    noise: float  # A/A spread of the control, the median of the sessions
    algorithms: dict[str, dict[str, tuple[Knob, ...]]]  # the knobs' domains, in the spaces' order
    # Algorithm and its knobs' values; time over the control's, None: it failed; what the model predicted, if it did.
    configs: tuple[tuple[str, tuple[Knob, ...], float | None, float | None], ...]

    @cached_property
    def name(self) -> str:
        """Of the sweep and its file."""
        return f"{self.device}-{self.spec}-{self.workload.replace(':', '-')}"

    @cached_property
    def spaces(self) -> dict[str, RecordedSpace]:
        """The spaces as they were, by algorithm."""
        return {algorithm: RecordedSpace(self, algorithm) for algorithm in self.algorithms}

    @cached_property
    def times(self) -> dict[TileConfig, float | None]:
        """Time over the control's by config; None: it failed."""
        return {self._config(algorithm, values): time for algorithm, values, time, _ in self.configs}

    @cached_property
    def predictions(self) -> dict[TileConfig, float | None]:
        """What the model said, in microseconds."""
        return {self._config(algorithm, values): guess for algorithm, values, _, guess in self.configs}

    def _config(self, algorithm: str, values: tuple[Knob, ...]) -> TileConfig:
        return self.spaces[algorithm].config_type(*values)

    @cached_property
    def best(self) -> float:
        """The least time."""
        return min(time for time in self.times.values() if time is not None)


class RecordedSpace:
    """A ``Space`` that knows legality by a sweep's list; it can't be rendered."""

    template = ""

    def __init__(self, sweep: Sweep, algorithm: str) -> None:
        self.target, self.algorithm, self._sweep = sweep.target, algorithm, sweep
        knobs = sweep.algorithms[algorithm]
        fields = [(name, type(domain[0]), field(metadata={"short": name})) for name, domain in knobs.items()]
        made = make_dataclass("RecordedConfig", fields, bases=(TileConfig,), frozen=True)
        made.algorithm = algorithm  # type: ignore[attr-defined]
        self.config_type: type[TileConfig] = made

    def serves(self, spec: KernelSpec) -> str | None:
        return None if spec.name == self._sweep.spec else f"the sweep is of {self._sweep.spec}"

    def knobs(self, spec: KernelSpec) -> Mapping[str, tuple[Knob, ...]]:
        return self._sweep.algorithms[self.algorithm]

    def rejection(self, spec: KernelSpec, config: TileConfig) -> str | None:
        return None if config in self._sweep.times else "it was not legal when the sweep was recorded"

    def default(self, spec: KernelSpec) -> TileConfig:
        return next(config for config in self._sweep.times if config.algorithm == self.algorithm)

    def context(self, spec: KernelSpec, config: TileConfig) -> Mapping[str, object]:
        raise NotImplementedError("a recorded space has no template")

    def launch(self, spec: KernelSpec, config: TileConfig) -> Mapping[str, int]:
        return {}

    def compile_flags(self, spec: KernelSpec, config: TileConfig) -> tuple[str, ...]:
        return ()

    def predicted_registers(self, spec: KernelSpec, config: TileConfig) -> int:
        return 0


@dataclass(frozen=True)
class Replay:
    """What a search came to."""

    trials: int
    regret: float  # of the config that the finals chose: its time over the best one's, less 1
    course: tuple[float, ...]  # regret of the best config tried so far, after each trial


def replay(sweep: Sweep, trials: int, *, seed: int = 0, method: Method = DEFAULT_METHOD, noise: bool = True) -> Replay:
    """Search a sweep for ``trials`` configs without seeds, each time with the sweep's noise, then choose by finals."""
    rng = random.Random(seed)
    spread = sweep.noise if noise else 0.0
    search = Search(
        sweep.target,
        KernelSpec.parse(sweep.spec),
        trials=trials,
        seed=seed,
        predict=sweep.predictions.__getitem__,
        spaces=tuple(sweep.spaces.values()),
        method=method,
    )

    def measured(config: TileConfig) -> float | None:
        time = sweep.times[config]
        return None if time is None else time * rng.gauss(1, spread)

    course: list[float] = []
    batch = search.ask(_BATCH)
    while batch:
        following = search.ask(_BATCH)
        for config in batch:
            search.tell(config, measured(config))
            time = sweep.times[config]
            least = min(course[-1] if course else math.inf, math.inf if time is None else time / sweep.best - 1)
            course.append(least)
        batch = following or search.ask(_BATCH)
    finals = {config: measured(config) for config in search.best()[:_FINALISTS]}
    chosen = min(finals, key=lambda config: finals[config] or math.inf, default=None)
    time = sweep.times[chosen] if chosen else None
    return Replay(len(course), math.inf if time is None else time / sweep.best - 1, tuple(course))


def read_sweep(path: Path) -> Sweep:
    """A sweep's file. DatabaseError where it is none."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Sweep)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DatabaseError(f"{path} holds no sweep: {error}") from None


def read_sweeps(folder: Path) -> list[Sweep]:
    """All sweeps of a folder, by name."""
    return [read_sweep(path) for path in sorted(folder.glob("*.json"))]


def write_sweep(sweep: Sweep, folder: Path) -> Path:
    """Write a sweep to ``<folder>/<name>.json``, a field or a config a line."""
    fields = msgspec.to_builtins(sweep)
    rows = ",\n  ".join(json.dumps(row) for row in fields.pop("configs"))
    lines = [f'"{name}": {json.dumps(value)}' for name, value in fields.items()]
    text = "{\n " + ",\n ".join([*lines, f'"configs": [\n  {rows}\n ]']) + "\n}\n"
    path = folder / f"{sweep.name}.json"
    replace_file(path, text.encode())
    return path


def quarter(sweep: Sweep) -> int:
    """A quarter of a sweep's configs: the most that a search may try."""
    return len(sweep.configs) // 4


def share_within(replays: Sequence[Replay], regret: float) -> float:
    """The share of replays whose choice is at most this far from the best."""
    return sum(each.regret <= regret for each in replays) / len(replays)
