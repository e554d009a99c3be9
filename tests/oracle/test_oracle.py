"""The oracle agrees with torch's dense attention in float64, sequence by sequence."""

from __future__ import annotations

import random

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from jagtile.generator import oracle
from jagtile.generator.oracle import errors, reference, tolerance
from jagtile.generator.workloads import Workload, random_workload


def by_torch(workload: Workload, q, k, v, cu_q, cu_k, scale) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.zeros(workload.total_q, workload.num_heads, workload.head_dim_v, dtype=torch.float64)
    lse = torch.full((workload.num_heads, workload.total_q), float("-inf"), dtype=torch.float64)
    group = workload.num_heads // workload.num_heads_kv
    for b in range(workload.batch):
        rows, cols = slice(int(cu_q[b]), int(cu_q[b + 1])), slice(int(cu_k[b]), int(cu_k[b + 1]))
        queries = q[rows].double().transpose(0, 1)
        keys, values = (x[cols].double().transpose(0, 1).repeat_interleave(group, 0) for x in (k, v))
        seen = torch.ones(queries.shape[1], keys.shape[1], dtype=torch.bool)
        if workload.is_causal:
            shift = 0 if workload.causal_alignment == "top_left" else keys.shape[1] - queries.shape[1]
            seen = seen.tril(shift)
        attention = scaled_dot_product_attention(queries, keys, values, attn_mask=seen, scale=scale)
        some = seen.any(dim=1)
        out[rows] = torch.where(some[:, None], attention, 0.0).transpose(0, 1)
        scores = (queries @ keys.transpose(1, 2) * scale).masked_fill(~seen, float("-inf"))
        lse[:, rows] = scores.logsumexp(dim=-1)
    return out, lse


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("is_causal", [False, True])
def test_it_agrees_with_dense_attention(seed, is_causal, monkeypatch):
    rng = random.Random(seed)
    if seed % 2:  # many small blocks of heads and rows
        monkeypatch.setattr(oracle, "_SCORE_BYTES", 3000)
    head_dim, head_dim_v = rng.choice(((1, 1), (8, 8), (24, 40), (64, 64)))
    workload = random_workload(rng, head_dim=head_dim, head_dim_v=head_dim_v, is_causal=is_causal, max_seqlen=70)
    batch = workload.make("cpu", "fp32", seed)
    scale = rng.choice((None, 0.3))
    out, lse = reference(*batch[:5], is_causal=is_causal, causal_alignment=workload.causal_alignment, scale=scale)
    want_out, want_lse = by_torch(workload, *batch[:5], scale or head_dim**-0.5)
    torch.testing.assert_close(out, want_out, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(lse, want_lse, rtol=1e-12, atol=1e-12)


def test_rows_without_a_visible_key_give_zero_and_minus_infinity():
    workload = Workload("w", (5, 3, 0), (2, 0, 4), 2, 1, 8, 8, is_causal=True, causal_alignment="bottom_right")
    out, lse = reference(*workload.make("cpu", "fp32")[:5], is_causal=True, causal_alignment="bottom_right")
    assert lse.isneginf().sum(dim=1).tolist() == [6, 6]
    assert (out[[0, 1, 2, 5, 6, 7]] == 0).all()
    assert (out[3:5] != 0).all()


def test_rows_of_no_sequence_are_zero():
    q = torch.randn(10, 1, 4)
    offsets = torch.tensor([2, 6])
    out, lse = reference(q, q, q, offsets, offsets)
    assert (out[:2] == 0).all()
    assert (out[6:] == 0).all()
    assert lse[0, 2:6].isfinite().all()


def test_strided_inputs_and_any_integer_offsets_are_taken():
    packed = torch.randn(9, 3, 2, 8)
    q, k, v = packed.unbind(1)
    for dtype in (torch.int32, torch.int64):
        offsets = torch.tensor([0, 4, 9], dtype=dtype)
        out, _ = reference(q, k, v, offsets, offsets)
        want, _ = reference(q.contiguous(), k.contiguous(), v.contiguous(), offsets, offsets)
        torch.testing.assert_close(out, want, rtol=0, atol=0)


def test_errors_are_relative_absolute_and_of_the_worst_row():
    ref = torch.ones(100, 2, 16, dtype=torch.float64)
    out = ref.float()
    assert errors(out, ref) == (0, 0, 0)
    out[7, 1] = 1.5
    found = errors(out, ref)
    assert found.rel == pytest.approx(0.5 / 200**0.5)
    assert found.max_abs == 0.5
    assert found.row_rel == pytest.approx(0.5)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_an_unwritten_element_is_an_infinite_error(poison):
    ref = torch.ones(10, 16, dtype=torch.float64)
    out = ref.float()
    out[3, 3] = poison
    assert errors(out, ref) == (float("inf"),) * 3


def test_equal_infinities_are_equal_and_unequal_ones_are_not():
    ref = torch.tensor([[1.0, float("-inf")]], dtype=torch.float64)
    assert errors(ref.float(), ref) == (0, 0, 0)
    assert errors(torch.tensor([[1.0, 0.0]]), ref).rel == float("inf")


def test_anything_but_zero_is_infinitely_far_from_zero():
    ref = torch.zeros(3, 16, dtype=torch.float64)
    assert errors(ref.float(), ref).rel == 0
    assert errors(ref.float() + 1, ref).rel == float("inf")
    assert errors(ref[:0].float(), ref[:0]).rel == 0


def test_unlike_shapes_are_refused():
    with pytest.raises(ValueError, match="shape"):
        errors(torch.zeros(3, 4), torch.zeros(4, 3, dtype=torch.float64))


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_torchs_own_kernels_are_within_tolerance_and_twice_their_error_may_not_be(dtype, is_causal):
    n, heads, head_dim = 512, 4, 64
    workload = Workload("w", (n,), (n,), heads, heads, head_dim, head_dim, is_causal)
    batch = workload.make("cpu", dtype)
    q, k, v = (x.transpose(0, 1)[None] for x in batch[:3])
    out = scaled_dot_product_attention(q, k, v, is_causal=is_causal)[0].transpose(0, 1)
    ref, _ = reference(*batch[:5], is_causal=is_causal)
    found = errors(out, ref)
    assert found.rel < tolerance(dtype)
    assert found.row_rel < 5 * tolerance(dtype)
    if dtype != "fp32":
        assert 2 * found.rel > tolerance(dtype)
