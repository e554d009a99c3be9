"""Draw the results of `jagtile bench -o results.json`: TFLOP/s of every peer on every workload.

    python benchmarks/plot.py results.json [results.svg]

Needs matplotlib (the extra `bench`).
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from jagtile.generator.bench_types import BenchReport


def plot(report: BenchReport, path: Path) -> None:
    """Grouped bars; a peer without a time on a workload has no bar there."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(peer.peer for result in report.workloads for peer in result.peers if peer.tflops))
    if not names:
        raise SystemExit("nothing was timed")
    width = 0.8 / len(names)
    figure, axes = pyplot.subplots(figsize=(max(6.0, 1.1 * len(report.workloads)), 4.5), layout="constrained")
    for index, name in enumerate(names):
        found = [(place, result.of(name)) for place, result in enumerate(report.workloads)]
        bars = [(place, peer.tflops) for place, peer in found if peer is not None and peer.tflops is not None]
        places = [place + width * (index - (len(names) - 1) / 2) for place, _ in bars]
        axes.bar(places, [tflops for _, tflops in bars], width, label=name)
    axes.set_xticks(
        range(len(report.workloads)), [result.workload for result in report.workloads], rotation=35, ha="right"
    )
    axes.set_ylabel("TFLOP/s of unmasked elements")
    axes.set_title(f"{report.device.label}, torch {report.torch}, {report.date}")
    axes.legend()
    figure.savefig(path)


def main(arguments: list[str]) -> None:
    """Command line: the results, and where the picture goes."""
    if not 1 <= len(arguments) <= 2:
        raise SystemExit(__doc__)
    source = Path(arguments[0])
    target = Path(arguments[1]) if len(arguments) == 2 else source.with_suffix(".svg")
    plot(msgspec.json.decode(source.read_bytes(), type=BenchReport), target)
    print(target)


if __name__ == "__main__":
    main(sys.argv[1:])
