"""``jagtile bench``, its worker and its peers."""

from __future__ import annotations

import contextlib
import json
import random

import msgspec
import pytest
import torch

from jagtile.generator import bench as bench_module
from jagtile.generator.bench import bench
from jagtile.generator.bench_types import BenchReport, PeerResult, Plan, describe
from jagtile.generator.bench_worker import Bencher
from jagtile.generator.measure import WorkerFacts
from jagtile.generator.oracle import errors, reference
from jagtile.generator.peer import Prepared
from jagtile.generator.peers import PEERS
from jagtile.generator.peers_torch import document_mask
from jagtile.generator.worker import WorkerFailure
from jagtile.generator.workloads import Workload, random_workload
from jagtile.tuning_db.schema import DeviceFacts

CPU = torch.device("cpu")
TINY = Workload("tiny", (5, 30, 1), (5, 30, 1), 2, 2, 16, 16)
QUICK = Plan(seconds=0.01, min_samples=3, max_samples=3)
FACTS = DeviceFacts(slug="cpu-x", label="x", target="cpu", units=1, bandwidth_gbs=0.0, compute_capability="generic")


def test_ours_and_torchs_are_checked_and_timed_on_lengths_from_a_file(run, tmp_path):
    lengths, results = tmp_path / "mine.txt", tmp_path / "results.json"
    lengths.write_text("7\n40\n1\n")
    arguments = ["--heads", "2", "--head-dim", "16", "--device", "cpu", "--seconds", "0.01", "--max-samples", "3"]
    peers = "jagtile,jagtile-njt,torch-njt,torch-loop,fa3"
    output = run("bench", "--lengths", str(lengths), *arguments, "--peers", peers, "-o", str(results)).output
    assert "mine: fwd_fp32_d16, 3 sequences, 48 queries" in output
    assert "Time of each peer over jagtile's" in output
    (result,) = json.loads(results.read_text())["workloads"]
    by_name = {peer["peer"]: peer for peer in result["peers"]}
    assert list(by_name) == peers.split(",")
    assert by_name.pop("fa3")["reason"] == "CUDA only"
    for peer in by_name.values():
        assert peer["state"] == "ok", peer["reason"]
        assert peer["samples"] == 3
        assert peer["error_rel"] < 2e-6
        assert peer["ratio"] == pytest.approx(peer["ms"] / by_name["jagtile"]["ms"])
    assert result["checked_share"] == 1.0


@pytest.mark.parametrize("name", ["torch-njt", "torch-loop"])
def test_a_peer_on_the_cpu_computes_what_the_oracle_does_or_refuses(name):
    rng, compared = random.Random(3), 0
    for _ in range(30):
        workload = random_workload(rng, head_dim=8, is_causal=rng.random() < 0.5, max_seqlen=40)
        if PEERS[name].refuses(workload, "fp32", CPU) or workload.total_q == 0 or workload.total_k == 0:
            continue
        batch = workload.make("cpu", "fp32")
        prepared = PEERS[name].prepare(workload, batch)
        expected, _ = reference(*batch[:5], is_causal=workload.is_causal, causal_alignment=workload.causal_alignment)
        assert errors(prepared.packed(prepared.call()), expected).rel < 1e-5, workload
        compared += 1
    assert compared >= 3


def test_the_mask_given_to_flex_attention_is_that_of_the_oracle():
    rng = random.Random(5)
    for _ in range(8):
        workload = random_workload(rng, head_dim=8, is_causal=rng.random() < 0.7, max_seqlen=24)
        batch = workload.make("cpu", "fp32")
        everywhere = torch.meshgrid(torch.arange(workload.total_q), torch.arange(workload.total_k), indexing="ij")
        visible = document_mask(workload, batch)(torch.zeros(1), torch.zeros(1), *everywhere)
        assert int(visible.sum()) == workload.pairs
        group = workload.num_heads // workload.num_heads_kv
        keys, values = (x.double().repeat_interleave(group, dim=1).transpose(0, 1) for x in (batch.k, batch.v))
        scores = (batch.q.double().transpose(0, 1) @ keys.mT * 8**-0.5).masked_fill(~visible, float("-inf"))
        out = (scores.softmax(-1).nan_to_num() @ values).transpose(0, 1)
        expected, _ = reference(*batch[:5], is_causal=workload.is_causal, causal_alignment=workload.causal_alignment)
        assert torch.allclose(out, expected), workload


@pytest.mark.parametrize("name", ["torch-varlen", "fa3", "fa4", "flex"])
def test_gpu_peers_say_that_they_need_a_gpu(name):
    assert PEERS[name].missing(CPU) == "CUDA only"


def test_peers_refuse_what_they_would_compute_otherwise():
    cross = Workload("cross", (4,), (9,), 4, 2, 64, 64, is_causal=True, causal_alignment="top_left")
    cuda = torch.device("cuda")
    assert PEERS["fa3"].refuses(cross, "bf16", cuda) == "causal with unequal lengths is bottom_right only"
    assert PEERS["fa3"].refuses(cross, "fp16", cuda) == "built for bf16 only"
    assert PEERS["torch-njt"].refuses(cross, "bf16", cuda) == "no GQA on nested tensors"
    assert PEERS["torch-varlen"].refuses(cross, "fp32", cuda) == "bf16 and fp16 only"


class _Wrong:
    """A peer that leaves part of its output as it finds it, under the name of one of ours."""

    name = "jagtile"

    def missing(self, device):
        return None

    def refuses(self, workload, dtype, device):
        return None

    def prepare(self, workload, batch):
        exact = reference(*batch[:5])[0].float()

        def call():
            out = torch.empty_like(exact)
            out[1:] = exact[1:]
            return out

        return Prepared(call, lambda out: out)


class _Raises(_Wrong):
    name = "torch-loop"

    def __init__(self, after: int) -> None:
        self.calls_left = after

    def prepare(self, workload, batch):
        exact = reference(*batch[:5])[0]

        def call():
            self.calls_left -= 1
            if self.calls_left < 0:
                raise MemoryError("no more")
            return exact

        return Prepared(call, lambda out: out)


@pytest.fixture
def bencher():
    return Bencher("cpu")


def test_what_a_kernel_leaves_unwritten_is_found_and_not_timed(bencher, monkeypatch):
    monkeypatch.setitem(PEERS, "jagtile", _Wrong())
    (found,) = bencher.run(TINY, "fp32", ["jagtile"], QUICK, lambda note: None).peers
    assert (found.state, found.ms) == ("incorrect", None)


@pytest.mark.parametrize("after", [0, 2, 4], ids=["at once", "when first timed", "in the middle"])
def test_a_peer_that_raises_costs_only_itself(bencher, monkeypatch, after):
    monkeypatch.setitem(PEERS, "torch-loop", _Raises(after))
    raising, other = bencher.run(TINY, "fp32", ["torch-loop", "torch-njt"], QUICK, lambda note: None).peers
    assert (raising.state, raising.ms, raising.reason) == ("failed", None, "MemoryError: no more")
    assert (other.state, other.samples) == ("ok", 3)


class _Dying:
    """A worker in which some peers kill the process."""

    def __init__(self, *deadly: str) -> None:
        self.deadly = deadly

    def call(self, method, *arguments, timeout):
        if method == "facts":
            return WorkerFacts(FACTS, "1.2", "2.13")
        workload, dtype, names, _ = arguments
        for name in names:
            if name in self.deadly:
                raise WorkerFailure("crash", "killed by SIGSEGV", name)
        if "inputs" in self.deadly:
            raise WorkerFailure("crash", "out of memory", "prepare inputs of it")
        return describe(workload, dtype, peers=tuple(PeerResult(peer=name, state="ok", ms=1.0) for name in names))


def _bench(worker, names=("jagtile", "fa3", "fa4")) -> BenchReport:
    return bench([TINY], CPU, "bf16", names, make_worker=lambda: contextlib.nullcontext(worker))


def test_peers_that_kill_the_worker_are_left_out_and_the_rest_is_measured():
    (result,) = _bench(_Dying("fa3", "fa4")).workloads
    assert [(peer.peer, peer.state) for peer in result.peers] == [
        ("jagtile", "ok"),
        ("fa3", "failed"),
        ("fa4", "failed"),
    ]
    assert result.peers[1].reason == "crash: killed by SIGSEGV"


def test_inputs_that_do_not_fit_fail_every_peer_and_end_nothing():
    (result,) = _bench(_Dying("inputs")).workloads
    assert {peer.state for peer in result.peers} == {"failed"}
    assert "out of memory" in result.peers[0].reason


@pytest.mark.parametrize(("state", "code"), [("incorrect", 4), ("failed", 1)])
def test_a_wrong_result_of_ours_exits_with_4_and_a_failure_with_1(run, monkeypatch, state, code):
    result = describe(TINY, "fp32", peers=(PeerResult(peer="jagtile", state=state, reason="off"),))
    report = msgspec.structs.replace(_bench(_Dying(), ("jagtile",)), workloads=(result,))
    monkeypatch.setattr(bench_module, "bench", lambda *_, **__: report)
    output = run("bench", "tiny-d64", "--device", "cpu", code=code).output
    assert "on tiny" in output


def test_the_named_workloads_are_listed(run, run_json):
    assert "sft-d128-gqa-causal" in run("bench", "--list").output
    assert {"u4k-d128", "cpu-d64"} <= {workload["name"] for workload in run_json("bench", "--list")}


def test_bad_requests_exit_with_1(run):
    assert "no workload 'nope'; there are" in run("bench", "nope", code=1).output
    assert "no peer fa9; there are jagtile" in run("bench", "cpu-d64", "--peers", "fa9", code=1).output
    assert "no peer fa9" in run("bench", "cpu-d64", "--skip", "fa9", code=1).output
    idle = run("bench", "cpu-d64", "--causal", "--head-dim", "128", code=1).output
    assert "--head-dim, --causal: only with --lengths FILE" in idle


def test_a_place_that_results_can_not_be_written_to_is_told_before_anything_is_measured(run, monkeypatch, tmp_path):
    monkeypatch.setattr(bench_module, "bench", None)
    (tmp_path / "file").write_text("")
    assert "Error: " in run("bench", "tiny-d64", "-o", str(tmp_path / "file" / "x.json"), code=1).output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_asking_for_one_exits_with_3(run):
    assert "jagtile doctor" in run("bench", "u4k-d128", "--device", "cuda", code=3).output
