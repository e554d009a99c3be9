"""Run a forward kernel by hand: ``python tests/emulator/run.py sm_90a/fwd_bf16_d64_causal/CONFIG --lengths 5,0,130``.

Prints the error against the float64 oracle; exit code 1 if it is too large or the kernel misbehaved.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from emulator import kernels
from emulator.driver import EmulatorError, emulated
from jagtile.generator.oracle import errors, reference, tolerance, torch_dtype
from jagtile.generator.render import Source
from jagtile.generator.spaces.sm90_forward import Sm90ForwardSpace
from jagtile.generator.spec import KernelSpec
from jagtile.generator.tile import Variant
from jagtile.generator.workloads import Workload
from jagtile.runtime import cuda


def _lengths(text: str) -> tuple[int, ...]:
    return tuple(int(length) for length in text.split(","))


def _variant(text: str) -> Variant:
    """A variant's name, or a spec's: its default config."""
    if "/" in text:
        return Variant.parse(text)
    spec = KernelSpec.parse(text)
    return Variant("sm_90a", spec, Sm90ForwardSpace().default(spec))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variant", type=_variant, help="sm_90a/SPEC/CONFIG, or SPEC for its default config")
    parser.add_argument("--lengths", type=_lengths, default=(5, 0, 130, 300), help="of queries, separated by commas")
    parser.add_argument("--lengths-k", type=_lengths, help="of keys, where they differ")
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--heads-kv", type=int, default=1)
    parser.add_argument("--without-lse", action="store_true", help="it is not asked for")
    parser.add_argument("--bottom-right", action="store_true", help="causal alignment")
    parser.add_argument("--seed", type=int, default=0, help="of the first schedule; data are the same for all")
    parser.add_argument("--seeds", type=int, default=1, help="how many schedules")
    parser.add_argument("--processors", type=int, default=2)
    parser.add_argument(
        "--replace", nargs=2, action="append", default=[], metavar=("OLD", "NEW"), help="edit the source"
    )
    return parser.parse_args()


def main() -> int:
    arguments = _arguments()
    variant: Variant = arguments.variant
    spec = variant.spec

    def change(source: Source) -> Source:
        for old, new in arguments.replace:
            source = kernels.substitution(old, new)(source)
        return source

    begin = time.perf_counter()
    artifact = kernels.artifact(variant, change)
    print(f"{variant.name}: built in {time.perf_counter() - begin:.1f} s")
    workload = Workload(
        "by hand",
        arguments.lengths,
        arguments.lengths_k or arguments.lengths,
        arguments.heads,
        arguments.heads_kv,
        spec.head_dim,
        spec.head_dim_v,
        spec.causal,
        causal_alignment="bottom_right" if arguments.bottom_right else "top_left",
    )
    batch = workload.make("cpu", spec.dtype, 1)
    expected, expected_lse = reference(
        *batch[:5], is_causal=spec.causal, causal_alignment=workload.causal_alignment, scale=0.1
    )
    failed = False
    for seed in range(arguments.seed, arguments.seed + arguments.seeds):
        out = torch.full(expected.shape, float("nan"), dtype=torch_dtype(spec.dtype))
        lse = torch.full(expected_lse.shape, float("nan"))
        begin = time.perf_counter()
        try:
            with emulated(arguments.processors, seed):
                kernel = cuda.load(artifact, torch.device("cuda", 0))
                wanted_lse = None if arguments.without_lse else lse
                kernel.forward(*batch[:5], out, wanted_lse, 0.1, arguments.bottom_right)
        except EmulatorError as error:
            print(f"seed {seed}: {error}")
            failed = True
            continue
        found = errors(out, expected)
        lse_error = float(torch.where(lse == expected_lse, 0.0, (lse - expected_lse).abs()).max())
        if arguments.without_lse:
            lse_error = 0.0
        verdict = "ok" if found.rel <= tolerance(out.dtype) and lse_error < 1e-3 else "WRONG"
        failed |= verdict != "ok"
        seconds = time.perf_counter() - begin
        print(f"seed {seed}: {verdict}, relative error {found.rel:.2e}, lse {lse_error:.1e}, {seconds:.2f} s")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
