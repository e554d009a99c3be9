"""Launches of the kernels that build work lists (templates/cuda/include/list_builder.cuh)."""

from __future__ import annotations

from typing import Any

from jagtile.runtime.cuda import driver

MOST_ALONE, MOST_SEQUENCES_ALONE = 2048, 1024  # blocks of a list that one CTA builds, and sequences
CLUSTER_CTAS = 8
ALONE_THREADS, CLUSTER_THREADS = (128, 512), (256, 1024)  # of a CTA: fewest and most, a power of two


class ListBuilder:
    """The two builders of a module: one CTA for a short list, a cluster of them for a long one."""

    def __init__(self, module: Any, symbol: str) -> None:
        self._alone = driver.function(module, symbol)
        self._cluster = driver.function(module, f"{symbol}_cluster")

    def build(self, launch: driver.Launcher, batch: int, most_blocks: int, stream: int, arguments: int) -> None:
        """Launch, for a list of at most so many blocks of a batch."""
        if batch <= MOST_SEQUENCES_ALONE and most_blocks <= MOST_ALONE:
            launch(self._alone, 1, _threads(most_blocks, *ALONE_THREADS), 0, stream, arguments)
        else:
            threads = _threads(-(-most_blocks // CLUSTER_CTAS), *CLUSTER_THREADS)
            launch(self._cluster, CLUSTER_CTAS, threads, 0, stream, arguments)


def _threads(most_blocks: int, fewest: int, most: int) -> int:
    """Threads of a CTA that has so many blocks at most: one for two sequences, or blocks."""
    return min(max(1 << (-(-most_blocks // 2) - 1).bit_length(), fewest), most)
