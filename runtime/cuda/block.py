"""The buffer that a launch's parameters are packed into."""

from __future__ import annotations

import ctypes
import threading


class ParameterBlock(threading.local):
    """A thread's own parameter block: the driver copies it while other threads may be filling theirs."""

    def __init__(self, size: int) -> None:
        self.data = bytearray(size)
        self.words = memoryview(self.data).cast("Q")
        self._fixed = (ctypes.c_char * size).from_buffer(self.data)
        self._pointers = (ctypes.c_void_p * 1)(ctypes.addressof(self._fixed))
        self.arguments = ctypes.addressof(self._pointers)
