"""Launches of the kernels that build work lists (templates/cuda/include/list_builder.cuh)."""

from __future__ import annotations

from typing import Any

from jagtile.runtime.cuda import driver

MOST_ALONE = 2048  # blocks of a list that one CTA builds
CLUSTER_CTAS = 8
THREADS, FEWEST_THREADS = 1024, 128  # of a CTA: one for each sequence, where it is alone


class ListBuilder:
    """The two builders of a module: one CTA for a short list, a cluster of them for a long one."""

    def __init__(self, module: Any, symbol: str) -> None:
        self._alone = driver.function(module, symbol)
        self._cluster = driver.function(module, f"{symbol}_cluster")

    def build(self, launch: driver.Launcher, batch: int, most_blocks: int, stream: int, arguments: int) -> None:
        """Launch, for a list of at most so many blocks of a batch."""
        if batch <= THREADS and most_blocks <= MOST_ALONE:
            threads = max(1 << (most_blocks - 1).bit_length(), FEWEST_THREADS)
            launch(self._alone, 1, min(threads, THREADS), 0, stream, arguments)
        else:
            launch(self._cluster, CLUSTER_CTAS, THREADS, 0, stream, arguments)
