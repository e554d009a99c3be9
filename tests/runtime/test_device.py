"""Device identities and their nearest relatives."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from jagtile.runtime import device as device_module
from jagtile.runtime.device import DeviceId, device_id, relatives
from jagtile.runtime.errors import UnsupportedError
from jagtile.runtime.isa import host_isa

H200 = DeviceId("sm90-132sm", "sm_90a", "NVIDIA H200", 132, 4917, "9.0")


def gpu(units: int, bandwidth: float, capability: str = "9.0", target: str = "sm_90a") -> DeviceId:
    return DeviceId(f"sm{capability.replace('.', '')}-{units}sm", target, "a GPU", units, bandwidth, capability)


def cpu(isa: str) -> DeviceId:
    return DeviceId(f"cpu-{isa}", "cpu", "a CPU", 8, 0.0, isa)


@pytest.fixture
def fake_gpu(monkeypatch):
    """Pretend that cuda:0 has the given properties."""

    def install(**properties: object) -> None:
        device_module._cuda_id.cache_clear()
        found = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, multi_processor_count=132)
        vars(found).update(properties)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found)

    yield install
    device_module._cuda_id.cache_clear()


def test_the_cpu_is_known_by_its_instruction_set():
    found = device_id(torch.device("cpu"))
    assert found.slug == f"cpu-{host_isa()}"
    assert (found.target, found.compute_capability) == ("cpu", host_isa())
    assert found.units >= 1
    assert found.label


def test_a_gpu_is_known_by_capability_multiprocessors_and_bandwidth(fake_gpu):
    fake_gpu(memory_clock_rate=3201000, memory_bus_width=6144)
    assert device_id(torch.device("cuda:0")) == H200


def test_bandwidth_is_zero_where_torch_does_not_tell_it(fake_gpu):
    fake_gpu()
    assert device_id(torch.device("cuda:0")).bandwidth_gbs == 0


def test_a_gpu_of_another_capability_is_refused_with_what_is_served(fake_gpu):
    fake_gpu(name="NVIDIA A100", major=8, minor=0)
    with pytest.raises(UnsupportedError, match=r"A100.*8\.0.*served.*9\.0"):
        device_id(torch.device("cuda:0"))


def test_a_gpu_of_another_maker_is_refused_though_its_version_looks_right(fake_gpu, monkeypatch):
    fake_gpu(name="gfx90a")
    monkeypatch.setattr(torch.version, "hip", "7.0")
    with pytest.raises(UnsupportedError, match="gfx90a"):
        device_id(torch.device("cuda:0"))


def test_another_kind_of_device_is_refused_with_what_is_served():
    with pytest.raises(UnsupportedError, match="meta is not served; served: the CPU"):
        device_id(torch.device("meta"))


def test_the_nearest_gpu_has_the_closest_multiprocessors_then_bandwidth():
    known = [gpu(78, 4000), gpu(132, 3350), gpu(114, 2000), gpu(114, 3000)]
    assert relatives(gpu(120, 3100), known) == [gpu(114, 3000), gpu(114, 2000), gpu(132, 3350), gpu(78, 4000)]


def test_a_gpu_of_another_capability_or_target_and_the_device_itself_are_no_relatives():
    known = [gpu(132, 4917), gpu(108, 2000, "8.0", "sm_80"), gpu(148, 8000, "10.0", "sm_100a"), cpu("avx2")]
    assert relatives(H200, known) == []


def test_the_nearest_cpu_has_the_best_instruction_set_that_this_one_supports():
    known = [cpu("generic"), cpu("avx2"), cpu("avx512bf16"), cpu("neon"), H200]
    assert relatives(cpu("avx512"), known) == [cpu("avx2"), cpu("generic")]


def test_a_cpu_of_an_unknown_instruction_set_is_no_relative():
    assert relatives(cpu("avx512"), [cpu("sse9")]) == []
