"""A cap on what a worker may allocate: a kernel that wants all memory fails before others are killed for it."""

from __future__ import annotations

import contextlib
import resource
from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_STATUS = Path("/proc/self/statm")
_CGROUP = Path("/sys/fs/cgroup")


def available_bytes() -> int | None:
    """Memory that can be had now without swapping, in this control group; None where the system does not tell."""
    found = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        line = next(line for line in _MEMINFO.read_text().splitlines() if line.startswith("MemAvailable:"))
        found.append(int(line.split()[1]) * 1024)
    with contextlib.suppress(OSError, ValueError):  # no limit reads "max"
        found.append(int((_CGROUP / "memory.max").read_text()) - int((_CGROUP / "memory.current").read_text()))
    return max(0, min(found)) if found else None


def cap_address_space() -> None:
    """Let this process have what is available now and no more. Not for CUDA, which reserves far more than it uses."""
    room = available_bytes()
    if room is None:
        return
    with contextlib.suppress(OSError, ValueError):
        used = int(_STATUS.read_text().split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = used + room
        resource.setrlimit(resource.RLIMIT_AS, (limit if hard < 0 else min(limit, hard), hard))
