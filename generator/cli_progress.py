"""What ``jagtile tune`` shows while it runs: a live bar on a terminal, plain lines elsewhere; both on stderr."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from jagtile.generator.cli_common import shortened, text
from jagtile.generator.tile import config_from_dict
from jagtile.generator.workloads import Workload
from jagtile.tuning_db.schema import TuningRecord


class TuneProgress:
    """A ``tune_types.Progress`` and a context manager."""

    def __init__(self, spec: str, regimes: int) -> None:
        self._spec = spec
        self._regimes = regimes
        self._regime_number = 0
        self._best: TuningRecord | None = None
        self._console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[best]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(spec, total=None, best="")

    def __enter__(self) -> TuneProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def regime_started(self, regime: str, workload: Workload, trials: int, known: int) -> None:
        """A regime's search begins."""
        self._regime_number += 1
        self._best = None
        on_record = f", {known} on record" if known else ""
        self._say(
            f"{regime} ({self._regime_number} of {self._regimes}): up to {trials} configs on {workload.name}{on_record}"
        )
        self._bar.reset(self._task, total=trials, completed=known, description=f"{self._spec} {regime}", best="")

    def recorded(self, record: TuningRecord) -> None:
        """A config was measured or failed."""
        name = config_from_dict(record.target, record.config).name
        if record.state == "ok" and record.time_us is not None:
            if self._best is None or record.time_us < (self._best.time_us or 0.0):
                self._best = record
                self._bar.update(self._task, best=f"best {name} {text(record.time_us)} us")
            if record.phase == "search":
                self._plain(f"  {name}: {text(record.time_us)} us")
        else:
            self._say(f"  {name}: {record.state}: {shortened(record.reason)}")
        self._bar.advance(self._task)

    def finals_started(self, regime: str, configs: int) -> None:
        """The finals of a regime begin."""
        self._best = None
        self._say(f"finals, {regime}: {configs} configs")
        self._bar.reset(self._task, total=configs, description=f"{self._spec} finals, {regime}", best="")

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _plain(self, line: str) -> None:
        """A line where there is no bar to show it."""
        if not self._console.is_terminal:
            self._say(line)
