"""Taking over other people's records: the union of all, and of the choices that follow from them the better ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from jagtile.generator.choose import choose
from jagtile.generator.resume import current_records, is_stale, variant_of
from jagtile.generator.spec import KernelSpec
from jagtile.runtime.problem import look_up_of
from jagtile.tuning_db.exchange import Export
from jagtile.tuning_db.schema import ChoiceEntry, Choices, Config, DeviceFacts, TuningRecord
from jagtile.tuning_db.store import Database, identity


@dataclass(frozen=True)
class Change:
    """A choice that follows from the merged records and did not before."""

    device: str
    key: str  # target/spec
    regime: str
    before: Config | None
    after: Config
    by: str  # whose record of the new config is the latest
    stale: bool  # it was measured with another source than today's


@dataclass(frozen=True)
class Merged:
    """What a merge did."""

    added: int
    known: int  # records that were there already
    changes: tuple[Change, ...]


def merge(database: Database, export: Export, by: str) -> Merged:
    """Add an export's records to the user's, and choose anew where that changes what follows from them.

    ``by``: whose records they are where they do not say. DatabaseError where nothing can be written; what was there
    stays in any case, and the same merge again adds what is missing.
    """
    added, changes = 0, []
    for slug in sorted({record.device for record in export.records}):
        own = [record for record in export.records if record.device == slug]
        known = {identity(record) for record in database.records(device=slug)}
        with database.writer(slug, ship=False) as writer:
            for record in own:
                if identity(record) not in known:
                    known.add(identity(record))
                    writer.append(record if record.by else msgspec.structs.replace(record, by=by))
                    added += 1
        if slug in export.devices:
            keys = sorted({(record.target, record.spec) for record in own})
            changes += _choose_anew(database, export.devices[slug], keys)
    return Merged(added, len(export.records) - added, tuple(changes))


def _choose_anew(database: Database, facts: DeviceFacts, keys: Sequence[tuple[str, str]]) -> list[Change]:
    """Choices of some specs from all records; specs without a record of today's source go by what there is."""
    changes = []
    with database.changing_choices(facts.slug, ship=False):
        users = database.choices("user", facts.slug) or Choices(device=facts)
        shipped = database.choices("shipped", facts.slug) or Choices(device=facts)
        specs = dict(users.specs)
        for target, spec in keys:
            key = f"{target}/{spec}"
            before = users.specs.get(key) or shipped.specs.get(key)
            current = [record for _, record in current_records(database, facts.slug, target, KernelSpec.parse(spec))]
            records = current or ([] if before else _usable(database, facts.slug, target, spec))
            start = Choices(device=facts, specs={key: before} if before else {})
            after = choose(records, start).specs.get(key)
            if after is not None and after != before:
                specs[key] = after
                changes += _changes(facts.slug, key, before, after, records)
        if changes:
            database.write_choices(msgspec.structs.replace(users, specs=specs), ship=False)
    return changes


def _usable(database: Database, slug: str, target: str, spec: str) -> list[TuningRecord]:
    """Records whose config is legal still, of whatever source."""
    legal = []
    for record in database.records(device=slug, target=target, spec=spec):
        variant = variant_of(record)
        if variant is not None and variant.space.rejection(variant.spec, variant.config) is None:
            legal.append(record)
    return legal


def _changes(
    slug: str, key: str, before: ChoiceEntry | None, after: ChoiceEntry, records: Sequence[TuningRecord]
) -> list[Change]:
    changes = []
    for regime, config in sorted(after.regimes.items()):
        old = before.config(look_up_of(regime)) if before else None
        if config != old:
            latest = [r for r in records if (r.regime, r.config, r.state) == (regime, config, "ok")][-1]
            changes.append(Change(slug, key, regime, old, config, latest.by, is_stale(latest)))
    return changes
