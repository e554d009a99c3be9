"""Tuning on a GPU: graphs are timed, the tuner itself never opens the device, the oracle copes with long sequences."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from jagtile.generator import timing
from jagtile.generator.oracle import reference
from jagtile.generator.timing import GraphTimer
from jagtile.generator.workloads import Workload, named

pytestmark = pytest.mark.gpu

SCRIPT = """
import sys
from pathlib import Path

import torch
from jagtile.generator.spec import KernelSpec
from jagtile.generator.tune import Budget, tune
from jagtile.tuning_db.store import Database

if __name__ == "__main__":
    database = Database(Path(sys.argv[1]) / "user", Path(sys.argv[1]) / "shipped")
    result = tune(KernelSpec.parse("fwd_bf16_d64_causal"), torch.device("cuda"), ("short", "decode"),
                  budget=Budget(trials=4), database=database)
    assert not torch.cuda.is_initialized()
    for found in result.regimes:
        print(found.regime, found.chosen.name, found.chosen_us, found.noise, found.states)
    assert all(found.states.get("ok", 0) >= 1 for found in result.regimes)
    assert {r.regime for r in result.records if r.phase == "final" and r.state == "ok"} == {"short", "decode"}
"""


def test_a_tune_works_without_a_cuda_context_of_its_own(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_graph_of_launches_is_timed():
    device = torch.device("cuda", torch.cuda.current_device())
    buffers = [torch.zeros(1 << 24, device=device) for _ in range(3)]
    launched = []

    def launch(index: int) -> None:
        launched.append(index)
        buffers[index % 3].add_(1)

    timer = GraphTimer(device)
    sample = timer.sampler(launch, sets=3, sample_ms=1.0)
    before, enqueued = buffers[0][0].item(), len(launched)
    assert sample() > 0
    assert buffers[0][0].item() > before
    assert len(launched) == enqueued  # the replay asks nothing of the host
    assert timer.cache_bytes > 0


def test_launches_apart_are_timed_without_the_rest_between_them(monkeypatch):
    monkeypatch.setattr(timing, "_REST_CYCLES", 40_000_000)  # 20 ms: other processes may be using the GPU, too
    device = torch.device("cuda", torch.cuda.current_device())
    buffers = [torch.zeros(1 << 24, device=device) for _ in range(2)]
    launched = []

    def launch(index: int) -> None:
        launched.append(index)
        buffers[index % 2].add_(1)

    sample = GraphTimer(device).sampler(launch, sets=2, sample_ms=0.1, apart=True)
    before, enqueued = buffers[0][0].item(), len(launched)
    assert 0 < sample() < 10_000
    assert buffers[0][0].item() > before
    assert len(launched) > enqueued


def test_the_oracle_is_the_same_on_the_gpu_and_takes_long_sequences():
    small = Workload("small", (50, 0, 1, 300), (70, 5, 0, 300), 4, 2, 32, 32, True, "bottom_right")
    batch = small.make("cpu", "fp32")
    arguments = {"is_causal": True, "causal_alignment": "bottom_right"}
    on_cpu = reference(*batch[:5], **arguments)
    on_gpu = reference(*(tensor.cuda() for tensor in batch[:5]), **arguments)
    for one, other in zip(on_cpu, on_gpu, strict=True):
        torch.testing.assert_close(one, other.cpu(), rtol=1e-10, atol=1e-12)
    long = replace(named()["u16k-d128-causal"], num_heads=2, num_heads_kv=2).make("cuda", "bf16")
    out, lse = reference(*long[:5], is_causal=True)
    assert out.isfinite().all()
    assert lse.isfinite().all()
