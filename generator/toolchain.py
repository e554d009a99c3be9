"""Find the compilers and ninja, and the version strings that stand for them in artifact keys."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from jagtile.runtime.errors import CompilerNotFoundError
from jagtile.runtime.settings import settings


@dataclass(frozen=True)
class Toolchain:
    """A compiler. ``version`` identifies what it emits; ``path`` is only where it happens to be."""

    path: Path
    version: str


def find_nvcc() -> Toolchain:
    """The CUDA compiler: JAGTILE_NVCC, pip and conda toolkits and CUDA_HOME, PATH, /usr/local/cuda."""
    return _nvcc(settings.nvcc, os.environ.get("PATH", ""), os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"))


def find_cxx() -> Toolchain:
    """The C++ compiler: CXX, then g++, c++ and clang++ on the PATH."""
    return _cxx(os.environ.get("CXX", "").strip(), os.environ.get("PATH", ""))


def find_ninja() -> Path:
    """The ninja of the ``ninja`` package, else the PATH's."""
    try:
        import ninja

        packaged = Path(ninja.BIN_DIR) / "ninja"
        if packaged.is_file():
            return packaged
    except ImportError:
        pass
    found = shutil.which("ninja")
    if found is None:
        raise CompilerNotFoundError(
            "ninja was not found: neither the Python package nor on the PATH. pip install ninja"
        )
    return Path(found)


@lru_cache(maxsize=8)
def _nvcc(setting: str | None, path: str, *_toolkits: str | None) -> Toolchain:
    tried = []
    for place, candidate in (
        (f"JAGTILE_NVCC ({setting or 'not set'})", setting),
        ("pip and conda toolkits, CUDA_HOME, CUDA_PATH", _pathfinder_nvcc()),
        ("PATH", shutil.which("nvcc", path=path)),
        ("/usr/local/cuda/bin/nvcc", "/usr/local/cuda/bin/nvcc"),
    ):
        if candidate is not None and os.access(candidate, os.X_OK) and Path(candidate).is_file():
            return Toolchain(Path(candidate), _nvcc_version(Path(candidate)))
        tried.append(place)
    raise CompilerNotFoundError(
        f"no CUDA compiler (nvcc) was found; tried: {'; '.join(tried)}. `pip install jagtile[nvcc]` brings one, or let "
        f"JAGTILE_NVCC name one"
    )


def _pathfinder_nvcc() -> str | None:
    from cuda.pathfinder import find_nvidia_binary_utility

    found: str | None = find_nvidia_binary_utility("nvcc")
    return found


def _nvcc_version(path: Path) -> str:
    text = _output(path, "--version")
    release = re.search(r"release .*, V([\d.]+)", text)
    build = re.search(r"^Build (\S+)", text, re.MULTILINE)
    if release is None:
        raise CompilerNotFoundError(f"{path} does not answer --version as nvcc does: {text.strip()[:200]!r}")
    return f"nvcc {release[1]}" + (f" ({build[1]})" if build else "")


@lru_cache(maxsize=8)
def _cxx(setting: str, path: str) -> Toolchain:
    tried = []
    for name in (setting, "g++", "c++", "clang++"):
        found = shutil.which(name, path=path) if name else None
        if found is not None:
            version = _output(Path(found), "--version").splitlines()
            machine = _output(Path(found), "-dumpmachine").strip()
            return Toolchain(Path(found), f"{version[0].strip() if version else name} [{machine}]")
        tried.append(name or "CXX (not set)")
    raise CompilerNotFoundError(
        f"no C++ compiler was found; tried: {', '.join(tried)}. Install one (such as `apt-get install g++`), or let "
        f"CXX name one"
    )


def _output(path: Path, flag: str) -> str:
    try:
        done = subprocess.run([path, flag], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompilerNotFoundError(f"{path} {flag} can't be run: {error}") from None
    return done.stdout
