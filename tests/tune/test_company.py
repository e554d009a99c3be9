"""Others on the device are noticed and told, and not knowing is no error."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace

import pytest
import torch
from fakes import DEVICE, SPEC, FakeBuilder, FakeWorker

from jagtile.generator.company import Conditions, conditions, gpu_conditions
from jagtile.generator.tune import Budget, tune
from jagtile.generator.worker import WorkerFailure
from jagtile.tuning_db.store import Database


class Nvml:
    """A module as pynvml, of one GPU."""

    NVML_CLOCK_SM = 1
    nvmlClocksThrottleReasonSwPowerCap = 4  # noqa: N815
    nvmlClocksThrottleReasonHwThermalSlowdown = 64  # noqa: N815

    def __init__(self, pids=(), busy=0, clock=1900, reasons=0) -> None:
        self.pids, self.busy, self.clock, self.reasons = pids, busy, clock, reasons

    def nvmlInit(self) -> None:  # noqa: N802
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid):  # noqa: N802
        if uuid != "GPU-1":
            raise RuntimeError("Not Found")
        return "handle"

    def nvmlDeviceGetComputeRunningProcesses(self, handle):  # noqa: N802
        return [SimpleNamespace(pid=pid) for pid in self.pids]

    def nvmlDeviceGetUtilizationRates(self, handle):  # noqa: N802
        return SimpleNamespace(gpu=self.busy)

    def nvmlDeviceGetClockInfo(self, handle, kind):  # noqa: N802
        return self.clock

    def nvmlDeviceGetMaxClockInfo(self, handle, kind):  # noqa: N802
        return 1980

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle):  # noqa: N802
        return self.reasons


OURS = os.getpid()


@pytest.mark.parametrize(
    ("nvml", "idle", "complaints"),
    [
        (Nvml([OURS]), True, ()),
        (Nvml([OURS, 7, 8]), False, ("2 other processes on the GPU",)),
        (Nvml([4711]), True, ()),  # the number of us outside of a container
        (Nvml([4711, 4712]), True, ("1 other process on the GPU",)),
        (Nvml([OURS], busy=80), True, ("the GPU was busy 80 % of the time before anything was launched",)),
        (Nvml([OURS], busy=80), False, ()),
        (Nvml([OURS], clock=300), True, ()),  # it idles
        (Nvml([OURS], clock=990), False, ("the SMs' clock is at 50 % of its highest",)),
        (Nvml([OURS], reasons=64 | 4), False, ("clocks are lowered: too hot (hardware)",)),
        (Nvml([OURS], reasons=4), False, ()),  # a power cap is normal
    ],
)
def test_what_makes_timings_doubtful_is_told(nvml, idle, complaints):
    assert gpu_conditions(nvml, "GPU-1", idle=idle).complaints == complaints


def test_what_nvml_does_not_tell_is_unknown_and_no_complaint(monkeypatch):
    found = gpu_conditions(Nvml(), "GPU-2", idle=True)
    assert (found.unknown, found.complaints) == ("NVML: Not Found", ())
    monkeypatch.setitem(sys.modules, "pynvml", None)
    found = conditions(torch.device("cuda"), idle=True)
    assert (found.unknown, found.complaints) == ("nvidia-ml-py is not installed", ())


def test_a_cpu_that_is_busy_before_we_begin_is_told(monkeypatch):
    cpus = len(os.sched_getaffinity(0))
    monkeypatch.setattr(os, "getloadavg", lambda: (3.0 * cpus, 0.0, 0.0))
    cpu = torch.device("cpu")
    assert conditions(cpu, idle=True).complaints == ("a load of 3.0 for each CPU before anything was launched",)
    assert conditions(cpu, idle=False).complaints == ()


class Silent(FakeWorker):
    def _conditions(self):
        raise WorkerFailure("crash", "gone", "ask how busy the device is")


@pytest.mark.parametrize(
    ("worker", "told"),
    [
        (FakeWorker(), ()),
        (Silent(), ()),
        (FakeWorker(conditions=[Conditions(unknown="no NVML"), Conditions(others=1)]), ("1 other process on the GPU",)),
        # The same complaint with another number is told once, a new one as well.
        (
            FakeWorker(conditions=[Conditions(others=2), Conditions(others=3, slowdowns=("too hot",))]),
            ("2 other processes on the GPU", "clocks are lowered: too hot"),
        ),
    ],
)
def test_a_tune_tells_each_kind_of_disturbance_once_and_goes_on(tmp_path, caplog, worker, told):
    result = tune(
        SPEC,
        torch.device("cuda"),
        ("long",),
        budget=Budget(3),
        database=Database(tmp_path / "user", tmp_path / "shipped"),
        build=FakeBuilder(),
        make_worker=lambda: worker,
    )
    assert result.disturbances == told
    warned = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert warned == [f"timings are doubtful: {each}" for each in told]
    assert result.choices.device == DEVICE
