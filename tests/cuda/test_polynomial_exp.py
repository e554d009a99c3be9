"""Exponentials by a polynomial (templates/cuda/include/polynomial_exp.cuh): its accuracy, and scores beyond range.

And the backward's probabilities of which some are made by it (polynomial_probabilities.cuh).
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from emulator.kernels import Snippet

from jagtile.generator.spaces.sm90_forward import HEADROOM, OUTGROWN

PER_THREAD, EVERY = 32, 4
TEXT = f"""
#include "cuda/include/fragments.cuh"
#include "cuda/include/gradients.cuh"
#include "cuda/include/polynomial_exp.cuh"
#include "cuda/include/polynomial_probabilities.cuh"
#include "cuda/include/softmax.cuh"

template <int kTop>
__device__ void of(float* scores, const float* offsets, float* sums) {{
  float mine[{PER_THREAD}];
  for (int i = 0; i < {PER_THREAD}; ++i) mine[i] = scores[{PER_THREAD} * threadIdx.x + i];
  const float offset[2] = {{offsets[0], offsets[1]}};
  float sum[2] = {{0.0f, 0.0f}};
  exponentials_by_both<{EVERY}, kTop, 0, {PER_THREAD}>(mine, offset, sum, 0.5f);
  for (int i = 0; i < {PER_THREAD}; ++i) scores[{PER_THREAD} * threadIdx.x + i] = mine[i];
  for (int h = 0; h < 2; ++h) sums[2 * threadIdx.x + h] = sum[h];
}}

extern "C" __global__ void bf16(float* scores, const float* offsets, float* sums) {{ of<1>(scores, offsets, sums); }}
extern "C" __global__ void fp16(float* scores, const float* offsets, float* sums) {{ of<14>(scores, offsets, sums); }}

extern "C" __global__ void probabilities(float* scores, const float* lse) {{
  float mine[{PER_THREAD}];
  for (int i = 0; i < {PER_THREAD}; ++i) mine[i] = scores[{PER_THREAD} * threadIdx.x + i];
  probabilities_by_both<{EVERY}>(mine, StatsInMemory(lse, threadIdx.x % 4), 0.5f);
  for (int i = 0; i < {PER_THREAD}; ++i) scores[{PER_THREAD} * threadIdx.x + i] = mine[i];
}}

extern "C" __global__ void outgrown(const float* probabilities, int* bf16, int* fp16) {{
  uint32_t packed[1][4] = {{}};
  packed[0][0] = pack_bf16(probabilities[threadIdx.x], 0.0f);
  bf16[threadIdx.x] = outgrown_bf16(packed);
  packed[0][0] = pack_fp16(probabilities[threadIdx.x], 0.0f);
  fp16[threadIdx.x] = outgrown_fp16(packed);
}}
"""


@cache
def snippet() -> Snippet:
    return Snippet(TEXT)


def exponentials(dtype: str, exponents: torch.Tensor, offset: float) -> torch.Tensor:
    """Powers of two by the polynomial, a thread for each; among others by MUFU, which are summed up with them."""
    scores = (2 * (exponents.double() + offset)).float()[:, None].repeat(1, PER_THREAD)
    sums = torch.zeros(len(scores), 2)
    for some, total in zip(scores.split(512), sums.split(512), strict=True):
        snippet()(dtype, 1, len(some), some, torch.full((2,), offset), total)
    pairs = scores.view(-1, PER_THREAD // 2, 2)
    torch.testing.assert_close(sums, pairs.view(len(scores), -1, 2, 2).sum((1, 3)), equal_nan=True)
    others, some = (pairs.unflatten(1, (-1, EVERY))[:, :, which] for which in (slice(-1), slice(-1, None)))
    for kind in (others, some):
        assert torch.equal(kind.nan_to_num(-1).amin((1, 2, 3)), kind.nan_to_num(-1).amax((1, 2, 3)))
    return some[:, 0, 0, 0]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("offset", [0.0, 3.3, -20.7])
def test_a_polynomial_is_as_exact_as_probabilities_need(dtype: str, offset: float) -> None:
    top = OUTGROWN[dtype]
    exponents = torch.linspace(top - 120, top - 1e-3, 5000)
    found = exponentials(dtype, exponents, offset)
    relative = found.double() / torch.exp2(exponents.double()) - 1
    assert relative.abs().max() < 1.1e-4


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_what_is_masked_or_far_below_is_nothing(dtype: str) -> None:
    exponents = torch.tensor([-float("inf"), -127, -128, -200, -1000, -5e5, -2.1e7, -1e9, -1e38])
    found = exponentials(dtype, exponents, 0.0)
    assert torch.equal(found, torch.full_like(found, 0.0 if dtype == "bf16" else 2.0**-114))
    low = torch.linspace(-130, -100, 2000)
    found = exponentials(dtype, low, 0.0)
    assert (found >= 0).all()
    assert (found <= 2.0**-99).all()


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_rows_that_outgrew_their_reference_are_found_however_far(dtype: str) -> None:
    top = OUTGROWN[dtype]
    powers = [top, top + 0.3, top + 1, *(20, 127, 128, 129, 255, 256, 384, 1000, 5e5, 4.2e6, 1.3e7, 1e9, 1e38)]
    found = exponentials(dtype, torch.tensor([*powers, float("inf"), float("nan")]), 0.0)
    marks = {name: torch.zeros(len(found), dtype=torch.int32) for name in HEADROOM}
    snippet()("outgrown", 1, len(found), found, marks["bf16"], marks["fp16"])
    assert marks[dtype].all()
    below = exponentials(dtype, torch.tensor([top - 0.01, top - 1.0, 0.0, -16.0, -float("inf")]), 0.0)
    snippet()("outgrown", 1, len(below), below, marks["bf16"], marks["fp16"])
    assert not marks[dtype][: len(below)].any()


def test_a_row_that_saw_no_key_yet_has_outgrown_its_reference() -> None:
    scores = torch.tensor([[0.0], [-float("inf")]]).repeat(1, PER_THREAD)
    snippet()("bf16", 1, 2, scores, torch.full((2,), -float("inf")), torch.zeros(2, 2))
    assert (scores.view(2, -1, EVERY, 2)[:, :, -1] == 2).all()


def probabilities(exponents: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """Of threads with 32 scores each: 8 groups of two rows and two columns, whose lse is given."""
    columns = 8 * torch.arange(8) + 2 * (torch.arange(len(exponents)) % 4)[:, None]
    offset = lse[columns[:, :, None] + torch.arange(2)][:, :, None]  # (threads, groups, 1, columns)
    scores = (2 * (exponents.view(-1, 8, 2, 2).double() + offset.nan_to_num(0.0, 0.0))).float().contiguous()
    snippet()("probabilities", 1, len(scores), scores, lse)
    return scores.view(len(scores), -1)


def test_probabilities_are_those_of_their_columns_whichever_way_they_are_made() -> None:
    exponents = -120 * torch.rand(64, PER_THREAD, generator=torch.Generator().manual_seed(0))
    lse = torch.linspace(-40, 60, 64)
    relative = probabilities(exponents, lse).double() / torch.exp2(exponents.double()) - 1
    assert relative.abs().max() < 1.1e-4
    made_by_it = relative.view(64, -1, EVERY, 2)[:, :, -1]
    assert made_by_it.abs().max() > 1e-5 > relative.view(64, -1, EVERY, 2)[:, :, :-1].abs().max()


def test_queries_that_see_nothing_have_no_probabilities() -> None:
    found = probabilities(torch.randn(4, PER_THREAD), torch.full((64,), float("inf")))
    assert torch.equal(found, torch.zeros_like(found))


def test_nan_of_lse_shows_in_all_probabilities() -> None:
    found = probabilities(torch.randn(4, PER_THREAD), torch.full((64,), float("nan")))
    assert found.isnan().all()
