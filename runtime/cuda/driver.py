"""Loading and launching through the CUDA driver (cuda-bindings, which torch's CUDA builds bring along).

It is the fastest of the paths measured in docs/launch.md. Modules are never unloaded: captured graphs may hold their
kernels.
"""

from __future__ import annotations

import threading
from functools import lru_cache
from typing import Any

from jagtile.runtime.errors import JagtileError

_DEPENDENT_LAUNCHES_IN_GRAPHS = 12030  # the first version of the driver that captures them


class CudaDriverError(JagtileError):
    """A call of the CUDA driver failed: the message has the call, the error's name and its description."""


class NoContextError(CudaDriverError):
    """The thread has no CUDA context yet: autograd's threads start without one."""


@lru_cache(maxsize=1)
def bindings() -> Any:  # an extension module without type stubs
    """``cuda.bindings.driver``, initialised. CudaDriverError where it or the driver is missing."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise CudaDriverError(f"CUDA kernels need cuda-bindings ({error}): pip install jagtile[cuda]") from None
    try:
        code = driver.cuInit(0)[0]
    except RuntimeError as error:  # libcuda is loaded at the first call
        raise CudaDriverError(f"there is no usable CUDA driver: {error}") from None
    _check(driver, code, "cuInit")
    return driver


def _check(driver: Any, code: Any, call: str) -> None:
    if code == driver.CUresult.CUDA_SUCCESS:
        return
    _, text = driver.cuGetErrorString(code)
    kind = NoContextError if code == driver.CUresult.CUDA_ERROR_INVALID_CONTEXT else CudaDriverError
    raise kind(f"{call} failed: {code.name} ({int(code)}): {(text or b'no description').decode()}")


def call(name: str, *arguments: Any) -> Any:
    """Call a driver function that gives at most one value; returns it. CudaDriverError unless it succeeds."""
    driver = bindings()
    code, *values = getattr(driver, name)(*arguments)
    _check(driver, code, name)
    return values[0] if values else None


def bind_primary_context(device_index: int) -> None:
    """Make the device's primary context, the one torch uses, current in this thread."""
    call("cuCtxSetCurrent", call("cuDevicePrimaryCtxRetain", device_index))


def recover(code: int, call: str, device_index: int, again: bool) -> None:
    """What a failed call's code asks for: a context for a thread that has not touched CUDA yet, CudaDriverError else,
    or where that has been tried before (``again``).
    """
    result = bindings().CUresult(code)
    if result == bindings().CUresult.CUDA_ERROR_INVALID_CONTEXT and not again:
        bind_primary_context(device_index)
    else:
        _check(bindings(), result, call)


def load_module(image: bytes) -> Any:
    """A module of a cubin, in the current context."""
    return call("cuModuleLoadData", image)


def function(module: Any, symbol: str, dynamic_smem: int = 0) -> Any:
    """A kernel of a module, allowed to use ``dynamic_smem`` bytes of shared memory."""
    kernel = call("cuModuleGetFunction", module, symbol.encode())
    if dynamic_smem:
        attributes = bindings().CUfunction_attribute
        call("cuFuncSetAttribute", kernel, attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, dynamic_smem)
        call("cuFuncSetAttribute", kernel, attributes.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100)
    return kernel


@lru_cache(maxsize=1)
def launches_dependents() -> bool:
    """Whether a kernel can be launched while the one before it runs, also in a graph that is captured."""
    version: int = call("cuDriverGetVersion")
    return version >= _DEPENDENT_LAUNCHES_IN_GRAPHS


class Launcher:
    """Launches kernels on one device. Made once, so that a launch looks nothing up."""

    def __init__(self, device_index: int) -> None:
        driver = bindings()
        self._device_index = device_index
        self._launch = driver.cuLaunchKernel
        self._success = driver.CUresult.CUDA_SUCCESS
        self._invalid_context = driver.CUresult.CUDA_ERROR_INVALID_CONTEXT

    def __call__(self, kernel: Any, grid: int, threads: int, smem: int, stream: int, arguments: int) -> None:
        """Launch on a raw stream. ``arguments``: address of an array of one pointer to the parameter block."""
        code = self._launch(kernel, grid, 1, 1, threads, 1, 1, smem, stream, arguments, 0)[0]
        if code != self._success:
            self._recover(code, "cuLaunchKernel", kernel, grid, 1, 1, threads, 1, 1, smem, stream, arguments, 0)

    def _recover(self, code: Any, call: str, *arguments: Any) -> None:
        """Launch once more where the thread has not touched CUDA yet, else raise CudaDriverError."""
        if code == self._invalid_context:
            bind_primary_context(self._device_index)
            code = self._launch(*arguments)[0]
        _check(bindings(), code, call)


class DependentLauncher(Launcher):
    """Launches kernels while the one before them on the stream may still run, for which they wait themselves
    (templates/cuda/include/dependent_launch.cuh): no others.
    """

    def __init__(self, device_index: int) -> None:
        super().__init__(device_index)
        self._launch = bindings().cuLaunchKernelEx
        self._own = _Config()

    def __call__(self, kernel: Any, grid: int, threads: int, smem: int, stream: int, arguments: int) -> None:
        """As Launcher."""
        config = self._own.config
        config.gridDimX, config.blockDimX, config.sharedMemBytes, config.hStream = grid, threads, smem, stream
        code = self._launch(config, kernel, arguments, 0)[0]
        if code != self._success:
            self._recover(code, "cuLaunchKernelEx", config, kernel, arguments, 0)


class _Config(threading.local):
    """A thread's own launch configuration: the driver reads it while other threads may be filling theirs."""

    def __init__(self) -> None:
        driver = bindings()
        attribute, value = driver.CUlaunchAttribute(), driver.CUlaunchAttributeValue()
        value.programmaticStreamSerializationAllowed = 1
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value = value
        self.config = driver.CUlaunchConfig()
        self.config.gridDimY = self.config.gridDimZ = self.config.blockDimY = self.config.blockDimZ = 1
        self.config.attrs = [attribute]
        self.config.numAttrs = 1
