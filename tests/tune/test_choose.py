"""Choices are a function of records: few configs, within the slack, the incumbent on ties, nothing that was wrong."""

from __future__ import annotations

import random

import msgspec
import pytest
from fakes import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st

from jagtile.generator.choose import choose
from jagtile.generator.spec import KernelSpec
from jagtile.generator.tile import parse_config
from jagtile.generator.workloads import representative
from jagtile.tuning_db.schema import ChoiceEntry, Choices, TuningRecord

REGIMES = ("short", "medium", "long")
KEY = "sm_90a/fwd_bf16_d128"
NONE = Choices(device=DEVICE)


def record(config: str, regime: str, time_us: float | None, **more) -> TuningRecord:
    fields = {
        "device": DEVICE.slug,
        "target": "sm_90a",
        "spec": "fwd_bf16_d128",
        "regime": regime,
        "workload": f"{regime} workload",
        "config": {"algorithm": "persistent", "block_m": ord(config)},
        "state": "ok",
        "time_us": time_us,
        "phase": "final",
        "session": regime,
        "aa_spread": 0.001,
        "date": "2026-01-01",
    }
    return TuningRecord(**{**fields, **more})


def table(**times: dict[str, float]) -> list[TuningRecord]:
    return [record(config, regime, time) for config, row in times.items() for regime, time in row.items()]


def incumbent(**regimes: str) -> Choices:
    configs = {regime: {"algorithm": "persistent", "block_m": ord(config)} for regime, config in regimes.items()}
    return Choices(device=DEVICE, specs={KEY: ChoiceEntry(default=next(iter(configs.values())), regimes=configs)})


def chosen(choices: Choices) -> dict[str, str]:
    return {regime: chr(config["block_m"]) for regime, config in choices.specs[KEY].regimes.items()}


def test_one_config_serves_all_regimes_where_it_is_within_the_slack():
    records = table(
        a={"short": 100.0, "long": 101.5}, b={"short": 110.0, "long": 100.0}, c={"short": 99.0, "long": 120.0}
    )
    assert chosen(choose(records, NONE, slack=0.02)) == {"short": "a", "long": "a"}
    assert chosen(choose(records, NONE, slack=0.005)) == {"short": "c", "long": "b"}


def test_the_incumbent_stays_within_the_noise_and_goes_beyond_the_slack():
    records = table(a={"long": 100.0}, b={"long": 100.05})
    assert chosen(choose(records, incumbent(long="b"))) == {"long": "b"}
    assert chosen(choose(records, incumbent(long="a"))) == {"long": "a"}
    assert chosen(choose(table(a={"long": 100.0}, b={"long": 105.0}), incumbent(long="b"))) == {"long": "a"}


def test_the_slack_is_never_below_the_measured_noise():
    records = [record("a", "long", 100.0, aa_spread=0.08), record("b", "long", 106.0, aa_spread=0.08)]
    assert chosen(choose(records, incumbent(long="b"), slack=0.0)) == {"long": "b"}


def test_large_noise_keeps_the_incumbent_but_excuses_no_other_config():
    loud = [record(c, "long", t, aa_spread=0.6) for c, t in (("a", 100.0), ("b", 140.0), ("c", 108.0))]
    assert chosen(choose(loud, incumbent(long="b"))) == {"long": "b"}
    quiet = table(a={"short": 150.0}, b={"short": 100.0}, c={"short": 100.4})
    assert chosen(choose(loud + quiet, NONE)) == {"short": "c", "long": "c"}
    assert chosen(choose(loud[:2] + quiet, NONE)) == {"short": "b", "long": "a"}


@pytest.mark.parametrize("state", ["incorrect", "crash", "timeout"])
def test_a_config_that_failed_in_one_regime_is_chosen_in_none(state):
    records = table(a={"short": 1.0, "long": 1.0}, b={"short": 2.0, "long": 2.0})
    records.append(record("a", "medium", None, state=state))
    assert set(chosen(choose(records, incumbent(short="a", medium="a"))).values()) == {"b"}


def test_the_latest_final_session_counts():
    records = [
        record("a", "long", 50.0, phase="search", session="0"),
        *(record(c, "long", t, session="1", date="2026-01-02") for c, t in (("a", 90.0), ("b", 100.0))),
        *(record(c, "long", t, session="2", date="2026-01-03") for c, t in (("b", 100.0), ("c", 95.0))),
    ]
    assert chosen(choose(records, NONE)) == {"long": "c"}


def test_search_records_serve_where_there_were_no_finals():
    records = [record("a", "long", 100.0, phase="search"), record("b", "long", 90.0, phase="search", session="x")]
    assert chosen(choose(records, NONE)) == {"long": "b"}


def test_what_was_only_searched_replaces_no_incumbent_that_it_was_not_compared_with():
    left = [record("a", "long", 90.0, phase="search"), record("b", "long", 95.0, phase="search")]
    assert chosen(choose(left, incumbent(long="z"))) == {"long": "z"}  # whose source has changed since
    assert chosen(choose([*left, record("z", "long", 99.0, phase="search")], incumbent(long="z"))) == {"long": "a"}
    assert chosen(choose([*left, record("c", "long", 99.0)], incumbent(long="z"))) == {"long": "c"}  # finals
    assert chosen(choose([*left, record("z", "long", None, state="crash")], incumbent(long="z"))) == {"long": "a"}


def test_finals_replace_no_legal_incumbent_that_nobody_tried_since_its_source_changed():
    legal, other = (parse_config("sm_90a", f"persistent_m192_n64_s{n}_q2_c1").to_dict() for n in (4, 3))
    kept = Choices(device=DEVICE, specs={KEY: ChoiceEntry(default=legal, regimes={"long": legal})})

    def of(config: dict[str, object], time_us: float | None, **more) -> TuningRecord:
        return msgspec.structs.replace(record("a", "long", time_us, **more), config=config)

    def left(*records: TuningRecord) -> dict[str, object]:
        return choose([of(other, 95.0), *records], kept).specs[KEY].regimes["long"]

    assert left() == legal
    assert left(of(legal, 95.1)) == legal
    assert left(of(legal, 99.0)) == other
    assert left(of(legal, None, state="spill")) == left(of(legal, None, state="crash")) == other


def test_several_workloads_of_a_regime_count_alike():
    records = [
        record("a", "long", 10.0, workload="one", session="1"),
        record("b", "long", 11.0, workload="one", session="1"),
        record("a", "long", 1300.0, workload="two", session="2"),
        record("b", "long", 1000.0, workload="two", session="2"),
    ]
    assert chosen(choose(records, NONE)) == {"long": "b"}


def test_what_represents_a_regime_no_more_does_not_count():
    names = [w.name for w in representative(KernelSpec.parse("fwd_bf16_d128"), "long", "sm_90a")]
    old = [record("a", "long", 100.0, workload="long:of-old"), record("b", "long", 150.0, workload="long:of-old")]
    new = [
        record(config, "long", time, workload=name) for name in names for config, time in (("b", 100.0), ("c", 90.0))
    ]
    assert chosen(choose([*old, *new], NONE)) == {"long": "c"}  # which has no time on what was tuned on once
    assert chosen(choose(old, NONE)) == {"long": "a"}
    failed = record("c", "long", None, workload=names[0], state="spill")
    assert chosen(choose([*old, failed], NONE)) == {"long": "a"}  # better than nothing


def test_regimes_and_specs_without_records_keep_their_choice():
    before = incumbent(short="z", long="y")
    before.specs["sm_90a/other"] = before.specs[KEY]
    after = choose(table(a={"long": 10.0}), before)
    assert chosen(after) == {"short": "z", "long": "a"}
    assert after.specs["sm_90a/other"] == before.specs["sm_90a/other"]
    assert choose([], before) == before
    assert choose([record("a", "long", 1.0, device="sm90-78sm")], before) == before


def test_the_default_is_the_chosen_config_that_is_best_over_all_regimes():
    records = table(a={"short": 10.0, "long": 30.0}, b={"short": 11.0, "long": 10.0})
    entry = choose(records, NONE).specs[KEY]
    assert chosen(choose(records, NONE)) == {"short": "a", "long": "b"}
    assert entry.default == entry.regimes["long"]


tables = st.dictionaries(
    st.sampled_from("abcdefgh"),
    st.fixed_dictionaries({regime: st.floats(50, 150) for regime in REGIMES}),
    min_size=1,
)


@settings(deadline=None)
@given(tables, st.floats(0, 0.2), st.randoms(use_true_random=False))
def test_every_choice_is_within_the_slack_and_the_order_of_records_is_nothing(rows, slack, rng: random.Random):
    records = table(**rows)
    choices = choose(records, NONE, slack)
    for regime, config in chosen(choices).items():
        assert rows[config][regime] <= min(row[regime] for row in rows.values()) * (1 + max(slack, 0.001)) * (1 + 1e-9)
    rng.shuffle(records)
    assert choose(records, NONE, slack) == choices
    again = choose(records, choices, slack)
    assert len(set(chosen(again).values())) == len(set(chosen(choices).values()))
    assert choose(records, again, slack) == again


@settings(deadline=None)
@given(tables)
def test_several_configs_are_chosen_only_where_no_single_one_would_do(rows):
    few = set(chosen(choose(table(**rows), NONE, slack=0.1)).values())
    best = {regime: min(row[regime] for row in rows.values()) for regime in REGIMES}
    if len(few) > 1:
        for row in rows.values():
            assert max(row[regime] / best[regime] for regime in REGIMES) > 1.1 - 1e-9
