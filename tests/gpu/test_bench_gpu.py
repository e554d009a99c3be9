"""``bench`` on a GPU: every peer that is installed runs, is compared with the oracle, and is timed."""

from __future__ import annotations

import statistics
import time

import pytest
import torch

from jagtile.generator.bench import bench
from jagtile.generator.bench_types import Plan
from jagtile.generator.bench_worker import ColdClock
from jagtile.generator.peers import PEERS
from jagtile.generator.workloads import named

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HOPPER, reason="needs a CUDA GPU of compute capability 9.0"),
]


@pytest.mark.parametrize("name", ["tiny-d64", "u1k-d128-causal"])
def test_all_peers_but_the_compiled_one_agree_with_the_oracle(name):
    plan = Plan(seconds=0.05, min_samples=3, max_samples=5)
    peers = [peer for peer in PEERS if peer != "flex"]  # which takes a compilation
    (result,) = bench([named()[name]], torch.device("cuda"), "bf16", peers, plan=plan).workloads
    for peer in result.peers:
        assert peer.state in ("ok", "missing", "refused"), peer
        if peer.state == "ok":
            assert peer.samples >= 3
            assert peer.host_us is not None
    assert {peer.peer for peer in result.peers if peer.state == "ok"} >= {
        "jagtile",
        "jagtile-njt",
        "torch-njt",
        "torch-varlen",
        "torch-loop",
    }


def test_the_hosts_time_is_hidden_unless_asked_for():
    device = torch.device("cuda", torch.cuda.current_device())
    clock = ColdClock(device)
    x = torch.zeros(1 << 20, device=device)

    def slow_to_launch():
        time.sleep(0.006)  # of which the device may still write its cache full for some
        return x.add_(1)

    hidden = statistics.median(clock.sample(slow_to_launch, 9000.0).ms for _ in range(5))
    exposed = statistics.median(clock.sample(slow_to_launch, 0.0).ms for _ in range(5))
    assert hidden < 0.5
    assert exposed > 4
