"""Regimes: total over every problem, monotone, and right for the named workloads."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jagtile.generator.spec import KernelSpec
from jagtile.generator.workloads import named, representative
from jagtile.runtime.problem import (
    FEW_MEAN,
    FEW_ROWS,
    HUGE_MEAN,
    LOOK_UPS,
    REGIMES,
    SHORT_MEAN,
    TINY_MEAN,
    Problem,
    look_up,
    look_up_of,
    regime,
    regime_index,
    regimes_for,
)

SPEC = KernelSpec("fwd", "bf16", 64, 64, False)
counts = st.integers(0, 1 << 40)


def of(workload, hints: bool, device: str = "cuda") -> str:
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
        ),
        device,
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
        ("u4k-d128", "huge"),
        ("u16k-d128", "huge"),
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
    packed = Problem(KernelSpec.parse("fwd_bf16_d128"), 475, 475 * 109, 475 * 109, 32, 4, 109, 109)
    assert (regime(packed), regime(replace(packed, heads_kv=32))) == ("short", "medium")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fwd_bf16_d64", {19: "tiny", 23: "short", 102: "short", 128: "short", 181: "medium"}),
        ("fwd_bf16_d128", {19: "tiny", 25: "tiny", 32: "short", 90: "short", 102: "medium"}),
        ("fwd_bf16_d192", {18: "tiny", 19: "short", 96: "short", 97: "medium"}),
        ("bwd_bf16_d64", {18: "tiny", 23: "short", 96: "short", 102: "medium"}),
        ("bwd_bf16_d64_dv72", {23: "tiny", 25: "short", 96: "short", 102: "medium"}),
        ("fwd_bf16_d64_causal", {23: "tiny", 25: "short", 128: "short", 181: "medium"}),
        ("fwd_bf16_d96", {18: "tiny", 19: "short", 96: "short", 102: "medium"}),
        ("bwd_bf16_d64_causal", {19: "tiny", 23: "short", 256: "short", 362: "medium"}),
        ("fwd_bf16_d128_causal", {23: "tiny", 28: "tiny", 29: "short", 97: "medium"}),
        ("bwd_bf16_d128", {24: "tiny", 25: "short", 97: "medium"}),
        ("bwd_bf16_d96", {24: "tiny", 25: "short", 97: "medium"}),
        ("bwd_bf16_d96_causal", {24: "tiny", 25: "short", 97: "medium"}),
        ("bwd_bf16_d128_causal", {26: "tiny", 30: "short", 96: "short", 102: "medium"}),
    ],
)
def test_what_was_measured_at_lengths_near_the_borders_is_heeded(name, expected):
    """Whatever the direction and the head dims, by what led on a GPU; not on a CPU."""
    problems = {mean: Problem(KernelSpec.parse(name), 100, 100 * mean, 100 * mean, 8, 8) for mean in expected}
    assert {mean: regime(problem) for mean, problem in problems.items()} == expected
    on_cpu = {mean: "tiny" if mean <= 18 else "short" if mean <= 96 else "medium" for mean in expected}
    assert {mean: regime(problem, "cpu") for mean, problem in problems.items()} == on_cpu


def test_groups_of_heads_are_short_for_no_shorter():
    problem = Problem(KernelSpec.parse("bwd_bf16_d64_causal"), 10, 2000, 2000, 8, 1)
    assert (regime(problem), regime(problem, "cpu")) == ("short", "medium")


@pytest.mark.parametrize(("longest", "expected"), [(8 * 28, "tiny"), (8 * 28 + 1, "short"), (8 * 96 + 1, "medium")])
def test_an_eighth_of_max_seqlen_counts_at_every_border(longest, expected):
    assert regime(Problem(KernelSpec.parse("fwd_bf16_d128"), 10, 200, 200, 8, 8, longest, 20)) == expected


def test_a_few_very_long_sequences_are_seen_through_max_seqlen():
    skewed = named()["skew-d128"]
    assert of(skewed, hints=False) == "medium"
    assert of(skewed, hints=True) == "huge"


@pytest.mark.parametrize(
    ("target", "name"), [(target, name) for target in ("cpu", "sm_90a") for name in regimes_for("fwd", target)]
)
def test_what_the_tuner_times_for_a_regime_belongs_to_it(name, target):
    for workload in representative(SPEC, name, target):
        assert of(workload, hints="skew" in workload.name, device=target) == name  # which max_seqlen alone tells


@pytest.mark.parametrize(
    "spec", ["fwd_bf16_d128_causal", "bwd_bf16_d64_causal", "bwd_bf16_d96", "bwd_bf16_d128_causal"]
)
def test_what_the_tuner_times_belongs_to_its_regime_by_every_specs_borders(spec):
    spec = KernelSpec.parse(spec)
    for name in regimes_for(spec.direction, "sm_90a"):
        for workload in representative(spec, name, "sm_90a"):
            problem = replace(workload.problem(spec.dtype, with_max="skew" in workload.name), spec=spec)
            assert regime(problem) == name


@given(counts, counts, counts, counts, counts, st.integers(1, 64), counts)
def test_every_problem_has_a_regime(batch, total_q, total_k, max_q, max_k, group, rows):
    assert 0 <= regime_index(batch, total_q, total_k, max_q, max_k, group, rows) < len(LOOK_UPS)


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


def few_rows(lengths: tuple[int, ...], heads: int, keys: int | None = None, **more: int) -> Problem:
    total_k = sum(lengths) if keys is None else keys * len(lengths)
    return Problem(SPEC, len(lengths), sum(lengths), total_k, heads, heads, **more)


@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        (few_rows((4000, 4358, 5031), 2), ("few", "long")),
        (few_rows((8192,), 4), ("few", "long")),
        (few_rows((600,) * 10, 7), ("few", "medium")),
        (few_rows((600,) * 11, 7), ("medium",)),  # 361 tiles of 128 rows
        (few_rows((8192,), 8), ("huge", "long")),
        (few_rows((2048,), 24), ("huge", "long")),
        (few_rows((2047,), 24), ("long",)),
        (few_rows((1024,), 42), ("long",)),
        (few_rows((16384, *(50,) * 50), 9, max_seqlen_q=16384), ("huge", "long")),
        (few_rows((16384, *(50,) * 50), 9, max_seqlen_q=16383), ("long",)),
        (few_rows((500,) * 3, 2), ("medium",)),
        (few_rows((16384, *(50,) * 50), 1), ("medium",)),
        (few_rows((16384, *(50,) * 50), 1, max_seqlen_q=16384), ("few", "long")),
        (few_rows((1,) * 4, 8, keys=8192), ("decode",)),
        (few_rows((100,) * 4, 8, keys=2048), ("cross",)),
        (few_rows((2048,) * 4, 4, keys=100), ("cross",)),
        (few_rows((60,) * 4, 4), ("short",)),
    ],
)
def test_long_batches_of_few_tiles_and_huge_ones_are_what_they_were_before_too(problem, expected):
    assert look_up(problem) == look_up(problem, "sm_90a") == expected
    assert regime(problem) == expected[0]


def test_no_backward_is_few_and_nothing_on_a_cpu_is_few_or_huge():
    problem = few_rows((4000, 4358, 5031), 2)
    assert look_up(problem, "cpu") == ("long",)
    backward = replace(problem, spec=replace(SPEC, direction="bwd"))
    assert (look_up(backward), look_up(backward, "cpu")) == (("huge", "long"), ("long",))
    assert look_up(replace(backward, total_q=3 * 2047, total_k=3 * 2047)) == ("long",)
    for direction, device, missing in (
        ("fwd", "cpu", ("few", "huge")),
        ("bwd", "cpu", ("few", "huge")),
        ("bwd", "sm_90a", ("few",)),
        ("bwd", "cuda", ("few",)),
    ):
        assert regimes_for(direction, device) == tuple(name for name in REGIMES if name not in missing)
    assert regimes_for("fwd", "sm_90a") == regimes_for("fwd", "cuda") == REGIMES


@given(counts, counts, counts, counts, counts, st.integers(1, 64), counts)
def test_few_and_huge_say_nothing_but_that_batches_are(batch, total_q, total_k, max_q, max_k, group, rows):
    plain = regime_index(batch, total_q, total_k, max_q, max_k, group)
    found = LOOK_UPS[regime_index(batch, total_q, total_k, max_q, max_k, group, rows)]
    assert found[-1] == REGIMES[plain]
    if len(found) > 1:
        mean = {"few": FEW_MEAN, "huge": HUGE_MEAN}[found[0]]
        assert rows > 0
        assert (rows < FEW_ROWS) == (found[0] == "few")
        assert max(total_q, total_k) >= mean * batch or max(max_q, max_k) >= 8 * mean


def test_a_regime_by_its_name_is_looked_up_as_a_batch_of_it_is():
    assert {look_up_of(name)[0] for name in REGIMES} == set(REGIMES)
    assert {look_up_of(name) for name in REGIMES} < set(LOOK_UPS)
    assert look_up_of("few") == ("few", "long")
    assert look_up_of("huge") == ("huge", "long")
    assert look_up_of("") == ("",)


def test_an_empty_batch_is_tiny():
    assert regime(Problem(SPEC, 0, 0, 0, 1, 1)) == "tiny"
