"""The steps of one tune: search a regime, time the finalists of all regimes together, conclude.

In a fleet the configs of a search and the regimes of the finals are shared out; each tuner concludes for itself.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import cast

import msgspec

from jagtile.generator.choose import choose
from jagtile.generator.company import Conditions
from jagtile.generator.fleet import Fleet
from jagtile.generator.measure import Plan
from jagtile.generator.resume import best_of_old, current_records, known_ratios
from jagtile.generator.roofline import predictor
from jagtile.generator.search import Search
from jagtile.generator.shared_search import SharedSearch, fingerprint
from jagtile.generator.tile import TileConfig, config_from_dict, recorded_variant
from jagtile.generator.trial import Job, TrialRunner
from jagtile.generator.tune_types import Budget, Progress, RegimeResult, TuneResult
from jagtile.generator.worker import WorkerFailure
from jagtile.generator.workloads import Workload, representative
from jagtile.runtime.device import DeviceId
from jagtile.runtime.dispatch import choose_for_regime, default_variant
from jagtile.runtime.errors import TuningError
from jagtile.runtime.problem import look_up_of, regimes_for
from jagtile.tuning_db.schema import ChoiceEntry, Choices, Phase, TuningRecord
from jagtile.tuning_db.store import Database, identity

log = logging.getLogger("jagtile")

_PROVEN = 2  # best configs of an earlier regime, and of older sources, that a regime tries first
_FINALISTS = 3  # of each regime
_FINALIST_RATIO = 1.1  # a finalist is at most this much slower than its regime's best
_SEARCH_SHARE = 0.8  # of a budget of seconds; the rest is for the finals
_PLANS: dict[tuple[str, Phase], Plan] = {
    ("cuda", "search"): Plan(rounds=7, sample_ms=2),
    ("cuda", "final"): Plan(rounds=15, sample_ms=4, drop_ratio=1.1),
    ("cpu", "search"): Plan(rounds=7, sample_ms=20),
    ("cpu", "final"): Plan(rounds=15, sample_ms=40, drop_ratio=1.1),
}
_NO_DIGITS = str.maketrans("", "", "0123456789.")  # a complaint with other numbers is the same one
_BATCH = {"cuda": 6, "cpu": 4}  # configs timed together in the search


@dataclass(frozen=True)
class Found:
    """What the search of one regime left."""

    regime: str
    workloads: tuple[Workload, ...]
    incumbent: TileConfig
    control: TileConfig | None
    search: Search


@dataclass
class TuneSession:
    """``search`` for every regime, then ``finals``, then ``conclude``."""

    runner: TrialRunner
    database: Database
    device_type: str
    budget: Budget
    seed: int
    fleet: Fleet | None
    resume: bool
    progress: Progress
    builder: ThreadPoolExecutor
    begin: float
    records: list[TuningRecord]  # of this process so far
    keep: Callable[[TuningRecord], None]  # writes down a record of another process
    _disturbances: dict[str, None] = field(default_factory=dict)
    _failed: set[TileConfig] = field(default_factory=set)
    _finals: list[TuningRecord] = field(default_factory=list)

    def look_around(self) -> None:
        """Tell, once, what makes timings doubtful."""
        try:
            now = cast(Conditions, self.runner.worker.call("conditions", timeout=self.runner.timeout))
        except WorkerFailure as failure:  # no config's fault, and the next call has a fresh worker
            log.info("the device's conditions are not known: %s", failure.reason)
            return
        if now.unknown:
            log.info("whether others use the device is not known: %s", now.unknown)
        for complaint in now.complaints:
            if complaint.translate(_NO_DIGITS) not in {known.translate(_NO_DIGITS) for known in self._disturbances}:
                log.warning("timings are doubtful: %s", complaint)
                self._disturbances[complaint] = None

    def search(self, regime: str, regimes_left: int, before: Sequence[Found] = ()) -> Found:
        """Spend a regime's share of the budget; the best of the regimes ``before`` are tried first."""
        spec, target = self.runner.spec, self.runner.target
        workloads = representative(spec, regime, target)
        incumbent = choose_for_regime(spec, regime, self._device(), self.database).variant.config
        good = [incumbent, default_variant(spec, target, regime).config, default_variant(spec, target).config]
        proven = [config for found in before for config in found.search.best()[:_PROVEN]]
        old = best_of_old(self.database, self.runner.facts.device.slug, target, spec, regime, _PROVEN)
        search = self._make_search(regime, workloads, [*good, *proven, *old])
        records = self._current_records() if self.resume else []
        self._failed |= {config for config, record in records if record.state != "ok"}
        for config in self._failed:
            search.tell(config, None)
        working = (c for c in good if c not in self._failed and self.runner.works(c, workloads[0]))
        control = next(working, None)
        for config, ratio in known_ratios(records, regime, workloads, control):
            search.tell(config, ratio)
        if isinstance(search, SharedSearch):
            search.control = control
            search.publish(records)
            search.sync()
        self.progress.regime_started(regime, workloads[0], len(search.results) + search.remaining, len(search.results))
        return self._spend(Found(regime, workloads, incumbent, control, search), self._deadline(regimes_left))

    def settle(self, found: Sequence[Found]) -> list[Found]:
        """Wait until nobody in the fleet searches any more, and try what tuners that are gone left untried."""
        settled = []
        for each in found:
            search = each.search
            while isinstance(search, SharedSearch):
                if time.monotonic() < self._deadline(1):
                    each = self._spend(each, self._deadline(1))
                search.sync()
                if not search.elsewhere:
                    break
                time.sleep(search.pause)
            self._failed |= {config for config, value in search.results.items() if value is None}
            settled.append(each)
        return settled

    def _make_search(self, regime: str, workloads: tuple[Workload, ...], seeds: Sequence[TileConfig]) -> Search:
        spec, target, trials = self.runner.spec, self.runner.target, self._trials()
        predict = predictor(self._device(), spec, workloads)
        if self.fleet is None:
            return Search(target, spec, trials=trials, seeds=seeds, seed=self.seed, predict=predict)
        return SharedSearch(
            target,
            spec,
            trials=trials,
            seeds=seeds,
            seed=self.seed + self.fleet.number,  # tuners that draw alike would be in each other's way
            predict=predict,
            ledger=self.fleet.ledger(f"{regime}/{fingerprint(target, spec, workloads)}"),
            regime=regime,
            workloads=workloads,
            recorded=self.records,
        )

    def _spend(self, found: Found, deadline: float) -> Found:
        """Measure batch after batch, until the search has no more to ask or the time is up."""
        control = found.control
        for batch in self._batches(found.search):
            control = self._measure(found, batch, control)
            if time.monotonic() > deadline:
                break
        return replace(found, control=control)

    def _batches(self, search: Search) -> Iterator[list[TileConfig]]:
        """Built batches. On a GPU the next one is built meanwhile; on a CPU that would disturb the timing."""
        size = _BATCH[self.device_type]
        batch = search.ask(size)
        building = self.builder.submit(self.runner.prepare, batch)
        while batch:
            building.result()
            if self.device_type == "cpu":
                yield batch
                batch = search.ask(size)
                building = self.builder.submit(self.runner.prepare, batch)
            else:
                following = search.ask(size)
                building = self.builder.submit(self.runner.prepare, following)
                yield batch
                batch = following or search.ask(size)

    def _measure(self, found: Found, batch: Sequence[TileConfig], control: TileConfig | None) -> TileConfig | None:
        """Measure a batch on the regime's workloads and tell the search; the control in force afterwards."""
        logs = dict.fromkeys(batch, 0.0)
        for workload in found.workloads:
            job = Job(found.regime, workload, "search", _PLANS[self.device_type, "search"])
            outcome = self.runner.run(job, list(logs), control)
            control = outcome.control
            self._failed |= {config for config, ratio in outcome.ratios.items() if ratio is None}
            logs = {c: logs[c] + math.log(ratio) for c, ratio in outcome.ratios.items() if ratio is not None}
        for config in batch:
            value = math.exp(logs[config] / len(found.workloads)) if config in logs else None
            found.search.tell(config, value)
        return control

    def finals(self, found: Sequence[Found], ship: bool) -> None:
        """Time the best of all regimes, the incumbents and the default together, in every regime.

        In a fleet: in those regimes that no other tuner times with the same configs.
        """
        spec, target = self.runner.spec, self.runner.target
        pool = [default_variant(spec, target).config]
        for regime in found:
            pool += [regime.incumbent, *([regime.control] if regime.control else []), *_finalists(regime.search)]
        pool += self._to_replace(found, ship)
        pool = [config for config in dict.fromkeys(pool) if config not in self._failed]
        if self.fleet is None:
            for regime in found:
                self._finals += self._final(regime, pool)
            return
        ledger = self.fleet.ledger(f"finals/{fingerprint(target, spec, (w for f in found for w in f.workloads))}")
        names = ", ".join(sorted(config.name for config in pool))
        keys = {f"{regime.regime}: {names}": regime for regime in found}
        for key in ledger.share(tuple(keys)):
            ledger.tell(key, 0.0, self._final(keys[key], pool))
        self._finals += [record for key in keys for record in ledger.read().results[key].records]

    def _to_replace(self, found: Sequence[Found], ship: bool) -> list[TileConfig]:
        """What is chosen where the new choices go: beside a user's own, dispatch takes nothing of what is shipped."""
        spec, target = self.runner.spec, self.runner.target
        slug = self.runner.facts.device.slug
        choices = self.database.choices("shipped" if ship else "user", slug)
        entry = None if choices is None else choices.specs.get(f"{target}/{spec.name}")
        if entry is None:
            return []
        variants = (recorded_variant(target, spec, entry.config(look_up_of(regime.regime)))[0] for regime in found)
        return [variant.config for variant in variants if variant is not None]

    def _final(self, found: Found, pool: Sequence[TileConfig]) -> list[TuningRecord]:
        """The finals of one regime; their records."""
        configs, before = [config for config in pool if config not in self._failed], len(self.records)
        self.progress.finals_started(found.regime, len(configs))
        control = found.control if found.control in configs else None
        for workload in found.workloads:
            job = Job(found.regime, workload, "final", _PLANS[self.device_type, "final"])
            outcome = self.runner.run(job, configs, control)
            self._failed |= {config for config, ratio in outcome.ratios.items() if ratio is None}
        return self.records[before:]

    def conclude(self, found: Sequence[Found], ship: bool, slack: float) -> TuneResult:
        """Choose from the records on disk, write the choices, sum up."""
        facts, key = self.runner.facts.device, f"{self.runner.target}/{self.runner.spec.name}"
        with self.database.changing_choices(facts.slug, ship):
            self._export()
            current = [record for _, record in self._current_records()]
            known = [*current, *self.records]
            before = self.database.choices("shipped" if ship else "user", facts.slug) or Choices(device=facts)
            if key not in before.specs:
                before = msgspec.structs.replace(before, specs={**before.specs, key: self._in_force(found, ship)})
            # A compiler's verdicts of this session count, whichever compiler is at hand.
            refused = [record for record in self.records if record.state in ("compile", "spill", "rejected")]
            choices = choose([*current, *refused], msgspec.structs.replace(before, device=facts), slack)
            results = tuple(self._result(regime, choices.specs[key], known) for regime in found)
            path = self.database.write_choices(choices, ship)
        seconds = time.monotonic() - self.begin
        return TuneResult(
            self.runner.spec, choices, path, results, tuple(self.records), seconds, tuple(self._disturbances)
        )

    def _export(self) -> None:
        """Write down what the rest of the fleet measured, but for what is on disk here already."""
        if self.fleet is None:
            return
        runner = self.runner
        own = self.database.records(device=runner.facts.device.slug, target=runner.target, spec=runner.spec.name)
        missing = {identity(record): record for record in self.fleet.records()}
        for known in own:
            missing.pop(identity(known), None)
        for record in missing.values():
            self.keep(record)

    def _in_force(self, found: Sequence[Found], ship: bool) -> ChoiceEntry:
        """What dispatch takes so far: for the regimes that were tuned and, as a new entry of the user's hides the
        shipped one, for the others too.
        """
        spec, regimes = self.runner.spec, {f.regime: f.incumbent for f in found}
        for regime in () if ship else regimes_for(spec.direction, self.runner.target):
            decision = choose_for_regime(spec, regime, self._device(), self.database)
            if regime not in regimes and decision.source != "default" and not decision.is_borrowed:
                regimes[regime] = decision.variant.config
        return ChoiceEntry(
            default=found[0].incumbent.to_dict(),
            regimes={regime: config.to_dict() for regime, config in regimes.items()},
        )

    def _result(self, found: Found, entry: ChoiceEntry, known: Sequence[TuningRecord]) -> RegimeResult:
        """``known``: all records, those of earlier runs too."""
        own = [r for r in self._finals if (r.regime, r.state) == (found.regime, "ok")]
        ends = {repr(r.config): r for r in known if r.regime == found.regime or r.state != "ok"}
        states = dict(Counter(str(record.state) for record in ends.values()))
        if not own:
            counts = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
            first = next(iter(ends.values())).reason if ends else "the budget allows no trial"
            raise TuningError(
                f"{self.runner.spec.name}, {found.regime}: none of {len(ends)} configs works ({counts}); "
                f"the first one's reason: {first}"
            )
        timed: dict[TileConfig, float] = {}
        for record in own:
            config = config_from_dict(record.target, record.config)
            timed[config] = timed.get(config, 0.0) + (record.time_us or math.inf)
        chosen = config_from_dict(self.runner.target, entry.regimes[found.regime])
        if chosen not in timed:  # another tuner's finals are later than ours
            wanted = (found.regime, "ok", chosen.to_dict())
            latest = {r.workload: r for r in known if (r.regime, r.state, r.config) == wanted}
            timed[chosen] = sum(r.time_us or math.inf for r in latest.values())
        flops = sum(workload.flops_of(self.runner.spec.direction) for workload in found.workloads)
        return RegimeResult(
            regime=found.regime,
            workload=", ".join(workload.name for workload in found.workloads),
            chosen=chosen,
            chosen_us=timed[chosen],
            chosen_tflops=flops / timed[chosen] / 1e6,
            incumbent=found.incumbent,
            incumbent_us=timed.get(found.incumbent),
            best_us=min(timed.values()),
            noise=max(record.aa_spread or 0.0 for record in own),
            states=states,
        )

    def _device(self) -> DeviceId:
        return DeviceId(**msgspec.structs.asdict(self.runner.facts.device))

    def _current_records(self) -> list[tuple[TileConfig, TuningRecord]]:
        runner = self.runner
        return current_records(self.database, runner.facts.device.slug, runner.target, runner.spec)

    def _trials(self) -> int | None:
        """None where only time ends the search; a budget without any limit means the whole space."""
        return self.budget.trials if self.budget.seconds is not None else self.budget.trials or 10**9

    def _deadline(self, regimes_left: int) -> float:
        if self.budget.seconds is None:
            return math.inf
        now = time.monotonic()
        return now + max(0.0, self.begin + self.budget.seconds * _SEARCH_SHARE - now) / regimes_left


def _finalists(search: Search) -> list[TileConfig]:
    best = search.best()
    within = search.results[best[0]] if best else None
    return [c for c in best[:_FINALISTS] if within and (search.results[c] or math.inf) <= within * _FINALIST_RATIO]
