"""The few calls of the CUDA driver that loading and launching need, through ctypes (numbers: docs/launch.md)."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

from jagtile.runtime.errors import JagtileError

_INVALID_CONTEXT = 201
_MAX_DYNAMIC_SMEM = 8
_PREFERRED_CARVEOUT = 9


class CudaDriverError(JagtileError):
    """A call of the CUDA driver failed: the message has the call, the error's name and its description."""


@lru_cache(maxsize=1)
def library() -> Any:  # ctypes.CDLL hands out untyped functions
    """libcuda, initialised. CudaDriverError where there is no driver."""
    try:
        lib = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise CudaDriverError(f"no CUDA driver: libcuda.so.1 cannot be loaded ({error})") from None
    pointer, u32, i32 = ctypes.c_void_p, ctypes.c_uint, ctypes.c_int
    lib.cuLaunchKernel.argtypes = [pointer, u32, u32, u32, u32, u32, u32, u32, pointer, pointer, pointer]
    lib.cuModuleLoadData.argtypes = [pointer, ctypes.c_char_p]
    lib.cuModuleGetFunction.argtypes = [pointer, pointer, ctypes.c_char_p]
    lib.cuFuncSetAttribute.argtypes = [pointer, i32, i32]
    lib.cuGetErrorName.argtypes = lib.cuGetErrorString.argtypes = [i32, pointer]
    lib.cuDevicePrimaryCtxRetain.argtypes = [pointer, i32]
    lib.cuCtxSetCurrent.argtypes = [pointer]
    check(lib.cuInit(0), "cuInit", lib)
    return lib


def check(code: int, call: str, lib: Any = None) -> None:
    """Raise CudaDriverError unless the call succeeded."""
    if code == 0:
        return
    lib = lib or library()
    name, text = ctypes.c_char_p(), ctypes.c_char_p()
    lib.cuGetErrorName(code, ctypes.byref(name))
    lib.cuGetErrorString(code, ctypes.byref(text))
    unknown = b"unknown error"
    raise CudaDriverError(
        f"{call} failed: {(name.value or unknown).decode()} ({code}): {(text.value or unknown).decode()}"
    )


def bind_primary_context(device_index: int) -> None:
    """Make the device's primary context, the one torch uses, current in this thread."""
    lib, context = library(), ctypes.c_void_p()
    check(lib.cuDevicePrimaryCtxRetain(ctypes.byref(context), device_index), "cuDevicePrimaryCtxRetain")
    check(lib.cuCtxSetCurrent(context), "cuCtxSetCurrent")


def load_module(image: bytes) -> ctypes.c_void_p:
    """A module of a cubin, in the current context. Never unloaded: captured graphs may hold its kernels."""
    module = ctypes.c_void_p()
    check(library().cuModuleLoadData(ctypes.byref(module), image), "cuModuleLoadData")
    return module


def function(module: ctypes.c_void_p, symbol: str, dynamic_smem: int = 0) -> ctypes.c_void_p:
    """A kernel of a module, allowed to use ``dynamic_smem`` bytes of shared memory."""
    lib, handle = library(), ctypes.c_void_p()
    check(lib.cuModuleGetFunction(ctypes.byref(handle), module, symbol.encode()), f"cuModuleGetFunction({symbol})")
    if dynamic_smem:
        check(lib.cuFuncSetAttribute(handle, _MAX_DYNAMIC_SMEM, dynamic_smem), f"cuFuncSetAttribute({symbol}, smem)")
        check(lib.cuFuncSetAttribute(handle, _PREFERRED_CARVEOUT, 100), f"cuFuncSetAttribute({symbol}, carveout)")
    return handle


def launch(
    kernel: ctypes.c_void_p, grid: int, threads: int, smem: int, stream: int, params: Any, device_index: int
) -> None:
    """Launch on a raw stream. ``params`` is a ctypes array of one pointer to the parameter block."""
    code = library().cuLaunchKernel(kernel, grid, 1, 1, threads, 1, 1, smem, stream, params, None)
    if code == _INVALID_CONTEXT:  # a thread that has not touched CUDA yet
        bind_primary_context(device_index)
        code = library().cuLaunchKernel(kernel, grid, 1, 1, threads, 1, 1, smem, stream, params, None)
    if code:
        check(code, "cuLaunchKernel")
