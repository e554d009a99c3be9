"""Records -> choices: the fewest distinct configs within a stated slack of the best, the incumbent on ties.

A pure function: the same records and incumbent give the same choices, in whatever order the records come. What several
people recorded is put on one scale by the configs that all of them timed.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from jagtile.generator.spec import KernelSpec
from jagtile.generator.tile import recorded_variant
from jagtile.generator.workloads import representative
from jagtile.runtime.problem import look_up_of
from jagtile.tuning_db.schema import ChoiceEntry, Choices, Config, TuningRecord

SLACK = 0.005  # a config this much slower than the best of a regime may still serve it: the ninth decile of A/A noise
_MAX_NOISE = 0.1  # for which a config may be preferred that is not the incumbent
_MAX_SUBSETS = 200_000  # looked at for one size, beyond which the cover is found greedily

Name = str  # canonical JSON of a config
Times = dict[Name, float]  # time over the regime's best


def choose(records: Iterable[TuningRecord], incumbent: Choices, slack: float = SLACK) -> Choices:
    """The choices that follow from the records of the incumbent's device.

    Specs and regimes without records keep the incumbent's entries, and so do regimes whose incumbent is legal and has
    none, or has no time and there are no finals: nobody compared it. ``records`` must be of current sources. Of a
    regime's records the latest final session of each person counts (``TuningRecord.by``), for lack of one their latest
    record of each config; not those of workloads that represent the regime no more. A config that was wrong, crashed or
    hung anywhere is never chosen. The slack of a regime is ``slack`` or, where larger, its measured noise up to 10 %;
    within the noise, however large, the incumbent stays.
    """
    by_spec: dict[str, list[TuningRecord]] = defaultdict(list)
    for record in records:
        if record.device == incumbent.device.slug:
            by_spec[f"{record.target}/{record.spec}"].append(record)
    specs = dict(incumbent.specs)
    for key, of_spec in by_spec.items():
        entry = _entry(of_spec, incumbent.specs.get(key), slack)
        if entry is not None:
            specs[key] = entry
    return msgspec.structs.replace(incumbent, specs=specs)


def _entry(records: Sequence[TuningRecord], incumbent: ChoiceEntry | None, slack: float) -> ChoiceEntry | None:
    bad = {_name(r.config) for r in records if r.state in ("incorrect", "crash", "timeout")}
    times: dict[str, Times] = {}
    noise: dict[str, float] = {}
    for regime in sorted({record.regime for record in records}):
        timed = [
            r for r in records if r.regime == regime and r.state == "ok" and r.time_us and _name(r.config) not in bad
        ]
        counting = _counting(_of_today(timed))
        ratios = _ratios(counting)
        if incumbent is not None:
            serving = incumbent.config(look_up_of(regime))
            compared = _name(serving) in bad or _name(serving) in ratios
            if not compared and _is_beside_the_point(records, regime, counting, serving):
                continue
        if ratios:
            times[regime] = ratios
            noise[regime] = max((r.aa_spread or 0.0 for r in counting), default=0.0)
    if not times:
        return None
    kept = {} if incumbent is None else {r: _name(incumbent.config(look_up_of(r))) for r in times}
    allowed = {}
    for regime, ratios in times.items():
        most = 1 + max(slack, min(noise[regime], _MAX_NOISE))
        allowed[regime] = {name for name, ratio in ratios.items() if ratio <= most}
        if ratios.get(kept.get(regime, ""), math.inf) <= 1 + noise[regime]:
            allowed[regime].add(kept[regime])
    cover = _cover(times, allowed, kept)
    regimes = {
        regime: _pick(times[regime], allowed[regime], cover, kept.get(regime), noise[regime]) for regime in times
    }
    configs = {_name(record.config): record.config for record in records}
    before = {} if incumbent is None else incumbent.regimes
    others = {regime: config for regime, config in before.items() if regime not in times and _name(config) not in bad}
    return ChoiceEntry(
        default=configs[_default(sorted(set(regimes.values())), times)],
        regimes={**others, **{regime: configs[name] for regime, name in regimes.items()}},
    )


def _is_beside_the_point(
    records: Sequence[TuningRecord], regime: str, counting: Sequence[TuningRecord], kept: Config
) -> bool:
    """Whether a regime's times say nothing against an incumbent that has none, as its source has changed.

    They are a search's, or finals of configs that were compared with what it was: finals try it wherever it is legal.
    """
    if not any(record.phase == "final" for record in counting):
        return True
    tried = {_name(record.config) for record in records if record.regime == regime}
    target, spec = counting[0].target, KernelSpec.parse(counting[0].spec)
    return _name(kept) not in tried and recorded_variant(target, spec, kept)[0] is not None


def _of_today(records: Sequence[TuningRecord]) -> Sequence[TuningRecord]:
    """Of one regime's records those of workloads that represent it, all where none does: of what it was tuned on once,
    later configs have no times, and would not be compared.
    """
    if not records:
        return records
    first = records[0]
    try:
        names = {w.name for w in representative(KernelSpec.parse(first.spec), first.regime, first.target)}
    except ValueError:  # no regime of today
        return records
    return [record for record in records if record.workload in names] or records


def _counting(records: Sequence[TuningRecord]) -> list[TuningRecord]:
    """Of one regime's times those that count: per workload and person the latest final session, else each config's
    latest.
    """
    counting: list[TuningRecord] = []
    for workload, by in sorted({(record.workload, record.by) for record in records}):
        timed = sorted(
            (r for r in records if (r.workload, r.by) == (workload, by)),
            key=lambda r: (r.date, _name(r.config)),
        )
        finals = [record for record in timed if record.phase == "final"]
        if finals:
            counting += [record for record in finals if record.session == finals[-1].session]
        else:
            counting += {_name(record.config): record for record in timed}.values()
    return counting


def _ratios(records: Sequence[TuningRecord]) -> Times:
    """Geometric mean over a regime's workloads of time over the workload's best, of configs timed on all of them."""
    by_workload: dict[str, Times] = {}
    for workload in sorted({record.workload for record in records}):
        people: dict[str, Times] = defaultdict(dict)
        for record in records:
            if record.workload == workload:
                people[record.by][_name(record.config)] = record.time_us or math.inf
        by_workload[workload] = _on_one_scale([people[by] for by in sorted(people)])
    if not by_workload:
        return {}
    common = set.intersection(*(set(times) for times in by_workload.values()))
    logs = {
        name: sum(math.log(times[name] / min(times[n] for n in common)) for times in by_workload.values())
        for name in common
    }
    return {name: math.exp((log - min(logs.values())) / len(by_workload)) for name, log in logs.items()}


def _on_one_scale(people: Sequence[Times]) -> Times:
    """Times of several people in proportion to the first one's, by the configs in common; as they are without any."""
    merged: Times = {}
    for times in people:
        common = sorted(merged.keys() & times.keys())
        log = sum(math.log(merged[name] / times[name]) for name in common) / len(common) if common else 0.0
        merged = {**{name: time * math.exp(log) for name, time in times.items()}, **merged}
    return merged


def _cover(times: Mapping[str, Times], allowed: Mapping[str, set[Name]], kept: Mapping[str, Name]) -> tuple[Name, ...]:
    """The fewest configs of which every regime allows one; among these the most incumbents, then the fastest."""
    pool = sorted(set().union(*allowed.values()))

    def cost(subset: tuple[Name, ...]) -> tuple[int, float, tuple[Name, ...]]:
        incumbents = sum(kept.get(regime) in names.intersection(subset) for regime, names in allowed.items())
        slowdown = sum(min(times[regime][n] for n in names.intersection(subset)) for regime, names in allowed.items())
        return -incumbents, slowdown, subset

    for size in range(1, len(allowed) + 1):
        if math.comb(len(pool), size) > _MAX_SUBSETS:
            break
        covers = [
            subset
            for subset in itertools.combinations(pool, size)
            if all(not names.isdisjoint(subset) for names in allowed.values())
        ]
        if covers:
            return min(covers, key=cost)
    return tuple(sorted({min(sorted(names), key=times[regime].__getitem__) for regime, names in allowed.items()}))


def _pick(times: Times, allowed: set[Name], cover: Sequence[Name], kept: Name | None, noise: float) -> Name:
    """A regime's config: the fastest of the cover, but the incumbent where it is of the cover and within the noise."""
    options = sorted(allowed.intersection(cover), key=lambda name: (times[name], name))
    if kept in options and times[kept] <= times[options[0]] * (1 + noise):
        return kept
    return options[0]


def _default(chosen: Sequence[Name], times: Mapping[str, Times]) -> Name:
    """Of the chosen configs the best one over all regimes (geometric mean); where it was not timed it counts double."""
    return min(chosen, key=lambda name: (sum(math.log(ratios.get(name, 2.0)) for ratios in times.values()), name))


def _name(config: Config) -> Name:
    return msgspec.json.encode(config, order="sorted").decode()
