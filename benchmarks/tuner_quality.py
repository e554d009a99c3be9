"""How good the tuner's choices are: against exhaustive sweeps, with a quarter of the trials, twice.

    PYTHONPATH=.pkg python benchmarks/tuner_quality.py FOLDER fwd_bf16_d256 bwd_bf16_d128 [--regime long]

Of each spec every legal config is measured (a sweep), then each regime is tuned twice by itself from nothing, with
other seeds and a quarter of the trials. The sweep's best configs and both choices are timed again together, in turns:
``regret`` is a choice's time over the best one's, less 1, ``apart`` the slower choice's over the faster one's, less 1.
A choice may be a slack slower than the best found, in favour of the default (--slack, as the tuner's own).

Exit status 1 where a regret or a distance is above --most. FOLDER/sweeps holds the sweeps for tests/tune/sweeps,
FOLDER/quality.json the table. What is on record in FOLDER is not measured again: interrupted, the same command goes on.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec
import torch

from jagtile.generator.choose import SLACK
from jagtile.generator.measure import Plan
from jagtile.generator.replay import Sweep, write_sweep
from jagtile.generator.spec import KernelSpec
from jagtile.generator.sweep import legal_of, sweeps, values_of
from jagtile.generator.tile import TileConfig
from jagtile.generator.trial import Caller, Job, TrialRunner
from jagtile.generator.tune import Budget, TuneResult, facts_of, tune, worker_for
from jagtile.generator.workloads import representative
from jagtile.runtime.problem import REGIMES, regimes_for
from jagtile.tuning_db.store import Database

SEEDS = (0, 1)
FINALISTS = 3  # best of the sweep that are timed again: the least of many noisy times is not the best config's
TIMEOUT = 30.0
PLANS = {"cuda": Plan(rounds=21, sample_ms=4), "cpu": Plan(rounds=15, sample_ms=40)}


@dataclass(frozen=True)
class Quality:
    """What two tunes of a spec and regime came to."""

    spec: str
    regime: str
    configs: int  # legal ones, all of them measured in the sweep
    trials: int  # of each tune
    best: str
    chosen: tuple[str, ...]  # by each tune
    regrets: tuple[float, ...]
    apart: float

    @property
    def worst(self) -> float:
        """The largest of the regrets and the distance."""
        return max(*self.regrets, self.apart)


class Examiner:
    """Measures specs on one device; ``options`` are those of ``tune``."""

    def __init__(self, device: torch.device, folder: Path, worker: Caller, **options: object) -> None:
        self._device, self._folder, self._worker, self._options = device, folder, worker, options

    def examine(self, spec: KernelSpec, regimes: Sequence[str]) -> tuple[list[Sweep], list[Quality]]:
        """The sweeps of a spec, and the quality of its tunes in each regime."""
        swept = self._database("swept")
        result = self._tune(spec, regimes, None, swept)
        legal = legal_of(result.choices.device.target, spec)
        slug = result.choices.device.slug
        made = list(sweeps(swept.records(spec=spec.name), {slug: result.choices.device}))
        trials = len(legal) // 4
        found = []
        for regime in regimes:
            chosen: list[TileConfig] = []
            for seed in SEEDS:
                tuned = self._tune(spec, (regime,), trials, self._database(f"tuned-{regime}-{seed}"), seed)
                chosen.append(tuned.regimes[0].chosen)
            candidates = [*best_of([sweep for sweep in made if sweep.regime == regime], legal)[:FINALISTS], *chosen]
            found.append(verdict(spec, regime, len(legal), trials, chosen, self._times(spec, regime, candidates)))
        return made, found

    def _database(self, name: str) -> Database:
        return Database(self._folder / name, self._folder / "nothing shipped")

    def _tune(
        self, spec: KernelSpec, regimes: Sequence[str], trials: int | None, database: Database, seed: int = 0
    ) -> TuneResult:
        return tune(
            spec,
            self._device,
            tuple(regimes),
            budget=Budget(trials),
            database=database,
            seed=seed,
            timeout=TIMEOUT,
            make_worker=lambda: nullcontext(self._worker),
            **self._options,
        )

    def _times(self, spec: KernelSpec, regime: str, configs: Sequence[TileConfig]) -> Mapping[TileConfig, float]:
        """Times in proportion to each other, in one session: the geometric mean over the regime's workloads."""
        facts = facts_of(self._worker, self._device, TIMEOUT)
        build = self._options.get("build") or _build
        runner = TrialRunner(facts.device.target, spec, self._worker, facts, build, lambda record: None, TIMEOUT)
        distinct = list(dict.fromkeys(configs))
        ratios: dict[TileConfig, list[float]] = {config: [] for config in distinct}
        for workload in representative(spec, regime, facts.device.target):
            job = Job(regime, workload, "final", PLANS[self._device.type])
            for config, ratio in runner.run(job, distinct, distinct[0]).ratios.items():
                ratios[config].append(math.inf if ratio is None else ratio)
        return {config: statistics.geometric_mean(each) for config, each in ratios.items()}


def best_of(made: Sequence[Sweep], legal: Sequence[TileConfig]) -> list[TileConfig]:
    """The configs that worked on every workload of a regime, the best on the whole first."""
    logs: dict[Hashable, list[float]] = {}
    for sweep in made:
        for algorithm, values, time, _ in sweep.configs:
            if time is not None:
                logs.setdefault((algorithm, values), []).append(math.log(time))
    by_values = {(config.algorithm, values_of(config)): config for config in legal}
    whole = {by_values[name]: sum(each) for name, each in logs.items() if len(each) == len(made)}
    return sorted(whole, key=whole.__getitem__)


def verdict(
    spec: KernelSpec,
    regime: str,
    configs: int,
    trials: int,
    chosen: Sequence[TileConfig],
    times: Mapping[TileConfig, float],
) -> Quality:
    """How far the chosen configs are from the best one, and from each other."""
    best = min(times, key=times.__getitem__)
    own = [times[config] for config in chosen]
    return Quality(
        spec.name,
        regime,
        configs,
        trials,
        best.name,
        tuple(config.name for config in chosen),
        tuple(round(time / times[best] - 1, 5) for time in own),
        round(max(own) / min(own) - 1, 5),
    )


def _build(variants):
    from jagtile.generator.build import build

    return build(variants)


def examine_all(
    specs: Sequence[KernelSpec],
    regimes: Sequence[str],
    device: torch.device,
    folder: Path,
    make_worker: Callable[[], AbstractContextManager[Caller]] | None = None,
    **options: object,
) -> list[Quality]:
    """Examine each spec in those of the regimes that it has, print a line a regime, and write what was found as it
    comes.
    """
    found: list[Quality] = []
    with (make_worker or worker_for(device, 0))() as worker:
        for spec in specs:
            own = [regime for regime in regimes if regime in regimes_for(spec.direction, device.type)]
            made, qualities = Examiner(device, folder, worker, **options).examine(spec, own)
            (folder / "sweeps").mkdir(parents=True, exist_ok=True)
            for sweep in made:
                write_sweep(sweep, folder / "sweeps")
            for each in qualities:
                found.append(each)
                regrets = "".join(f"{100 * regret:8.2f} %" for regret in each.regrets)
                of = f"{each.trials} of {each.configs}"
                print(
                    f"{each.spec:28}{each.regime:8}{of:>12}{regrets}{100 * each.apart:8.2f} %  {each.best}", flush=True
                )
            (folder / "quality.json").write_bytes(msgspec.json.format(msgspec.json.encode([asdict(q) for q in found])))
    return found


def main() -> None:
    """Parse, examine, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("specs", nargs="+", type=KernelSpec.parse)
    parser.add_argument("--regime", action="append", choices=REGIMES, help="only this one (repeatable)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--slack", type=float, default=SLACK)
    parser.add_argument("--most", type=float, default=0.02)
    options = parser.parse_args()
    print(f"{'spec':28}{'regime':8}{'trials':>12}{'regret':>10}{'regret':>10}{'apart':>10}  best")
    device, regimes = torch.device(options.device), options.regime or REGIMES
    found = examine_all(options.specs, regimes, device, options.folder, slack=options.slack)
    failed = [each for each in found if each.worst > options.most]
    print(f"{len(found) - len(failed)} of {len(found)} pairs within {100 * options.most:g} %")
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
