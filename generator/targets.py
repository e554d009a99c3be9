"""How each target is compiled: its compiler, its flags, and what its output must look like."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jagtile.generator import ptxas
from jagtile.generator.toolchain import Toolchain, find_cxx, find_nvcc
from jagtile.runtime.artifact import CompileReport


@dataclass(frozen=True)
class Target:
    """Flags hold no paths: they are part of artifact keys."""

    find: Callable[[], Toolchain]
    flags: tuple[str, ...]
    suffix: str
    report: Callable[[str, str, float], CompileReport]  # (compiler output, symbol, seconds)


def _plain_report(output: str, symbol: str, seconds: float) -> CompileReport:
    return CompileReport(seconds=seconds)


TARGETS = {
    "sm_90a": Target(
        find_nvcc,
        ("-cubin", "-gencode=arch=compute_90a,code=sm_90a", "-O3", "-std=c++17", "--resource-usage"),
        ".cubin",
        ptxas.parse,
    ),
    "cpu": Target(
        find_cxx,
        ("-shared", "-fPIC", "-O3", "-std=c++17", "-fopenmp", "-fvisibility=hidden"),
        ".so",
        _plain_report,
    ),
}
