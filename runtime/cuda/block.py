"""The buffer that a launch's parameters are packed into."""

from __future__ import annotations

import ctypes
import threading

from jagtile.runtime.cuda.tensor_map import MAP_BYTES


class ParameterBlock(threading.local):
    """A thread's own parameter block: the driver copies it while other threads may be filling theirs."""

    def __init__(self, size: int, maps: int) -> None:
        self.data = bytearray(size)
        # The base addresses of the tensor maps that come first: each map's first 8 bytes.
        self.addresses = memoryview(self.data).cast("Q")[: maps * MAP_BYTES // 8 : MAP_BYTES // 8]
        self._fixed = (ctypes.c_char * size).from_buffer(self.data)
        self._pointers = (ctypes.c_void_p * 1)(ctypes.addressof(self._fixed))
        self.arguments = ctypes.addressof(self._pointers)
