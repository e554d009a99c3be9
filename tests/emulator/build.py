"""Kernels as shared objects of the host: translated, compiled with g++, kept by the hash of all that they depend on."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

from filelock import FileLock

from emulator.cuda_source import Translation
from jagtile.generator.render import Source
from jagtile.generator.toolchain import find_cxx

_CPP = Path(__file__).parent / "cpp"
_RUNTIME_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-g1", "-ffp-contract=off")
# Registers that an asynchronous product writes are variables whose address it keeps: no two may share a place.
_KERNEL_FLAGS = (
    *("-O1", "-std=c++17", "-fPIC", "-g1", "-w", "-fstack-reuse=none", "-fno-strict-aliasing", "-fno-ipa-sra"),
    # A call before every access to memory, cpp/accesses.cpp.
    "-fsanitize=kernel-address",
    *("--param=asan-instrumentation-with-call-threshold=0", "--param=asan-stack=0", "--param=asan-globals=0"),
)
_PATIENCE_SECONDS = 300


def cache_folder() -> Path:
    """Beside the kernels that the tests keep from run to run, if they do, else the run's own cache."""
    folder = os.environ.get("JAGTILE_TEST_CACHE") or os.environ.get("JAGTILE_CACHE_DIR") or tempfile.gettempdir()
    return Path(folder) / "emulator"


@lru_cache(maxsize=1)
def _host_flags() -> tuple[str, ...]:
    """Without fma in hardware every fused multiply-add is a call."""
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return ()
    return ("-march=x86-64-v3",) if {"avx2", "fma", "bmi2"} <= set(flags) else ()


def translate(source: Source) -> tuple[str, list[str]]:
    """The C++ of a rendered kernel with its headers inside, and the names of its kernels."""
    translation = Translation()
    headers = dict(source.headers)
    seen: set[str] = set()

    def inlined(text: str) -> str:
        def include(match: re.Match[str]) -> str:
            path = match[1]
            if path in seen or path not in headers:
                return match[0] if path not in headers else ""
            seen.add(path)
            return inlined(headers[path].replace("#pragma once", ""))

        return re.sub(r'^[ \t]*#[ \t]*include[ \t]+"([^"]+)"', include, text, flags=re.MULTILINE)

    body = translation.translate(inlined(source.text))
    return f'#include "cuda.h"\n{body}\n{translation.entries()}', list(translation.kernels)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE_SECONDS)
    if done.returncode:
        errors = "\n".join(line for line in done.stderr.splitlines() if "error" in line)[:4000]
        raise RuntimeError(f"{' '.join(command)}\n{errors or done.stderr[:4000]}")


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _made(path: Path, make: object) -> Path:
    """``path``, made in a private folder and moved into place where it is missing, by one process at a time."""
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if path.exists():
            return path
        with tempfile.TemporaryDirectory(dir=path.parent) as private:
            made = Path(private) / path.name
            make(made)  # type: ignore[operator]
            made.replace(path)
    return path


@lru_cache(maxsize=1)
def _runtime() -> tuple[Path, ...]:
    """The runtime's objects."""
    cxx = find_cxx()
    headers = "".join(path.read_text() for path in sorted(_CPP.glob("*.h")))
    objects = []
    for source in sorted(_CPP.glob("*.cpp")):
        key = _hash(cxx.version, *_RUNTIME_FLAGS, headers, source.read_text())

        def compile_it(target: Path, source: Path = source) -> None:
            _run([*cxx.command, *_RUNTIME_FLAGS, "-c", str(source), "-o", str(target)])

        objects.append(_made(cache_folder() / f"{source.stem}-{key}.o", compile_it))
    return tuple(objects)


def build(source: Source) -> Path:
    """The shared object of a rendered CUDA source.

    PtxError for PTX that is not modelled, RuntimeError for what the compiler refuses.
    """
    text, _ = translate(source)
    cxx, runtime = find_cxx(), _runtime()
    key = _hash(cxx.version, *_KERNEL_FLAGS, *_host_flags(), *(path.name for path in runtime), text)

    def compile_it(target: Path) -> None:
        kernel = target.with_suffix(".cpp")
        kernel.write_text(text)
        flags = [*_KERNEL_FLAGS, *_host_flags(), "-I", str(_CPP), "-shared", str(kernel), *map(str, runtime)]
        _run([*cxx.command, *flags, "-o", str(target)])
        kernel.replace(cache_folder() / f"{key}.cpp")  # for addresses in reports, and to be read

    return _made(cache_folder() / f"{key}.so", compile_it)
