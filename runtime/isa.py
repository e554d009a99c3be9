"""The instruction-set level of the host's CPU, as the CPU target's kernels know it."""

from __future__ import annotations

import platform
from functools import lru_cache
from pathlib import Path

# Each level with the levels whose kernels it can run, best first; "generic" is plain vector extensions.
ISAS: dict[str, tuple[str, ...]] = {
    "avx512bf16": ("avx512bf16", "avx512", "avx2", "generic"),
    "avx512": ("avx512", "avx2", "generic"),
    "avx2": ("avx2", "generic"),
    "neon": ("neon", "generic"),
    "generic": ("generic",),
}

# What /proc/cpuinfo must list for each x86 level; a level needs the ones below it too.
_X86_FLAGS: tuple[tuple[str, frozenset[str]], ...] = (
    ("avx2", frozenset({"avx2", "fma", "f16c"})),
    ("avx512", frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl"})),
    ("avx512bf16", frozenset({"avx512_bf16"})),
)


def supports(host: str, isa: str) -> bool:
    """Whether a CPU of level ``host`` can run kernels built for ``isa``. ValueError names an unknown level."""
    for name in (host, isa):
        if name not in ISAS:
            raise ValueError(f"instruction set {name!r} is not one of {', '.join(ISAS)}")
    return isa in ISAS[host]


def x86_isa(flags: frozenset[str]) -> str:
    """The level of an x86-64 CPU with these ``/proc/cpuinfo`` flags."""
    level = "generic"
    for name, needed in _X86_FLAGS:
        if not needed <= flags:
            break
        level = name
    return level


@lru_cache(maxsize=1)
def host_isa() -> str:
    """The best level this machine runs: "avx512bf16", "avx512", "avx2", "neon" or "generic"."""
    machine = platform.machine().lower()
    if machine in ("aarch64", "arm64"):
        return "neon"
    if machine not in ("x86_64", "amd64"):
        return "generic"
    return x86_isa(_cpuinfo_flags())


def _cpuinfo_flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() == "flags":
            return frozenset(value.split())
    return frozenset()
