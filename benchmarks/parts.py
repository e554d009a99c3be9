"""Device time of every kernel of a forward and backward, workload by workload: where the time of ragged batches goes.

    PYTHONPATH=.pkg python benchmarks/parts.py recsys-d64 one-token-d64 vit-d64
    PYTHONPATH=.pkg python benchmarks/parts.py recsys-d64=keyblocks_m64_n64_s2_c2_dbulk_o0_k1_hnone_l0_e1

Each argument is a workload, with or without a backward's config; else dispatch chooses, as it does for the forward.
Prints the median of the launches, as torch's profiler (CUPTI) saw them; a list of work is built once.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace

import torch
from torch.profiler import ProfilerActivity, profile

from jagtile.generator.build import build_one
from jagtile.generator.passes import pass_of
from jagtile.generator.spec import Direction
from jagtile.generator.tile import Variant
from jagtile.generator.workloads import Workload, named
from jagtile.runtime import cuda
from jagtile.runtime.kernel import Kernel
from jagtile.runtime.loader import kernel_for
from jagtile.runtime.problem import look_up
from jagtile.runtime.routes import decide

CALLS = 11
_DIRECTIONS: tuple[Direction, ...] = ("fwd", "bwd")


def kernel_times(kernel: Kernel, direction: Direction, w: Workload, device: torch.device) -> dict[str, list[float]]:
    """Microseconds of every launch of ``CALLS`` calls, by the kernel's name, in the order of first launches."""
    one = pass_of(direction)
    given = one.make_set(w, "bf16", device, seed=1)
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(CALLS):
            one.launch(kernel, w, given)
        torch.cuda.synchronize()
    times: dict[str, list[float]] = {}
    for event in sorted(profiled.events(), key=lambda event: event.time_range.start):
        if event.name.startswith("jagtile"):
            times.setdefault(event.name, []).append(event.device_time)
    return times


def main() -> None:
    """Print a line a kernel."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="+", metavar="WORKLOAD[=CONFIG]")
    device = torch.device("cuda", torch.cuda.current_device())
    for job in parser.parse_args().jobs:
        name, _, config = job.partition("=")
        w = named()[name]
        problem = w.problem("bf16")
        print(f"{name} ({look_up(problem)[0]})")
        for direction in _DIRECTIONS:
            spec = replace(w.spec("bf16"), direction=direction)
            if config and direction == "bwd":
                kernel: Kernel = cuda.load(build_one(Variant.parse(f"sm_90a/{spec.name}/{config}")), device)
            else:
                found = decide(spec, look_up(replace(problem, spec=spec)), device)
                kernel = kernel_for(found.variant, device)
            for symbol, times in kernel_times(kernel, spec.direction, w, device).items():
                print(f"  {symbol:76}{statistics.median(times):9.2f} us  ({len(times)} launches)", flush=True)


if __name__ == "__main__":
    main()
