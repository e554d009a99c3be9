"""What dispatch picks along the mean length of a batch, beside the best of what it picks anywhere else.

    PYTHONPATH=.pkg python benchmarks/borders.py [--head-dim 64] [--causal] [--backward] [-o FILE.svg]

Batches of --tokens tokens and uniformly drawn lengths, their mean from --shortest to --longest in half octaves and
close to each border between regimes. On every batch the variants of all regimes are timed, interleaved, with a cold
cache; the loss is the time of the variant that dispatch takes over that of the fastest. Exit status 1 where a loss is
above --most.
With -o the times are drawn (needs matplotlib, the extra `bench`).
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch

from jagtile.generator.bench_worker import ColdClock
from jagtile.generator.passes import pass_of
from jagtile.generator.spec import Direction, KernelSpec
from jagtile.generator.tile import Variant
from jagtile.generator.workloads import Workload
from jagtile.runtime.device import device_id, resolved
from jagtile.runtime.dispatch import choose, choose_for_regime
from jagtile.runtime.kernel import Kernel
from jagtile.runtime.loader import kernel_for
from jagtile.runtime.problem import HUGE_MEAN, LONG_MEAN, regimes_for, short_means
from jagtile.tuning_db.store import Database

HIDDEN_US = 300.0  # more than the host takes to enqueue a call


def borders(spec: KernelSpec, device: torch.device) -> tuple[int, ...]:
    """Of the regimes of a spec, in tokens of mean length."""
    on_gpu = device.type == "cuda"
    return (
        *short_means(spec.direction, spec.head_dim, spec.head_dim_v, spec.causal, on_gpu),
        LONG_MEAN,
        *((HUGE_MEAN,) if on_gpu else ()),
    )


def means(shortest: int, longest: int, at: Iterable[int]) -> list[int]:
    """Mean lengths: half octaves, and 6 % to either side of each border, which are ``at``."""
    octaves = {round(2 ** (step / 2)) for step in range(2, 33)}
    sides = {round(border * side) for border in at for side in (0.94, 1.06)}
    return sorted(mean for mean in octaves | sides if shortest <= mean <= longest)


def batch_of(mean: int, tokens: int, heads: int, head_dim: int, is_causal: bool) -> Workload:
    """Lengths drawn uniformly from half to one and a half of the mean, which they have exactly."""
    rng = random.Random(mean)
    lengths: list[int] = []
    for _ in range(max(2, tokens // mean) // 2):
        spread = rng.randint(0, mean // 2)
        lengths += [mean - spread, mean + spread]
    seqlens = tuple(lengths)
    return Workload(f"mean {mean}", seqlens, seqlens, heads, heads, head_dim, head_dim, is_causal)


def variants(spec: KernelSpec, device: torch.device) -> list[Variant]:
    """What dispatch takes in any regime, once each."""
    regimes = regimes_for(spec.direction, device.type)
    found = [choose_for_regime(spec, name, device_id(device), Database()).variant for name in regimes]
    return list(dict.fromkeys(found))


def measure(
    w: Workload, kernels: dict[Variant, Kernel], clock: ColdClock, device: torch.device, samples: int
) -> dict[Variant, float]:
    """Median milliseconds of each variant, in interleaved rounds."""
    spec = next(iter(kernels)).spec
    one = pass_of(spec.direction)
    given = one.make_set(w, spec.dtype, device, seed=1)
    times: dict[Variant, list[float]] = {variant: [] for variant in kernels}
    for turn in range(samples + 1):  # the first builds the work lists
        for variant in random.sample(list(kernels), len(kernels)):
            kernel = kernels[variant]
            sample = clock.sample(lambda kernel=kernel: one.launch(kernel, w, given), HIDDEN_US)
            if turn:
                times[variant].append(sample.ms)
    return {variant: statistics.median(found) for variant, found in times.items()}


def draw(rows: list[tuple[Workload, Variant, dict[Variant, float]]], at: Iterable[int], title: str, path: Path) -> None:
    """TFLOP/s of each variant over the mean length; a ring around what dispatch takes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8.0, 4.5), layout="constrained")
    places = [w.total_q / w.batch for w, _, _ in rows]
    for variant in rows[0][2]:
        speeds = [w.flops_of(variant.spec.direction) / times[variant] / 1e9 for w, _, times in rows]
        axes.plot(places, speeds, marker=".", label=variant.config.name)
    taken = [w.flops_of(variant.spec.direction) / times[variant] / 1e9 for w, variant, times in rows]
    axes.plot(places, taken, "o", fillstyle="none", color="black", label="dispatch")
    for border in at:
        axes.axvline(border, color="grey", linewidth=0.5)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("mean length, tokens")
    axes.set_ylabel("TFLOP/s of unmasked elements")
    axes.set_title(title)
    axes.legend()
    figure.savefig(path)


def main() -> None:
    """Parse, measure, print a line a mean length, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--tokens", type=int, default=1 << 16)
    parser.add_argument("--shortest", type=int, default=16, help="smallest mean length")
    parser.add_argument("--longest", type=int, default=8192, help="largest mean length")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--backward", action="store_true", help="not the forward")
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp16", "fp32"))
    parser.add_argument("--samples", type=int, default=7)
    parser.add_argument("--most", type=float, default=1.10, help="loss that is still fine")
    parser.add_argument("-o", "--output", type=Path, help="draw to FILE (.svg, .png)")
    options = parser.parse_args()
    device = resolved(torch.device(options.device))
    direction: Direction = "bwd" if options.backward else "fwd"
    spec = KernelSpec(direction, options.dtype, options.head_dim, options.head_dim, options.causal)
    kernels = {variant: kernel_for(variant, device) for variant in variants(spec, device)}
    clock, worst, rows = ColdClock(device), 1.0, []
    at = borders(spec, device)
    for mean in means(options.shortest, options.longest, at):
        w = batch_of(mean, options.tokens, options.heads, options.head_dim, options.causal)
        taken = choose(replace(w.problem(options.dtype), spec=spec), device_id(device), Database())
        times = measure(w, kernels, clock, device, options.samples)
        rows.append((w, taken.variant, times))
        best = min(times, key=times.__getitem__)
        loss = times[taken.variant] / times[best]
        worst = max(worst, loss)
        name, ms = taken.variant.config.name, times[taken.variant]
        other = min(times.keys() - {taken.variant}, key=times.__getitem__, default=None)
        beside = f"  next {other.config.name} {times[other] / ms:.3f}" if other else ""  # over what is taken
        print(f"mean {mean:5}  {taken.regime:7} {name:36}{ms:9.4f} ms  loss {loss:5.3f}{beside}", flush=True)
    print(f"{spec.name}: largest loss {worst:.3f} over {len(rows)} lengths")
    if options.output is not None:
        title = f"{spec.name}, {options.tokens} tokens, {options.heads} heads, {device_id(device).slug}"
        draw(rows, at, title, options.output)
    raise SystemExit(worst > options.most)


if __name__ == "__main__":
    main()
