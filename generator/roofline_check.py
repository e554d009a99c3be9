"""How well the roofline model ranks what was measured: `python -m jagtile.generator.roofline_check [DEVICE]`.

For every spec and regime on record: Spearman's rank correlation of predicted and measured times, and how much slower
than the best measured config the best of the quarter is that the model likes most.
"""

from __future__ import annotations

import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from jagtile.generator.resume import variant_of
from jagtile.generator.roofline import roofline
from jagtile.generator.tile import Variant
from jagtile.generator.workloads import representative
from jagtile.tuning_db.store import Database

DEVICE = "sm90-132sm"


@dataclass(frozen=True)
class Agreement:
    """Prediction and measurement for one spec and regime."""

    spec: str
    regime: str
    configs: int
    correlation: float  # of ranks
    quarter: float  # best of the predicted quarter over the best
    level: float  # median of predicted over measured


def agreements(database: Database, device: str = DEVICE) -> list[Agreement]:
    """One for each spec and regime with at least eight configs that are legal still and that there is a model of."""
    (facts,) = (facts for facts in database.devices("shipped") if facts.slug == device)
    times: dict[tuple[str, str, str], dict[Variant, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in database.records("shipped", device=device, state="ok"):
        variant = variant_of(record)
        if variant is not None and variant.space.rejection(variant.spec, variant.config) is None:
            times[record.spec, record.regime, record.workload][variant].append(record.time_us or 0.0)
    found = []
    for (spec, regime, workload), by_variant in sorted(times.items()):
        pairs = []
        for variant, samples in by_variant.items():
            for each in representative(variant.spec, regime, variant.target):
                predicted = roofline(variant, each, facts) if each.name == workload else None
                if predicted is not None:
                    pairs.append((predicted.us, statistics.median(samples)))
        if len(pairs) >= 8:
            found.append(_agreement(spec, regime, sorted(pairs)))
    return found


def _agreement(spec: str, regime: str, pairs: Sequence[tuple[float, float]]) -> Agreement:
    predicted, measured = [p for p, _ in pairs], [m for _, m in pairs]
    return Agreement(
        spec=spec,
        regime=regime,
        configs=len(pairs),
        correlation=rank_correlation(predicted, measured),
        quarter=min(measured[: max(1, len(measured) // 4)]) / min(measured),
        level=statistics.median(p / m for p, m in pairs),
    )


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's; 0 where all of one side are equal."""
    ranks = [_ranks(one), _ranks(other)]
    return 0.0 if any(len(set(r)) == 1 for r in ranks) else statistics.correlation(*ranks)


def _ranks(values: Sequence[float]) -> list[float]:
    """Places in order, equal values sharing the mean of theirs."""
    places: dict[float, list[int]] = defaultdict(list)
    for place, value in enumerate(sorted(values)):
        places[value].append(place)
    return [statistics.mean(places[value]) for value in values]


def main() -> None:
    """Print the medians of each regime and of all, as a table of docs/tuning.md."""
    found = agreements(Database(), *sys.argv[1:2])
    print(
        "| regime | specs | configs | rank correlation, median (lowest) | best of the quarter | predicted / measured |"
    )
    print("|---|---|---|---|---|---|")
    for regime in [*dict.fromkeys(each.regime for each in found), "all"]:
        own = [each for each in found if regime in (each.regime, "all")]
        correlations = [each.correlation for each in own]
        print(
            f"| {regime} | {len(own)} | {sum(each.configs for each in own)} "
            f"| {statistics.median(correlations):.2f} ({min(correlations):.2f}) "
            f"| {max(each.quarter for each in own):.2f} at worst "
            f"| {min(each.level for each in own):.2f} to {max(each.level for each in own):.2f} |"
        )


if __name__ == "__main__":
    main()
