"""Checks and times chosen Hopper forward variants side by side: the tool for trying a change of the templates.

    PYTHONPATH=.pkg python benchmarks/variants.py --peers fa3 \
        "u4k-d64: m192_n128_s2_q2_c1 m256_n64_s3_q1_c1" "random46: split_m192_n64_s3_q2_c1 m192_n64_s4_q2_c1"

Each argument names a workload and configs (``persistent_`` may be left out, ``split_`` not), or is a file of such
lines. A workload is one of generator/workloads.json, or a batch of random_batches.py by its number there (and its
--seed). Every variant is compared with the float64 oracle on small nasty batches and on the workload itself, then all
variants and peers take turns in shuffled order with a cold L2; ours are asked for no lse, as in inference. Prints
medians and the ratio of the fastest peer's time to each.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from random_batches import batches
from sanitize import check, nasty_workloads

from jagtile.generator.build import build
from jagtile.generator.oracle import tolerance
from jagtile.generator.peers import PEERS
from jagtile.generator.spot_check import BUDGET_FLOPS, spot_check
from jagtile.generator.tile import Variant, spaces
from jagtile.generator.workloads import Workload, named
from jagtile.runtime import cuda
from jagtile.runtime.kernel import ForwardKernel

_COLD_BYTES = 200 << 20  # written before each call, several times the L2
_BUSY_CYCLES = 2_000_000  # about a millisecond, in which the host enqueues the call
Call = Callable[[], object]


def main() -> None:
    """Parse, build, check, time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", nargs="+", metavar="WORKLOAD: CONFIG...", help="or a file of such lines")
    parser.add_argument("--peers", default="fa3", help="comma-separated, see `jagtile bench` (default: fa3)")
    parser.add_argument("--samples", type=int, default=15)
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp16"))
    parser.add_argument("--seed", type=int, default=0, help="of random_batches.py, whose batches are named")
    parser.add_argument("-o", "--output", type=Path, help="write the medians as JSON")
    options = parser.parse_args()
    device = torch.device("cuda", torch.cuda.current_device())
    plan = [_parse(line, options.dtype, options.seed) for line in lines(options.lines)]
    kernels = _load({variant for _, variants in plan for variant in variants}, device)
    medians = {}
    for workload, variants in plan:
        chosen = {variant: kernels[variant] for variant in variants if variant in kernels}
        medians[workload.name] = _time(workload, chosen, options, device)
    if options.output:
        options.output.write_text(json.dumps(medians, indent=1))


def _parse(line: str, dtype: str, seed: int) -> tuple[Workload, list[Variant]]:
    name, _, configs = line.partition(":")
    number = re.fullmatch(r"random(\d+)", name.strip())
    workload = batches(int(number[1]) + 1, seed, "cuda")[-1] if number else named()[name.strip()]
    prefix = f"sm_90a/{workload.spec(dtype).name}/"  # type: ignore[arg-type]
    return workload, [Variant.parse(prefix + with_algorithm(config)) for config in configs.split()]


def with_algorithm(config: str) -> str:
    """A config's name, of the persistent forward if it names no algorithm."""
    algorithms = {space.algorithm for space in spaces()}
    return config if config.partition("_")[0] in algorithms else f"persistent_{config}"


def _load(variants: set[Variant], device: torch.device) -> dict[Variant, ForwardKernel]:
    """The variants that are legal, build and compute rightly; of the others, the reason is printed."""
    legal = []
    for variant in sorted(variants, key=lambda variant: variant.name):
        reason = variant.space.rejection(variant.spec, variant.config)
        if reason:
            print(f"illegal   {variant.name}: {reason}")
        else:
            legal.append(variant)
    loaded: dict[Variant, ForwardKernel] = {}
    for result in build(legal):
        if result.artifact is None:
            print(f"not built {result.variant.name}: {result.reason}")
            continue
        kernel = cuda.load(result.artifact, device)
        worst = max(check(result.variant, kernel, w, device) for w in nasty_workloads(result.variant.spec))
        if worst <= tolerance(result.variant.spec.dtype):
            loaded[result.variant] = kernel
        else:
            print(f"WRONG     {result.variant.name}: relative error {worst:.2e}", flush=True)
    return loaded


def _time(
    w: Workload, kernels: dict[Variant, ForwardKernel], options: argparse.Namespace, device: torch.device
) -> dict[str, float]:
    """Milliseconds of each variant and peer on one workload, printed as they stand to each other."""
    batch = w.make(device, options.dtype, seed=1)
    out = torch.empty((w.total_q, w.num_heads, w.head_dim_v), dtype=batch.q.dtype, device=device)
    bottom_right = w.causal_alignment == "bottom_right"
    expected = spot_check(batch, w, BUDGET_FLOPS["cuda"])
    calls: dict[str, Call] = {}
    for variant, kernel in kernels.items():

        def call(kernel: ForwardKernel = kernel) -> None:
            kernel.forward(*batch[:5], out, None, w.head_dim**-0.5, bottom_right)

        out.fill_(float("nan"))
        call()
        error = expected.errors(out).rel
        if not error <= tolerance(options.dtype):
            print(f"WRONG     {variant.name} on {w.name}: relative error {error:.2e}")
            continue
        calls[variant.config.name] = call
    peers = {}
    for name in filter(None, options.peers.split(",")):
        peer = PEERS[name]
        reason = peer.missing(device) or peer.refuses(w, options.dtype, device)
        if reason:
            print(f"{name} on {w.name}: {reason}")
        else:
            peers[name] = peer.prepare(w, batch).call
    calls |= peers
    medians = race(calls, options.samples, device)
    print_ranking(w.name, medians, set(peers), w.flops)
    return medians


def race(calls: Mapping[str, Call], samples: int, device: torch.device) -> dict[str, float]:
    """Median milliseconds of each, taking turns in shuffled order with a cold L2."""
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    cold = torch.empty(_COLD_BYTES, dtype=torch.uint8, device=device)
    for turn in range(samples):
        for name in random.sample(list(calls), len(calls)):
            torch.cuda._sleep(_BUSY_CYCLES)  # type: ignore[no-untyped-call]
            cold.fill_(turn % 256)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            calls[name]()
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end))
    return {name: statistics.median(values) for name, values in times.items()}


def print_ranking(title: str, medians: Mapping[str, float], peers: Collection[str], flops: int) -> None:
    """Fastest first, with the ratio of the fastest peer's time to each."""
    best_peer = min((medians[name] for name in peers), default=float("nan"))
    print(title)
    for name, ms in sorted(medians.items(), key=lambda pair: pair[1]):
        print(f"  {name:40} {ms:8.4f} ms {flops / ms / 1e9:6.0f} TFLOP/s  {best_peer / ms:6.3f}x", flush=True)


def lines(arguments: Iterable[str]) -> Iterator[str]:
    """Lines of the form ``WORKLOAD: CONFIG...``, and those of files of them."""
    for argument in arguments:
        text = argument if ":" in argument else Path(argument).read_text()
        yield from filter(None, (line.partition("#")[0].strip() for line in text.splitlines()))


if __name__ == "__main__":
    main()
