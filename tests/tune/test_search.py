"""The search finds the best within few trials, never asks twice, and does the same for the same seed."""

from __future__ import annotations

from dataclasses import fields

import pytest
from fakes import SPEC, TARGET, landscape

from jagtile.generator.search import Method, Search
from jagtile.generator.spaces.sm90_forward import Sm90ForwardSpace
from jagtile.generator.spec import KernelSpec
from jagtile.generator.tile import Variant
from jagtile.runtime.errors import UnsupportedError


class WithoutPairs(Sm90ForwardSpace):
    """Half of the space, as a sampler's time grows with the square of what it has seen."""

    def knobs(self, spec):
        return {**super().knobs(spec), "cluster": (1,)}


def make(*, spec: KernelSpec = SPEC, **more) -> Search:
    """A search of one algorithm's space, whatever others there are: 256 configs of SPEC."""
    return Search(TARGET, spec, spaces=(WithoutPairs(),), **more)


def run(search: Search, value_of, batch: int = 4) -> list:
    asked = []
    while configs := search.ask(batch):
        asked += configs
        for config in configs:
            search.tell(config, value_of(config))
    return asked


def test_most_searches_of_a_quarter_of_the_space_end_within_two_percent_of_the_best():
    within = 0
    for seed in range(6):
        search = make(trials=0, seed=seed)
        optimum = min(landscape(config, seed) for config in search.legal)
        search.trials = len(search.legal) // 4
        run(search, lambda config, seed=seed: landscape(config, seed))
        within += landscape(search.best()[0], seed) <= 1.02 * optimum
    assert within >= 5  # the space has 256 configs, a quarter is 64 trials


def test_the_same_seed_asks_the_same_and_another_seed_does_not():
    def order(seed):
        return run(make(trials=30, seed=seed), landscape)

    assert order(1) == order(1)
    assert order(1) != order(2)


def test_every_config_is_legal_and_asked_once_and_the_budget_is_kept():
    search = make(trials=40, seed=3)
    asked = run(search, landscape)
    assert len(asked) == len(set(asked)) == 40
    for config in asked:
        Variant(TARGET, SPEC, config).check()


def test_a_budget_beyond_the_space_tries_all_of_it():
    search = make(trials=10**9)
    assert set(run(search, landscape)) == set(search.legal)
    assert search.best()[0] == min(search.legal, key=landscape)


def test_a_search_without_a_limit_is_good_whenever_it_is_stopped():
    within = 0
    for seed in range(4):
        search = make(trials=None, seed=seed)
        optimum = min(landscape(config, seed) for config in search.legal)
        for _ in range(len(search.legal) // 16):
            for config in search.ask(4):
                search.tell(config, landscape(config, seed))
        within += landscape(search.best()[0], seed) <= 1.02 * optimum
    assert within >= 3


def test_seeds_come_first_and_an_illegal_one_is_left_out():
    legal = make(trials=10).legal
    foreign = make(spec=KernelSpec.parse("fwd_bf16_d64"), trials=10).legal
    illegal = next(config for config in foreign if config not in legal)
    search = make(trials=10, seeds=[legal[7], illegal, legal[3], legal[7]])
    assert search.ask(2) == [legal[7], legal[3]]


def test_what_is_told_beforehand_counts_and_is_not_asked():
    search = make(trials=20, seed=1)
    known = search.legal[:12]
    for config in known:
        search.tell(config, landscape(config))
    asked = run(search, landscape)
    assert len(asked) == 8
    assert not set(asked) & set(known)


def test_failures_are_no_results():
    search = make(trials=40, seed=1)
    run(search, lambda config: None if config.block_n > 64 else landscape(config))
    assert search.best()
    assert all(config.block_n <= 64 for config in search.best())


def test_a_space_where_nothing_works_is_searched_to_the_end_of_the_budget():
    search = make(trials=30, seed=1)
    assert len(run(search, lambda config: None)) == 30
    assert search.best() == []


def test_the_last_trials_are_neighbours_of_the_best():
    search = make(trials=40, seed=5)
    asked = run(search, landscape, batch=1)

    def knobs_apart(config, others):
        return min(
            sum(getattr(config, knob.name) != getattr(other, knob.name) for knob in fields(config)) for other in others
        )

    for position in range(30, 40):
        best_so_far = sorted(asked[:position], key=landscape)[:4]
        assert knobs_apart(asked[position], best_so_far) <= 3


def test_what_is_predicted_to_be_fast_comes_first_spread_over_the_space():
    search = make(trials=40, seed=1, predict=landscape)
    ranked = sorted(search.legal, key=landscape)
    asked = run(search, landscape)
    assert asked[0] == ranked[0]
    predicted = asked[: int(0.7 * 40)]
    assert set(predicted) <= set(ranked[: 2 * len(predicted)])
    assert predicted != ranked[: len(predicted)]
    for place, config in enumerate(predicted[:5]):
        assert all(search._steps(config, other) >= 1.5 for other in predicted[:place])
    assert len(set(asked)) == 40


def test_predictions_that_mislead_leave_a_share_to_the_search_and_unpredicted_configs_have_a_chance():
    misled = make(trials=40, seed=1, predict=lambda config: -landscape(config))
    run(misled, landscape)
    worst = sorted(misled.legal, key=landscape, reverse=True)[:40]
    assert misled.best()[0] not in worst
    half = make(trials=40, seed=1, predict=lambda c: landscape(c) if c.q_stages == 1 else None)
    assert {config.q_stages for config in run(half, landscape)} >= {1, 2}


@pytest.mark.parametrize("trials", [30, None])
def test_a_sampler_may_see_numbers_in_their_order(trials):
    search = make(trials=trials, seed=1, method=Method(ordered=True))
    asked = [config for _ in range(6) for config in search.ask(4) if not search.tell(config, landscape(config))]
    assert len(set(asked)) == len(asked) == 24
    assert set(asked) <= set(search.legal)


def test_a_spec_without_template_is_refused():
    with pytest.raises(UnsupportedError, match="no template of target nowhere"):
        Search("nowhere", SPEC, trials=1)
