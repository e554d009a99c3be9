"""Record a sweep of a CPU spec where others use the machine too: by the CPU time of one thread instead of the clock.

    OMP_NUM_THREADS=1 python benchmarks/cpu_sweep.py fwd_fp32_d64 medium tests/tune/sweeps --sequences 4

`jagtile tune --exhaustive` with `python -m jagtile.generator.sweep` is the way on an idle device. Here a config's time
is its least CPU time of some launches spread over the run; the noise is the median difference of the minima of the odd
and of the even ones, and the first config is the reference. Kernels are built before anything is timed.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch

from jagtile.generator.build import build
from jagtile.generator.passes import pass_of
from jagtile.generator.replay import Sweep, write_sweep
from jagtile.generator.spec import KernelSpec
from jagtile.generator.sweep import values_of
from jagtile.generator.tile import TileConfig, Variant, legal_configs, spaces_of
from jagtile.generator.workloads import Workload, representative
from jagtile.runtime.device import device_id
from jagtile.runtime.isa import host_isa
from jagtile.runtime.loader import load

CPU = torch.device("cpu")


def timed(spec: KernelSpec, configs: list[TileConfig], workload: Workload, rounds: int) -> dict[TileConfig, list[int]]:
    """Nanoseconds of CPU time of each config's launches, one a round."""
    results = build([Variant("cpu", spec, config) for config in configs])
    kernels = {r.variant.config: load(r.artifact, CPU) for r in results if r.artifact is not None}
    kind = pass_of(spec.direction)
    given = kind.make_set(workload, spec.dtype, CPU, 0)
    samples: dict[TileConfig, list[int]] = {config: [] for config in kernels}
    order, rng = list(kernels), random.Random(0)
    for _ in range(rounds):
        rng.shuffle(order)
        for config in order:
            begin = time.thread_time_ns()
            kind.launch(kernels[config], workload, given)
            samples[config].append(time.thread_time_ns() - begin)
    return samples


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec")
    parser.add_argument("regime")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sequences", type=int, default=4, help="of the regime's workload")
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    if os.environ.get("OMP_NUM_THREADS") != "1":
        parser.error("set OMP_NUM_THREADS=1: the CPU time of one thread is what counts")
    spec = KernelSpec.parse(options.spec)
    whole = representative(spec, options.regime, "cpu")[0]
    cut = {name: getattr(whole, name)[: options.sequences] for name in ("seqlens_q", "seqlens_k")}
    workload = replace(whole, **cut)
    (space,) = spaces_of("cpu", spec)
    configs = [c for c in legal_configs(space, spec) if c.to_dict()["isa"] == host_isa()]
    samples = timed(spec, configs, workload, options.rounds)
    least = {config: min(each) for config, each in samples.items()}
    halves = [abs(min(each[::2]) / min(each[1::2]) - 1) for each in samples.values()]
    reference = least[configs[0]]
    rows = tuple((space.algorithm, values_of(c), round(least[c] / reference, 5), None) for c in configs if c in least)
    sweep = Sweep(
        device=device_id(CPU).slug,
        target="cpu",
        spec=spec.name,
        regime=options.regime,
        workload=whole.name,
        how=f"its first {options.sequences} sequences, by the CPU time of one thread",
        noise=round(statistics.median(halves), 5),
        algorithms={space.algorithm: {**space.knobs(spec), "isa": (host_isa(),)}},
        configs=rows,
    )
    fast = sorted(least.values())
    print(f"{len(rows)} configs, noise {sweep.noise:.2%}, {fast[0] / 1e6:.1f} to {fast[-1] / 1e6:.1f} ms")
    print(write_sweep(sweep, options.folder))


if __name__ == "__main__":
    main()
