"""DeviceId: what distinguishes one device from another for tuning and dispatch, and which known device is nearest."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol, TypeVar

import torch

from jagtile.runtime.errors import UnsupportedError
from jagtile.runtime.isa import ISAS, host_isa, supports


class Facts(Protocol):
    """What is compared between devices; ``DeviceId`` and the tuning database's ``DeviceFacts`` both have it."""

    @property
    def slug(self) -> str: ...
    @property
    def target(self) -> str: ...
    @property
    def units(self) -> int: ...
    @property
    def bandwidth_gbs(self) -> float: ...
    @property
    def compute_capability(self) -> str: ...


@dataclass(frozen=True)
class DeviceId:
    """A kind of device. The marketing name is only a label; the slug says what matters."""

    slug: str  # "sm90-132sm", "cpu-avx512bf16"
    target: str  # "sm_90a", "cpu"
    label: str  # e.g. "NVIDIA H200"
    units: int  # multiprocessors, or CPUs that this process may use
    bandwidth_gbs: float  # of memory, from the driver's clock and bus width; 0 where it is not known
    compute_capability: str  # "9.0"; for a CPU its instruction set, e.g. "avx512bf16"


# Target of each compute capability that is served.
_CUDA_TARGETS = {(9, 0): "sm_90a"}

SERVED_DEVICES = "the CPU, and NVIDIA GPUs of compute capability 9.0 (Hopper)"


def device_id(device: torch.device) -> DeviceId:
    """The identity of a torch device, cached. UnsupportedError for a device that no target serves.

    Asking for a CUDA device initialises CUDA in this process.
    """
    if device.type == "cpu":
        return _cpu_id()
    if device.type == "cuda":
        return _cuda_id(resolved(device).index)
    raise UnsupportedError(f"device {device} is not served; served: {SERVED_DEVICES}")


def resolved(device: torch.device | str | None) -> torch.device:
    """The device, a CUDA one with its index; None is the current CUDA device, the CPU where there is none."""
    found = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device is None else device)
    if found.type == "cuda":
        return torch.device("cuda", torch.cuda.current_device() if found.index is None else found.index)
    return torch.device(found.type)


@lru_cache(maxsize=1)
def _cpu_id() -> DeviceId:
    isa = host_isa()
    units = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return DeviceId(f"cpu-{isa}", "cpu", _cpu_label(), units, 0.0, isa)


def _cpu_label() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@lru_cache(maxsize=64)
def _cuda_id(index: int) -> DeviceId:
    properties = torch.cuda.get_device_properties(index)
    capability = (properties.major, properties.minor)
    if torch.version.hip or capability not in _CUDA_TARGETS:
        raise UnsupportedError(
            f"cuda:{index} ({properties.name}, compute capability {capability[0]}.{capability[1]}) is not served; "
            f"served: {SERVED_DEVICES}"
        )
    clock_khz = getattr(properties, "memory_clock_rate", 0)  # not in every torch release
    bus_bits = getattr(properties, "memory_bus_width", 0)
    units = properties.multi_processor_count
    return DeviceId(
        slug=f"sm{capability[0]}{capability[1]}-{units}sm",
        target=_CUDA_TARGETS[capability],
        label=properties.name,
        units=units,
        bandwidth_gbs=round(2 * clock_khz * 1e3 * bus_bits / 8 / 1e9),  # two transfers a clock
        compute_capability=f"{capability[0]}.{capability[1]}",
    )


F = TypeVar("F", bound=Facts)


def relatives(device: Facts, known: Iterable[F]) -> list[F]:
    """The known devices whose choices make sense on ``device``, nearest first, itself left out.

    GPUs: same target and compute capability, then the closest number of multiprocessors, then the closest bandwidth.
    CPUs: the best instruction set among those that the device supports.
    """

    def related(other: F) -> bool:
        if other.target != device.target or other.slug == device.slug:
            return False
        if device.target == "cpu":
            return other.compute_capability in ISAS and supports(device.compute_capability, other.compute_capability)
        return other.compute_capability == device.compute_capability

    def distance(other: F) -> tuple[float, float, str]:
        if device.target == "cpu":
            return ISAS[device.compute_capability].index(other.compute_capability), 0.0, other.slug
        return abs(other.units - device.units), abs(other.bandwidth_gbs - device.bandwidth_gbs), other.slug

    return sorted(filter(related, known), key=distance)
