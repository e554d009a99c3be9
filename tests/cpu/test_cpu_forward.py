"""The CPU kernels against the oracle: shapes, strides, dtypes, head dims, instruction sets."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernels import NAN, VARIANTS, Call, check

from jagtile.generator.oracle import errors, reference, tolerance, torch_dtype
from jagtile.generator.tile import Variant
from jagtile.runtime.kernel import ForwardKernel

KernelOf = Callable[[Variant], ForwardKernel]
CAUSAL = [variant for variant in VARIANTS if variant.spec.causal]
each_variant = pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)

lengths = st.one_of(st.integers(0, 3), st.integers(0, 40), st.integers(0, 150))
layouts = st.sampled_from(("dense", "packed", "heads_first", "gaps"))
calls = st.builds(
    Call,
    lengths=st.lists(st.tuples(lengths, lengths), max_size=6).map(tuple),
    heads_kv=st.integers(1, 3),
    gqa_ratio=st.sampled_from((1, 2, 3, 8)),
    alignment=st.sampled_from(("top_left", "bottom_right")),
    scale=st.sampled_from((None, None, 0.3, -0.2, 0.0)),
    layouts=st.tuples(layouts, layouts, layouts, layouts),
    wide_q=st.booleans(),
    wide_k=st.booleans(),
    with_lse=st.booleans(),
    spare=st.sampled_from((0, 0, 5)),
    dropout_p=st.sampled_from((0.1, 0.5, 0.9, 1.0)),
    seed=st.integers(0, 2**31),
)


@each_variant
@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(call=calls)
def test_any_jagged_batch_agrees_with_the_oracle(variant: Variant, call: Call, kernel_of: KernelOf) -> None:
    check(kernel_of(variant), variant.spec, call)


@each_variant
def test_lengths_around_every_block_border_agree_with_the_oracle(variant: Variant, kernel_of: KernelOf) -> None:
    config = variant.config
    around = [border + step for border in (config.lanes, config.block_m, config.block_n) for step in (-1, 0, 1)]
    pairs = tuple(zip(around, reversed(around), strict=True)) + tuple((length, length) for length in around)
    for alignment in ("top_left", "bottom_right"):
        check(kernel_of(variant), variant.spec, Call(pairs, heads_kv=1, gqa_ratio=1, alignment=alignment))


@each_variant
def test_a_batch_without_sequences_or_tokens_is_no_work(variant: Variant, kernel_of: KernelOf) -> None:
    for empty in ((), ((0, 0), (0, 0)), ((0, 9),)):
        check(kernel_of(variant), variant.spec, Call(empty))


@pytest.mark.parametrize("variant", CAUSAL, ids=lambda variant: variant.name)
def test_rows_that_see_no_key_give_zero_and_minus_infinity(variant: Variant, kernel_of: KernelOf) -> None:
    spec, dtype = variant.spec, torch_dtype(variant.spec.dtype)
    len_q, len_k = 70, 30
    q, k = torch.randn(len_q, 2, spec.head_dim).to(dtype), torch.randn(len_k, 2, spec.head_dim).to(dtype)
    v = torch.randn(len_k, 2, spec.head_dim_v).to(dtype)
    out, lse = torch.full((len_q, 2, spec.head_dim_v), NAN, dtype=dtype), torch.full((2, len_q), NAN)
    kernel_of(variant).forward(q, k, v, torch.tensor([0, len_q]), torch.tensor([0, len_k]), out, lse, 0.5, True)
    assert not out[: len_q - len_k].any()
    assert bool((lse[:, : len_q - len_k] == float("-inf")).all())
    assert bool(lse[:, len_q - len_k :].isfinite().all())


@each_variant
def test_nan_in_one_sequence_stays_there(variant: Variant, kernel_of: KernelOf) -> None:
    spec, dtype = variant.spec, torch_dtype(variant.spec.dtype)
    cu = torch.tensor([0, 21, 40, 77])
    q, k = (torch.randn(77, 2, spec.head_dim).to(dtype) for _ in range(2))
    v = torch.randn(77, 2, spec.head_dim_v).to(dtype)
    expected, _ = reference(q, k, v, cu, cu, is_causal=spec.causal, scale=0.2)
    for x in (q, k, v):
        x[21:40] = NAN
    out = torch.full_like(v, NAN)
    kernel_of(variant).forward(q, k, v, cu, cu, out, None, 0.2, False)
    others = torch.tensor([*range(21), *range(40, 77)])
    assert errors(out[others], expected[others]).rel <= tolerance(dtype)
    assert bool(out[21:40].isnan().any(-1).all()), "NaN inputs must not look like a result"


@each_variant
def test_scores_far_apart_neither_overflow_nor_lose_the_largest(variant: Variant, kernel_of: KernelOf) -> None:
    spec, dtype = variant.spec, torch_dtype(variant.spec.dtype)
    q = torch.full((50, 2, spec.head_dim), 8.0).to(dtype)
    k = torch.linspace(-8, 8, 50).reshape(50, 1, 1).expand(50, 2, spec.head_dim).to(dtype).contiguous()
    v = torch.randn(50, 2, spec.head_dim_v).to(dtype)
    cu = torch.tensor([0, 50])
    out, lse = torch.full_like(v, NAN), torch.full((2, 50), NAN)
    kernel_of(variant).forward(q, k, v, cu, cu, out, lse, 1.0, False)
    expected, expected_lse = reference(q, k, v, cu, cu, is_causal=spec.causal, scale=1.0)
    assert errors(out, expected).rel <= tolerance(dtype)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-6, atol=1e-5)
