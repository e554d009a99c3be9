"""The buffer that a launch's parameters are packed into."""

from __future__ import annotations

import ctypes
import threading
from array import array

from jagtile.runtime.cuda.tensor_map import MAP_BYTES

WORD = 8  # bytes of an address


def map_addresses(maps: int) -> slice:
    """The words of a block that are the base addresses of the tensor maps that come first: each map's first."""
    return slice(0, maps * MAP_BYTES // WORD, MAP_BYTES // WORD)


class ParameterBlock(threading.local):
    """A thread's own parameter block: the driver copies it while other threads may be filling theirs."""

    def __init__(self, size: int, addressed: slice) -> None:
        self.data = bytearray(size)
        self._fixed = (ctypes.c_char * size).from_buffer(self.data)
        self._pointers = (ctypes.c_void_p * 1)(ctypes.addressof(self._fixed))
        # The block, its words that ``fill`` writes addresses to, a launch's ``arguments``: in one, since looking up
        # what is a thread's own is dear.
        addresses = memoryview(self.data).cast("Q")[addressed]
        self.parts = (self.data, addresses, ctypes.addressof(self._pointers))


def fill(block: ParameterBlock, planned: bytes, addresses: tuple[int, ...] | None) -> tuple[bytearray, int]:
    """A thread's block with what was planned and the tensors' addresses, unless the plan has them; ``arguments``."""
    data, addressed, arguments = block.parts
    data[:] = planned
    if addresses is not None:
        addressed[:] = array("Q", addresses)
    return data, arguments
