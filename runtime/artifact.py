"""An artifact: one built kernel (a cubin or a shared object) with the metadata that says what it is.

``meta.json`` beside the binary is written last and published together with it; whoever reads an artifact needs nothing
of the generator: the launcher's numbers are in it.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

ABI_VERSION = 8  # of kernels' names and parameter blocks (templates/cuda/include/*params.cuh, templates/cpu/params.h)


class CompileReport(msgspec.Struct, frozen=True, kw_only=True):
    """What the compiler said. Zero where a target has no such number."""

    seconds: float = 0.0
    registers: int = 0
    spill_bytes: int = 0  # stores + loads
    stack_bytes: int = 0
    static_smem_bytes: int = 0
    warnings: tuple[str, ...] = ()


class ArtifactMeta(msgspec.Struct, frozen=True, kw_only=True):
    """Contents of meta.json."""

    abi: int
    key: str  # content address, see generator/build.py
    target: str
    spec: str
    config: dict[str, int | str | bool]
    symbol: str
    file: str  # name of the binary beside meta.json
    size: int
    sha256: str  # of the binary
    source_sha256: str
    compiler: str
    launch: dict[str, int]
    report: CompileReport


class Artifact(msgspec.Struct, frozen=True):
    """A verified artifact on disk."""

    meta: ArtifactMeta
    path: Path  # the binary
    origin: str  # "built", "cache" or "pack:<name>"
