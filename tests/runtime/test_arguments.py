"""Bad arguments of varlen_attention and warmup: each error names the argument, what it was and what is accepted."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import jagtile

CU = torch.tensor([0, 3, 5], dtype=torch.int32)


def call(**changes):
    """A good call but for the changes."""
    arguments = {
        "q": torch.ones(5, 4, 8),
        "k": torch.ones(5, 2, 8),
        "v": torch.ones(5, 2, 8),
        "cu_seqlens_q": CU,
        "cu_seqlens_k": CU,
    }
    return jagtile.varlen_attention(**{**arguments, **changes})


def offsets(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


NESTED = torch.nested.nested_tensor([torch.ones(2, 8)], layout=torch.jagged)

ERRORS = {
    "q is no tensor": ({"q": [1.0]}, TypeError, r"q must be a torch.Tensor \(total_q, H, D\), got list"),
    "k is no tensor": ({"k": np.ones((5, 2, 8))}, TypeError, "k must be a torch.Tensor.*got ndarray"),
    "v is no tensor": ({"v": None}, TypeError, "v must be a torch.Tensor.*got NoneType"),
    "q is nested": ({"q": NESTED}, ValueError, "q is a nested tensor.*use jagtile.sdpa"),
    "q has two dimensions": (
        {"q": torch.ones(5, 8)},
        ValueError,
        r"q must have three dimensions.*got the shape \(5, 8\)",
    ),
    "v has four dimensions": ({"v": torch.ones(1, 5, 2, 8)}, ValueError, "v must have three dimensions"),
    "k has a strided last dimension": (
        {"k": torch.ones(5, 8, 2).transpose(1, 2)},
        ValueError,
        r"k must have a last stride of 1, got the strides \(16, 1, 2\)",
    ),
    "k has another dtype": (
        {"k": torch.ones(5, 2, 8).half()},
        ValueError,
        "k has dtype torch.float16, q torch.float32",
    ),
    "v has another dtype": ({"v": torch.ones(5, 2, 8).double()}, ValueError, "v has dtype torch.float64"),
    "v is on another device": ({"v": torch.ones(5, 2, 8, device="meta")}, ValueError, "v is on meta, q on cpu"),
    "k has another head_dim": ({"k": torch.ones(5, 2, 16)}, ValueError, "k has head_dim 16, q 8"),
    "v has other tokens": ({"v": torch.ones(6, 2, 8)}, ValueError, "v has 6 tokens and 2 heads, k 5 and 2"),
    "v has other heads": ({"v": torch.ones(5, 4, 8)}, ValueError, "v has 5 tokens and 4 heads, k 5 and 2"),
    "heads are no multiple": (
        {"q": torch.ones(5, 3, 8)},
        ValueError,
        "q has 3 heads, k 2: the former must be a multiple of the latter",
    ),
    "there are no key heads": (
        {"k": torch.ones(5, 0, 8), "v": torch.ones(5, 0, 8)},
        ValueError,
        "q has 4 heads, k 0.*both at least 1",
    ),
    "head_dim is 0": (
        {"q": torch.ones(5, 4, 0), "k": torch.ones(5, 2, 0)},
        ValueError,
        "q has head_dim 0; it must be at least 1",
    ),
    "the dtype is not served": (
        {name: torch.ones(5, 2, 8, dtype=torch.int32) for name in "qkv"},
        jagtile.UnsupportedError,
        "q has dtype torch.int32; served: torch.float32, torch.bfloat16, torch.float16, torch.float64",
    ),
    "cu_seqlens_q is no tensor": ({"cu_seqlens_q": [0, 3, 5]}, TypeError, "cu_seqlens_q must be a torch.Tensor"),
    "cu_seqlens_k is no tensor": ({"cu_seqlens_k": None}, TypeError, "cu_seqlens_k must be a torch.Tensor"),
    "cu_seqlens_q has two dimensions": (
        {"cu_seqlens_q": CU[None]},
        ValueError,
        r"cu_seqlens_q.*\(B\+1,\), got \(1, 3\)",
    ),
    "cu_seqlens_k is empty": ({"cu_seqlens_k": CU[:0]}, ValueError, r"cu_seqlens_k.*\(B\+1,\), got \(0,\)"),
    "cu_seqlens_q is float": (
        {"cu_seqlens_q": CU.float()},
        ValueError,
        "cu_seqlens_q must be int32 or int64, got torch.float",
    ),
    "cu_seqlens_k is on another device": (
        {"cu_seqlens_k": CU.to("meta")},
        ValueError,
        "cu_seqlens_k is on meta, q on cpu",
    ),
    "cu_seqlens_q is strided": (
        {"cu_seqlens_q": offsets(0, 9, 3, 9, 5)[::2]},
        ValueError,
        "cu_seqlens_q must be contiguous, got the stride 2",
    ),
    "batch sizes differ": (
        {"cu_seqlens_k": offsets(0, 5)},
        ValueError,
        "cu_seqlens_q has 3 offsets, cu_seqlens_k 2",
    ),
    "cu_seqlens_q begins late": (
        {"cu_seqlens_q": offsets(1, 3, 5)},
        ValueError,
        "cu_seqlens_q must begin with 0, got 1",
    ),
    "cu_seqlens_k decreases": (
        {"cu_seqlens_k": offsets(0, 4, 2)},
        ValueError,
        "cu_seqlens_k must never decrease, got 4, 2 at 1, 2",
    ),
    "cu_seqlens_q ends too late": (
        {"cu_seqlens_q": offsets(0, 3, 6)},
        ValueError,
        "cu_seqlens_q ends with 6, beyond the 5 tokens",
    ),
    "max_seqlen_q is a tensor": (
        {"max_seqlen_q": torch.tensor(3)},
        TypeError,
        "max_seqlen_q must be an int or None, got Tensor",
    ),
    "max_seqlen_k is negative": ({"max_seqlen_k": -1}, ValueError, "max_seqlen_k must be at least 0, got -1"),
    "is_causal is no bool": ({"is_causal": 1}, TypeError, "is_causal must be True or False, got 1"),
    "return_lse is no bool": ({"return_lse": None}, TypeError, "return_lse must be True or False, got None"),
    "causal_alignment is unknown": (
        {"causal_alignment": "bottom-right"},
        ValueError,
        "causal_alignment must be one of top_left, bottom_right, got 'bottom-right'",
    ),
    "scale is a tensor": ({"scale": torch.tensor(1.0)}, TypeError, "scale must be a float or None, got Tensor"),
    "scale is not finite": ({"scale": float("nan")}, ValueError, "scale must be finite.*got nan"),
    "scale is beyond float32": ({"scale": -(10**400)}, ValueError, "at most 1e.30 in size, got -1000"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_varlen_attention_refuses(case):
    changes, error, message = ERRORS[case]
    with pytest.raises(error, match=message):
        call(**changes)


def test_without_the_change_the_call_is_good(oracle_kernels):
    assert call().shape == (5, 4, 8)


WARMUP_ERRORS = {
    "head_dim is too large": ({"head_dim": 300}, ValueError, "head_dim must be between 1 and 256, got 300"),
    "the dtype is not served": ({"dtype": torch.float64}, jagtile.UnsupportedError, "dtype torch.float64.*served"),
    "is_causal is no bool": ({"is_causal": 0}, TypeError, "is_causal must be True or False, got 0"),
    "a regime is unknown": ({"regimes": ["long", "vast"]}, ValueError, "regimes holds 'vast'; regimes are tiny, short"),
    "the device is not served": ({"device": "meta"}, jagtile.UnsupportedError, "device meta is not served"),
}


@pytest.mark.parametrize("case", WARMUP_ERRORS)
def test_warmup_refuses(case):
    changes, error, message = WARMUP_ERRORS[case]
    with pytest.raises(error, match=message):
        jagtile.warmup(**{"head_dim": 64, "dtype": torch.float32, "device": "cpu", **changes})


def test_explain_asks_for_offsets_where_the_tensors_are_packed():
    x = torch.ones(5, 2, 8)
    with pytest.raises(TypeError, match="cu_seqlens_q and cu_seqlens_k must be tensors"):
        jagtile.explain(x, x, x)
