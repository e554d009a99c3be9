"""Regimes: total over every problem, monotone, and right for the named workloads."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jagtile.generator.spec import KernelSpec
from jagtile.generator.workloads import named, representative
from jagtile.runtime.problem import REGIMES, SHORT_MEAN, TINY_MEAN, Problem, regime, regime_index

SPEC = KernelSpec("fwd", "bf16", 64, 64, False)
counts = st.integers(0, 1 << 40)


def of(workload, hints: bool) -> str:
    max_q, max_k = (max(workload.seqlens_q), max(workload.seqlens_k)) if hints else (None, None)
    return regime(
        Problem(
            SPEC,
            workload.batch,
            workload.total_q,
            workload.total_k,
            workload.num_heads,
            workload.num_heads_kv,
            max_q,
            max_k,
        )
    )


@pytest.mark.parametrize("hints", [False, True])
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("one-token-d64", "tiny"),
        ("recsys-d64", "short"),
        ("vit-d64", "medium"),
        ("sft-d128-gqa-causal", "medium"),
        ("u1k-d128", "long"),
        ("u4k-d128", "long"),
        ("u16k-d128", "long"),
        ("cross-d64", "cross"),
        ("mixed-d128-gqa-causal", "cross"),
        ("decode-d128-gqa", "decode"),
    ],
)
def test_the_named_workloads_fall_where_they_should(name, expected, hints):
    assert of(named()[name], hints) == expected


@pytest.mark.parametrize(("border", "names"), [(TINY_MEAN, ("tiny", "short")), (SHORT_MEAN, ("short", "medium"))])
def test_a_border_belongs_to_the_shorter_side(border, names):
    assert tuple(REGIMES[regime_index(7, total, total)] for total in (7 * border, 7 * border + 1)) == names
    assert tuple(REGIMES[regime_index(7, 7, 7, 8 * border + more)] for more in (0, 1)) == names


def test_groups_of_heads_are_short_for_longer():
    groups = [REGIMES[regime_index(10, 1200, 1200, group=group)] for group in (1, 3, 4, 8)]
    assert groups == ["medium", "medium", "short", "short"]
    packed = Problem(SPEC, 475, 475 * 109, 475 * 109, 32, 4, 109, 109)
    assert (regime(packed), regime(replace(packed, heads_kv=32))) == ("short", "medium")


def test_what_was_measured_at_lengths_near_the_borders_is_heeded():
    """On an H100 the short regime's configs led at means of 23 and 64, the medium one's at 120."""
    of_mean = {mean: REGIMES[regime_index(100, 100 * mean, 100 * mean)] for mean in (16, 23, 64, 120)}
    assert of_mean == {16: "tiny", 23: "short", 64: "short", 120: "medium"}


def test_a_few_very_long_sequences_are_seen_through_max_seqlen():
    skewed = named()["skew-d128"]
    assert of(skewed, hints=False) == "medium"
    assert of(skewed, hints=True) == "long"


@pytest.mark.parametrize("target", ["cpu", "sm_90a"])
@pytest.mark.parametrize("name", REGIMES)
def test_what_the_tuner_times_for_a_regime_belongs_to_it(name, target):
    for workload in representative(SPEC, name, target):
        assert of(workload, hints=False) == name


@given(batch=counts, total_q=counts, total_k=counts, max_q=counts, max_k=counts, group=st.integers(1, 64))
def test_every_problem_has_a_regime(batch, total_q, total_k, max_q, max_k, group):
    assert 0 <= regime_index(batch, total_q, total_k, max_q, max_k, group) < len(REGIMES)


@given(batch=st.integers(1, 5000), mean=st.integers(0, 40_000), longer=st.integers(0, 40_000), hint=counts, more=counts)
def test_longer_sequences_never_give_a_shorter_regime(batch, mean, longer, hint, more):
    def order(length: int, longest: int) -> int:
        return regime_index(batch, batch * length, batch * length, longest, longest)

    assert order(mean, hint) <= order(mean + longer, hint + more)
    assert order(mean + longer, hint + more) <= REGIMES.index("long")


@given(batch=st.integers(1, 5000), keys=st.integers(SHORT_MEAN + 1, 40_000), queries=st.integers(1, 40_000))
def test_more_queries_against_the_same_keys_never_return_to_decode(batch, keys, queries):
    names = [REGIMES[regime_index(batch, batch * q, batch * keys)] for q in range(1, queries, max(1, queries // 50))]
    assert names == sorted(names, key=lambda name: name != "decode")


def test_an_empty_batch_is_tiny():
    assert regime(Problem(SPEC, 0, 0, 0, 1, 1)) == "tiny"
