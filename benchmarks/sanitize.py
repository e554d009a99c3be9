"""Runs Hopper kernels on small nasty batches, for compute-sanitizer to watch.

    compute-sanitizer --tool memcheck --report-api-errors no --kernel-name kns=jagtile python benchmarks/sanitize.py

Likewise racecheck, initcheck and synccheck. Arguments name variants; without any, the shipped choices of the GPU at
hand are run, the defaults of all regimes for the same specs, and the default backward of each that has none. Each
launch is compared with the float64 oracle, on the CPU, so that only our kernels touch the GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import replace

import torch

from jagtile.generator.build import build
from jagtile.generator.oracle import errors, reference, tolerance
from jagtile.generator.oracle_gradients import gradient_tolerance, reference_gradients
from jagtile.generator.spec import KernelSpec
from jagtile.generator.tile import Variant, config_from_dict
from jagtile.generator.workloads import Workload
from jagtile.runtime import cuda
from jagtile.runtime.device import device_id
from jagtile.runtime.dispatch import default_variant
from jagtile.runtime.kernel import BackwardKernel, ForwardKernel
from jagtile.runtime.problem import REGIMES
from jagtile.tuning_db.store import Database

LENGTHS = (0, 1, 65, 0, 200, 300)


def shipped_variants(device: torch.device) -> list[Variant]:
    """Every variant that the shipped choices name, and every default beside them, once."""
    choices = Database().choices("shipped", device_id(device).slug)
    found: dict[Variant, None] = {}
    for key, entry in choices.specs.items() if choices else ():
        target, spec = key.split("/")
        for config in (entry.default, *entry.regimes.values()):
            found[Variant(target, KernelSpec.parse(spec), config_from_dict(target, config))] = None
        for regime in REGIMES:
            found[default_variant(KernelSpec.parse(spec), target, regime)] = None
    return list(found)


def check(variant: Variant, loaded: ForwardKernel, w: Workload, device: torch.device) -> float:
    """The worse relative error of two launches in a row on one work list, with lse and without."""
    batch = w.make("cpu", variant.spec.dtype, seed=3)
    on_gpu = [tensor.to(device) for tensor in batch[:5]]
    nan = float("nan")
    expected, _ = reference(*batch[:5], is_causal=w.is_causal, causal_alignment=w.causal_alignment)
    worst = 0.0
    for lse in (torch.full((w.num_heads, w.total_q), nan).to(device), None):
        out = torch.full((w.total_q, w.num_heads, w.head_dim_v), nan, dtype=batch.q.dtype).to(device)
        q, k, v, cu_seqlens_q, cu_seqlens_k = on_gpu
        bottom_right = w.causal_alignment == "bottom_right"
        loaded.forward(q, k, v, cu_seqlens_q, cu_seqlens_k, out, lse, w.head_dim**-0.5, bottom_right)
        worst = max(worst, errors(out.cpu(), expected).rel)
    return worst


def backwards(variants: Iterable[Variant]) -> list[Variant]:
    """The default backward of every case that there is a forward for, where none is named."""
    variants = list(variants)
    named = {variant.spec for variant in variants}
    specs = {replace(variant.spec, direction="bwd"): variant.target for variant in variants}
    return [default_variant(spec, target) for spec, target in specs.items() if spec not in named]


def check_backward(variant: Variant, loaded: BackwardKernel, w: Workload, device: torch.device) -> float:
    """The worst relative error of a gradient, of two launches in a row on one work list."""
    batch = w.make("cpu", variant.spec.dtype, seed=3)
    kind = {"is_causal": w.is_causal, "causal_alignment": w.causal_alignment}
    out, lse = reference(*batch[:5], **kind)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    dout, dlse = (torch.randn(x.shape, generator=generator) for x in (out, lse))
    dout = dout.to(batch.q.dtype)
    given = [x.to(device) for x in (*batch[:5], out.to(batch.q.dtype), lse.float(), dout, dlse)]
    grads = [torch.full(x.shape, float("nan"), dtype=x.dtype).to(device) for x in batch[:3]]
    for _ in range(2):
        loaded.backward(*given, *grads, w.head_dim**-0.5, w.causal_alignment == "bottom_right")  # type: ignore[arg-type]
    expected = reference_gradients(*batch[:5], dout, dlse, **kind)  # type: ignore[arg-type]
    return max(errors(grad.cpu(), want).rel for grad, want in zip(grads, expected, strict=True))


def nasty_workloads(spec: KernelSpec) -> tuple[Workload, ...]:
    """Small batches of edge lengths: equal, crossed with both alignments, many of next to nothing, few to many."""
    kind = (spec.head_dim, spec.head_dim_v, spec.causal)
    few = ((1,) * 100 + (300,) + (130,) * 20, (3,) * 100 + (300,) + (258,) * 20)
    return (
        Workload("edges", LENGTHS, LENGTHS, 4, 2, *kind),
        Workload("edges, cross", LENGTHS, LENGTHS[::-1], 2, 1, *kind, causal_alignment="bottom_right"),
        Workload("edges, cross, top-left", LENGTHS, LENGTHS[::-1], 2, 1, *kind),
        Workload("many short", *few, 4, 4, *kind, causal_alignment="bottom_right"),
        Workload("few queries", (1, 0, 40, 2), (1500, 10, 700, 0), 6, 2, *kind, causal_alignment="bottom_right"),
        Workload("few keys", (1500, 10, 700, 0), (300, 0, 40, 2), 2, 1, *kind),
    )


def main() -> None:
    """Print a line a variant; exit 1 where one is wrong."""
    device = torch.device("cuda", torch.cuda.current_device())
    variants = [Variant.parse(name) for name in sys.argv[1:]]
    if not variants:
        variants = shipped_variants(device)
        variants += backwards(variants)
    wrong = 0
    for result in build(variants):
        if result.artifact is None:
            raise SystemExit(f"{result.variant.name}: {result.reason}")
        loaded = cuda.load(result.artifact, device)
        spec = result.variant.spec
        forward = spec.direction == "fwd"
        one = check if forward else check_backward
        worst = max(one(result.variant, loaded, w, device) for w in nasty_workloads(spec))  # type: ignore[operator]
        wrong += not worst <= (tolerance if forward else gradient_tolerance)(spec.dtype)
        print(f"{result.variant.name}: relative error {worst:.2e}", flush=True)
    raise SystemExit(wrong > 0)


if __name__ == "__main__":
    main()
