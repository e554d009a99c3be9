"""Deliberately broken CPU kernels, built from a broken template: each costs itself and nothing else."""

from __future__ import annotations

import mmap
import multiprocessing
import resource

import pytest
import torch
from broken_space import SOUND, broken_space, only

from jagtile.generator import memory_limit, workloads
from jagtile.generator.spaces.cpu_forward import CpuForwardSpace
from jagtile.generator.spec import KernelSpec
from jagtile.generator.tile import config_from_dict
from jagtile.generator.toolchain import find_cxx
from jagtile.generator.tune import Budget, tune
from jagtile.runtime.errors import CompilerNotFoundError
from jagtile.tuning_db.store import Database

SPEC = KernelSpec.parse("fwd_fp32_d16")
FAULTS = {
    "loop": ("timeout", "no answer within"),
    "segfault": ("crash", "SIGSEGV"),
    "memory": ("crash", "SIGABRT"),
    "wrong": ("incorrect", "relative error"),
    "overrun": ("incorrect", "rows outside the output were written"),
}


@pytest.fixture
def broken(monkeypatch):
    """The one template of the target is the broken one, and workloads are next to nothing."""
    try:
        find_cxx()
    except CompilerNotFoundError as error:
        pytest.skip(str(error))
    only(broken_space(CpuForwardSpace, "cpu/broken.cpp.j2", FAULTS), monkeypatch)
    monkeypatch.setattr(workloads, "_CPU_SIZES", dict.fromkeys(workloads._CPU_SIZES, 2))


def test_a_broken_kernel_costs_itself_only(broken, tmp_path):
    database = Database(tmp_path / "user", tmp_path / "shipped")
    result = tune(SPEC, torch.device("cpu"), ("short",), budget=Budget(trials=None), database=database, timeout=4.0)
    ended = {config_from_dict("cpu", r.config).fault: r for r in result.records if r.phase == "search"}
    assert {fault: ended[fault].state for fault in ended} == {
        **dict.fromkeys(SOUND, "ok"),
        **{fault: state for fault, (state, _) in FAULTS.items()},
    }
    for fault, (_, reason) in FAULTS.items():
        assert reason in ended[fault].reason
        assert ended[fault].time_us is None
    assert result.regimes[0].chosen.fault in SOUND
    assert {config_from_dict("cpu", r.config).fault for r in result.records if r.phase == "final"} <= set(SOUND)


def _allocate_more_than_there_is() -> None:
    memory_limit.cap_address_space()
    mmap.mmap(-1, 1 << 24).close()
    with pytest.raises(OSError, match="Cannot allocate"):
        mmap.mmap(-1, (memory_limit.available_bytes() or 0) + (4 << 30), flags=mmap.MAP_PRIVATE | 0x4000)  # NORESERVE


@pytest.mark.skipif(memory_limit.available_bytes() is None, reason="the system does not tell how much memory is free")
def test_a_worker_can_not_have_more_memory_than_there_is():
    process = multiprocessing.get_context("fork").Process(target=_allocate_more_than_there_is)
    process.start()
    process.join()
    assert process.exitcode == 0


def test_a_control_groups_limit_counts_and_none_is_no_error(monkeypatch, tmp_path):
    (tmp_path / "memory.max").write_text("5000000\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    monkeypatch.setattr(memory_limit, "_CGROUP", tmp_path)
    assert memory_limit.available_bytes() == 4000000
    (tmp_path / "memory.max").write_text("max\n")
    monkeypatch.setattr(memory_limit, "_MEMINFO", tmp_path / "none")
    assert memory_limit.available_bytes() is None
    before = resource.getrlimit(resource.RLIMIT_AS)
    memory_limit.cap_address_space()
    assert resource.getrlimit(resource.RLIMIT_AS) == before
