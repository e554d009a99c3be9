"""What is shipped in tuning_db/: every choice is legal, was measured, and is what dispatch takes on its device."""

from __future__ import annotations

import warnings

import msgspec
import pytest

from jagtile.generator.choose import choose
from jagtile.generator.resume import current_records
from jagtile.generator.spec import KernelSpec
from jagtile.generator.tile import Variant, config_from_dict
from jagtile.generator.trial import source_sha256
from jagtile.runtime.device import DeviceId
from jagtile.runtime.dispatch import choose_for_regime
from jagtile.runtime.errors import JagtileWarning
from jagtile.runtime.problem import REGIMES, look_up_of, regimes_for
from jagtile.tuning_db.schema import ChoiceEntry, Choices
from jagtile.tuning_db.store import Database

DATABASE = Database()
SHIPPED = [DATABASE.choices("shipped", facts.slug) for facts in DATABASE.devices("shipped")]
ENTRIES = [
    pytest.param(choices, key, id=f"{choices.device.slug}-{key.rpartition('/')[2]}")
    for choices in SHIPPED
    if choices is not None
    for key in choices.specs
]


def chosen(entry: ChoiceEntry) -> list[dict[str, int | str | bool]]:
    """Every config of an entry once."""
    configs = {repr(config): config for config in (entry.default, *entry.regimes.values())}
    return list(configs.values())


def test_the_h200_has_choices_and_every_device_its_own_folder():
    folders = {path.parent.name for path in DATABASE.shipped_root.glob("*/*.json*")}
    assert "sm90-132sm" in folders
    assert {choices.device.slug for choices in SHIPPED if choices is not None} == folders


def test_every_shipped_line_is_a_record_of_its_folders_device_and_names_a_spec():
    with warnings.catch_warnings():
        warnings.simplefilter("error", JagtileWarning)
        records = DATABASE.records()
    lines = sum(len(path.read_text().splitlines()) for path in DATABASE.shipped_root.glob("*/records.jsonl"))
    assert len([r for r in records if r.device in {c.device.slug for c in SHIPPED if c is not None}]) >= lines > 0
    for record in records:
        assert KernelSpec.parse(record.spec).name == record.spec
        assert record.regime in REGIMES


@pytest.mark.parametrize(("choices", "key"), ENTRIES)
def test_every_shipped_choice_is_legal_and_was_measured(choices: Choices, key: str):
    target, _, spec = key.rpartition("/")
    assert target == choices.device.target
    assert choices.specs[key].regimes.keys() <= set(regimes_for(KernelSpec.parse(spec).direction, target))
    measured = DATABASE.records(device=choices.device.slug, target=target, spec=spec, state="ok")
    for config in chosen(choices.specs[key]):
        variant = Variant(target, KernelSpec.parse(spec), config_from_dict(target, config))
        variant.check()
        own = [record for record in measured if record.config == config]
        assert {record.phase for record in own} >= {"final"}, f"{variant.name} was never in the finals"
        if source_sha256(variant) not in {record.source_sha256 for record in own}:
            warnings.warn(f"{variant.name} was tuned with another source: retune with --ship", stacklevel=1)


@pytest.mark.parametrize(("choices", "key"), ENTRIES)
def test_the_shipped_choices_follow_from_the_shipped_records(choices: Choices, key: str, tmp_path):
    spec = KernelSpec.parse(key.rpartition("/")[2])
    records = current_records(Database(tmp_path), choices.device.slug, choices.device.target, spec)
    if records and choices.specs[key].default not in [record.config for _, record in records]:
        pytest.skip("what is chosen was tuned with another source: retune with --ship")
    assert choose([record for _, record in records], choices).specs[key] == choices.specs[key]


@pytest.mark.parametrize(("choices", "key"), ENTRIES)
@pytest.mark.parametrize("regime", REGIMES)
def test_dispatch_takes_the_shipped_choices_on_their_device_and_on_its_relatives(
    choices: Choices, key: str, regime: str, tmp_path
):
    own = DeviceId(**msgspec.structs.asdict(choices.device))
    smaller = DeviceId(
        f"{own.slug}-smaller", own.target, "a relative", own.units - 1, own.bandwidth_gbs, own.compute_capability
    )
    spec, entry = KernelSpec.parse(key.rpartition("/")[2]), choices.specs[key]
    for device, source in ((own, "shipped"), (smaller, f"relative:{own.slug}")):
        decision = choose_for_regime(spec, regime, device, Database(tmp_path))
        assert decision.source == source
        assert decision.variant.config.to_dict() == entry.config(look_up_of(regime))
