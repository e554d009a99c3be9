"""Whether others use a device while it is timed: processes, load before we begin, clocks that were lowered.

GPUs are asked through NVML, the driver's own interface (``pip install nvidia-ml-py``, in the extra ``cuda``).
nvidia-smi would be a process to start and a table to parse; torch's helpers call the same package and tell neither
processes nor reasons. Where it is missing nothing is known, which harms nothing. A CPU is asked for its load.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from typing import Any

import torch

_BUSY_PERCENT = 10  # of the time, before we launched anything
_BUSY_LOAD = 0.5  # processes that want to run, for each CPU
_LOW_CLOCK = 0.6  # of the highest
# Reasons that say something of the machine. A power cap is how a large GPU works under full load.
_SLOWDOWNS = {
    "nvmlClocksThrottleReasonHwSlowdown": "hardware slowdown",
    "nvmlClocksThrottleReasonHwThermalSlowdown": "too hot (hardware)",
    "nvmlClocksThrottleReasonSwThermalSlowdown": "too hot (driver)",
    "nvmlClocksThrottleReasonHwPowerBrakeSlowdown": "power brake",
    "nvmlClocksThrottleReasonApplicationsClocksSetting": "application clocks are set",
}


@dataclass(frozen=True)
class Conditions:
    """A device at one moment. None where it is not known."""

    idle: bool = False  # we ourselves have launched nothing yet
    others: int | None = None  # other processes with a context on the GPU
    busy: int | None = None  # percent of the last second or so in which some kernel ran
    clock: float | None = None  # of the SMs, in proportion to their highest
    slowdowns: tuple[str, ...] = ()  # why clocks are lowered
    load: float | None = None  # processes that want to run, for each CPU
    unknown: str = ""  # why nothing is known

    @property
    def complaints(self) -> tuple[str, ...]:
        """What makes timings doubtful."""
        found = []
        if self.others:
            found.append(f"{self.others} other process{'es' if self.others > 1 else ''} on the GPU")
        if self.idle and self.busy is not None and self.busy >= _BUSY_PERCENT:
            found.append(f"the GPU was busy {self.busy} % of the time before anything was launched")
        if self.idle and self.load is not None and self.load >= _BUSY_LOAD:
            found.append(f"a load of {self.load:.1f} for each CPU before anything was launched")
        if not self.idle and self.clock is not None and self.clock < _LOW_CLOCK:
            found.append(f"the SMs' clock is at {100 * self.clock:.0f} % of its highest")
        found += [f"clocks are lowered: {reason}" for reason in self.slowdowns]
        return tuple(found)


def conditions(device: torch.device, *, idle: bool) -> Conditions:
    """The conditions now. Called by the process that owns the device; ``idle``: it has launched nothing yet."""
    if device.type != "cuda":
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return Conditions(idle=idle, load=os.getloadavg()[0] / cpus)
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return Conditions(unknown="nvidia-ml-py is not installed")
    torch.empty(1, device=device)  # NVML lists processes that have a context: so should we
    return gpu_conditions(nvml, f"GPU-{torch.cuda.get_device_properties(device).uuid}", idle=idle)


def gpu_conditions(nvml: Any, uuid: str, *, idle: bool) -> Conditions:
    """Those of the GPU of a UUID, by a module with the functions of pynvml."""
    try:
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
        pids = [process.pid for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle)]
        busy = nvml.nvmlDeviceGetUtilizationRates(handle).gpu
        clock = nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)
        highest = nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM)
        reasons = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
    except Exception as error:  # NVMLError is of the module that may be missing; a MIG slice knows only a part of this
        return Conditions(unknown=f"NVML: {error}")
    return Conditions(
        idle=idle,
        others=_others(pids),
        busy=busy,
        clock=clock / highest if highest else None,
        slowdowns=tuple(text for name, text in _SLOWDOWNS.items() if reasons & getattr(nvml, name, 0)),
    )


def _others(pids: list[int]) -> int:
    """How many of the processes are not this one. In a container NVML tells the host's numbers: then one is ours."""
    others = [pid for pid in pids if pid != os.getpid()]
    return len(others) - 1 if others and len(others) == len(pids) else len(others)
