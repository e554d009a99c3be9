"""Checks and times chosen Hopper backward variants side by side, as benchmarks/variants.py does forward ones.

    PYTHONPATH=.pkg python benchmarks/backward_variants.py --peers fa4,torch-varlen \\
        "u4k-d128: m64_n128_s2_c1_dbulk_o0_k1_hnone_l0_e1 m64_n128_s2_c1_dred_o0_k1_hnone_l0_e1" "u4k-d64-causal:"

Each argument names a workload and configs (the first template's name in front may be left out; none: its default), or
is a file of such lines. Every variant is compared with the float64 oracle's gradients on small nasty batches and on the
workload itself, with and without an order of additions. Then forward and backward of all take turns in shuffled order
with a cold L2: the variants behind the forward that dispatch chooses, the peers through autograd; and so do the
variants' backwards alone, in a race of their own, in-order ones among them. Prints medians, and the ratio of the
fastest peer's time to each.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from sanitize import nasty_workloads
from variants import Call, lines, print_ranking, race

from jagtile.generator.build import build
from jagtile.generator.passes import pass_of
from jagtile.generator.peer import as_it_is
from jagtile.generator.peers import PEERS
from jagtile.generator.tile import Variant, parse_config, spaces_of
from jagtile.generator.workloads import Workload, named
from jagtile.runtime import cuda
from jagtile.runtime.kernel import BackwardKernel, ForwardKernel
from jagtile.runtime.loader import kernel_for
from jagtile.runtime.problem import look_up
from jagtile.runtime.routes import decide

TARGET = "sm_90a"


def main() -> None:
    """Parse, build, check, time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", nargs="+", metavar="WORKLOAD: CONFIG...", help="or a file of such lines")
    parser.add_argument("--peers", default="fa4,torch-varlen", help="comma-separated, see `jagtile bench`")
    parser.add_argument("--samples", type=int, default=15)
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp16"))
    parser.add_argument("-o", "--output", type=Path, help="write the medians as JSON")
    options = parser.parse_args()
    device = torch.device("cuda", torch.cuda.current_device())
    plan = [_parse(line, options.dtype) for line in lines(options.lines)]
    kernels = _load({variant for _, variants in plan for variant in variants}, device)
    medians = {}
    for workload, variants in plan:
        chosen = {variant: kernels[variant] for variant in variants if variant in kernels}
        medians[workload.name] = _time(workload, chosen, options, device)
    if options.output:
        options.output.write_text(json.dumps(medians, indent=1))


def _parse(line: str, dtype: str) -> tuple[Workload, list[Variant]]:
    name, _, configs = line.partition(":")
    workload = named()[name.strip()]
    spec = replace(workload.spec(dtype), direction="bwd")  # type: ignore[arg-type]
    space, *others = spaces_of(TARGET, spec)
    algorithms = tuple(each.algorithm for each in (space, *others))
    full = [config if config.startswith(algorithms) else f"{space.algorithm}_{config}" for config in configs.split()]
    return workload, [
        Variant(TARGET, spec, parse_config(TARGET, config)) for config in full or [space.default(spec).name]
    ]


@contextmanager
def _in_order() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def _wrong(kernel: BackwardKernel, variant: Variant, w: Workload, device: torch.device) -> str:
    """What is wrong with a kernel on a workload, additions in order and not; "" for nothing."""
    backward = pass_of("bwd")
    case = backward.case(w, variant.spec.dtype, device, True)
    with _in_order():
        in_order = backward.compare(kernel, variant.spec, w, case).wrong
    return backward.compare(kernel, variant.spec, w, case).wrong or (in_order and f"in order: {in_order}")


def _load(variants: set[Variant], device: torch.device) -> dict[Variant, BackwardKernel]:
    """The variants that are legal, build and compute rightly; of the others, the reason is printed."""
    legal = []
    for variant in sorted(variants, key=lambda variant: variant.name):
        reason = variant.space.rejection(variant.spec, variant.config)
        if reason:
            print(f"illegal   {variant.name}: {reason}")
        else:
            legal.append(variant)
    loaded: dict[Variant, BackwardKernel] = {}
    for result in build(legal):
        if result.artifact is None:
            print(f"not built {result.variant.name}: {result.reason}")
            continue
        kernel = cast(BackwardKernel, cuda.load(result.artifact, device))
        reasons = [_wrong(kernel, result.variant, w, device) for w in nasty_workloads(result.variant.spec)]
        if any(reasons):
            print(f"WRONG     {result.variant.name}: {next(filter(None, reasons))}", flush=True)
        else:
            loaded[result.variant] = kernel
    return loaded


def _time(
    w: Workload, kernels: Mapping[Variant, BackwardKernel], options: argparse.Namespace, device: torch.device
) -> dict[str, dict[str, float]]:
    """Milliseconds of forward and backward of each variant and peer, and of backwards alone; printed."""
    batch = w.make(device, options.dtype, seed=1)
    out = torch.empty((w.total_q, w.num_heads, w.head_dim_v), dtype=batch.q.dtype, device=device)
    lse = torch.empty((w.num_heads, w.total_q), device=device)
    dout, grads = torch.randn_like(out), [torch.empty_like(x) for x in batch[:3]]
    meaning = (w.head_dim**-0.5, w.causal_alignment == "bottom_right")
    chosen = decide(w.spec(options.dtype), look_up(w.problem(options.dtype)), device).variant
    forward = cast(ForwardKernel, kernel_for(chosen, device))
    both: dict[str, Call] = {}
    alone: dict[str, Call] = {}
    for variant, kernel in kernels.items():
        if reason := _wrong(kernel, variant, w, device):
            print(f"WRONG     {variant.name} on {w.name}: {reason}")
            continue

        def backward(kernel: BackwardKernel = kernel) -> None:
            kernel.backward(*batch[:5], out, lse, dout, None, *grads, *meaning)

        def call(backward: Call = backward) -> None:
            forward.forward(*batch[:5], out, lse, *meaning)
            backward()

        def in_order(backward: Call = backward) -> None:
            with _in_order():
                backward()

        name = variant.config.name
        both[name], alone[name], alone[f"{name}, in order"] = call, backward, in_order
    forward.forward(*batch[:5], out, lse, *meaning)
    leaves = [x.detach().requires_grad_() for x in batch[:3]]
    peers: dict[str, Call] = {}
    for name in filter(None, options.peers.split(",")):
        peer = PEERS[name]
        reason = peer.missing(device) or peer.refuses(w, options.dtype, device)
        if reason:
            print(f"{name} on {w.name}: {reason}")
            continue
        attention = peer.prepare(w, batch._replace(q=leaves[0], k=leaves[1], v=leaves[2])).call

        def train(attention: Call = attention) -> None:
            torch.autograd.grad(as_it_is(attention()), leaves, dout)

        try:
            train()
        except (RuntimeError, NotImplementedError, AssertionError) as error:
            print(f"{name} on {w.name}: {error}")
        else:
            peers[name] = train
    medians = {"both": race(both | peers, options.samples, device), "backward": race(alone, options.samples, device)}
    flops = w.flops_of("bwd")
    print_ranking(f"{w.name}, forward and backward", medians["both"], set(peers), w.flops + flops)
    print_ranking(f"{w.name}, backward alone", medians["backward"], (), flops)
    return medians


if __name__ == "__main__":
    main()
