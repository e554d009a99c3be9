"""A search whose configs are shared out among the tuners of a fleet: claimed before they are measured."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence

from jagtile.generator.fleet import Ledger
from jagtile.generator.resume import known_ratios
from jagtile.generator.search import Search
from jagtile.generator.spec import KernelSpec
from jagtile.generator.tile import TileConfig, Variant, legal_configs, spaces_of
from jagtile.generator.trial import source_sha256
from jagtile.generator.workloads import Workload
from jagtile.tuning_db.schema import TuningRecord


class SharedSearch(Search):
    """One tuner's part in a fleet's search for one regime. ``trials`` are the fleet's, all tuners' together."""

    def __init__(
        self,
        target: str,
        spec: KernelSpec,
        *,
        trials: int | None,
        seeds: Sequence[TileConfig] = (),
        seed: int = 0,
        predict: Callable[[TileConfig], float | None] = lambda config: None,
        ledger: Ledger,
        regime: str,
        workloads: tuple[Workload, ...],
        recorded: Sequence[TuningRecord],
    ) -> None:
        """``recorded``: what this process measures, a list that grows. The others see it with each result."""
        super().__init__(target, spec, trials=trials, seeds=seeds, seed=seed, predict=predict)
        self.control: TileConfig | None = None  # whose time the others' results are put in proportion to
        self.pause = ledger.fleet.poll  # seconds between two looks at what the others do
        self._ledger, self._regime, self._workloads, self._recorded = ledger, regime, workloads, recorded
        self._named = {config.name: config for config in self.legal}

    def publish(self, records: Sequence[tuple[TileConfig, TuningRecord]]) -> None:
        """Let the others know all that this search was told so far, with the records behind it."""
        known = self._ledger.read().holders
        for config, value in self.results.items():
            if config.name not in known:
                own = [r for c, r in records if c == config and (r.regime == self._regime or r.state != "ok")]
                self._ledger.publish(config.name, self.point(config), value, own)

    def ask(self, count: int) -> list[TileConfig]:
        """Up to ``count`` configs that nobody else measures; none where the fleet's budget or the space is used up."""
        while True:
            self.sync()
            wanted = super().ask(count)
            points = {config.name: self.point(config) for config in wanted}
            won = self._ledger.claim(points, self.trials) if points else set()
            for config in wanted:
                if config.name not in won:
                    self.withdraw(config)
            if won or not wanted:
                return [config for config in wanted if config.name in won]

    def tell(self, config: TileConfig, value: float | None) -> None:
        """As ``Search.tell``; what came of a config that we claimed is told to all."""
        super().tell(config, value)
        if self._ledger.holds(config.name):
            own = [r for r in self._recorded if r.config == config.to_dict() and r.regime == self._regime]
            self._ledger.tell(config.name, value, own)

    def sync(self) -> None:
        """Learn what the others found and what they are at."""
        view = self._ledger.read()
        entries = {self._named[key]: entry for key, entry in view.results.items() if key in self._named}
        records = [(config, record) for config, entry in entries.items() for record in entry.records]
        ratios = dict(known_ratios(records, self._regime, self._workloads, self.control))
        for config, entry in entries.items():
            if config not in self.results:
                super().tell(config, None if entry.value is None else ratios.get(config, entry.value))
        self.elsewhere = {self._named[key] for key in view.claimed if key in self._named}


def fingerprint(target: str, spec: KernelSpec, workloads: Iterable[Workload]) -> str:
    """Of what results depend on: every legal config's source and the workloads. Tuners share what has the same one."""
    variants = [Variant(target, spec, c) for space in spaces_of(target, spec) for c in legal_configs(space, spec)]
    facts = [*map(source_sha256, variants), *map(repr, workloads)]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:12]
