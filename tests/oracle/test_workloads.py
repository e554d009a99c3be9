"""Named, random and file-read workloads; what the tuner times belongs to the regime it stands for."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from jagtile.generator.spec import KernelSpec
from jagtile.generator.workloads import (
    Workload,
    checks,
    from_lengths_file,
    named,
    random_workload,
    representative,
)
from jagtile.runtime.problem import Problem, regime, regimes_for


def test_the_named_workloads_are_the_known_ones():
    workloads = named()
    assert len(workloads) == 30
    assert workloads["vit-d64"].total_q == 145168
    assert workloads["decode-d128-gqa"].total_k == 262144
    assert workloads["u4k-d192-128"].head_dim_v == 128
    assert workloads["mixed-d128-gqa-causal"].causal_alignment == "bottom_right"
    cpu = workloads["cpu-d64"]
    assert (cpu.batch, cpu.num_heads, cpu.head_dim) == (32, 8, 64)
    assert min(cpu.seqlens_q) >= 16
    assert max(cpu.seqlens_q) <= 512
    assert all(workload.name == name for name, workload in workloads.items())


def test_flops_are_four_d_h_for_each_unmasked_pair():
    assert named()["u4k-d128"].flops == 8 * 4096 * 4096 * 4 * 128 * 16
    assert named()["u4k-d192-128"].flops == 8 * 4096 * 4096 * 2 * (192 + 128) * 16


@pytest.mark.parametrize("alignment", ["top_left", "bottom_right"])
@pytest.mark.parametrize("lengths", [(5, 5), (3, 7), (7, 3), (0, 4), (4, 0), (1, 1)])
def test_unmasked_pairs_are_counted(lengths, alignment):
    len_q, len_k = lengths
    shift = 0 if alignment == "top_left" else len_k - len_q
    want = int(torch.ones(len_q, len_k).tril(shift).sum())
    assert Workload("w", (len_q,), (len_k,), 1, 1, 8, 8, True, alignment).pairs == want


def test_the_same_seed_makes_the_same_batch():
    workload = Workload("w", (3, 0, 5), (2, 4, 0), 4, 2, 8, 16)
    batch, again, other = (workload.make("cpu", torch.bfloat16, seed) for seed in (1, 1, 2))
    assert batch.q.shape == (8, 4, 8)
    assert batch.k.shape == (6, 2, 8)
    assert batch.v.shape == (6, 2, 16)
    assert batch.cu_seqlens_q.tolist() == [0, 3, 3, 8]
    assert batch.cu_seqlens_k.dtype == torch.int32
    assert (batch.max_seqlen_q, batch.max_seqlen_k) == (5, 4)
    assert torch.equal(batch.q, again.q)
    assert not torch.equal(batch.q, other.q)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seqlens_k": (1,)}, "2 query lengths but 1 key lengths"),
        ({"seqlens_q": (-1, 2)}, "negative"),
        ({"num_heads": 3, "num_heads_kv": 2}, "no multiple"),
    ],
)
def test_senseless_workloads_are_refused(fields, message):
    good = {"seqlens_q": (1, 2), "seqlens_k": (1, 2), "num_heads": 2, "num_heads_kv": 2}
    with pytest.raises(ValueError, match=message):
        Workload("w", **{**good, **fields}, head_dim=8, head_dim_v=8)


def test_lengths_are_read_from_a_file(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("# queries keys\n5\n3 7  # a comment\n\n4,9\n")
    workload = from_lengths_file(path, num_heads=4, num_heads_kv=2, head_dim=32, is_causal=True)
    assert (workload.name, workload.seqlens_q, workload.seqlens_k) == ("mine", (5, 3, 4), (5, 7, 9))
    assert (workload.num_heads_kv, workload.head_dim_v, workload.is_causal) == (2, 32, True)


@pytest.mark.parametrize(
    ("text", "message"), [("5\nfive\n", "line 2"), ("1 2 3\n", "line 1"), ("-4\n", "line 1"), ("# no\n", "no lengths")]
)
def test_a_file_of_something_else_is_refused_with_its_line(tmp_path, text, message):
    path = tmp_path / "bad.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        from_lengths_file(path, num_heads=1, head_dim=8)


def test_random_workloads_are_nasty():
    rng = random.Random(0)
    many = [random_workload(rng, head_dim=8, max_seqlen=100) for _ in range(100)]
    lengths = {n for workload in many for n in workload.seqlens_q}
    assert {0, 1, 63, 64, 65, 100} <= lengths
    assert {True, False} == {workload.seqlens_q == workload.seqlens_k for workload in many}
    assert {1, 2, 4} == {workload.num_heads // workload.num_heads_kv for workload in many}


@pytest.mark.parametrize("causal", [False, True])
def test_checks_are_small_fixed_and_hold_the_edges(causal):
    spec = KernelSpec("fwd", "bf16", 64, 32, causal)
    assert checks(spec) == checks(spec)
    assert all(w.spec("bf16") == spec for w in checks(spec))
    assert {w.causal_alignment for w in checks(spec)} == {"top_left", "bottom_right"}
    assert sum(w.flops for w in checks(spec)) < 2e9


@pytest.mark.parametrize("target", ["cpu", "sm_90a"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dims", [(64, 64), (96, 96), (128, 128), (192, 128), (256, 256), (17, 17)])
@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_what_stands_for_a_regime_belongs_to_it(target, causal, head_dims, direction):
    spec = KernelSpec(direction, "bf16", *head_dims, causal)
    for name in regimes_for(direction, target):
        for w in representative(spec, name, target):
            assert w.spec("bf16") == replace(spec, direction="fwd")
            problem = Problem(spec, w.batch, w.total_q, w.total_k, w.num_heads, w.num_heads_kv)
            assert regime(problem, target) == name or "skew" in w.name  # only max_seqlen tells that it is skewed
            longest = Problem(
                spec, w.batch, w.total_q, w.total_k, w.num_heads, w.num_heads_kv, max(w.seqlens_q), max(w.seqlens_k)
            )
            assert regime(longest, target) == name


def test_short_sequences_of_a_backward_are_not_all_skewed():
    longest = [max(w.seqlens_k) for w in representative(KernelSpec.parse("bwd_bf16_d128"), "short", "sm_90a")]
    assert min(longest) <= 128 < max(longest)


def test_an_unknown_regime_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="short, medium, long, cross, decode"):
        representative(KernelSpec.parse("fwd_bf16_d64"), "vast", "cpu")
