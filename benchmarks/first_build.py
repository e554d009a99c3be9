"""Seconds until a kernel that is nowhere yet is built: what the first call of a new spec waits for.

    PYTHONPATH=.pkg python benchmarks/first_build.py [SPEC...] [--repeats 2]

Without SPECs: the forward and backward of the usual head dims, causal or not, bf16. One build at a time of the config
that dispatch takes by default, each into an empty cache: look-up, rendering, ninja, nvcc, publishing. Beside the time
that passes the CPU's own, which is what would pass if nobody else wanted the CPU: it is one compiler's work. The least
of the repeats. Exit status 1 where one takes more than --most. No GPU is needed.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from jagtile.generator.build import build_one
from jagtile.generator.spec import KernelSpec
from jagtile.generator.targets import TARGETS
from jagtile.runtime.dispatch import default_variant
from jagtile.runtime.settings import settings

DIMS = ("d32", "d64", "d96", "d128", "d192", "d256", "d192_dv128")


def usual_specs() -> list[KernelSpec]:
    """What the shipped records are of, or are to be."""
    names = (f"{way}_bf16_{dims}{mask}" for way in ("fwd", "bwd") for mask in ("", "_causal") for dims in DIMS)
    return [KernelSpec.parse(name) for name in names]


def seconds_of(spec: KernelSpec, target: str, repeats: int) -> tuple[float, float]:
    """Seconds that pass and the CPU's, the least of some builds."""
    variant, passed, spent = default_variant(spec, target), float("inf"), float("inf")
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder, settings.override(cache_dir=Path(folder)):
            begin, own = time.perf_counter(), cpu_seconds()
            build_one(variant)
            passed, spent = min(passed, time.perf_counter() - begin), min(spent, cpu_seconds() - own)
    return passed, spent


def cpu_seconds() -> float:
    """Of this process and of those that it waited for."""
    return sum(os.times()[:4])


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, build, print a line a spec, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("specs", nargs="*", type=KernelSpec.parse)
    parser.add_argument("--target", default="sm_90a", choices=tuple(TARGETS))
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--most", type=float, default=3.0)
    options = parser.parse_args(arguments)
    TARGETS[options.target].find()  # once a process, not of a build
    found = {}
    for spec in options.specs or usual_specs():
        found[spec], spent = seconds_of(spec, options.target, options.repeats)
        print(f"{spec.name:28}{found[spec]:6.2f} s{spent:10.2f} s of the CPU", flush=True)
    slow = [spec.name for spec, seconds in found.items() if seconds > options.most]
    print(f"{len(found) - len(slow)} of {len(found)} within {options.most:g} s" + "".join(f"; {name}" for name in slow))
    raise SystemExit(bool(slow))


if __name__ == "__main__":
    main()
