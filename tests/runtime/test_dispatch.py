"""Dispatch: look-up order, what is skipped and why. Pure: no GPU, no files."""

from __future__ import annotations

from dataclasses import replace

import pytest

from jagtile.generator.spec import KernelSpec
from jagtile.runtime.device import DeviceId
from jagtile.runtime.dispatch import choose, choose_for_regime, default_variant
from jagtile.runtime.errors import UnsupportedError
from jagtile.runtime.problem import REGIMES, Problem
from jagtile.tuning_db.schema import ChoiceEntry, Choices, DeviceFacts

H200 = DeviceId("sm90-132sm", "sm_90a", "NVIDIA H200", 132, 4917, "9.0")
SPEC = KernelSpec("fwd", "bf16", 128, 128, True)


def problem(batch: int = 8, length: int = 4096, keys: int | None = None) -> Problem:
    return Problem(SPEC, batch, batch * length, batch * (length if keys is None else keys), 16, 16)


class FakeDatabase:
    """Choices by (origin, slug)."""

    def __init__(self, **choices: Choices) -> None:
        self._choices = {tuple(name.split("__")): found for name, found in choices.items()}

    def choices(self, origin, slug):
        return self._choices.get((origin, slug.replace("-", "_")))

    def devices(self, origin):
        return [found.device for (place, _), found in self._choices.items() if place == origin]


def choices(entry: ChoiceEntry | None, units: int = 132, spec: KernelSpec = SPEC) -> Choices:
    device = DeviceFacts(
        slug=f"sm90-{units}sm",
        label="a GPU",
        target="sm_90a",
        units=units,
        bandwidth_gbs=4000,
        compute_capability="9.0",
    )
    return Choices(device=device, specs={} if entry is None else {f"sm_90a/{spec.name}": entry})


def test_the_users_choice_comes_before_the_shipped_one(plain_spaces):
    database = FakeDatabase(
        user__sm90_132sm=choices(ChoiceEntry(default=plain_spaces(128))),
        shipped__sm90_132sm=choices(ChoiceEntry(default=plain_spaces(64))),
    )
    decision = choose(problem(), H200, database)
    assert (decision.source, decision.variant.config.block) == ("user", 128)
    assert decision.variant.name == "sm_90a/fwd_bf16_d128_causal/plain_b128"


def test_the_shipped_choice_serves_where_the_user_has_none_for_the_spec(plain_spaces):
    database = FakeDatabase(
        user__sm90_132sm=choices(None), shipped__sm90_132sm=choices(ChoiceEntry(default=plain_spaces(128)))
    )
    decision = choose(problem(), H200, database)
    assert (decision.source, decision.variant.config.block) == ("shipped", 128)
    assert [step.answer for step in decision.steps] == [
        "no entry for fwd_bf16_d128_causal",
        "taken: the spec's default entry, plain_b128",
    ]


def test_the_nearest_relative_serves_where_the_device_has_no_choices(plain_spaces):
    database = FakeDatabase(
        shipped__sm90_78sm=choices(ChoiceEntry(default=plain_spaces(64)), units=78),
        shipped__sm90_114sm=choices(ChoiceEntry(default=plain_spaces(128)), units=114),
    )
    decision = choose(problem(), H200, database)
    assert (decision.source, decision.variant.config.block) == ("relative:sm90-114sm", 128)


def test_a_farther_relative_serves_where_the_nearest_lacks_the_spec(plain_spaces):
    database = FakeDatabase(
        user__sm90_114sm=choices(None, units=114),
        shipped__sm90_78sm=choices(ChoiceEntry(default=plain_spaces(128)), units=78),
    )
    assert choose(problem(), H200, database).source == "relative:sm90-78sm"


def test_on_a_gpu_the_other_16_bit_dtype_serves_where_the_spec_has_no_choices_at_all(plain_spaces):
    fp16 = replace(SPEC, dtype="fp16")
    database = FakeDatabase(
        user__sm90_132sm=choices(ChoiceEntry(default=plain_spaces(128), regimes={"long": plain_spaces(128)})),
        shipped__sm90_78sm=choices(None, units=78),
    )
    decision = choose(replace(problem(), spec=fp16), H200, database)
    assert (decision.source, decision.variant.name) == ("user", "sm_90a/fwd_fp16_d128_causal/plain_b128")
    assert decision.steps[-1].answer == "taken: fwd_bf16_d128_causal, regime long, plain_b128"
    own = choices(ChoiceEntry(default=plain_spaces(64)), units=78, spec=fp16)
    database = FakeDatabase(user__sm90_132sm=choices(ChoiceEntry(default=plain_spaces(128))), shipped__sm90_78sm=own)
    assert choose(replace(problem(), spec=fp16), H200, database).source == "relative:sm90-78sm"


def test_dropout_takes_the_choices_of_the_spec_without_it():
    plain = KernelSpec("fwd", "fp32", 64, 64, True)
    variant = default_variant(plain, "cpu")
    config = replace(variant.config, block_m=variant.config.block_m // 2)
    device = DeviceFacts(slug="cpu-x", label="a CPU", target="cpu", units=2, bandwidth_gbs=0, compute_capability="")
    recorded = Choices(device=device, specs={f"cpu/{plain.name}": ChoiceEntry(default=config.to_dict())})
    identity = DeviceId("cpu-x", "cpu", "a CPU", 2, 0, "")
    for spec in (plain, replace(plain, dropout=True)):
        decision = choose_for_regime(spec, "long", identity, FakeDatabase(shipped__cpu_x=recorded))
        assert decision.variant == replace(variant, spec=spec, config=config)


def test_on_the_cpu_16_bit_dtypes_are_tuned_apart():
    cpu = DeviceId("cpu-avx512bf16", "cpu", "a CPU", 2, 0, "")
    facts = DeviceFacts(slug=cpu.slug, label=cpu.label, target="cpu", units=2, bandwidth_gbs=0.0, compute_capability="")
    other = default_variant(replace(SPEC, dtype="bf16"), "cpu").config.to_dict()
    recorded = Choices(device=facts, specs={f"cpu/{SPEC.name}": ChoiceEntry(default=other)})
    database = FakeDatabase(user__cpu_avx512bf16=recorded)
    assert choose_for_regime(SPEC, "long", cpu, database).source == "user"
    assert choose_for_regime(replace(SPEC, dtype="fp16"), "long", cpu, database).source == "default"


def test_the_default_of_the_space_serves_where_nothing_is_recorded(plain_spaces):
    decision = choose(problem(), H200, FakeDatabase())
    assert (decision.source, decision.variant.config.block) == ("default", 64)
    assert [step.place for step in decision.steps] == [
        "user choices for sm90-132sm",
        "shipped choices for sm90-132sm",
        "default of sm_90a/plain",
    ]


@pytest.mark.parametrize("regime", REGIMES)
def test_some_regimes_have_a_default_of_their_own(regime):
    decision = choose_for_regime(SPEC, regime, H200, FakeDatabase())
    algorithm = {"tiny": "packed", "cross": "split", "decode": "split"}.get(regime, "persistent")
    assert decision.variant.config.algorithm == algorithm
    assert decision.steps[-1].place == f"default of sm_90a/{algorithm}"
    recorded = choices(ChoiceEntry(default=default_variant(SPEC, "sm_90a").config.to_dict()))
    decision = choose_for_regime(SPEC, regime, H200, FakeDatabase(user__sm90_132sm=recorded))
    assert decision.variant.config.algorithm == "persistent"


def test_a_regime_has_its_own_config(plain_spaces):
    entry = ChoiceEntry(default=plain_spaces(64), regimes={"long": plain_spaces(128)})
    decision = choose(problem(length=2047), H200, FakeDatabase(user__sm90_132sm=choices(entry)))
    assert (decision.regime, decision.variant.config.block) == ("long", 128)


def test_a_regime_without_an_entry_takes_the_specs_default_not_its_neighbours(plain_spaces):
    entry = ChoiceEntry(default=plain_spaces(64), regimes={"long": plain_spaces(128)})
    decision = choose(problem(length=500), H200, FakeDatabase(user__sm90_132sm=choices(entry)))
    assert (decision.regime, decision.variant.config.block) == ("medium", 64)


FEW = replace(problem(batch=2), heads=4, heads_kv=4)
FEW_AND_MEDIUM = replace(problem(batch=10, length=600), heads=4, heads_kv=4)


@pytest.mark.parametrize(
    ("regimes", "blocks"), [(("few", "medium", "long"), (64, 64)), (("medium", "long"), (96, 128))]
)
def test_few_tiles_are_served_as_what_they_are_beside_until_they_are_tuned(plain_spaces, regimes, blocks):
    configs = {"few": plain_spaces(64), "medium": plain_spaces(96), "long": plain_spaces(128)}
    entry = ChoiceEntry(default=plain_spaces(32), regimes={regime: configs[regime] for regime in regimes})
    database = FakeDatabase(user__sm90_132sm=choices(entry))
    found = [choose(each, H200, database) for each in (FEW_AND_MEDIUM, FEW)]
    assert tuple(decision.variant.config.block for decision in found) == blocks
    assert {decision.regime for decision in found} == {"few"}
    assert {decision.is_borrowed for decision in found} == {"few" not in regimes}
    for decision, neighbour in zip(found, ("medium", "long"), strict=True):
        assert decision.chosen_for == ("few" if "few" in regimes else neighbour)
        assert decision.steps[0].answer.startswith(f"taken: regime {decision.chosen_for}, ")


def test_few_tiles_take_the_specs_default_where_the_neighbour_has_no_entry_either(plain_spaces):
    entry = ChoiceEntry(default=plain_spaces(64), regimes={"medium": plain_spaces(128)})
    decision = choose(FEW, H200, FakeDatabase(user__sm90_132sm=choices(entry)))
    assert (decision.regime, decision.chosen_for, decision.variant.config.block) == ("few", "", 64)
    assert decision.is_borrowed


def test_an_illegal_choice_for_few_gives_way_to_the_neighbours(plain_spaces):
    entry = ChoiceEntry(default=plain_spaces(64), regimes={"few": plain_spaces(256), "long": plain_spaces(128)})
    decision = choose(FEW, H200, FakeDatabase(user__sm90_132sm=choices(entry)))
    assert (decision.chosen_for, decision.variant.config.block) == ("long", 128)
    assert decision.steps[0].answer.startswith("skipped: regime few: ")


def test_an_illegal_config_is_skipped_with_the_arithmetic(plain_spaces):
    entry = ChoiceEntry(default=plain_spaces(64), regimes={"long": plain_spaces(256)})
    decision = choose(problem(), H200, FakeDatabase(user__sm90_132sm=choices(entry)))
    assert decision.variant.config.block == 64
    assert "block 256 > 128" in decision.steps[0].answer
    assert decision.steps[1].answer.startswith("taken: the spec's default entry")


@pytest.mark.parametrize("config", [{"algorithm": "gone", "block": 64}, {"algorithm": "plain", "tile": 64}, {}])
def test_a_config_of_an_algorithm_or_knob_that_no_longer_exists_is_skipped(plain_spaces, config):
    decision = choose(problem(), H200, FakeDatabase(user__sm90_132sm=choices(ChoiceEntry(default=config))))
    assert decision.source == "default"
    assert decision.steps[0].answer.startswith("skipped: the spec's default entry")


def test_what_no_space_serves_is_refused_with_every_reason(plain_spaces):
    spec = KernelSpec("fwd", "fp32", 64, 64, False)
    with pytest.raises(UnsupportedError, match="fwd_fp32_d64 on target sm_90a: plain: it computes in bf16 and fp16"):
        choose_for_regime(spec, "long", H200, FakeDatabase())


@pytest.mark.parametrize("regime", REGIMES)
def test_the_choice_depends_on_nothing_but_its_arguments(plain_spaces, regime):
    entry = ChoiceEntry(default=plain_spaces(64), regimes={"long": plain_spaces(128)})
    database = FakeDatabase(shipped__sm90_114sm=choices(entry, units=114))
    first = choose_for_regime(SPEC, regime, H200, database)
    assert choose_for_regime(SPEC, regime, H200, database) == first
