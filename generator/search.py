"""Which config to try next: seeds, then Optuna's TPE by ask-and-tell, then the neighbours of the best ones found.

Knows spaces and numbers only: no files, no device, no clock. What is illegal is rejected by arithmetic and costs
nothing; what is known already is answered from memory; where all that is left fits the budget, all of it is tried.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from jagtile.generator.fleet import Point
from jagtile.generator.spec import KernelSpec
from jagtile.generator.tile import Knob, TileConfig, legal_configs, spaces_of
from jagtile.runtime.errors import UnsupportedError

if TYPE_CHECKING:
    import optuna

TPE_SHARE = 0.6  # of the budget; the rest descends through neighbours
_EXPLORED_FIRST = 20  # configs of an open-ended search, before turns alternate ...
_TURNS = 10  # ... in rounds of so many
_DESCEND_FROM = 4  # of the best configs
_RUNNER_UP = 0.6  # steps by which each next of them is handicapped
_LONG_STEP = 0.25  # what a step counts beyond the first along one knob
_FOREIGN = 10.0  # steps to a config of another algorithm
_MAX_ASKS = 64  # of TPE for one fresh config, before one is drawn at random


class Search:
    """The search for one spec on one target. Deterministic for a seed and the same order of calls."""

    def __init__(
        self,
        target: str,
        spec: KernelSpec,
        *,
        trials: int | None,
        seeds: Sequence[TileConfig] = (),
        seed: int = 0,
    ) -> None:
        """``trials``: distinct configs to try, those told beforehand included; None: the caller stops when it likes.
        ``seeds``: known-good configs, tried first.
        """
        self.trials = trials
        self.results: dict[TileConfig, float | None] = {}  # None: it failed
        self.elsewhere: set[TileConfig] = set()  # configs that others are at work on
        self._spaces = {space.algorithm: space for space in spaces_of(target, spec)}
        if not self._spaces:
            raise UnsupportedError(f"no template of target {target} computes {spec.name}")
        self._grids = {space.algorithm: space.knobs(spec) for space in self._spaces.values()}
        self.legal = tuple(config for space in self._spaces.values() for config in legal_configs(space, spec))
        self._legal_set = frozenset(self.legal)
        self._seeds = [config for config in dict.fromkeys(seeds) if config in self._legal_set]
        self._rng = random.Random(seed)
        self._asked: dict[TileConfig, optuna.Trial | None] = {}
        self._seed = seed
        self._study: optuna.Study | None = None

    @property
    def remaining(self) -> int:
        """Configs that may still be asked for."""
        trials = len(self.legal) if self.trials is None else min(self.trials, len(self.legal))
        return max(0, trials - len(self.results) - len(self._asked) - len(self.elsewhere - self.results.keys()))

    def best(self) -> list[TileConfig]:
        """Configs that did not fail, the best first."""
        scored = [(value, config) for config, value in self.results.items() if value is not None]
        return [config for _, config in sorted(scored, key=lambda pair: pair[0])]

    def ask(self, count: int) -> list[TileConfig]:
        """Up to ``count`` fresh legal configs; none where the budget or the space is used up."""
        fresh: list[TileConfig] = []
        while len(fresh) < count and self.remaining:
            config, trial = self._next()
            self._asked[config] = trial
            fresh.append(config)
        return fresh

    def tell(self, config: TileConfig, value: float | None) -> None:
        """The result of a config, asked for or not: smaller is better, None that it failed."""
        if config not in self._legal_set:
            return
        trial = self._asked.pop(config, None)
        first = config not in self.results
        self.results[config] = value
        if self._study is not None and trial is not None:
            _answer(self._study, trial, value)
        elif self._study is not None and first:
            self._study.add_trial(self._told(config, value))

    def withdraw(self, config: TileConfig) -> None:
        """Take back an ``ask``: another is at work on the config."""
        trial = self._asked.pop(config, None)
        if self._study is not None and trial is not None:
            _forget(self._study, trial)

    def point(self, config: TileConfig) -> Point:
        """The config in the joint grid of all algorithms."""
        own, domains = config.to_dict(), dict(self._domains())
        return Point({name: own.get(name, domain[0]) for name, domain in domains.items()}, domains)

    def _next(self) -> tuple[TileConfig, optuna.Trial | None]:
        for config in self._seeds:
            if self._is_fresh(config):
                return config, None
        unknown = [config for config in self.legal if self._is_fresh(config)]
        if self.trials is not None and len(unknown) <= self.remaining:
            return unknown[0], None
        return self._ask_tpe(unknown) if self._is_explored_now() else (self._nearest(unknown), None)

    def _is_explored_now(self) -> bool:
        """Whether TPE asks next. Where the end is not known, turns alternate at the same share."""
        done = len(self.results) + len(self._asked) + len(self.elsewhere)
        if self.trials is not None:
            return done < TPE_SHARE * self.trials
        return done < _EXPLORED_FIRST or done % _TURNS < TPE_SHARE * _TURNS

    def _is_fresh(self, config: TileConfig) -> bool:
        return config not in self.results and config not in self._asked and config not in self.elsewhere

    def _ask_tpe(self, unknown: Sequence[TileConfig]) -> tuple[TileConfig, optuna.Trial | None]:
        study = self._study = self._study or self._open_study()
        for _ in range(_MAX_ASKS):
            trial = study.ask(dict(self._distributions()))
            config = self._config(trial.params)
            if config is None:
                _answer(study, trial, None)
            elif config in self.results:
                _answer(study, trial, self.results[config])
            elif not self._is_fresh(config):
                _forget(study, trial)
            else:
                return config, trial
        return self._rng.choice(unknown), None

    def _nearest(self, unknown: Sequence[TileConfig]) -> TileConfig:
        """The unknown config that is the fewest steps away from one of the best; ties are drawn."""
        best = self.best()[:_DESCEND_FROM]
        shuffled = self._rng.sample(unknown, len(unknown))
        if not best:
            return shuffled[0]
        return min(
            shuffled,
            key=lambda config: min(self._steps(config, good) + _RUNNER_UP * i for i, good in enumerate(best)),
        )

    def _steps(self, a: TileConfig, b: TileConfig) -> float:
        if a.algorithm != b.algorithm:
            return _FOREIGN
        total = 0.0
        for knob, domain in self._grids[a.algorithm].items():
            one, other = getattr(a, knob), getattr(b, knob)
            if one != other:
                apart = 1
                if not isinstance(one, bool | str):
                    ordered = sorted(domain, key=int)
                    apart = abs(ordered.index(one) - ordered.index(other))
                total += 1 + _LONG_STEP * (apart - 1)
        return total

    def _open_study(self) -> optuna.Study:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(direction="minimize", sampler=optuna.samplers.TPESampler(seed=self._seed))
        study.add_trials([self._told(config, value) for config, value in self.results.items()])
        return study

    def _domains(self) -> Iterator[tuple[str, tuple[Knob, ...]]]:
        """Every knob by name, over all algorithms; one that an algorithm does not have is ignored there."""
        yield "algorithm", tuple(self._spaces)
        names = dict.fromkeys(knob for grid in self._grids.values() for knob in grid)
        for name in names:
            domains = (grid[name] for grid in self._grids.values() if name in grid)
            yield name, tuple(dict.fromkeys(value for domain in domains for value in domain))

    def _distributions(self) -> Iterator[tuple[str, optuna.distributions.BaseDistribution]]:
        from optuna.distributions import CategoricalDistribution

        for name, choices in self._domains():
            yield name, CategoricalDistribution(choices)

    def _config(self, params: dict[str, Knob]) -> TileConfig | None:
        """The config of a point of the joint grid, None where it is not legal."""
        algorithm = str(params["algorithm"])
        make = self._spaces[algorithm].config_type
        config = make(**{knob: params[knob] for knob in self._grids[algorithm]})
        return config if config in self._legal_set else None

    def _told(self, config: TileConfig, value: float | None) -> optuna.trial.FrozenTrial:
        from optuna.trial import TrialState, create_trial

        return create_trial(
            params=self.point(config).params,
            distributions=dict(self._distributions()),
            value=value,
            state=TrialState.PRUNED if value is None else TrialState.COMPLETE,
            constraints={"works": 1.0 if value is None else -1.0},
        )


def _answer(study: optuna.Study, trial: optuna.Trial, value: float | None) -> None:
    from optuna.trial import TrialState

    trial.set_constraint("works", 1.0 if value is None else -1.0)
    study.tell(trial, value, state=TrialState.PRUNED if value is None else TrialState.COMPLETE)


def _forget(study: optuna.Study, trial: optuna.Trial) -> None:
    from optuna.trial import TrialState

    study.tell(trial, state=TrialState.FAIL)
