"""Seeds of schedules: no two runs of a test share one, and a test's are its own, whatever its process ran before."""

from __future__ import annotations

import itertools
import zlib

_numbers = itertools.count(1)


def begin(test: str) -> None:
    """Every later seed is this test's."""
    global _numbers
    _numbers = itertools.count(zlib.crc32(test.encode()))


def next_seed() -> int:
    """For ``emulated``, whose launches count on from it."""
    return 1000 * next(_numbers)
