"""The contract of SDPA on nested tensors, row by row: what torch does with an input, and what jagtile does.

Three tables: what torch computes (and jagtile the same), what torch refuses or gets wrong (and jagtile computes), and
what both refuse. torch's side is checked where it shows on the CPU. docs/njt.md is these tables for people.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from njt_cases import (
    assert_close,
    attention,
    head_by_head,
    njt,
    offsets_of,
    one_for_all,
    packed_projection,
    qkv,
    sequences,
    with_holes,
    without_heads,
)
from torch.nested._internal.sdpa import jagged_scaled_dot_product_attention as torchs
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

import jagtile

pytestmark = [
    pytest.mark.usefixtures("oracle_kernels", "no_grad"),
    pytest.mark.filterwarnings("ignore::jagtile.JagtileWarning"),
]


def through_torch(**call) -> torch.Tensor:
    with jagtile.enabled():
        return scaled_dot_product_attention(**call)


ours = pytest.mark.parametrize("ours", [jagtile.sdpa, through_torch], ids=["sdpa", "enabled"])

# --- what torch computes on every device, and jagtile in the same way

SAME = {
    "equal lengths": lambda: qkv(),
    "cross attention: key lengths other than query's": lambda: qkv((3, 4), (6, 1)),
    "equal offsets in unlike tensors": lambda: {name: njt() for name in ("query", "key", "value")},
    "enable_gqa with equal heads": lambda: {**qkv(), "enable_gqa": True},
    "a zero-length sequence": lambda: qkv((3, 0, 4)),
    "a query without keys": lambda: qkv((3, 2, 4), (1, 0, 5)),
    "scale": lambda: {**qkv(), "scale": 0.3},
    "scale 0": lambda: {**qkv(), "scale": 0.0},
    "a head_dim that is no multiple of 8": lambda: qkv(dim=5),
    "a head_dim above 256": lambda: qkv(dim=264),
    "head_dim_v other than head_dim": lambda: qkv(dim_v=12),
    "float16": lambda: qkv(dtype=torch.float16),
    "bfloat16": lambda: qkv(dtype=torch.bfloat16),
    "float64": lambda: qkv(dtype=torch.float64),
    "offsets in int32": lambda: one_for_all(njt(offsets=offsets_of((3, 4), torch.int32))),
    "cached lengths": lambda: one_for_all(njt(min_seqlen=3, max_seqlen=4)),
    "wrong cached lengths": lambda: one_for_all(njt((3, 4), min_seqlen=1, max_seqlen=2)),
    "one sequence of one token": lambda: qkv((1,)),
    "a head axis of its own for (B, j, D)": lambda: one_for_all(without_heads().unsqueeze(1)),
}


@ours
@pytest.mark.parametrize("row", SAME)
def test_torch_computes_it_and_so_do_we(row, ours):
    call = SAME[row]()
    out, expected = ours(**call), torchs(**call)
    assert_close(out, attention(**call))
    assert_close(out, [x.double() for x in sequences(expected)] if out.dtype == torch.float32 else attention(**call))
    assert (out.dtype, out.shape, out._values.stride()) == (expected.dtype, expected.shape, expected._values.stride())
    assert out.offsets() is expected.offsets() is call["query"].offsets()


# --- what torch refuses on some device, or computes wrongly on another, and jagtile computes

BEYOND = {
    "is_causal, equal lengths": lambda: {**qkv(), "is_causal": True},
    "is_causal, fewer keys": lambda: {**qkv((3, 4), (2, 1)), "is_causal": True},
    "is_causal, more keys": lambda: {**qkv((3, 1), (5, 4)), "is_causal": True},
    "is_causal, more keys, bfloat16": lambda: {**qkv((3, 1), (5, 4), dtype=torch.bfloat16), "is_causal": True},
    "is_causal, more keys, float16": lambda: {**qkv((3, 1), (5, 4), dtype=torch.float16), "is_causal": True},
    "is_causal, more keys, float64": lambda: {**qkv((3, 1), (5, 4), dtype=torch.float64), "is_causal": True},
    "is_causal, a zero-length sequence": lambda: {**qkv((3, 0, 4)), "is_causal": True},
    "GQA": lambda: {**qkv(heads=6, heads_kv=2), "enable_gqa": True},
    "GQA, causal": lambda: {**qkv(heads=6, heads_kv=2), "enable_gqa": True, "is_causal": True},
    "MQA": lambda: {**qkv(heads=4, heads_kv=1), "enable_gqa": True},
    "holes": lambda: one_for_all(with_holes()),
    "holes, causal": lambda: {**one_for_all(with_holes()), "is_causal": True},
    "holes in query alone": lambda: {**qkv((2, 4, 1)), "query": with_holes()},
    "all sequences empty": lambda: qkv((0, 0)),
    "B = 0": lambda: qkv(()),
    "three dimensions": lambda: {name: without_heads() for name in ("query", "key", "value")},
    "three dimensions, causal, cross": lambda: {
        "query": without_heads((2, 5)),
        **dict.fromkeys(("key", "value"), without_heads((3, 4))),
        "is_causal": True,
    },
    "three dimensions, holes": lambda: one_for_all(without_heads(holes=True)),
    "chunks of a packed projection": packed_projection,
    "storage (B, H, j, D)": lambda: one_for_all(head_by_head()),
    "values beyond the last offset": lambda: one_for_all(njt((3, 4, 2), offsets=torch.tensor([0, 3, 7]))),
}


@ours
@pytest.mark.parametrize("row", BEYOND)
def test_torch_does_not_compute_it_and_we_do(row, ours):
    call = BEYOND[row]()
    with pytest.raises((RuntimeError, IndexError)):
        torchs(**call)
    out = ours(**call)
    assert_close(out, attention(**call))
    query = call["query"]
    assert out.offsets() is query.offsets()
    assert out.lengths() is query.lengths()
    assert out.shape == (*query.shape[:-1], call["value"].shape[-1])
    assert out.dtype == query.dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_causal_has_one_alignment_for_all_dtypes(dtype):
    call = {**qkv((1, 2), (4, 3), dtype=dtype), "is_causal": True}
    first_of_value = sequences(call["value"])[0][:1].double()
    assert_close(jagtile.sdpa(**call), attention(**call))
    torch.testing.assert_close(sequences(jagtile.sdpa(**call))[0].double(), first_of_value)  # it sees key 0 only
    bottom_right = {**call, "causal_alignment": "bottom_right"}
    assert_close(jagtile.sdpa(**bottom_right), attention(**bottom_right))


@ours
@pytest.mark.parametrize("row", ["chunks of a packed projection", "storage (B, H, j, D)", "holes"])
def test_storage_is_read_in_place_but_for_holes(row, ours, oracle_kernels):
    call = BEYOND[row]()
    ours(**call)
    (arguments,) = oracle_kernels.arguments
    read = [x.untyped_storage().data_ptr() for x in arguments[:3]]
    given = [call[name]._values.untyped_storage().data_ptr() for name in ("query", "key", "value")]
    assert (read == given) == (row != "holes")


# --- the forgotten transpose: (B, j, X, D), ragged on dimension 1, is dense attention over X of each token

TOKENWISE = {
    "plain": {},
    "is_causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "enable_gqa is dropped": {"enable_gqa": True},
}


@ours
@pytest.mark.parametrize("row", TOKENWISE)
def test_ragged_on_dimension_one_keeps_torchs_meaning(row, ours, oracle_kernels):
    q, k, v = (njt(heads=5).transpose(1, 2) for _ in range(3))
    kind = {name: value for name, value in TOKENWISE[row].items() if name != "enable_gqa"}
    out = ours(query=q, key=k, value=v, **TOKENWISE[row])
    torch.testing.assert_close(out._values, scaled_dot_product_attention(q._values, k._values, v._values, **kind))
    assert out.offsets() is q.offsets()
    assert oracle_kernels.arguments == []


# --- what both refuse: torch's error on the CPU, ours, what ours says


def strided_nested() -> torch.Tensor:
    return torch.nested.nested_tensor([torch.ones(2, 3, 8), torch.ones(2, 4, 8)], layout=torch.strided)


def five_dimensions() -> torch.Tensor:
    return torch.nested.nested_tensor_from_jagged(torch.ones(7, 2, 2, 8), offsets_of((3, 4))).transpose(1, 3)


REFUSED = {
    "a dense operand": (
        lambda: {**qkv(), "key": torch.ones(2, 2, 3, 8)},
        ValueError,
        ValueError,
        "key must be a nested",
    ),
    "a strided nested operand": (lambda: {**qkv(), "value": strided_nested()}, ValueError, ValueError, "value must be"),
    "unlike dtypes": (lambda: {**qkv(), "key": njt().half()}, ValueError, ValueError, "key has dtype torch.float16"),
    "unlike devices": (lambda: {**qkv(), "key": njt().to("meta")}, ValueError, ValueError, "on meta"),
    "two dimensions": (
        lambda: one_for_all(torch.nested.nested_tensor_from_jagged(torch.ones(7), offsets_of((3, 4)))),
        ValueError,
        ValueError,
        "query must have at least three dimensions, got 2",
    ),
    "ragged on unlike dimensions": (
        lambda: {**qkv(), "key": njt().transpose(1, 2)},
        ValueError,
        ValueError,
        r"ragged on the same dimension, got \[2, 1, 2\]",
    ),
    "a dense mask": (
        lambda: {**qkv(), "attn_mask": torch.ones(4, 4, dtype=torch.bool)},
        ValueError,
        ValueError,
        "attn_mask must be None for nested tensors, got Tensor",
    ),
    "a nested mask": (lambda: {**qkv(), "attn_mask": njt()}, ValueError, ValueError, "attn_mask must be None"),
    "a causal bias": (
        lambda: {**qkv(), "attn_mask": causal_lower_right(4, 4)},
        ValueError,
        ValueError,
        "attn_mask must be None",
    ),
    "a mask, and is_causal": (
        lambda: {**qkv(), "attn_mask": torch.ones(4, 4), "is_causal": True},
        ValueError,
        ValueError,
        "attn_mask must be None",
    ),
    "three dimensions, transposed": (
        lambda: one_for_all(without_heads().transpose(1, 2)),
        RuntimeError,
        RuntimeError,
        "query has 3 dimensions and is ragged on dimension 2",
    ),
    "five dimensions": (
        lambda: one_for_all(five_dimensions()),
        RuntimeError,
        RuntimeError,
        "query has 5 dimensions and is ragged on dimension 3",
    ),
    "ragged on the head_dim": (
        lambda: one_for_all(njt().transpose(2, 3)),
        AttributeError,
        RuntimeError,
        "ragged on dimension 3",
    ),
    "key and value of unlike lengths, equal totals": (
        lambda: {**qkv(), "value": njt((4, 3))},
        RuntimeError,
        ValueError,
        "value has other offsets than key",
    ),
    "key and value of unlike totals": (
        lambda: {**qkv(), "value": njt((3, 5))},
        RuntimeError,
        ValueError,
        "value has 8 tokens, key 7",
    ),
    "another batch": (
        lambda: {**qkv(), **dict.fromkeys(("key", "value"), njt((2, 3, 1)))},
        RuntimeError,
        ValueError,
        "key has 3 sequences, query 2",
    ),
    "a batch of one is not broadcast": (
        lambda: {**qkv(), **dict.fromkeys(("key", "value"), njt((3,)))},
        RuntimeError,
        ValueError,
        "key has 1 sequences, query 2",
    ),
    "head_dim of key other than query's": (
        lambda: {**qkv(), "query": njt(dim=16)},
        RuntimeError,
        ValueError,
        "key has head_dim 8, query 16",
    ),
    "grouped heads without enable_gqa": (
        lambda: qkv(heads=4, heads_kv=2),
        RuntimeError,
        ValueError,
        "pass enable_gqa=True",
    ),
    "one key head without enable_gqa": (
        lambda: qkv(heads=4, heads_kv=1),
        RuntimeError,
        ValueError,
        "pass enable_gqa=True",
    ),
    "heads that are no multiple": (
        lambda: {**qkv(heads=3, heads_kv=2), "enable_gqa": True},
        RuntimeError,
        ValueError,
        "query has 3 heads, key 2",
    ),
    "an integer dtype": (lambda: qkv(dtype=torch.int32), RuntimeError, RuntimeError, "query has dtype torch.int32"),
    "a complex dtype": (
        lambda: qkv(dtype=torch.complex64),
        RuntimeError,
        RuntimeError,
        "query has dtype torch.complex64",
    ),
    "a dropout_p beyond 1": (
        lambda: {**qkv(), "dropout_p": 1.5},
        RuntimeError,
        ValueError,
        "dropout_p must be from 0 to 1, got 1.5",
    ),
}


@pytest.mark.parametrize("row", REFUSED)
def test_torch_refuses_it_and_so_do_we(row):
    make, torchs_error, our_error, message = REFUSED[row]
    with pytest.raises(torchs_error):
        torchs(**make())
    with pytest.raises(our_error, match=message):
        jagtile.sdpa(**make())
    with pytest.raises((torchs_error, our_error)):
        through_torch(**make())


@ours
def test_dropout_is_served(ours):
    """Values of 1: a query's output is the part of its weights that is kept, by what is kept on average."""
    call = qkv(lengths=(200, 300), heads=4)
    call["value"] = torch.ones_like(call["key"])
    out = ours(**call, dropout_p=0.25)._values
    assert abs(float(out.mean()) - 1) < 0.01
    assert 0.01 < float(out.std()) < 0.3
    assert torch.equal(ours(**call, dropout_p=1.0)._values, torch.zeros_like(out))


def test_dropout_without_kernels_is_refused_and_torchs_own_takes_it_while_enabled(no_dropout):
    call = {**qkv(), "dropout_p": 0.5}
    with pytest.raises(RuntimeError, match=r"dropout_p is 0\.5; served: 0"):
        jagtile.sdpa(**call)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        out = through_torch(**call)
    torch.manual_seed(0)
    torch.testing.assert_close(out._values, torchs(**call)._values)


ARGUMENTS = {
    "is_causal": ("yes", TypeError),
    "dropout_p": (None, TypeError),
    "scale": ("1", TypeError),
    "enable_gqa": (None, TypeError),
}


@ours
@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_argument_of_a_wrong_type_is_a_type_error(name, ours):
    value, error = ARGUMENTS[name]
    with pytest.raises(error):
        ours(**qkv(), **{name: value})
