"""Nested tensors with holes: sequences that fill only a part of their place in the buffer."""

from __future__ import annotations

import pytest
import torch
from torch.nested._internal.nested_tensor import nested_view_from_values_offsets_lengths
from torch.nn.functional import scaled_dot_product_attention

import jagtile
from jagtile.runtime import fallback
from jagtile.runtime.holes import close_holes, open_holes

pytestmark = pytest.mark.usefixtures("oracle_kernels")

PLACES = [0, 5, 9, 9, 12]  # where each sequence begins, and the end of the buffer
LENGTHS = [3, 4, 0, 1]


def holed(lengths=LENGTHS, places=PLACES, heads=2, dim=8, rows=12, dtype=torch.float32) -> torch.Tensor:
    """(B, heads, j, dim), NaN in the holes."""
    values = torch.full((rows, heads, dim), float("nan"), dtype=dtype)
    for begin, length in zip(places, lengths, strict=False):
        values[begin : begin + length] = torch.randn(length, heads, dim)
    offsets, lengths = torch.tensor(places), torch.tensor(lengths)
    return nested_view_from_values_offsets_lengths(values, offsets, lengths).transpose(1, 2)


def whole(lengths=LENGTHS, heads=2, dim=8) -> torch.Tensor:
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    return torch.nested.nested_tensor_from_jagged(torch.randn(sum(lengths), heads, dim), offsets).transpose(1, 2)


def sequences(nested: torch.Tensor) -> list[torch.Tensor]:
    """The (H, length, D) of each sequence."""
    begins = nested._offsets.tolist()
    lengths = (nested._offsets.diff() if nested._lengths is None else nested._lengths).tolist()
    return [nested._values[:, begin : begin + length] for begin, length in zip(begins, lengths, strict=False)]


def assert_right(out: torch.Tensor, *qkv: torch.Tensor, **kind) -> None:
    for found, *triple in zip(sequences(out), *map(sequences, qkv), strict=True):
        expected = scaled_dot_product_attention(*(x[None] for x in triple), **kind)[0]
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("which", ["query", "key and value", "value", "all"])
def test_each_sequence_is_attended_by_itself(which, is_causal):
    query = holed() if which in ("query", "all") else whole()
    key = holed() if which in ("key and value", "all") else whole()
    value = holed() if which in ("key and value", "value", "all") else whole()
    out = jagtile.sdpa(query, key, value, is_causal=is_causal)
    assert_right(out, query, key, value, is_causal=is_causal)
    assert out.offsets() is query.offsets()
    assert out.lengths() is query.lengths()
    assert out.shape == query.shape


def test_holes_of_the_query_are_zero_holes_of_the_output():
    query = holed()
    out = jagtile.sdpa(query, query, query)
    assert not out._values.isnan().any()
    assert not out._values[:, [3, 4, 10, 11]].any()
    assert (out + query).shape == query.shape  # a residual


def test_it_serves_what_torch_narrows(oracle_kernels):
    x = torch.randn(3, 5, 2, 8)
    begin, length = torch.tensor([0, 1, 2]), torch.tensor([3, 4, 2])
    narrowed = torch.nested.narrow(x, 1, begin, length, layout=torch.jagged).transpose(1, 2)
    assert narrowed._lengths is not None
    out = jagtile.sdpa(narrowed, narrowed, narrowed, is_causal=True)
    for b, found in enumerate(sequences(out)):
        part = x[b, begin[b] : begin[b] + length[b]].transpose(0, 1)
        torch.testing.assert_close(found, scaled_dot_product_attention(part, part, part, is_causal=True))


def test_torchs_function_computes_them_while_enabled():
    query = holed()
    with jagtile.enabled():
        assert_right(scaled_dot_product_attention(query, query, query), query, query, query)


def test_key_and_value_may_lie_in_buffers_of_other_sizes():
    query, key = whole(), holed()
    value = holed(places=[0, 3, 7, 8, 9], rows=9)
    assert_right(jagtile.sdpa(query, key, value), query, key, value)


def test_key_and_value_must_have_the_same_lengths():
    with pytest.raises(ValueError, match="value has other offsets than key"):
        jagtile.sdpa(whole(), holed(), holed([3, 3, 1, 1]))


def test_gradients_reach_the_rows_and_leave_the_holes(monkeypatch):
    monkeypatch.setattr(fallback, "_REASONS", {})
    offsets, lengths = torch.tensor([0, 3, 5]), torch.tensor([2, 1])
    leaves = [torch.randn(5, 1, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def call(*values):
        nested = (nested_view_from_values_offsets_lengths(x, offsets, lengths).transpose(1, 2) for x in values)
        return jagtile.sdpa(*nested).values()

    with pytest.warns(jagtile.JagtileWarning, match="float64"):
        assert torch.autograd.gradcheck(call, leaves)


def test_it_compiles_into_one_graph():
    query = holed()
    out = torch.compile(lambda x: jagtile.sdpa(x, x, x), backend="aot_eager", fullgraph=True)(query)
    torch.testing.assert_close(out._values, jagtile.sdpa(query, query, query)._values)
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_opening_undoes_closing(dtype):
    values, offsets, lengths = torch.randn(12, 1, 1), torch.tensor(PLACES, dtype=dtype), torch.tensor(LENGTHS)
    closed = close_holes(values, offsets, lengths.to(dtype), 10)
    torch.testing.assert_close(closed[:, 0, 0], torch.cat([values[[0, 1, 2, 5, 6, 7, 8, 9], 0, 0], torch.zeros(2)]))
    opened = open_holes(closed, offsets, lengths.to(dtype), 12)
    filled = torch.tensor([1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 0, 0], dtype=torch.bool)
    torch.testing.assert_close(opened, torch.where(filled[:, None, None], values, 0.0))


def test_no_sequence_and_no_row_are_served():
    empty = nested_view_from_values_offsets_lengths(
        torch.randn(0, 2, 8), torch.tensor([0]), torch.tensor([], dtype=torch.int64)
    ).transpose(1, 2)
    assert jagtile.sdpa(empty, empty, empty)._values.shape == (2, 0, 8)
