"""Compare ways to search by replaying them over recorded sweeps: regret of the choice against trials.

    python benchmarks/samplers.py tests/tune/sweeps --seeds 20 --plot docs/samplers.svg

Prints the tables of docs/tuning.md. Needs matplotlib for the plot; scipy and cmaes for the samplers that use them (what
can't be imported is left out). Every method is run with the tuner's batches and the sweeps' own noise. `--results`
keeps replays in a file, and takes from it those that are there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import msgspec
import optuna

from jagtile.generator.replay import Replay, Sweep, quarter, read_sweeps, replay, share_within
from jagtile.generator.search import DEFAULT_METHOD, Method

Make = Callable[[int], optuna.samplers.BaseSampler]
OURS = "the tuner's"
Results = dict[str, dict[str, list[Replay]]]  # by method and sweep


def _random(seed: int) -> optuna.samplers.BaseSampler:
    return optuna.samplers.RandomSampler(seed=seed)


def _brute_force(seed: int) -> optuna.samplers.BaseSampler:
    return optuna.samplers.BruteForceSampler(seed=seed)


def _tpe(seed: int) -> optuna.samplers.BaseSampler:
    return optuna.samplers.TPESampler(seed=seed)


def _tpe_univariate(seed: int) -> optuna.samplers.BaseSampler:
    return optuna.samplers.TPESampler(seed=seed, multivariate=False)


def _gp(seed: int) -> optuna.samplers.BaseSampler:
    return optuna.samplers.GPSampler(seed=seed, n_startup_trials=6, deterministic_objective=False)


def _cma(seed: int) -> optuna.samplers.BaseSampler:
    return optuna.samplers.CmaEsSampler(seed=seed, n_startup_trials=1, warn_independent_sampling=False)


def _genetic(seed: int) -> optuna.samplers.BaseSampler:
    return optuna.samplers.NSGAIISampler(seed=seed, population_size=8)


_SAMPLERS: dict[str, tuple[Make, tuple[str, ...]]] = {
    "random": (_random, ()),
    "brute force": (_brute_force, ()),
    "TPE": (_tpe, ()),
    "TPE, univariate": (_tpe_univariate, ()),
    "GP": (_gp, ("scipy",)),
    "CMA-ES": (_cma, ("cmaes",)),
    "NSGA-II": (_genetic, ()),
}


def methods() -> dict[str, Method]:
    """Each sampler by itself and followed by the descent, and the tuner's own method."""
    found = {OURS: DEFAULT_METHOD}
    for name, (make, needs) in _SAMPLERS.items():
        if all(find_spec(module) for module in needs):
            ordered = name == "CMA-ES"  # it knows numbers only
            found[name] = Method(0.0, 1.0, make, ordered)
            found[f"{name}, then descent"] = Method(0.0, 0.6, make, ordered)
    found["descent"] = Method(0.0, 0.15, _random)
    for predicted in (0.0, 0.3, 0.5, 1.0):
        found[f"the tuner's, {predicted:.0%} predicted"] = Method(predicted)
    return found


def _run(task: tuple[str, Sweep, int]) -> Replay:
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    name, sweep, seed = task
    return replay(sweep, quarter(sweep), seed=seed, method=methods()[name])


def compare(sweeps: Sequence[Sweep], names: Sequence[str], seeds: int, jobs: int, known: Results) -> Results:
    """Replays by method and sweep, a seed each; those that are known are not run again."""
    found = {name: {sweep.name: known.get(name, {}).get(sweep.name, [])[:seeds] for sweep in sweeps} for name in names}
    tasks = [
        (name, sweep, seed)
        for name, sweep in itertools.product(names, sweeps)
        for seed in range(len(found[name][sweep.name]), seeds)
    ]
    with ProcessPoolExecutor(jobs) as pool:
        for (name, sweep, _), result in zip(tasks, pool.map(_run, tasks), strict=True):
            found[name][sweep.name].append(result)
    return found


def print_tables(sweeps: Sequence[Sweep], found: Results) -> None:
    """A row a method, then a row a sweep for the tuner's own."""
    print("| method | regret: mean | median | 9 of 10 below | within 2 % | worst sweep's mean |")
    print("|---|---|---|---|---|---|")
    for name, by_sweep in sorted(found.items(), key=lambda item: _mean(_all(item[1]))):
        each = _all(by_sweep)
        tenths = statistics.quantiles([min(replay.regret, 1.0) for replay in each], n=10)
        print(
            f"| {name} | {_mean(each):.2%} | {statistics.median(r.regret for r in each):.2%} | {tenths[-1]:.2%} "
            f"| {share_within(each, 0.02):.0%} | {max(map(_mean, by_sweep.values())):.2%} |"
        )
    print("\n| sweep | configs | trials | noise | regret: mean | worst | within 2 % |\n|---|---|---|---|---|---|---|")
    for sweep in sweeps:
        own = found[OURS][sweep.name]
        print(
            f"| {sweep.device} {sweep.spec} {sweep.regime} | {len(sweep.configs)} | {quarter(sweep)} "
            f"| {sweep.noise:.1%} | {_mean(own):.2%} | {max(r.regret for r in own):.2%} "
            f"| {share_within(own, 0.02):.0%} |"
        )


def _all(by_sweep: dict[str, list[Replay]]) -> list[Replay]:
    return list(itertools.chain.from_iterable(by_sweep.values()))


def _mean(replays: Sequence[Replay]) -> float:
    return statistics.mean(min(replay.regret, 1.0) for replay in replays)


def plot(panels: dict[str, Results], path: Path) -> None:
    """A panel for each folder: mean regret of the best tried so far against the share of a sweep that was tried."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "jagtile", "svg.fonttype": "none"})
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(1, len(panels), figsize=(6 * len(panels), 4.5), layout="constrained", squeeze=False)
    shares = [step / 25 for step in range(1, 26)]  # of the trials, which are a quarter of the configs
    for axes, (title, found) in zip(grid[0], panels.items(), strict=True):
        for name, by_sweep in found.items():
            means = [statistics.mean(_at(replay, share) for replay in _all(by_sweep)) for share in shares]
            width = 2.5 if name == OURS else 1
            axes.plot([25 * share for share in shares], [100 * mean for mean in means], label=name, linewidth=width)
        axes.axhline(2, color="grey", linewidth=0.5)
        axes.set(title=title, xlabel="configs tried, % of the space", ylim=(0, 15))
        axes.legend(fontsize=7)
    grid[0][0].set_ylabel("mean regret of the best so far, %")
    figure.savefig(path, metadata={"Date": None})


def _at(replay: Replay, share: float) -> float:
    place = max(0, round(share * replay.trials) - 1)
    return min(replay.course[place], 1.0)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="of sweeps")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--method", action="append", choices=list(methods()), help="only this one (repeatable)")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    names = list(dict.fromkeys([OURS, *(options.method or methods())]))
    path, panels = options.results, {}
    for folder in options.folders:
        sweeps = read_sweeps(folder)
        known = msgspec.convert(json.loads(path.read_text()), Results) if path and path.exists() else {}
        found = panels[folder.name] = compare(sweeps, names, options.seeds, options.jobs, known)
        print(f"\n{folder}\n")
        print_tables(sweeps, found)
        if path:
            kept = {name: known.get(name, {}) | found.get(name, {}) for name in known.keys() | found.keys()}
            path.write_text(json.dumps(msgspec.to_builtins(kept)))  # msgspec knows no infinity in JSON
    if options.plot:
        plot(panels, options.plot)


if __name__ == "__main__":
    main()
