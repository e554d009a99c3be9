"""jagtile.sdpa on nested tensors: numbers against dense attention a sequence, and torch's contract for the output."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

import jagtile
from jagtile.generator.oracle import tolerance

pytestmark = pytest.mark.usefixtures("no_grad")


def njt(lengths, heads=2, dim=8, dtype=torch.float32, offsets=None, **cached) -> torch.Tensor:
    """An NJT (B, heads, j, dim) made the usual way: (B, j, heads, dim), transposed."""
    if offsets is None:
        offsets = torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()])
    values = torch.randn(sum(lengths), heads, dim).to(dtype)
    return torch.nested.nested_tensor_from_jagged(values, offsets, **cached).transpose(1, 2)


def qkv(lengths, lengths_k=None, heads=2, heads_kv=None, dim=8, dim_v=None, dtype=torch.float32):
    query = njt(lengths, heads, dim, dtype)
    offsets = None if lengths_k is not None else query.offsets()
    key = njt(lengths_k or lengths, heads_kv or heads, dim, dtype, offsets)
    value = njt(lengths_k or lengths, heads_kv or heads, dim_v or dim, dtype, key.offsets())
    return query, key, value


def sequences(nested: torch.Tensor) -> list[torch.Tensor]:
    """The (H, length, D) of each sequence."""
    offsets = nested.offsets().tolist()
    return [nested._values[:, a:b] for a, b in pairwise(offsets)]


def dense(query, key, value, **kind) -> list[torch.Tensor]:
    """Dense float64 attention a sequence."""
    return [
        scaled_dot_product_attention(*(x.double()[None] for x in triple), enable_gqa=True, **kind)[0]
        for triple in zip(*map(sequences, (query, key, value)), strict=True)
    ]


def assert_agree(out: torch.Tensor, expected: list[torch.Tensor]) -> None:
    bar = 4 * tolerance(out.dtype)  # of single sequences, where the bar is for whole batches
    for found, wanted in zip(sequences(out), expected, strict=True):
        assert found.shape == wanted.shape
        assert (found.double() - wanted).norm() <= bar * wanted.norm().clamp_min(1e-30)


lengths_of = st.lists(st.integers(1, 24), min_size=1, max_size=5)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=lengths_of,
    heads_kv=st.integers(1, 3),
    group=st.integers(1, 3),
    dims=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    causal=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_it_equals_dense_attention_of_each_sequence(
    oracle_kernels, lengths, heads_kv, group, dims, dtype, causal, seed
):
    torch.manual_seed(seed)
    query, key, value = qkv(lengths, None, heads_kv * group, heads_kv, *dims, dtype)
    out = jagtile.sdpa(query, key, value, is_causal=causal, enable_gqa=group > 1)
    assert_agree(out, dense(query, key, value, is_causal=causal))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pairs=st.lists(st.tuples(st.integers(1, 24), st.integers(1, 24)), min_size=1, max_size=5), causal=st.booleans())
def test_key_lengths_may_be_others_than_query_lengths(oracle_kernels, pairs, causal):
    query, key, value = qkv([a for a, _ in pairs], [b for _, b in pairs])
    out = jagtile.sdpa(
        query, key, value, is_causal=causal
    )  # torch documents top-left, and its dense CPU kernel does so
    assert_agree(out, dense(query, key, value, is_causal=causal))


def test_bottom_right_lets_the_last_query_see_every_key(oracle_kernels):
    query, key, value = qkv([2, 3], [4, 3])
    out = jagtile.sdpa(query, key, value, is_causal=True, causal_alignment="bottom_right")
    masks = [torch.ones(n, m, dtype=torch.bool).tril(m - n) for n, m in ((2, 4), (3, 3))]
    expected = [
        scaled_dot_product_attention(*(x.double()[None] for x in triple), attn_mask=mask)[0]
        for *triple, mask in zip(*map(sequences, (query, key, value)), masks, strict=True)
    ]
    assert_agree(out, expected)


def test_a_scale_is_applied(oracle_kernels):
    query, key, value = qkv([3, 5])
    assert_agree(jagtile.sdpa(query, key, value, scale=0.7), dense(query, key, value, scale=0.7))


def test_zero_length_sequences_are_served_and_queries_without_keys_give_zero(oracle_kernels):
    query, key, value = qkv([0, 3, 2], [4, 0, 2])
    out = sequences(jagtile.sdpa(query, key, value))
    assert [x.shape[1] for x in out] == [0, 3, 2]
    assert not out[1].any()
    assert out[2].any()


def test_an_empty_batch_gives_an_empty_batch(oracle_kernels):
    out = jagtile.sdpa(*qkv([]))
    assert (out.shape[0], out._values.shape) == (0, (2, 0, 8))


# --- the output


def test_the_output_shares_the_querys_offsets_and_nested_int(oracle_kernels):
    query, key, value = qkv([3, 1], [2, 5], dim_v=12)
    out = jagtile.sdpa(query, key, value)
    assert out.offsets() is query.offsets()
    assert out.shape == (2, 2, query.shape[2], 12)
    assert out._ragged_idx == 2
    assert out.lengths() is None


def test_a_residual_can_be_added(oracle_kernels):
    query, key, value = qkv([3, 1])
    out = jagtile.sdpa(query, key, value)
    torch.testing.assert_close((out + query)._values, out._values + query._values)


def test_the_output_is_stored_token_by_token_and_returned_transposed(oracle_kernels):
    out = jagtile.sdpa(*qkv([3, 1], heads=2, dim=8))
    assert out._values.stride() == (8, 16, 1)
    assert out.transpose(1, 2).is_contiguous()
    merged = out.transpose(1, 2).flatten(-2)
    assert merged.shape[2] == 16
    assert merged._values.data_ptr() == out._values.data_ptr()


def test_cached_lengths_of_the_query_are_carried_over_and_used_as_hints(oracle_kernels):
    query = njt([3, 1], min_seqlen=1, max_seqlen=3)
    key = njt([3, 1], offsets=query.offsets())
    out = jagtile.sdpa(query, key, key)
    assert (out._maybe_min_seqlen, out._maybe_max_seqlen) == (1, 3)
    bare = jagtile.sdpa(key, key, key)
    assert (bare._maybe_min_seqlen, bare._maybe_max_seqlen) == (None, None)


def test_cached_lengths_that_are_wrong_do_no_harm(oracle_kernels):
    query = njt([3, 7], min_seqlen=1, max_seqlen=2)
    key = njt([3, 7], offsets=query.offsets().clone(), min_seqlen=5, max_seqlen=5)
    value = njt([3, 7], offsets=key.offsets().clone(), min_seqlen=9, max_seqlen=9)
    assert_agree(jagtile.sdpa(query, key, value), dense(query, key, value))


def test_torchs_own_output_has_the_same_layout(oracle_kernels):
    query, key, value = qkv([3, 1])
    ours, torchs = jagtile.sdpa(query, key, value), scaled_dot_product_attention(query, key, value)
    assert ours.shape == torchs.shape
    assert ours.dtype == torchs.dtype
    assert ours._values.stride() == torchs._values.stride()
    assert ours.offsets() is torchs.offsets()
    torch.testing.assert_close(ours._values, torchs._values)


# --- the input's storage


def test_chunks_of_a_packed_projection_are_not_copied(oracle_kernels):
    packed = torch.nested.nested_tensor_from_jagged(torch.randn(7, 3 * 2 * 8), torch.tensor([0, 3, 7]))
    query, key, value = (x.unflatten(-1, (2, 8)).transpose(1, 2) for x in packed.chunk(3, dim=-1))
    out = jagtile.sdpa(query, key, value)
    assert [x.data_ptr() for x in oracle_kernels.arguments[0][:3]] == [
        x._values.data_ptr() for x in (query, key, value)
    ]
    assert_agree(out, dense(query, key, value))


def test_storage_of_head_by_head_is_not_copied(oracle_kernels):
    values = torch.randn(2, 7, 8)
    query = torch.nested._internal.nested_tensor.NestedTensor(values, torch.tensor([0, 3, 7]), _ragged_idx=2)
    out = jagtile.sdpa(query, query, query)
    assert oracle_kernels.arguments[0][0].data_ptr() == values.data_ptr()
    assert_agree(out, dense(query, query, query))


def test_a_strided_last_dimension_is_copied(oracle_kernels):
    values = torch.randn(2, 8, 7).transpose(1, 2)
    query = torch.nested._internal.nested_tensor.NestedTensor(values, torch.tensor([0, 3, 7]), _ragged_idx=2)
    assert_agree(jagtile.sdpa(query, query, query), dense(query, query, query))


def test_values_beyond_the_last_offset_give_zero(oracle_kernels):
    query = torch.nested.nested_tensor_from_jagged(torch.randn(9, 2, 8), torch.tensor([0, 3, 7])).transpose(1, 2)
    out = jagtile.sdpa(query, query, query)
    assert out._values.shape == (2, 9, 8)
    assert not out._values[:, 7:].any()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.int16])
def test_offsets_may_be_of_any_integer_type(oracle_kernels, dtype):
    query = njt([3, 4], offsets=torch.tensor([0, 3, 7], dtype=dtype))
    assert_agree(jagtile.sdpa(query, query, query), dense(query, query, query))


def test_key_and_value_may_have_equal_offsets_in_two_tensors(oracle_kernels):
    query, key = njt([2, 2]), njt([1, 4])
    value = njt([1, 4], offsets=key.offsets().int())
    assert_agree(jagtile.sdpa(query, key, value), dense(query, key, value))


# --- autocast, modes, the forgotten transpose


def test_autocast_casts_every_operand_but_float64(oracle_kernels):
    query, key, value = qkv([3, 1])
    with torch.autocast("cpu", torch.bfloat16):
        assert jagtile.sdpa(query, key.to(torch.float16), value).dtype == torch.bfloat16
        assert jagtile.sdpa(query.double(), key.double(), value.double()).dtype == torch.float64


def test_inference_mode_is_served_for_tensors_made_outside(oracle_kernels):
    query, key, value = qkv([3, 1])
    with torch.inference_mode():
        assert_agree(jagtile.sdpa(query, key, value), dense(query, key, value))


def test_ragged_on_dimension_one_means_dense_attention_as_in_torch():
    x = torch.nested.nested_tensor_from_jagged(torch.randn(7, 4, 8), torch.tensor([0, 3, 7]))
    out = jagtile.sdpa(x, x, x, is_causal=True)
    expected = scaled_dot_product_attention(*[x._values] * 3, is_causal=True)
    torch.testing.assert_close(out._values, expected)
    assert out.offsets() is x.offsets()


# --- refusals


def good() -> dict[str, object]:
    query, key, value = qkv([3, 1])
    return {"query": query, "key": key, "value": value}


def strided_nested() -> torch.Tensor:
    return torch.nested.nested_tensor([torch.ones(2, 3, 8), torch.ones(2, 1, 8)])


def ragged_last() -> torch.Tensor:
    return njt([3, 1]).transpose(2, 3)


def two_dimensional() -> torch.Tensor:
    return torch.nested.nested_tensor_from_jagged(torch.ones(4), torch.tensor([0, 3, 4]))


ERRORS = {
    "a dense tensor": ({"query": lambda: torch.ones(2, 2, 3, 8)}, ValueError, "query must be a nested tensor.*strided"),
    "a nested tensor of another layout": ({"value": strided_nested}, ValueError, "value must be a nested tensor"),
    "no tensor": ({"key": lambda: None}, ValueError, "key must be a nested tensor.*got NoneType"),
    "a mask": ({"attn_mask": lambda: torch.ones(3, 3)}, ValueError, "attn_mask must be None.*got Tensor"),
    "dropout of more than all": ({"dropout_p": lambda: 1.1}, ValueError, "dropout_p must be from 0 to 1, got 1.1"),
    "dropout that is no number": ({"dropout_p": lambda: None}, TypeError, "dropout_p must be a float, got NoneType"),
    "is_causal that is no bool": ({"is_causal": lambda: None}, TypeError, "is_causal must be True or False, got None"),
    "enable_gqa that is no bool": ({"enable_gqa": lambda: 1}, TypeError, "enable_gqa must be True or False, got 1"),
    "a scale that is no number": ({"scale": lambda: "1"}, TypeError, "scale must be a float or None, got str"),
    "an unknown alignment": ({"causal_alignment": lambda: "top"}, ValueError, "causal_alignment.*got 'top'"),
    "another dtype": (
        {"key": lambda: njt([3, 1]).half()},
        ValueError,
        "key has dtype torch.float16, query torch.float32",
    ),
    "a dtype that is not floating": (
        {name: lambda: njt([3, 1], dtype=torch.int32) for name in ("query", "key", "value")},
        jagtile.UnsupportedError,
        "query has dtype torch.int32; served",
    ),
    "another batch size": ({"key": lambda: njt([4])}, ValueError, "key has 1 sequences, query 2"),
    "value with other lengths": (
        {"value": lambda: njt([1, 3])},
        ValueError,
        "value has other offsets than key: their sequences must have the same lengths",
    ),
    "value with another total": ({"value": lambda: njt([3, 2])}, ValueError, "value has 5 tokens, key 4"),
    "other head dims": ({"query": lambda: njt([3, 1], dim=16)}, ValueError, "key has head_dim 8, query 16"),
    "grouped heads without enable_gqa": (
        {"query": lambda: njt([3, 1], heads=4)},
        ValueError,
        "query has 4 heads, key and value 2: pass enable_gqa=True",
    ),
    "heads that can't be grouped": (
        {"query": lambda: njt([3, 1], heads=3), "enable_gqa": lambda: True},
        ValueError,
        "query has 3 heads, key 2",
    ),
    "two dimensions": (
        dict.fromkeys(("query", "key", "value"), two_dimensional),
        ValueError,
        "query must have at least three dimensions, got 2",
    ),
    "ragged on unlike dimensions": (
        {"key": ragged_last},
        ValueError,
        r"query, key and value must be ragged on the same dimension, got \[2, 3, 2\]",
    ),
    "ragged on the last dimension": (
        dict.fromkeys(("query", "key", "value"), ragged_last),
        jagtile.UnsupportedError,
        "query has 4 dimensions and is ragged on dimension 3",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_it_refuses(case):
    changes, error, message = ERRORS[case]
    with pytest.raises(error, match=message):
        jagtile.sdpa(**{**good(), **{name: make() for name, make in changes.items()}})


def test_every_refusal_beyond_validation_is_a_runtime_error_as_in_torch():
    assert issubclass(jagtile.UnsupportedError, RuntimeError)
