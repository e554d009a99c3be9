"""The Hopper forward whose short neighbours share a tile, on the emulator: numbers, isolation, and mistakes in it."""

from __future__ import annotations

import random
import re
from functools import cache

import pytest
import torch
from emulator import kernels
from emulator.driver import EmulatorError, emulated
from emulator.schedules import next_seed

from jagtile.generator.guard import guarded, guards_intact, poisoned
from jagtile.generator.oracle import errors, reference, tolerance
from jagtile.generator.tile import Variant
from jagtile.generator.workloads import JaggedBatch, Workload
from jagtile.runtime import cuda
from jagtile.runtime.artifact import Artifact

SCALE = 0.1
D64 = "fwd_bf16_d64/split_m64_n48_s3_q2_c4_t1_k1"
CAUSAL = "fwd_fp16_d72_dv40_causal/split_m64_n48_s2_q1_c1_k1"
D128 = "fwd_bf16_d128_causal/split_m64_n48_s2_q2_c2_k1"
VARIANTS = [D64, CAUSAL, D128]


@cache
def built(name: str, *edit: str) -> Artifact:
    return kernels.artifact(Variant.parse(f"sm_90a/{name}"), kernels.substitution(*edit) if edit else None)


def workload(name: str, queries, keys=None, heads=(2, 2), bottom_right: bool = False) -> Workload:
    spec = Variant.parse(f"sm_90a/{name}").spec
    alignment = "bottom_right" if bottom_right else "top_left"
    kind = (spec.head_dim, spec.head_dim_v, spec.causal, alignment)
    return Workload("packs", tuple(queries), tuple(keys or queries), *heads, *kind)


def batch_of(name: str, w: Workload, seed: int = 0) -> JaggedBatch:
    return w.make("cpu", built(name).meta.spec.split("_")[1], seed)  # type: ignore[arg-type]


def expected(w: Workload, b: JaggedBatch) -> tuple[torch.Tensor, torch.Tensor]:
    how = {"is_causal": w.is_causal, "causal_alignment": w.causal_alignment}
    return reference(*b[:5], **how, scale=SCALE)  # type: ignore[arg-type]


def run(
    artifact: Artifact, w: Workload, b: JaggedBatch, processors: int = 3, lse_wanted: bool = True
) -> tuple[torch.Tensor, torch.Tensor | None]:
    out = poisoned(b.q.new_empty(w.total_q, w.num_heads, w.head_dim_v), b.q.dtype)
    lse = torch.full((w.num_heads, w.total_q), float("nan")) if lse_wanted else None
    with emulated(processors, seed=next_seed()):
        kernel = cuda.load(artifact, torch.device("cuda", 0))
        offsets, bottom_right = (b.cu_seqlens_q, b.cu_seqlens_k), w.causal_alignment == "bottom_right"
        kernel.forward(*map(guarded, b[:3]), *offsets, out, lse, SCALE, bottom_right)
    assert guards_intact(out)
    return out, lse


def assert_right(name: str, w: Workload, seed: int = 0, processors: int = 3) -> None:
    b = batch_of(name, w, seed)
    want, want_lse = expected(w, b)
    for lse_wanted in (True, False):
        out, lse = run(built(name), w, b, processors, lse_wanted)
        assert errors(out, want).rel <= tolerance(out.dtype)
        if lse is not None:
            torch.testing.assert_close(lse, want_lse.float(), rtol=1e-4, atol=1e-3)


def some(count: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.choice((0, 1, 1, 2, 3, 7, 16, 20, 47, 48, 49, 64, 65, 150)) for _ in range(count)]


@pytest.mark.parametrize("heads", [(2, 2), (4, 1), (6, 2)])
@pytest.mark.parametrize("name", VARIANTS)
def test_numbers_match_the_oracle(name: str, heads: tuple[int, int]) -> None:
    lengths = some(40, heads[0])
    assert_right(name, workload(name, lengths, heads=heads), seed=1)
    assert_right(name, workload(name, lengths, some(40, 9), heads, bottom_right=True), seed=2, processors=5)


@pytest.mark.parametrize("name", VARIANTS)
def test_sequences_without_queries_or_without_keys_among_others(name: str) -> None:
    queries, keys = (3, 0, 5, 1, 0, 2, 4, 0, 0, 9, 0), (4, 7, 0, 1, 0, 6, 3, 0, 5, 0, 0)
    assert_right(name, workload(name, queries, keys))
    assert_right(name, workload(name, queries, (0,) * len(keys)))
    assert_right(name, workload(name, queries, keys, bottom_right=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", VARIANTS)
def test_nan_and_infinity_stay_in_their_sequence(name: str, value: float) -> None:
    w = workload(name, (3, 20, 1, 150, 2, 13, 5), (4, 20, 3, 100, 3, 11, 6))
    b = batch_of(name, w)
    want, want_lse = expected(w, b)
    for spoilt in (1, 3, 5):
        (q_begin, q_end), (k_begin, k_end) = (cu[spoilt : spoilt + 2].tolist() for cu in b[3:5])
        bad = b._replace(q=b.q.clone(), k=b.k.clone(), v=b.v.clone())
        bad.q[q_begin:q_end] = bad.k[k_begin:k_end] = value
        bad.v[k_begin:k_end] = value
        rest = [*range(q_begin), *range(q_end, w.total_q)]
        for lse_wanted in (True, False):
            out, lse = run(built(name), w, bad, lse_wanted=lse_wanted)
            assert errors(out[rest], want[rest]).rel <= tolerance(out.dtype)
            assert out[q_begin:q_end].isnan().all()
            if lse is not None:
                torch.testing.assert_close(lse[:, rest], want_lse[:, rest].float(), rtol=1e-4, atol=1e-3)


MISTAKES = {
    "rows see all keys of their tile": ("mask_others(scores, seen, thread_column);", "", "^wrong$"),
    "a row has the keys of the sequence behind": (
        "if (tokens[h] < begin_q || tokens[h] >= end_q) continue;",
        "if (tokens[h] <= begin_q || tokens[h] > end_q) continue;",
        "^wrong$",
    ),
    "a tile has a sequence more than it is told of": ("(count - 1) << 28", "(count - 2) << 28", "^wrong$"),
    "a diagonal begins with the tile": ("begin_k + tokens[h] - begin_q + shift", "tokens[h] + shift", "^wrong$"),
    "V is handed back before it has been read again": (
        "        named_barrier_sync(1 + warpgroup, 128);  // V has been read\n",
        "",
        "not ordered after|race",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_found(mistake: tuple[str, str, str]) -> None:
    old, new, report = mistake
    w = workload(CAUSAL, (3, 20, 1, 9, 2, 13, 5, 70) * 3, (5, 17, 3, 11, 2, 10, 6, 70) * 3)
    b = batch_of(CAUSAL, w)
    want, _ = expected(w, b)
    # The first sequence of most packs has NaN, so that their tiles are multiplied twice.
    spoilt = [0, 3, 8, 11, 16, 19]
    clean = torch.ones(w.total_q, dtype=torch.bool)
    for number in spoilt:
        b.v[b.cu_seqlens_k[number] : b.cu_seqlens_k[number + 1]] = float("nan")
        clean[b.cu_seqlens_q[number] : b.cu_seqlens_q[number + 1]] = False
    found = "wrong"
    try:
        for _ in range(3):
            out, _ = run(built(CAUSAL, old, new), w, b, processors=1)
            if errors(out[clean], want[clean]).rel <= tolerance(out.dtype):
                found = "nothing"
    except EmulatorError as error:
        found = str(error)
    assert re.search(report, found), found
