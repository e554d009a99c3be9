"""Which knobs a config's time hangs on, by Optuna's PED-ANOVA over records.

PED-ANOVA asks how the values of a knob among the fastest quarter differ from those among all that was tried. Unlike
fANOVA it needs no scikit-learn, and no forest is fitted to two dozen points.
"""

from __future__ import annotations

from collections.abc import Mapping

from jagtile.tuning_db.schema import Config

MIN_CONFIGS = 12  # fewer say nothing
_FAST = 0.25


def importances(times: Mapping[tuple[tuple[str, object], ...], float]) -> dict[str, float]:
    """Shares of the knobs that vary, 1 in all, the largest first; none where too few configs were timed.

    ``times``: microseconds by config, ``as_key`` of it.
    """
    if len(times) < MIN_CONFIGS:
        return {}
    import optuna
    from optuna.distributions import CategoricalDistribution

    domains: dict[str, list[object]] = {}
    for config in times:
        for knob, value in config:
            domains.setdefault(knob, []).append(value)
    distributions = {
        knob: CategoricalDistribution(sorted(set(values), key=str))  # type: ignore[arg-type]
        for knob, values in domains.items()
        if len(values) == len(times) and len(set(values)) > 1
    }
    if not distributions:
        return {}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study()
    for config, time in times.items():
        params = {knob: value for knob, value in config if knob in distributions}
        study.add_trial(optuna.create_trial(params=params, distributions=dict(distributions), value=time))
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=_FAST)
    found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return dict(sorted(found.items(), key=lambda pair: (-pair[1], pair[0])))


def as_key(config: Config) -> tuple[tuple[str, object], ...]:
    """A config's knobs in order, to be a key."""
    return tuple(sorted(config.items()))
