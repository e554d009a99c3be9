"""A driver that records what is launched, and tensors to launch it for."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch

import jagtile
from jagtile.runtime import native

_LAUNCH = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, *(ctypes.c_uint,) * 7, *(ctypes.c_void_p,) * 3)
_LAUNCH_EX = ctypes.CFUNCTYPE(ctypes.c_int, *(ctypes.c_void_p,) * 4)
_IS_CAPTURING = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_int))
SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute of cuda.h."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_int), ("room", ctypes.c_char * 60))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        *((name, ctypes.c_uint) for name in ("gx", "gy", "gz", "bx", "by", "bz", "smem")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )


@dataclass(frozen=True)
class Launch:
    """One, with the words of the block as it was."""

    by: str  # "python" or "native"
    kernel: str
    grid: int
    threads: int
    smem: int
    stream: int
    words: tuple[int, ...]
    dependent: bool  # the kernel before it may still run


class Recorder:
    """The driver."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self.symbols: list[str] = []
        self.sizes: dict[str, int] = {}
        self.stream = 0
        self.device = 0
        self.capturing = False
        self.fails_with = 0
        self.recovered = 0
        self.launches_dependents = True
        self.launch, self.launch_ex = _LAUNCH(self._native_launch), _LAUNCH_EX(self._native_launch_ex)
        self.is_capturing = _IS_CAPTURING(self._tell_capturing)

    def function(self, _module: object, symbol: str, _smem: int = 0) -> int:
        self.symbols.append(symbol)
        return len(self.symbols)

    def python_launch(self, function: int, grid: int, _y: int, _z: int, threads: int, *rest: int) -> tuple[int]:
        _, _, smem, stream, arguments, _ = rest
        self._record("python", function, grid, threads, smem, stream, arguments)
        return (0,)

    def python_launch_ex(self, config: Any, function: int, arguments: int, _extra: int) -> tuple[int]:
        (attribute,) = config.attrs
        assert config.numAttrs == 1
        assert (attribute.id, attribute.value.programmaticStreamSerializationAllowed) == (SERIALIZATION, 1)
        assert (config.gridDimY, config.gridDimZ, config.blockDimY, config.blockDimZ) == (1,) * 4
        numbers = (config.gridDimX, config.blockDimX, config.sharedMemBytes, config.hStream)
        self._record("python", function, *numbers, arguments, dependent=True)
        return (0,)

    def _native_launch(self, function: int, grid: int, _y: int, _z: int, threads: int, *rest: Any) -> int:
        _, _, smem, stream, arguments, _ = rest
        if self.fails_with:
            code, self.fails_with = self.fails_with, 0
            return code
        self._record("native", function, grid, threads, smem, stream or 0, arguments)
        return 0

    def _native_launch_ex(self, config: int, function: int, arguments: Any, _extra: Any) -> int:
        if self.fails_with:
            code, self.fails_with = self.fails_with, 0
            return code
        of = _Config.from_address(config)
        attribute = of.attributes[0]
        assert (of.count, attribute.id, attribute.value) == (1, SERIALIZATION, 1)
        assert (of.gy, of.gz, of.by, of.bz) == (1,) * 4
        self._record("native", function, of.gx, of.bx, of.smem, of.stream or 0, arguments, dependent=True)
        return 0

    def _record(
        self,
        by: str,
        function: int,
        grid: int,
        threads: int,
        smem: int,
        stream: int,
        arguments: int,
        dependent: bool = False,
    ) -> None:
        symbol = self.symbols[function - 1]
        size = self.sizes.get(symbol, 0)
        block = ctypes.cast(arguments, ctypes.POINTER(ctypes.c_void_p))[0]
        assert block is not None
        words = memoryview(ctypes.string_at(block, size)).cast("Q") if size else ()
        self.launches.append(Launch(by, symbol, grid, threads, smem, stream, tuple(words), dependent))

    def _tell_capturing(self, _stream: int, status: Any) -> int:
        status[0] = int(self.capturing)
        return 0

    def take(self, by: str | None = None) -> list[Launch]:
        """What was launched since, which is all by one."""
        taken, self.launches = self.launches, []
        assert by is None or {launch.by for launch in taken} == {by}
        return taken


def connect(extension: Any, recorder: Recorder) -> None:
    """Once more after a change of what the host remembers of the driver: its streams."""
    functions = (recorder.launch, recorder.launch_ex, recorder.is_capturing)
    native.connect(extension, *map(native._address, functions), "cpu")


class Batch:
    """Packed operands that require grad, and nested ones of the same values."""

    def __init__(self, dim: int = 64, heads_kv: int = 4, lengths: tuple[int, ...] = (5, 0, 40, 3)) -> None:
        total = sum(lengths)
        self.q, self.dout = torch.randn(2, total, 4, dim, dtype=torch.bfloat16)
        self.k, self.v = torch.randn(2, total, heads_kv, dim, dtype=torch.bfloat16)
        ends = torch.tensor(lengths).cumsum(0)
        self.cu = torch.cat([torch.zeros(1, dtype=torch.int64), ends])
        self.leaves = [x.clone().requires_grad_() for x in (self.q, self.k, self.v)]
        self.nested = [self.nest(x) for x in (self.q, self.k, self.v)]
        self.nested_leaves = [x.detach().requires_grad_() for x in self.nested]
        self.nested_dout = self.nest(self.dout)

    def nest(self, values: torch.Tensor) -> torch.Tensor:
        return torch.nested.nested_tensor_from_jagged(values, self.cu, max_seqlen=40, min_seqlen=0).transpose(1, 2)

    def attend(self, **kind: Any) -> Any:
        return jagtile.varlen_attention(*self.leaves, self.cu, self.cu, **kind)

    def attend_nested(self, **kind: Any) -> torch.Tensor:
        return jagtile.sdpa(*self.nested_leaves, **kind)


def alike(first: Launch, second: Launch, moved: list[tuple[torch.Tensor, torch.Tensor]], unknown: int = 1) -> None:
    """Whether two launches differ in nothing but where tensors are: those that ``moved``, and so many others."""
    for field in ("kernel", "grid", "threads", "smem", "stream", "dependent"):
        assert getattr(first, field) == getattr(second, field)
    known = {(a.data_ptr(), b.data_ptr()) for a, b in moved}
    assert len(first.words) == len(second.words) > 0
    others = {b - a for a, b in zip(first.words, second.words, strict=True) if a != b and (a, b) not in known}
    assert len(others) <= unknown
