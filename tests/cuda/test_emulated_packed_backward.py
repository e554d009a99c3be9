"""The Hopper backward for short sequences, run by the emulator: tiles across sequences, nothing leaks between them."""

from __future__ import annotations

import random
from functools import cache

import gradient_checks
import pytest
import torch
from emulator import kernels
from emulator.backward_checks import assert_right, backward, loaded
from emulator.driver import emulated

from jagtile.generator.guard import guarded
from jagtile.generator.oracle import errors, reference
from jagtile.generator.oracle_gradients import Gradients, gradient_tolerance, reference_gradients
from jagtile.generator.tile import Variant
from jagtile.generator.workloads import JaggedBatch, Workload
from jagtile.runtime import UnsupportedError, cuda
from jagtile.runtime.artifact import Artifact
from jagtile.runtime.cuda import CudaPackedBackwardKernel, work_list

D64 = "bwd_bf16_d64/packedrows_n64_s2_c2"
CAUSAL = "bwd_bf16_d64_causal/packedrows_n48_s1_c2"
BOTH = pytest.mark.parametrize("name", [D64, CAUSAL])
VARIANTS = [
    D64,
    CAUSAL,
    "bwd_fp16_d8_causal/packedrows_n128_s2_c1",
    "bwd_bf16_d32/packedrows_n96_s1_c2",
    "bwd_fp16_d72_dv40_causal/packedrows_n32_s3_c1",
    "bwd_bf16_d128_causal/packedrows_n64_s2_c1",
    "bwd_bf16_d96_dv128/packedrows_n16_s1_c1",
]
TINY = tuple(random.Random(3).choices((0, 1, 1, 2, 3, 4), k=70))
MIXED = (5, 0, 0, 64, 1, 130, 63, 0, 2, 1, 1, 70, 0)


@cache
def built(name: str) -> Artifact:
    return kernels.artifact(Variant.parse(f"sm_90a/{name}"))


def workload(of: str, name: str, lengths: tuple[int, ...], keys: tuple[int, ...] | None = None, **more) -> Workload:
    spec = Variant.parse(f"sm_90a/{of}").spec
    heads = {"num_heads": 2, "num_heads_kv": 2, **more}
    dims = {"head_dim": spec.head_dim, "head_dim_v": spec.head_dim_v, "is_causal": spec.causal}
    return Workload(name, lengths, lengths if keys is None else keys, **heads, **dims)


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_match_the_oracle(name: str) -> None:
    cases = [
        workload(name, "tiny", TINY, num_heads=3, num_heads_kv=3),
        workload(name, "mixed", MIXED),
        workload(name, "cross", MIXED, MIXED[::-1], num_heads_kv=1, causal_alignment="bottom_right"),
        workload(name, "few queries", (1, 12, 0, 1), (3, 150, 20, 0), causal_alignment="top_left"),
        workload(name, "many queries", (150, 0, 70, 3), (3, 10, 90, 0), num_heads=4, causal_alignment="bottom_right"),
        workload(name, "one", (64,), num_heads=1, num_heads_kv=1),
    ]
    for seed, w in enumerate(cases):
        assert_right(built(name), w, seed, with_dlse=seed != 1)


@BOTH
def test_every_schedule_gives_the_same_bits(name: str) -> None:
    """Whether additions need an order or not: there are none."""
    w = workload(name, "mixed", (*TINY, *MIXED[:7]), num_heads_kv=1)
    with loaded(built(name)) as kernel:
        b, dout = gradient_checks.batch(kernel, w, 4, "cpu")
    first, second = (backward(built(name), w, b, dout, processors=processors) for processors in (2, 5))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


# --- which sequence a row belongs to


@BOTH
@pytest.mark.parametrize(
    "lengths",
    [
        (0,) * 40 + (3,) + (0,) * 100 + (2, 1) + (0,) * 70,  # more empty ones than a step of the search looks at
        (1,) * 200,
        (65, 0, 0, 63, 0, 1),
        (0, 256),
    ],
    ids=["runs of empty ones", "one token each", "borders of tiles", "one"],
)
def test_sequences_are_found(name: str, lengths: tuple[int, ...]) -> None:
    assert_right(built(name), workload(name, "found", lengths, num_heads=1, num_heads_kv=1))


@BOTH
@pytest.mark.parametrize("alignment", ["top_left", "bottom_right"])
def test_rows_of_no_sequence_get_zeros_and_their_values_go_nowhere(name: str, alignment: str) -> None:
    w = workload(name, "middle", (70, 3, 0, 90), (5, 140, 60, 7), causal_alignment=alignment)
    with loaded(built(name)) as kernel:
        b, dout = gradient_checks.batch(kernel, w, 2, "cpu")
    b = b._replace(cu_seqlens_q=torch.tensor([70, 72, 73, 100]), cu_seqlens_k=torch.tensor([5, 12, 12, 145]))
    for tensor, begin, end in ((b.q, 70, 100), (dout, 70, 100), (b.k, 5, 145), (b.v, 5, 145)):
        tensor[:begin] = tensor[end:] = 0.0
    expected = truth(w, b, dout)
    for tensor, begin, end in ((b.q, 70, 100), (dout, 70, 100), (b.k, 5, 145), (b.v, 5, 145)):
        tensor[:begin] = tensor[end:] = float("nan")
    found = backward(built(name), w, b, dout)
    for grad, want, (begin, end) in zip(found, expected, ((70, 100), (5, 145), (5, 145)), strict=True):
        assert errors(grad[begin:end], want[begin:end]).rel <= gradient_tolerance(grad.dtype)
        assert not grad[:begin].any()
        assert not grad[end:].any()


def truth(w: Workload, b: JaggedBatch, dout: torch.Tensor) -> Gradients:
    kind = {"is_causal": w.is_causal, "causal_alignment": w.causal_alignment, "scale": gradient_checks.SCALE}
    return reference_gradients(*b[:5], dout, **kind)


def test_int64_and_mixed_offsets() -> None:
    w = workload(CAUSAL, "mixed", MIXED, MIXED[::-1])
    with loaded(built(CAUSAL)) as kernel:
        b, dout = gradient_checks.batch(kernel, w, 3, "cpu")
    expected = truth(w, b, dout)
    for q_type, k_type in ((torch.int64, torch.int64), (torch.int32, torch.int64), (torch.int64, torch.int32)):
        typed = b._replace(cu_seqlens_q=b.cu_seqlens_q.to(q_type), cu_seqlens_k=b.cu_seqlens_k.to(k_type))
        for grad, want in zip(backward(built(CAUSAL), w, typed, dout), expected, strict=True):
            assert errors(grad, want).rel <= gradient_tolerance(grad.dtype)


# --- leaks


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [D64, CAUSAL, "bwd_bf16_d128_causal/packedrows_n64_s2_c1"])
def test_nan_and_infinity_stay_in_their_sequence(name: str, value: float) -> None:
    lengths, keys = (3, 20, 1, 150, 2, 33), (4, 20, 0, 100, 3, 61)
    w = workload(name, "neighbours", lengths, keys, num_heads_kv=1)
    with loaded(built(name)) as kernel:
        b, dout = gradient_checks.batch(kernel, w, 6, "cpu")
    expected = truth(w, b, dout)
    for spoiled in (1, 3, 4):
        (q_begin, q_end), (k_begin, k_end) = (
            cu[spoiled : spoiled + 2].tolist() for cu in (b.cu_seqlens_q, b.cu_seqlens_k)
        )
        bad, bad_dout = b._replace(q=b.q.clone(), k=b.k.clone(), v=b.v.clone()), dout.clone()
        bad.q[q_begin:q_end] = bad_dout[q_begin:q_end] = value
        bad.k[k_begin:k_end] = bad.v[k_begin:k_end] = value
        for grad, want, (begin, end) in zip(
            of_spoiled(name, w, bad, bad_dout), expected, ((q_begin, q_end), *((k_begin, k_end),) * 2), strict=True
        ):
            rest = [*range(begin), *range(end, len(grad))]
            assert errors(grad[rest], want[rest]).rel <= gradient_tolerance(grad.dtype)
            assert grad[begin:end].isnan().any() or begin == end


def of_spoiled(
    name: str, w: Workload, b: JaggedBatch, dout: torch.Tensor, change=None, clean: JaggedBatch | None = None
) -> Gradients:
    """Gradients that may hold NaN; the forward's results are those of ``clean`` where that is given."""
    kind = {"is_causal": w.is_causal, "causal_alignment": w.causal_alignment, "scale": gradient_checks.SCALE}
    out, lse = reference(*(clean or b)[:5], **kind)
    grads = Gradients(*(guarded(torch.full_like(x, 7.0)) for x in b[:3]))
    artifact = built(name) if change is None else kernels.artifact(Variant.parse(f"sm_90a/{name}"), change)
    with loaded(artifact) as kernel:
        bottom_right = w.causal_alignment == "bottom_right"
        kernel.backward(*b[:5], out.to(b.q.dtype), lse.float(), dout, None, *grads, gradient_checks.SCALE, bottom_right)
    return grads


def test_without_its_second_product_nan_would_leak() -> None:
    """The tests above can fail."""
    w = workload(D64, "neighbours", (3, 20, 30))
    with loaded(built(D64)) as kernel:
        b, dout = gradient_checks.batch(kernel, w, 6, "cpu")
    b.k[3:23] = b.q[3:23] = float("nan")
    once = kernels.substitution("if (__any_sync(0xffffffff, any_nan(product)))", "if (false)")
    for grad in of_spoiled(D64, w, b, dout, once)[:2]:
        assert grad[:3].isnan().any()


def test_dp_of_what_is_not_seen_may_be_anything() -> None:
    w = workload(CAUSAL, "future", (40, 50), num_heads=1, num_heads_kv=1)
    with loaded(built(CAUSAL)) as kernel:
        b, dout = gradient_checks.batch(kernel, w, 6, "cpu")
    expected = truth(w, b, dout)
    spoiled = b._replace(v=b.v.clone())
    spoiled.v[30] = float("inf")
    dq = of_spoiled(CAUSAL, w, spoiled, dout, clean=b).dq
    for rows in (slice(30), slice(40, None)):
        assert errors(dq[rows], expected.dq[rows]).rel <= gradient_tolerance(dq.dtype)
    assert dq[30:40].isnan().any()


# --- the launcher


def test_a_call_is_two_launches_of_as_many_ctas_as_there_are_slots_or_tiles() -> None:
    variant = Variant.parse(f"sm_90a/{D64}")
    launch = variant.space.launch(variant.spec, variant.config)
    with emulated(processors=2) as machine:
        kernel = cuda.load(built(D64), torch.device("cuda", 0))
        assert isinstance(kernel, CudaPackedBackwardKernel)
        for lengths, keys, ctas in (((20,), (20,), 4), ((3,), (70,), 4), ((300,) * 3, (20,) * 3, 4)):
            w = workload(D64, "grid", lengths, keys)
            gradient_checks.assert_right(kernel, w)
            (prepare, *_), attention = machine.launches[-2:]
            assert prepare == "jagtile_backward_prepare"
            assert attention == (variant.symbol, ctas, launch["num_threads"], launch["smem_bytes"])
        assert len(machine.launches) == 6
        assert len(kernel._maps) == 1  # the second call's are the first one's with other addresses


def test_what_is_empty_needs_no_launch() -> None:
    with emulated() as machine:
        kernel = cuda.load(built(D64), torch.device("cuda", 0))
        for lengths, keys in (((), ()), ((0, 0), (0, 0)), ((3, 1), (0, 0)), ((0, 0), (5, 0))):
            gradient_checks.assert_right(kernel, workload(D64, "empty", lengths, keys), with_dlse=False)
        tokens, none = torch.ones(3, 2, 64).bfloat16(), torch.tensor([0], dtype=torch.int32)
        grads = [torch.full_like(tokens, float("nan")) for _ in range(3)]
        kernel.backward(*(tokens,) * 3, none, none, tokens, torch.zeros(2, 3), tokens, None, *grads, 0.1, False)
        assert not any(grad.any() for grad in grads)
    assert not machine.launches


@BOTH
@pytest.mark.parametrize("keys", [(0, 0, 40), (5, 0, 3)])
def test_tiles_that_nobody_sees_give_zeros(name: str, keys: tuple[int, ...]) -> None:
    """Several of them in one CTA, between others: every one must hand its buffer back."""
    assert_right(built(name), workload(name, "no keys", (3, 140, 20), keys, num_heads=8, num_heads_kv=4))
    assert_right(built(name), workload(name, "no queries", keys, (3, 140, 20), num_heads=8, num_heads_kv=4))


@pytest.mark.parametrize("odd", ["q", "k", "v", "dout"])
def test_layouts_that_tma_cannot_address_are_copied(odd: str) -> None:
    w = workload(D64, "odd", MIXED)
    with loaded(built(D64)) as kernel:
        b, dout = gradient_checks.batch(kernel, w, 9, "cpu")
    tensor = dout if odd == "dout" else getattr(b, odd)
    tokens, heads, dim = tensor.shape
    storage = torch.empty(tokens * heads * (dim + 3) + 1, dtype=tensor.dtype)
    view = storage[1:].view(tokens, heads, dim + 3)[..., :dim].copy_(tensor)
    expected = truth(w, b, dout)
    b, dout = (b, view) if odd == "dout" else (b._replace(**{odd: view}), dout)
    for grad, want in zip(backward(built(D64), w, b, dout), expected, strict=True):
        assert errors(grad, want).rel <= gradient_tolerance(grad.dtype)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 0.3])
def test_any_scale(scale: float) -> None:
    assert_right(built(CAUSAL), workload(CAUSAL, "scale", MIXED), scale=scale)


@pytest.mark.parametrize(("limit", "text"), [("MAX_TOKENS", "70 queries"), ("MAX_TILES", "8 tiles")])
def test_more_than_the_kernel_can_count_is_refused(monkeypatch: pytest.MonkeyPatch, limit: str, text: str) -> None:
    monkeypatch.setattr(work_list, limit, 3)
    w = workload(D64, "many", (70,))
    with emulated() as machine:
        kernel = cuda.load(built(D64), torch.device("cuda", 0))
        b, dout = gradient_checks.batch(kernel, w, 9, "cpu")
        with pytest.raises(UnsupportedError, match=text):
            gradient_checks.gradients(kernel, w, b, dout)
    assert not machine.launches
