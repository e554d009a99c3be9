"""Deliberately broken Hopper kernels: each costs itself and nothing else, as their CPU twins do."""

from __future__ import annotations

import pytest
import torch
from broken_space import SOUND, broken_space, only

from jagtile.generator.build import build
from jagtile.generator.render import render
from jagtile.generator.spaces.sm90_forward import Sm90ForwardSpace
from jagtile.generator.spec import KernelSpec
from jagtile.generator.tile import Variant, config_from_dict, legal_configs
from jagtile.generator.tune import Budget, tune
from jagtile.tuning_db.store import Database

SPEC = KernelSpec.parse("fwd_bf16_d64")
FAULTS = {
    "loop": ("timeout", "no answer within"),
    "illegal": ("crash", "illegal memory access"),
    "memory": ("crash", "OUT_OF_MEMORY"),  # of every thread that an SM has room for: 138 GB on 132 SMs
    "wrong": ("incorrect", "relative error"),
}
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


@pytest.fixture
def broken(monkeypatch):
    space = broken_space(Sm90ForwardSpace, "cuda/broken.cu.j2", FAULTS)
    only(space, monkeypatch)
    return space


@pytest.fixture
def scarce():
    """Less free memory than what wants most needs, on the largest Hoppers too."""
    free, _ = torch.cuda.mem_get_info()
    held = torch.empty(max(0, free - (100 << 30)), dtype=torch.uint8, device="cuda")
    yield
    del held
    torch.cuda.empty_cache()


def test_each_fault_is_in_the_source(broken):
    sources = {c.fault: render(Variant("sm_90a", SPEC, c)).text for c in legal_configs(broken, SPEC)}
    assert sources.keys() == {*SOUND, *FAULTS}
    bodies = {fault: text.partition("namespace {")[2].replace(f"_f{fault}", "") for fault, text in sources.items()}
    assert len(set(bodies.values())) == 1 + len(FAULTS)
    assert bodies["none"] == bodies["no"]


@pytest.mark.nvcc
def test_the_broken_kernels_compile(broken):
    results = build([Variant("sm_90a", SPEC, config) for config in legal_configs(broken, SPEC)])
    assert {result.variant.config.fault: result.state for result in results} == dict.fromkeys((*SOUND, *FAULTS), "ok")


@pytest.mark.gpu
@pytest.mark.timeout(240)
@pytest.mark.skipif(not HOPPER, reason="needs a CUDA GPU of compute capability 9.0")
def test_a_broken_kernel_costs_itself_only(broken, scarce, tmp_path):
    database = Database(tmp_path / "user", tmp_path / "shipped")
    result = tune(SPEC, torch.device("cuda"), ("short",), budget=Budget(trials=None), database=database, timeout=10.0)
    ended = {config_from_dict("sm_90a", r.config).fault: r for r in result.records if r.phase == "search"}
    assert {fault: record.state for fault, record in ended.items()} == {
        **dict.fromkeys(SOUND, "ok"),
        **{fault: state for fault, (state, _) in FAULTS.items()},
    }
    for fault, (_, reason) in FAULTS.items():
        assert reason in ended[fault].reason
        assert ended[fault].time_us is None
    assert result.regimes[0].chosen.fault in SOUND
