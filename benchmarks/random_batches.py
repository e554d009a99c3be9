"""Random jagged batches against every importable peer: how far ahead on the whole, and how bad the worst is.

    PYTHONPATH=.pkg python benchmarks/random_batches.py [--count 50] [--seed 0] [-o results.json]

Lengths are constant, uniform, lognormal, zipf or bimodal; head_dim 64 or 128; causal or not; 1 to 64 heads; 1, 4 or 8
query heads a kv head. All in one interleaved run with a cold cache, as `jagtile bench`. The ratio is the time of the
best peer over ours. Exit status 1 where one ratio is below --floor, or their geometric mean below --mean. variants.py
times other configs on a batch, by its number.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec
import torch

from jagtile.generator.bench import bench
from jagtile.generator.bench_types import BenchReport, Plan, WorkloadResult
from jagtile.generator.peers import OURS, PEERS
from jagtile.generator.workloads import Workload

MOST_TOKENS = {"cuda": 1 << 17, "cpu": 1 << 12}
MOST_FLOPS = {"cuda": 2e12, "cpu": 4e9}  # of a forward: a few milliseconds on a GPU
LONGEST = 16384
Draw = Callable[[random.Random, float], float]

# Lengths of a given scale.
KINDS: Mapping[str, Draw] = {
    "constant": lambda rng, scale: scale,
    "uniform": lambda rng, scale: rng.uniform(1, 2 * scale),
    "lognormal": lambda rng, scale: rng.lognormvariate(math.log(scale), 1.2),
    "zipf": lambda rng, scale: scale / 4 * rng.paretovariate(1.1),
    "bimodal": lambda rng, scale: scale * (8 if rng.random() < 0.1 else 0.25),
}


def draw(rng: random.Random, index: int, device: str) -> Workload:
    """One batch: as many sequences as its tokens and FLOPs allow, 4096 at most."""
    kind = rng.choice(list(KINDS))
    scale = 2 ** rng.uniform(3, 12)
    group = rng.choice((1, 4, 8))
    heads = group * rng.choice([n for n in (1, 2, 4, 8, 16, 32, 64) if n * group <= 64])
    head_dim, is_causal = rng.choice((64, 128)), rng.random() < 0.5
    tokens, flops = rng.uniform(0.05, 1.0) * MOST_TOKENS[device], MOST_FLOPS[device]
    lengths: list[int] = []
    while len(lengths) < 4096:
        length = max(1, min(LONGEST, round(KINDS[kind](rng, scale))))
        tokens -= length
        flops -= 4 * head_dim * heads * length**2 / (2 if is_causal else 1)
        if lengths and min(tokens, flops) < 0:
            break
        lengths.append(length)
    name = f"{index:02} {kind} {round(scale)}, h{heads}/{heads // group} d{head_dim}{' causal' if is_causal else ''}"
    seqlens = tuple(lengths)
    return Workload(name, seqlens, seqlens, heads, heads // group, head_dim, head_dim, is_causal)


def batches(count: int, seed: int, device: str) -> list[Workload]:
    """The first ``count`` batches; which these are follows from the seed and the kind of device."""
    rng = random.Random(seed)
    return [draw(rng, index, device) for index in range(count)]


def best_ratio(result: WorkloadResult) -> tuple[float, str] | None:
    """Time of the fastest peer that is not ours over ours, and its name; None where there is no such pair of times."""
    ratios = [(p.ratio, p.peer) for p in result.peers if p.peer not in OURS and p.ratio is not None]
    return min(ratios, default=None)


def verdict(ratios: Sequence[float], floor: float, mean: float) -> tuple[float, float, bool]:
    """The lowest ratio, the geometric mean, and whether both reach what is asked."""
    lowest, geometric = min(ratios), math.exp(sum(map(math.log, ratios)) / len(ratios))
    return lowest, geometric, lowest >= floor and geometric >= mean


def main() -> None:
    """Parse, run, print a line a batch and the verdict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--skip", default="flex", help="comma-separated peers (default: flex, which compiles for each)")
    parser.add_argument("--seconds", type=float, default=0.1, help="of calls, per peer and batch")
    parser.add_argument("--floor", type=float, default=0.95)
    parser.add_argument("--mean", type=float, default=1.4)
    parser.add_argument("-o", "--output", type=Path, help="write all results as JSON")
    options = parser.parse_args()
    workloads = batches(options.count, options.seed, options.device)
    found: list[tuple[float, str]] = []

    def on_result(report: BenchReport) -> None:
        result = report.workloads[-1]
        if options.output is not None:
            options.output.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1))
        best, ours = best_ratio(result), result.of(OURS[0])
        if best is None or ours is None:
            failed = (p for p in result.peers if p.state in ("incorrect", "failed"))
            states = ", ".join(f"{p.peer} {p.state}: {p.reason}" for p in failed)
            print(f"{result.workload:48} no ratio; {states}", flush=True)
            return
        found.append(best)
        size = f"{result.sequences:5} x {result.total_q / result.sequences:7.1f}"
        print(f"{result.workload:48}{size}{ours.ms:10.4f} ms{best[0]:7.2f} {best[1]:12} {result.variant}", flush=True)

    device = torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu")
    plan = Plan(seconds=options.seconds, min_samples=5, max_samples=15)
    peers = [name for name in PEERS if name not in options.skip.split(",")]
    bench(workloads, device, "bf16", peers, plan=plan, on_result=on_result)
    if len(found) < len(workloads):
        raise SystemExit(f"{len(workloads) - len(found)} of {len(workloads)} batches have no ratio")
    lowest, geometric, enough = verdict([ratio for ratio, _ in found], options.floor, options.mean)
    print(f"{len(found)} batches: lowest ratio {lowest:.2f}, geometric mean {geometric:.2f}")
    raise SystemExit(not enough)


if __name__ == "__main__":
    main()
