"""Timers of launches: on a GPU CUDA graphs of several launches between events, or events around launches that come
apart; the host's clock on a CPU.

``launch(i)`` launches on the i-th of ``sets`` rotating sets of inputs; a sampler runs a fixed number of launches and
returns microseconds a launch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch

Launch = Callable[[int], None]
Sampler = Callable[[], float]

_MAX_LAUNCHES = 256  # of one sample
_REST_CYCLES = 400_000  # some 200 µs
FLUSH_COVER = 4  # bytes that a flush writes, over those of the last-level cache
_FALLBACK_CACHE_BYTES = 32 << 20
_MAX_CPU_CACHE_BYTES = 64 << 20  # a cache shared by a hundred cores would take seconds to rotate through


class Timer(Protocol):
    """Makes samplers for one device."""

    cache_bytes: int  # of the last-level cache, that rotating inputs must exceed

    def sampler(self, launch: Launch, sets: int, sample_ms: float, *, apart: bool = False) -> Sampler:
        """Warm up, then a sampler of about ``sample_ms`` milliseconds of launches that rotates through ``sets`` inputs.

        ``apart``: a GPU rests before each launch, and overwrites its cache. In a row, launches that keep the tensor
        cores busy meet the power limit, and other configs win at the lower clock.
        """
        ...


def timer_for(device: torch.device) -> Timer:
    """The timer of a device."""
    return GraphTimer(device) if device.type == "cuda" else HostTimer()


class GraphTimer:
    """Leaves the host's cost out: it replays a CUDA graph of several launches, or hides behind the device's rest."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cache_bytes = int(torch.cuda.get_device_properties(device).L2_cache_size)
        # One for all graphs: work lists are kept by stream, and those that a graph uses must be kept.
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def sampler(self, launch: Launch, sets: int, sample_ms: float, *, apart: bool = False) -> Sampler:
        from jagtile.runtime.cuda.work_list import reuse_while_capturing

        begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        graph, stream = torch.cuda.CUDAGraph(), self._stream
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for index in range(sets):  # each set once before the capture: the launcher keeps a work list for each
                launch(index)
            begin.record()
            for index in range(3):
                launch(index)
            end.record()
            end.synchronize()
        launches = _launches(begin.elapsed_time(end) / 3, sets, sample_ms)
        if apart:
            return self._sampler_apart(launch, launches)
        # The work lists are left out: a batch's layers share one, built once.
        with reuse_while_capturing(), torch.cuda.graph(graph, stream=stream):
            for index in range(launches):
                launch(index)
        graph.replay()
        torch.cuda.synchronize(self.device)

        def sample() -> float:
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            return float(begin.elapsed_time(end)) * 1e3 / launches

        return sample

    def _sampler_apart(self, launch: Launch, launches: int) -> Sampler:
        def event() -> torch.cuda.Event:
            return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]

        around = [(event(), event()) for _ in range(launches)]

        def sample() -> float:
            with torch.cuda.stream(self._stream):
                for index, (begin, end) in enumerate(around):
                    torch.cuda._sleep(_REST_CYCLES)  # type: ignore[no-untyped-call]
                    self._flushed.add_(1)
                    begin.record()
                    launch(index)
                    end.record()
            torch.cuda.synchronize(self.device)
            return 1e3 * sum(float(begin.elapsed_time(end)) for begin, end in around) / launches

        return sample

    @cached_property
    def _flushed(self) -> torch.Tensor:
        return torch.zeros(FLUSH_COVER * self.cache_bytes // 4, dtype=torch.int32, device=self.device)


class HostTimer:
    """perf_counter around launches that are complete at return."""

    def __init__(self) -> None:
        self.cache_bytes = min(_last_level_cache(), _MAX_CPU_CACHE_BYTES)

    def sampler(self, launch: Launch, sets: int, sample_ms: float, *, apart: bool = False) -> Sampler:
        launch(0)
        begin = time.perf_counter()
        launch(1)
        launches = _launches((time.perf_counter() - begin) * 1e3, sets, sample_ms)

        def sample() -> float:
            begin = time.perf_counter()
            for index in range(launches):
                launch(index)
            return (time.perf_counter() - begin) * 1e6 / launches

        return sample


def _launches(launch_ms: float, sets: int, sample_ms: float) -> int:
    """Launches of one sample: about ``sample_ms``, in whole rotations where a rotation is short enough."""
    wanted = min(_MAX_LAUNCHES, max(1, math.ceil(sample_ms / max(launch_ms, 1e-3))))
    return wanted if wanted < sets else min(_MAX_LAUNCHES, math.ceil(wanted / sets) * sets)


def _last_level_cache() -> int:
    """Bytes of the CPU's last-level cache as Linux tells it."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        try:
            text = path.read_text().strip()
            sizes.append(int(text.rstrip("KM")) << {"K": 10, "M": 20}.get(text[-1], 0))
        except (OSError, ValueError):
            continue
    return max(sizes, default=_FALLBACK_CACHE_BYTES)
