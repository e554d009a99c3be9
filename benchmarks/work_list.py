"""How long the device takes to build the work list of a batch, apart from the attention that uses it.

    PYTHONPATH=.pkg python benchmarks/work_list.py [--most 16384]

Batches of 64 sequences and up, 64 tokens each on average, offsets made anew for every call so that every call builds
its list. Prints the median device time of each kernel of a call, as torch's profiler (CUPTI) saw it.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from torch.profiler import ProfilerActivity, profile

import jagtile

CALLS = 21


def kernel_times(batch: int, mean: int, is_causal: bool) -> dict[str, list[float]]:
    """Microseconds of every launch of ``CALLS`` calls, by the kernel's name."""
    generator = torch.Generator().manual_seed(batch)
    lengths = torch.randint(0, 2 * mean + 1, (batch,), generator=generator)
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int().cuda()
    x = torch.randn((int(lengths.sum()), 4, 64), device="cuda", dtype=torch.bfloat16)

    def call() -> None:
        fresh = offsets.clone()
        jagtile.varlen_attention(x, x, x, fresh, fresh, is_causal=is_causal)

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(CALLS):
            call()
        torch.cuda.synchronize()
    times: dict[str, list[float]] = {}
    for event in profiled.events():
        if event.name.startswith("jagtile"):
            times.setdefault(event.name, []).append(event.device_time)
    return times


def main() -> None:
    """Print a line a batch size and kernel."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=16384, help="sequences of the largest batch")
    parser.add_argument("--mean", type=int, default=64, help="tokens a sequence")
    parser.add_argument("--causal", action="store_true")
    options = parser.parse_args()
    batch = 64
    while batch <= options.most:
        for name, times in sorted(kernel_times(batch, options.mean, options.causal).items()):
            print(f"B {batch:6}  {name:64}{statistics.median(times):9.2f} us  ({len(times)} launches)", flush=True)
        batch *= 4


if __name__ == "__main__":
    main()
