"""The oracle's gradients agree with autograd through the same attention in float64."""

from __future__ import annotations

import random

import pytest
import torch

from jagtile.generator import oracle_gradients
from jagtile.generator.oracle_gradients import gradient_tolerance, reference_gradients
from jagtile.generator.workloads import random_workload


def attend(q, k, v, offsets_q, offsets_k, is_causal, bottom_right, scale) -> tuple[torch.Tensor, torch.Tensor]:
    """Jagged attention out of operations that autograd knows; rows that see no key give 0 and -inf."""
    group = q.shape[1] // k.shape[1]
    outs, lses = [], []
    for begin_q, end_q, begin_k, end_k in zip(offsets_q, offsets_q[1:], offsets_k, offsets_k[1:], strict=False):
        rows, cols = slice(begin_q, end_q), slice(begin_k, end_k)
        keys, values = (x[cols].transpose(0, 1).repeat_interleave(group, 0) for x in (k, v))
        scores = q[rows].transpose(0, 1) @ keys.transpose(1, 2) * scale
        if is_causal:
            shift = scores.shape[2] - scores.shape[1] if bottom_right else 0
            scores = scores.masked_fill(torch.ones(scores.shape[1:]).tril(shift) == 0, float("-inf"))
        lse = scores.logsumexp(2)
        weights = (scores - torch.where(lse.isneginf(), 0.0, lse).unsqueeze(2)).exp()
        outs.append((weights @ values).transpose(0, 1))
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses, dim=1)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("is_causal", [False, True])
def test_they_agree_with_autograd(seed, is_causal, monkeypatch):
    rng = random.Random(seed)
    if seed % 2:  # many small blocks of rows
        monkeypatch.setattr(oracle_gradients, "_SCORE_BYTES", 1000)
    head_dim, head_dim_v = rng.choice(((1, 1), (8, 8), (24, 40)))
    workload = random_workload(rng, head_dim=head_dim, head_dim_v=head_dim_v, is_causal=is_causal, max_seqlen=70)
    batch = workload.make("cpu", torch.float64, seed)
    operands = [x.requires_grad_() for x in batch[:3]]
    scale, alignment = rng.choice((0.3, -0.2)), workload.causal_alignment
    offsets = (batch.cu_seqlens_q.tolist(), batch.cu_seqlens_k.tolist())
    out, lse = attend(*operands, *offsets, is_causal, alignment == "bottom_right", scale)
    seen = ~lse.isneginf()
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    for by_lse in (None, dlse):
        loss = (out * dout).sum() + (0 if by_lse is None else (lse[seen] * dlse[seen]).sum())
        want = torch.autograd.grad(loss, operands, retain_graph=True, allow_unused=True)
        found = reference_gradients(
            *batch[:5], dout, by_lse, is_causal=is_causal, causal_alignment=alignment, scale=scale
        )
        for one, other in zip(found, want, strict=True):
            wanted = torch.zeros_like(one) if other is None else other.nan_to_num(0.0)
            torch.testing.assert_close(one, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("len_q", "len_k"), [(1, 500), (500, 1), (40, 40)])
def test_operands_are_bounded_as_scores_are(len_q, len_k, monkeypatch):
    monkeypatch.setattr(oracle_gradients, "_SCORE_BYTES", 8 * 500 * 64)
    multiply, sizes = oracle_gradients._block, []

    def block(q, k, v, *more):
        sizes.extend(x.nbytes for x in (q, k, v))
        return multiply(q, k, v, *more)

    monkeypatch.setattr(oracle_gradients, "_block", block)
    q, k = torch.randn(len_q, 16, 64), torch.randn(len_k, 16, 64)
    reference_gradients(q, k, k, torch.tensor([0, len_q]), torch.tensor([0, len_k]), q)
    assert max(sizes) <= oracle_gradients._SCORE_BYTES


def test_tokens_without_partners_have_zeros_whatever_their_gradients():
    q = torch.randn(10, 1, 4)
    nan = torch.full((10, 1, 4), float("nan"))
    offsets_q, offsets_k = torch.tensor([0, 4, 8]), torch.tensor([0, 0, 8])
    dout = torch.cat([nan[:4], torch.ones(4, 1, 4), nan[:2]])
    dq, dk, dv = reference_gradients(q, q, q, offsets_q, offsets_k, dout)
    assert not dq[[0, 1, 2, 3, 8, 9]].any()
    assert dq[4:8].any()
    assert not dk[8:].any()
    assert not dv[8:].any()
    assert dv[:8].all()


def test_sixteen_bits_are_given_more_room_than_thirty_two():
    bars = [gradient_tolerance(dtype) for dtype in ("fp32", "fp16", "bf16")]
    assert bars == sorted(bars)
