"""Stands in for ``cuda.bindings.driver`` and for torch's CUDA: the real launchers run on tensors of the CPU.

``with emulated(): ...`` puts it in place. "Images" of modules are paths of shared objects made by build.py.
"""

from __future__ import annotations

import ctypes
import enum
import gc
import re
import struct
import subprocess
import sys
import types
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from jagtile.runtime.cuda import driver as jagtile_driver
from jagtile.runtime.cuda import tensor_map, work_list
from jagtile.runtime.settings import settings

_MAGIC = 0x544D4150
_MAP_BYTES = 128


class EmulatorError(Exception):
    """A kernel did what it must not; the message says which thread, at which instruction."""


class CUresult(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_INVALID_CONTEXT = 201
    CUDA_ERROR_NOT_FOUND = 500


class CUtensorMapDataType(enum.IntEnum):
    CU_TENSOR_MAP_DATA_TYPE_UINT8 = 0
    CU_TENSOR_MAP_DATA_TYPE_UINT16 = 1
    CU_TENSOR_MAP_DATA_TYPE_UINT32 = 2
    CU_TENSOR_MAP_DATA_TYPE_INT32 = 3
    CU_TENSOR_MAP_DATA_TYPE_UINT64 = 4
    CU_TENSOR_MAP_DATA_TYPE_INT64 = 5
    CU_TENSOR_MAP_DATA_TYPE_FLOAT16 = 6
    CU_TENSOR_MAP_DATA_TYPE_FLOAT32 = 7
    CU_TENSOR_MAP_DATA_TYPE_FLOAT64 = 8
    CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 = 9


_ELEMENT_BYTES = {0: 1, 1: 2, 2: 4, 3: 4, 4: 8, 5: 8, 6: 2, 7: 4, 8: 8, 9: 2}


class CUtensorMapSwizzle(enum.IntEnum):
    CU_TENSOR_MAP_SWIZZLE_NONE = 0
    CU_TENSOR_MAP_SWIZZLE_32B = 1
    CU_TENSOR_MAP_SWIZZLE_64B = 2
    CU_TENSOR_MAP_SWIZZLE_128B = 3


class CUtensorMapInterleave(enum.IntEnum):
    CU_TENSOR_MAP_INTERLEAVE_NONE = 0


class CUtensorMapL2promotion(enum.IntEnum):
    CU_TENSOR_MAP_L2_PROMOTION_NONE = 0
    CU_TENSOR_MAP_L2_PROMOTION_L2_64B = 1
    CU_TENSOR_MAP_L2_PROMOTION_L2_128B = 2
    CU_TENSOR_MAP_L2_PROMOTION_L2_256B = 3


class CUtensorMapFloatOOBfill(enum.IntEnum):
    CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE = 0


class CUlaunchAttributeID(enum.IntEnum):
    CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION = 6


class CUfunctionAttribute(enum.IntEnum):
    CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8
    CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT = 9


def encode_map(
    kind: int,
    rank: int,
    address: int,
    dims: Sequence[int],
    strides: Sequence[int],
    box: Sequence[int],
    swizzle: int,
) -> bytes:
    """The 128 bytes that cpp/copies.cpp reads. ValueError for what cuTensorMapEncodeTiled refuses."""
    size = _ELEMENT_BYTES[kind]
    inner = box[0] * size

    def check(legal: bool, what: str) -> None:
        if not legal:
            raise ValueError(f"tensor map: {what}")

    check(1 <= rank <= 5, f"rank {rank}")
    check(len(dims) == len(box) == rank and len(strides) == rank - 1, f"{dims}, {strides}, {box} for rank {rank}")
    check(address % 16 == 0 and address > 0, f"address {address:#x} is not a multiple of 16")
    check(all(1 <= extent <= 1 << 32 for extent in dims), f"extents {dims}")
    check(all(stride % 16 == 0 and 0 < stride < 1 << 40 for stride in strides), f"strides {strides}")
    check(all(1 <= extent <= 256 for extent in box), f"box {box}")
    check(inner % 16 == 0, f"the box is {inner} bytes wide")
    check(swizzle == 0 or inner <= 16 << swizzle, f"the box is {inner} bytes wide under swizzle {swizzle}")

    def padded(values: Sequence[int], to: int) -> list[int]:
        return [*values, *[0] * (to - len(values))]

    last = padded([extent - 1 for extent in dims], 5)
    data = struct.pack(
        "<QI4B5I5HH4Q", address, _MAGIC, rank, size, swizzle, kind, *last, *padded(box, 5), 0, *padded(strides, 4)
    )
    return data.ljust(_MAP_BYTES, b"\0")


@dataclass
class Function:
    library: ctypes.CDLL
    path: Path
    name: str
    dynamic_smem: int = 48 * 1024


class _TensorSpans:
    """Where the elements of the process's tensors are: what a kernel may read and write."""

    def __init__(self) -> None:
        self._spans: set[tuple[int, int]] = set()
        self._collections = -1

    def found(self) -> list[tuple[int, int]]:
        """Those of now, and those of earlier calls. Looks at old objects only where young ones may have become old."""
        collections = sum(generation["collections"] for generation in gc.get_stats()[1:])
        generations = (0, 1) if collections == self._collections else (0, 1, 2)
        self._collections = collections
        for thing in (thing for generation in generations for thing in gc.get_objects(generation)):
            if issubclass(type(thing), torch.Tensor):
                with suppress(RuntimeError):  # what compilers leave behind may have no memory, or a symbol for its size
                    nbytes = thing.untyped_storage().nbytes()
                    if thing.device.type == "cpu" and isinstance(nbytes, int) and nbytes:
                        begin = thing.untyped_storage().data_ptr()
                        self._spans.add((begin, begin + nbytes))
        return sorted(self._spans)


class _Parameters:
    """A launch's own copy of its parameters, aligned as constant memory is."""

    def __init__(self, library: ctypes.CDLL, name: str, arguments: int) -> None:
        sizes = ctypes.cast(getattr(library, f"emu_sizes_{name}"), ctypes.POINTER(ctypes.c_uint))
        self._buffers, pointers = [], []
        while size := sizes[len(pointers)]:
            buffer = ctypes.create_string_buffer(size + 64)
            aligned = -(-ctypes.addressof(buffer) // 64) * 64
            ctypes.memmove(aligned, ctypes.c_void_p.from_address(arguments + 8 * len(pointers)).value or 0, size)
            self._buffers.append(buffer)
            pointers.append(aligned)
        self.pointers = (ctypes.c_void_p * len(pointers))(*pointers)
        self.spans = [
            (ctypes.addressof(b), ctypes.addressof(b) + ctypes.sizeof(b)) for b in [*self._buffers, self.pointers]
        ]


@dataclass
class Machine:
    """The emulated device: how many CTAs it holds at a time, and the seed of the next launch's schedule."""

    processors: int = 2
    seed: int = 0
    launches: list[tuple[str, int, int, int]] = field(default_factory=list)  # kernel, CTAs, threads, shared memory
    dependent: list[bool] = field(default_factory=list)  # of each: launched while those before it may be running
    _tensors: _TensorSpans = field(default_factory=_TensorSpans)

    def launch(
        self,
        function: Function,
        grid: Sequence[int],
        block: Sequence[int],
        smem: int,
        arguments: int,
        dependent: bool = False,
    ) -> tuple[CUresult]:
        name = function.name
        if smem > function.dynamic_smem:
            raise EmulatorError(f"{name}: {smem} B of shared memory, allowed are {function.dynamic_smem}")
        self.launches.append((name, grid[0] * grid[1] * grid[2], block[0] * block[1] * block[2], smem))
        self.dependent.append(dependent)
        library = function.library
        entry = ctypes.cast(getattr(library, f"emu_entry_{name}"), ctypes.c_void_p)
        library.emu_launch.restype = ctypes.c_char_p
        unsigned3 = ctypes.c_uint * 3
        threads, ctas = (ctypes.c_uint * 2).in_dll(library, f"emu_bounds_{name}")
        if threads and block[0] * block[1] * block[2] > threads:
            raise EmulatorError(f"{name}: {block} threads, __launch_bounds__ allow {threads}")
        ctas = max(ctas, 1)
        cluster = ctypes.c_uint.in_dll(library, f"emu_cluster_{name}").value
        if grid[0] % cluster:
            raise EmulatorError(f"{name}: a grid of {grid[0]} CTAs in clusters of {cluster}")
        registers = min(65536 // (threads * ctas) // 8 * 8, 256) if threads else 0  # ptxas's choice, by the bounds
        parameters = _Parameters(library, name, arguments)
        flat = [word for span in [*parameters.spans, *self._tensors.found()] for word in span]
        library.emu_allow((ctypes.c_uint64 * len(flat))(*flat), len(flat) // 2, len(parameters.spans))
        error = library.emu_launch(
            entry,
            parameters.pointers,
            unsigned3(*grid),
            unsigned3(*block),
            ctypes.c_uint(smem),
            registers,
            cluster,
            max(self.processors * ctas, cluster),
            int(dependent),
            ctypes.c_uint64(self.seed),
        )
        self.seed += 1
        if error is not None:
            text = error.decode()
            raise EmulatorError(f"{name}, seed {self.seed - 1}: {_with_places(text, library, function.path)}")
        return (CUresult.CUDA_SUCCESS,)


def _with_places(text: str, library: ctypes.CDLL, path: Path) -> str:
    """Addresses (``@0x...``) as functions and lines of the translated source, if addr2line is there."""

    base = ctypes.cast(library.emu_launch, ctypes.c_void_p).value or 0
    try:
        symbols = subprocess.run(["nm", path], capture_output=True, text=True, check=True).stdout
        offset = next(int(line.split()[0], 16) for line in symbols.splitlines() if line.endswith(" T emu_launch"))
    except (OSError, subprocess.CalledProcessError, StopIteration):
        return text

    def place(match: re.Match[str]) -> str:
        address = hex(int(match[1], 16) - base + offset - 1)
        try:
            command = ["addr2line", "-Cfips", "-e", str(path), address]
            found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError):
            return match[0]
        calls = re.findall(r"^(?: *\(inlined by\) )?(.*) at (?:.*):(\d+|\?)", found, re.MULTILINE)
        return "in " + " < ".join(f"{name.split('(')[0].removeprefix('void ')}:{line}" for name, line in calls)

    return f"{re.sub(r'@(0x[0-9a-f]+)', place, text)}\n  (lines of {path.with_suffix('.cpp')})"


def _bindings(machine: Machine) -> types.ModuleType:
    """The module ``cuda.bindings.driver``, as far as jagtile.runtime.cuda uses it."""
    module = types.ModuleType("cuda.bindings.driver")
    success = CUresult.CUDA_SUCCESS

    def load(image: bytes) -> tuple[CUresult, Any]:
        path = Path(image.decode())
        return success, SimpleNamespace(library=ctypes.CDLL(str(path)), path=path)

    def get_function(loaded: Any, symbol: bytes) -> tuple[CUresult, Any]:
        name = symbol.decode()
        if not hasattr(loaded.library, f"emu_entry_{name}"):
            return CUresult.CUDA_ERROR_NOT_FOUND, None
        return success, Function(loaded.library, loaded.path, name)

    def set_attribute(function: Function, attribute: int, value: int) -> tuple[CUresult]:
        if attribute == CUfunctionAttribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES:
            if value > 227 * 1024:
                return (CUresult.CUDA_ERROR_INVALID_VALUE,)
            function.dynamic_smem = value
        return (success,)

    def encode(kind, rank, address, dims, strides, box, steps, interleave, swizzle, promotion, fill):  # type: ignore[no-untyped-def]
        if list(steps) != [1] * rank or interleave != 0 or fill != 0:
            return CUresult.CUDA_ERROR_INVALID_VALUE, None
        data = ctypes.create_string_buffer(encode_map(int(kind), rank, address, dims, strides, box, int(swizzle)))
        return success, SimpleNamespace(getPtr=lambda: ctypes.addressof(data), keep=data)

    def launch(function, gx, gy, gz, bx, by, bz, smem, stream, arguments, extra):  # type: ignore[no-untyped-def]
        return machine.launch(function, (gx, gy, gz), (bx, by, bz), smem, arguments)

    def launch_ex(config, function, arguments, extra):  # type: ignore[no-untyped-def]
        grid = (config.gridDimX, config.gridDimY, config.gridDimZ)
        threads = (config.blockDimX, config.blockDimY, config.blockDimZ)
        serialization = CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        dependent = any(
            attribute.id == serialization and attribute.value.programmaticStreamSerializationAllowed
            for attribute in config.attrs[: config.numAttrs]
        )
        return machine.launch(function, grid, threads, config.sharedMemBytes, arguments, dependent)

    for name, member in {
        "CUresult": CUresult,
        "CUtensorMapDataType": CUtensorMapDataType,
        "CUtensorMapSwizzle": CUtensorMapSwizzle,
        "CUtensorMapInterleave": CUtensorMapInterleave,
        "CUtensorMapL2promotion": CUtensorMapL2promotion,
        "CUtensorMapFloatOOBfill": CUtensorMapFloatOOBfill,
        "CUfunction_attribute": CUfunctionAttribute,
        "CUlaunchAttributeID": CUlaunchAttributeID,
        "CUlaunchConfig": SimpleNamespace,
        "CUlaunchAttribute": SimpleNamespace,
        "CUlaunchAttributeValue": SimpleNamespace,
        "cuuint32_t": int,
        "cuuint64_t": int,
        "cuInit": lambda _: (success,),
        "cuDriverGetVersion": lambda: (success, 13000),
        "cuGetErrorString": lambda code: (success, code.name.encode()),
        "cuDevicePrimaryCtxRetain": lambda _: (success, "context"),
        "cuCtxSetCurrent": lambda _: (success,),
        "cuModuleLoadData": load,
        "cuModuleGetFunction": get_function,
        "cuFuncSetAttribute": set_attribute,
        "cuTensorMapEncodeTiled": encode,
        "cuLaunchKernel": launch,
        "cuLaunchKernelEx": launch_ex,
    }.items():
        setattr(module, name, member)
    return module


@contextmanager
def emulated(processors: int = 2, seed: int = 0) -> Iterator[Machine]:
    """Inside, jagtile.runtime.cuda finds a device with this many processors, and torch.cuda answers accordingly."""
    machine = Machine(processors, seed)
    bindings = _bindings(machine)
    package, parent = types.ModuleType("cuda"), types.ModuleType("cuda.bindings")
    package.bindings, parent.driver = parent, bindings  # type: ignore[attr-defined]
    modules = {"cuda": package, "cuda.bindings": parent, "cuda.bindings.driver": bindings}
    properties = SimpleNamespace(multi_processor_count=processors, major=9, minor=0)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(sys.modules, modules))
        for target, name, answer in (
            (torch._C, "_cuda_getDevice", lambda: 0),
            (torch._C, "_cuda_getCurrentRawStream", lambda _: 0),
            (torch._C, "_cuda_isCurrentStreamCapturing", lambda: False),
            (torch.cuda, "device", lambda _: torch.no_grad()),
            (torch.cuda, "current_device", lambda: 0),
            (torch.cuda, "get_device_properties", lambda _: properties),
            (work_list, "_ENTRIES", {}),
        ):
            stack.enter_context(mock.patch.object(target, name, answer, create=True))
        stack.enter_context(settings.override(native_host="off"))  # whose thread would make objects old meanwhile
        for cached in (jagtile_driver.bindings, jagtile_driver.launches_dependents, tensor_map.address_comes_first):
            cached.cache_clear()
            stack.callback(cached.cache_clear)
        yield machine
