"""The Hopper forward for short sequences, run by the emulator: tiles across sequences, nothing leaks between them."""

from __future__ import annotations

import random
import sys
from dataclasses import replace

import pytest
import torch
from emulator import kernels
from emulator.driver import emulated

from jagtile.generator.guard import guarded, guards_intact, poisoned
from jagtile.generator.oracle import errors, reference, tolerance
from jagtile.generator.tile import Variant
from jagtile.generator.workloads import JaggedBatch, Workload
from jagtile.runtime import UnsupportedError, cuda
from jagtile.runtime.cuda import work_list

SCALE = 0.1
D64 = "fwd_bf16_d64/packed_n80_s2_c3"
CAUSAL = "fwd_bf16_d64_causal/packed_n48_s1_c2"
VARIANTS = [
    D64,
    CAUSAL,
    "fwd_fp16_d64_causal/packed_n96_s2_c3",
    "fwd_bf16_d8/packed_n32_s3_c4",
    "fwd_bf16_d32_causal/packed_n64_s1_c4",
    "fwd_bf16_d72_dv40_causal/packed_n64_s2_c2",
    "fwd_fp16_d96/packed_n64_s2_c2",
    "fwd_bf16_d256_dv192_causal/packed_n64_s1_c1",
]
TINY = tuple(random.Random(3).choices((0, 1, 1, 2, 3, 4), k=70))
MIXED = (5, 0, 0, 64, 1, 130, 63, 0, 2, 1, 1, 70, 0)


def variant(name: str) -> Variant:
    return Variant.parse(f"sm_90a/{name}")


def workload(of: Variant, name: str, lengths: tuple[int, ...], keys: tuple[int, ...] | None = None, **more) -> Workload:
    heads = {"num_heads": 2, "num_heads_kv": 2, **more}
    spec = of.spec
    dims = {"head_dim": spec.head_dim, "head_dim_v": spec.head_dim_v, "is_causal": spec.causal}
    return Workload(name, lengths, lengths if keys is None else keys, **heads, **dims)


def run(of: Variant, w: Workload, b: JaggedBatch, seed: int = 0, change=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Of outputs that were NaN in rows of NaN."""
    out = poisoned(torch.empty(w.total_q, w.num_heads, w.head_dim_v), b.q.dtype)
    lse = torch.full((w.num_heads, w.total_q), float("nan"))
    with emulated(processors=2, seed=seed) as machine:
        kernel = cuda.load(kernels.artifact(of, change), torch.device("cuda", 0))
        kernel.forward(*b[:5], out, lse, SCALE, w.causal_alignment == "bottom_right")
        assert len(machine.launches) == 1
    assert guards_intact(out)
    return out, lse


def expected(w: Workload, b: JaggedBatch) -> tuple[torch.Tensor, torch.Tensor]:
    return reference(*b[:5], is_causal=w.is_causal, causal_alignment=w.causal_alignment, scale=SCALE)


def assert_right(of: Variant, w: Workload, b: JaggedBatch, seed: int = 0) -> None:
    out, lse = run(of, w, b, seed)
    want, want_lse = expected(w, b)
    assert errors(out, want).rel <= tolerance(out.dtype)
    torch.testing.assert_close(lse, want_lse.float(), rtol=1e-4, atol=1e-3)


def batch_of(w: Workload, of: Variant, seed: int = 1) -> JaggedBatch:
    """With NaN before and behind every input."""
    b = w.make("cpu", of.spec.dtype, seed)
    return b._replace(q=guarded(b.q), k=guarded(b.k), v=guarded(b.v))


@pytest.mark.parametrize("name", VARIANTS)
def test_numbers_match_the_oracle(name: str) -> None:
    of = variant(name)
    cases = [
        workload(of, "tiny", TINY, num_heads=3, num_heads_kv=3),
        workload(of, "mixed", MIXED),
        workload(of, "cross", MIXED, MIXED[::-1], num_heads=2, num_heads_kv=1, causal_alignment="bottom_right"),
        workload(of, "few queries", (1, 2, 0, 1), (3, 150, 20, 0), causal_alignment="top_left"),
        workload(of, "one", (64,)),
    ]
    for seed, w in enumerate(cases):
        assert_right(of, w, batch_of(w, of), seed)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", [D64, CAUSAL])
def test_every_schedule_gives_the_same(name: str, seed: int) -> None:
    of = variant(name)
    w = workload(of, "mixed", (*TINY, *MIXED[:7]), num_heads=2, num_heads_kv=1)
    b = batch_of(w, of)
    out, lse = run(of, w, b, seed)
    same, same_lse = run(of, w, b, seed + 100)
    assert torch.equal(out, same)
    assert torch.equal(lse, same_lse)


# --- which sequence a row belongs to


@pytest.mark.parametrize("name", [D64, CAUSAL])
@pytest.mark.parametrize(
    "lengths",
    [
        (0,) * 40 + (3,) + (0,) * 100 + (2, 1) + (0,) * 70,  # more empty ones than a step of the search looks at
        (1,) * 200,
        (0, 0, 1),
        (65, 0, 0, 63, 0, 1),
        (0, 256),
    ],
    ids=["runs of empty ones", "one token each", "three", "borders of tiles", "one"],
)
def test_sequences_are_found(name: str, lengths: tuple[int, ...]) -> None:
    of = variant(name)
    w = workload(of, "found", lengths, num_heads=1, num_heads_kv=1)
    assert_right(of, w, batch_of(w, of))


def test_sequences_are_found_among_thousands() -> None:
    """Three steps of the search; most tiles begin and end in runs of empty sequences."""
    of = variant(D64)
    rng = random.Random(8)
    lengths = tuple(rng.choice((0,) * 30 + (1, 2, 5)) for _ in range(4000))
    w = workload(of, "thousands", lengths, num_heads=1, num_heads_kv=1)
    assert_right(of, w, batch_of(w, of))


@pytest.mark.parametrize("name", [D64, CAUSAL])
@pytest.mark.parametrize("alignment", ["top_left", "bottom_right"])
def test_rows_of_no_sequence_are_zeros_and_their_values_go_nowhere(name: str, alignment: str) -> None:
    of = variant(name)
    w = workload(of, "middle", (70, 3, 0, 90), (5, 140, 60, 7), causal_alignment=alignment)
    b = batch_of(w, of)
    cut = b._replace(cu_seqlens_q=torch.tensor([70, 72, 73, 100]), cu_seqlens_k=torch.tensor([5, 12, 12, 145]))
    for tensor, begin, end in ((cut.q, 70, 100), (cut.k, 5, 145), (cut.v, 5, 145)):
        tensor[:begin] = tensor[end:] = float("nan")
    assert_right(of, w, cut)


def test_int64_and_mixed_offsets() -> None:
    of = variant(CAUSAL)
    w = workload(of, "mixed", MIXED, MIXED[::-1])
    b = batch_of(w, of)
    for q_type, k_type in ((torch.int64, torch.int64), (torch.int32, torch.int64), (torch.int64, torch.int32)):
        assert_right(of, w, b._replace(cu_seqlens_q=b.cu_seqlens_q.to(q_type), cu_seqlens_k=b.cu_seqlens_k.to(k_type)))


def test_keys_and_values_of_one_head_and_strided_rows() -> None:
    of = variant(D64)
    w = workload(of, "packed", MIXED, num_heads=4, num_heads_kv=1)
    b = batch_of(w, of)
    together = torch.cat([b.q, b.k, b.v], dim=1)  # as a projection leaves them
    assert_right(of, w, b._replace(q=together[:, :4], k=together[:, 4:5], v=together[:, 5:]))
    spread = replace(w, num_heads_kv=4)
    assert_right(of, spread, b._replace(k=b.k.expand(-1, 4, -1), v=b.v.expand(-1, 4, -1)))


# --- leaks


def poison(b: JaggedBatch, queries: slice, keys: slice, value: float) -> JaggedBatch:
    b = b._replace(q=b.q.clone(), k=b.k.clone(), v=b.v.clone())
    b.q[queries] = b.k[keys] = value
    b.v[keys] = value
    return b


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [D64, CAUSAL, "fwd_fp16_d96/packed_n64_s2_c2"])
def test_nan_and_infinity_stay_in_their_sequence(name: str, value: float) -> None:
    of = variant(name)
    lengths, keys = (3, 20, 1, 150, 2, 33), (4, 20, 0, 100, 3, 61)
    w = workload(of, "neighbours", lengths, keys, num_heads=2, num_heads_kv=1)
    b = batch_of(w, of)
    want, want_lse = expected(w, b)
    for poisoned_sequence in (1, 3, 4):
        (q_begin, q_end), (k_begin, k_end) = (
            cu[poisoned_sequence : poisoned_sequence + 2].tolist() for cu in (b.cu_seqlens_q, b.cu_seqlens_k)
        )
        out, lse = run(of, w, poison(b, slice(q_begin, q_end), slice(k_begin, k_end), value), poisoned_sequence)
        rest = [*range(q_begin), *range(q_end, w.total_q)]
        assert errors(out[rest], want[rest]).rel <= tolerance(out.dtype)
        torch.testing.assert_close(lse[:, rest], want_lse[:, rest].float(), rtol=1e-4, atol=1e-3)
        if k_begin < k_end:
            assert out[q_begin:q_end].isnan().all()


def test_a_value_that_is_not_seen_yet_does_not_leak_into_earlier_rows() -> None:
    of = variant(CAUSAL)
    w = workload(of, "future", (40, 90))
    b = batch_of(w, of)
    want, _ = expected(w, b)
    b.v[100] = float("nan")
    out, _ = run(of, w, b)
    assert errors(out[:100], want[:100]).rel <= tolerance(out.dtype)
    assert out[100:].isnan().all()


def test_one_value_spoils_its_column_only() -> None:
    of = variant(D64)
    w = workload(of, "column", (30, 9, 60))
    b = batch_of(w, of)
    b.v[35, 1, 13] = float("inf")
    out, _ = run(of, w, b)
    assert out[30:39, 1, 13].isinf().all()
    out[30:39, 1, 13] = b.v[35, 1, 13] = 0.0
    want, _ = expected(w, b)
    want[30:39, 1, 13] = 0.0
    assert errors(out, want).rel <= tolerance(out.dtype)


def test_without_its_second_product_nan_would_leak() -> None:
    """The tests above can fail."""
    of = variant(D64)
    w = workload(of, "neighbours", (3, 20, 30))
    b = batch_of(w, of)
    b.v[3:23] = float("nan")
    once = kernels.substitution("if (__any_sync(0xffffffff, any_nan(product)))", "if (false)")
    out, _ = run(of, w, b, change=once)
    assert out[:3].isnan().any()


# --- the launcher


def test_a_call_is_one_launch_of_as_many_ctas_as_there_are_slots_or_pairs() -> None:
    of = variant(D64)
    launch = of.space.launch(of.spec, of.config)
    with emulated(processors=2) as machine:
        kernel = cuda.load(kernels.artifact(of), torch.device("cuda", 0))
        assert isinstance(kernel, cuda.CudaPackedKernel)
        for lengths, ctas in (((3, 20), 2), ((300,) * 3, 6)):
            w = workload(of, "grid", lengths)
            b = w.make("cpu", "bf16")
            out = torch.empty_like(b.q)
            kernel.forward(*b[:5], out, None, SCALE, False)
            assert machine.launches[-1] == (of.symbol, ctas, launch["num_threads"], launch["smem_bytes"])
            assert errors(out, expected(w, b)[0]).rel <= tolerance(out.dtype)
        assert len(machine.launches) == 2
        assert len(kernel._maps) == 1  # the second call's are the first one's with other addresses


def test_what_is_empty_needs_no_launch() -> None:
    of = variant(D64)
    with emulated() as machine:
        kernel = cuda.load(kernels.artifact(of), torch.device("cuda", 0))
        for lengths in ((), (0, 0)):
            b = workload(of, "empty", lengths).make("cpu", "bf16")
            kernel.forward(*b[:5], torch.empty_like(b.q), None, SCALE, False)
    assert not machine.launches


@pytest.mark.parametrize("keys", [(0, 0, 0), (0, 0, 40), (5, 0, 3)])
@pytest.mark.parametrize("name", [D64, CAUSAL])
def test_tiles_without_keys_give_zeros(name: str, keys: tuple[int, ...]) -> None:
    """Several of them in one CTA, between others: every one must hand its buffer of Q back."""
    of = variant(name)
    w = workload(of, "no keys", (3, 140, 20), keys, num_heads=8, num_heads_kv=4)
    assert_right(of, w, w.make("cpu", "bf16"))


@pytest.mark.parametrize("odd", ["q", "k", "v"])
def test_layouts_that_tma_cannot_address_are_copied(odd: str) -> None:
    of = variant(D64)
    w = workload(of, "odd", MIXED)
    b = w.make("cpu", "bf16", 9)
    tensor = getattr(b, odd)
    tokens, heads, dim = tensor.shape
    storage = torch.empty(tokens * heads * (dim + 3) + 1, dtype=tensor.dtype)
    view = storage[1:].view(tokens, heads, dim + 3)[..., :dim].copy_(tensor)
    assert_right(of, w, b._replace(**{odd: view}))


@pytest.mark.parametrize("scale", [-0.3, 0.0, 2.0])
def test_any_scale(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "SCALE", scale)
    of = variant(CAUSAL)
    w = workload(of, "scale", MIXED)
    assert_right(of, w, batch_of(w, of))


@pytest.mark.parametrize(("limit", "text"), [("MAX_TOKENS", "70 queries"), ("MAX_TILES", "4 tiles")])
def test_more_than_the_kernel_can_count_is_refused(monkeypatch: pytest.MonkeyPatch, limit: str, text: str) -> None:
    monkeypatch.setattr(work_list, limit, 3)
    of = variant(D64)
    b = workload(of, "many", (70,)).make("cpu", "bf16")
    with emulated() as machine:
        kernel = cuda.load(kernels.artifact(of), torch.device("cuda", 0))
        with pytest.raises(UnsupportedError, match=text):
            kernel.forward(*b[:5], torch.empty_like(b.q), None, SCALE, False)
    assert not machine.launches
