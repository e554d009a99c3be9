"""Compare rules that end a config's timing early, replayed over recorded sweeps: rounds spent, and regret.

    python benchmarks/pruners.py tests/tune/sweeps

A round's sample of a config is its recorded time with the sweep's noise. The configs come in random order; of
those that were timed to the end the one with the least median is chosen. Needs scipy for Optuna's WilcoxonPruner, whose
instances are the rounds: in each of them all configs have the same conditions.
"""

from __future__ import annotations

import random
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import optuna

from jagtile.generator.measure import Plan
from jagtile.generator.replay import Sweep, read_sweeps

PLAN = Plan(rounds=7, sample_ms=2)  # as in the search on a GPU
Samples = Callable[[int], float]  # of a round


def everything(sweep: Sweep, rng: random.Random) -> tuple[int, float]:
    """All rounds of all configs."""
    return _by_ratio(sweep, rng, float("inf"))


def ours(sweep: Sweep, rng: random.Random) -> tuple[int, float]:
    """A config far behind the best after three rounds is dropped."""
    return _by_ratio(sweep, rng, PLAN.drop_ratio)


def wilcoxon(sweep: Sweep, rng: random.Random) -> tuple[int, float]:
    """Optuna's signed-rank test against the best config so far, from the third round on."""
    pruner = optuna.pruners.WilcoxonPruner(p_threshold=0.1, n_startup_steps=PLAN.drop_after - 1)
    study, rounds, medians = optuna.create_study(pruner=pruner), 0, {}
    for config, samples in _samples(sweep, rng):
        trial, own = study.ask(), []
        for place in range(PLAN.rounds):
            own.append(samples(place))
            trial.report(own[-1], place)
            if trial.should_prune():
                break
        rounds += len(own)
        if len(own) == PLAN.rounds:
            medians[config] = statistics.median(own)
            study.tell(trial, medians[config])
        else:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    return rounds, _regret(sweep, medians)


def _by_ratio(sweep: Sweep, rng: random.Random, ratio: float) -> tuple[int, float]:
    rounds, medians = 0, {}
    best = float("inf")
    for config, samples in _samples(sweep, rng):
        own = [samples(place) for place in range(PLAN.drop_after)]
        if statistics.median(own) <= ratio * best:
            own += [samples(place) for place in range(PLAN.drop_after, PLAN.rounds)]
            medians[config] = statistics.median(own)
            best = min(best, medians[config])
        rounds += len(own)
    return rounds, _regret(sweep, medians)


def _samples(sweep: Sweep, rng: random.Random) -> list[tuple[object, Samples]]:
    def of(time: float) -> Samples:
        return lambda place: time * rng.gauss(1, sweep.noise)

    found = [(config, of(time)) for config, time in sweep.times.items() if time is not None]
    rng.shuffle(found)
    return found


def _regret(sweep: Sweep, medians: dict[object, float]) -> float:
    chosen = min(medians, key=medians.__getitem__)
    return (sweep.times[chosen] or float("inf")) / sweep.best - 1  # type: ignore[index]


def main() -> None:
    """Print a row a rule."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sweeps = read_sweeps(Path(sys.argv[1]))
    print("| rule | rounds a config | regret: mean | worst |\n|---|---|---|---|")
    for rule in (everything, ours, wilcoxon):
        found = [(s, *rule(s, random.Random(seed))) for s in sweeps for seed in range(5)]
        rounds = statistics.mean(count / len(s.configs) for s, count, _ in found)
        regrets = [regret for _, _, regret in found]
        print(f"| {rule.__name__} | {rounds:.1f} | {statistics.mean(regrets):.2%} | {max(regrets):.2%} |")


if __name__ == "__main__":
    main()
