"""One OpenMP runtime a process: kernels use the one that torch has loaded, whatever its file is called.

A kernel asks the dynamic linker for ``libgomp.so.1``. Some torch wheels bundle the library under that name, and it is
shared as it is; others rename it, and a second runtime with a second pool of spinning threads would be started. Putting
torch's into the global scope first makes the kernels' symbols resolve to it. Kernels of clang++ ask for LLVM's libomp
and do start a pool of their own.
"""

from __future__ import annotations

import ctypes
import os
from functools import lru_cache
from pathlib import Path

_RUNTIMES = ("libgomp", "libiomp", "libomp")


@lru_cache(maxsize=1)
def share_openmp() -> None:
    """Make the OpenMP runtime that is loaded already visible to libraries that are loaded later."""
    for path in loaded_runtimes()[:1]:
        ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL | getattr(os, "RTLD_NOLOAD", 0))


def loaded_runtimes() -> list[str]:
    """Paths of the OpenMP runtimes mapped into this process; empty where that can't be known."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    paths = (line.split(maxsplit=5)[-1] for line in lines if "/" in line)
    return list(dict.fromkeys(path for path in paths if Path(path).name.startswith(_RUNTIMES)))
