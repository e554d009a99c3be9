"""Which config to try next: seeds, then an Optuna sampler's by ask-and-tell, then neighbours of the best ones found.

Knows spaces and numbers only: no files, no device, no clock. What is illegal is rejected by arithmetic and costs
nothing; what is known already is answered from memory; where all that is left fits the budget, all of it is tried.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from jagtile.generator.fleet import Point
from jagtile.generator.spec import KernelSpec
from jagtile.generator.tile import Knob, Space, TileConfig, legal_configs, spaces_of
from jagtile.runtime.errors import UnsupportedError

if TYPE_CHECKING:
    import optuna

_ROUNDS = 32, 10  # configs of the first and of each later round of an open-ended search
_DESCEND_FROM = 4  # of the best configs
_RUNNER_UP = 0.6  # steps by which each next of them is handicapped
_LONG_STEP = 0.25  # what a step counts beyond the first along one knob
_FOREIGN = 10.0  # steps to a config of another algorithm
_SPREAD = 1.5  # steps at least between the first configs that are tried because of their predictions ...
_SPREAD_OVER = 2  # ... which are the best of so many times those that the budget has room for
_HOPELESS = 4.0  # times the best prediction: not even tried as a seed; the model is off by less (docs/tuning.md)
_MAX_ASKS = 64  # of the sampler for one fresh config, before one is drawn at random


def _tpe(seed: int) -> optuna.samplers.BaseSampler:
    import optuna

    return optuna.samplers.TPESampler(seed=seed)


@dataclass(frozen=True)
class Method:
    """How to search; docs/tuning.md says how they compare."""

    predicted: float = 0.7  # share of the budget for the configs that are predicted to be best, if any are predicted
    explored: float = 0.6  # share of the rest that the sampler has; what is left descends through neighbours
    sampler: Callable[[int], optuna.samplers.BaseSampler] = _tpe  # of a seed
    ordered: bool = False  # whether the sampler sees numbers as places in their order, or as mere categories


DEFAULT_METHOD = Method()


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
        predict: Callable[[TileConfig], float | None] = lambda config: None,
        spaces: Sequence[Space] | None = None,
        method: Method = DEFAULT_METHOD,
    ) -> None:
        """``trials``: distinct configs to try, those told beforehand included; None: the caller stops when it likes.
        ``seeds``: known-good configs, tried first. ``predict``: a guess at a config's time, None where there is none.
        ``spaces`` stand in for the target's, in replays.
        """
        self.trials = trials
        self._method = method
        self.results: dict[TileConfig, float | None] = {}  # None: it failed
        self.elsewhere: set[TileConfig] = set()  # configs that others are at work on
        self._spaces = {space.algorithm: space for space in spaces or spaces_of(target, spec)}
        if not self._spaces:
            raise UnsupportedError(f"no template of target {target} computes {spec.name}")
        self._grids = {space.algorithm: space.knobs(spec) for space in self._spaces.values()}
        self.legal = tuple(config for space in self._spaces.values() for config in legal_configs(space, spec))
        self._legal_set = frozenset(self.legal)
        guesses = {config: guess for config in self.legal if (guess := predict(config)) is not None}
        hopeless = _HOPELESS * min(guesses.values(), default=math.inf)
        self._seeds = [
            config
            for config in dict.fromkeys(seeds)
            if config in self._legal_set and not guesses.get(config, 0.0) > hopeless
        ]
        self._places = {config: place for place, config in enumerate(sorted(guesses, key=guesses.__getitem__))}
        self._predicted = self._spread(list(self._places))  # the most promising first
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
        predicted = next(filter(self._is_fresh, self._predicted), None)
        share = self._method.predicted if self._predicted else 0.0
        if predicted is not None and self._is_turn_of(share):
            return predicted, None
        explores = self._is_turn_of(share + (1 - share) * self._method.explored)
        return self._sampled(unknown) if explores else (self._nearest(unknown), None)

    def _spread(self, ranked: list[TileConfig]) -> list[TileConfig]:
        """``ranked`` with near neighbours of earlier ones put back: those that the budget has no room for are last."""
        trials = self.trials if self.trials is not None else _ROUNDS[0]
        room = math.ceil(_SPREAD_OVER * self._method.predicted * trials)
        first: list[TileConfig] = []
        for config in ranked[:room]:
            if all(self._steps(config, other) >= _SPREAD for other in first):
                first.append(config)
        return list(dict.fromkeys([*first, *ranked]))

    def _is_turn_of(self, share: float) -> bool:
        """Whether what has the first ``share`` of the budget is next; where the end is not known, of each round."""
        done = len(self.results) + len(self._asked) + len(self.elsewhere)
        if self.trials is not None:
            return done < share * self.trials
        first, later = _ROUNDS
        return done < share * first if done < first else (done - first) % later < share * later

    def _is_fresh(self, config: TileConfig) -> bool:
        return config not in self.results and config not in self._asked and config not in self.elsewhere

    def _sampled(self, unknown: Sequence[TileConfig]) -> tuple[TileConfig, optuna.Trial | None]:
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
        """The unknown config that is the fewest steps away from one of the best; of equally near ones the one that is
        predicted to be faster, else they are drawn.
        """
        best = self.best()[:_DESCEND_FROM]
        shuffled = self._rng.sample(unknown, len(unknown))
        if not best:
            return shuffled[0]

        def distance(config: TileConfig) -> tuple[float, int]:
            steps = min(self._steps(config, good) + _RUNNER_UP * i for i, good in enumerate(best))
            return steps, self._places.get(config, len(self._places))

        return min(shuffled, key=distance)

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
        study = optuna.create_study(direction="minimize", sampler=self._method.sampler(self._seed))
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
        from optuna.distributions import CategoricalDistribution, IntDistribution

        for name, choices in self._domains():
            ranks = self._ranks.get(name)
            yield name, IntDistribution(0, len(ranks) - 1) if ranks else CategoricalDistribution(choices)

    @cached_property
    def _ranks(self) -> dict[str, list[int]]:
        """The values, in order, of knobs that the sampler sees as places."""
        if not self._method.ordered:
            return {}
        numbers = {name: [v for v in values if type(v) is int] for name, values in self._domains()}
        return {name: sorted(numbers[name]) for name, values in self._domains() if len(values) == len(numbers[name])}

    def _params(self, config: TileConfig) -> dict[str, Knob]:
        """The config as the sampler sees it."""
        params = self.point(config).params
        return {k: self._ranks[k].index(v) if k in self._ranks and isinstance(v, int) else v for k, v in params.items()}

    def _config(self, params: dict[str, Knob]) -> TileConfig | None:
        """The config of what the sampler proposes, None where it is not legal."""
        values = {k: self._ranks[k][v] if k in self._ranks and isinstance(v, int) else v for k, v in params.items()}
        algorithm = str(values["algorithm"])
        make = self._spaces[algorithm].config_type
        config = make(**{knob: values[knob] for knob in self._grids[algorithm]})
        return config if config in self._legal_set else None

    def _told(self, config: TileConfig, value: float | None) -> optuna.trial.FrozenTrial:
        from optuna.trial import TrialState, create_trial

        return create_trial(
            params=self._params(config),
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
