"""FlashAttention's function by another import: same arguments, same meaning, and a clear no to what is not served."""

from __future__ import annotations

import inspect
import random
from contextlib import nullcontext

import pytest
import torch

import jagtile
from jagtile.compat import flash_attn_varlen_func
from jagtile.generator.oracle import errors, reference, tolerance
from jagtile.generator.workloads import JaggedBatch, Workload, random_workload
from jagtile.runtime import compat

CROSS = Workload("cross", (3, 0, 17, 40), (9, 4, 0, 25), 4, 2, 32, 32)


def call(b: JaggedBatch, **options):
    return flash_attn_varlen_func(
        b.q, b.k, b.v, b.cu_seqlens_q, b.cu_seqlens_k, b.max_seqlen_q, b.max_seqlen_k, **options
    )


@pytest.mark.parametrize("causal", [False, True])
def test_it_computes_bottom_right_attention(causal: bool) -> None:
    rng = random.Random(3)
    for w in (CROSS, random_workload(rng, head_dim=32, cross=True)):
        b = w.make("cpu", "fp32", seed=1)
        expected, expected_lse = reference(*b[:5], is_causal=causal, causal_alignment="bottom_right", scale=0.3)
        out, lse, probs = call(b, causal=causal, softmax_scale=0.3, return_attn_probs=True)
        assert errors(out, expected).rel <= tolerance(torch.float32)
        torch.testing.assert_close(lse, expected_lse.float())
        assert probs is None
        assert torch.equal(call(b, causal=causal, softmax_scale=0.3, deterministic=True), out)


def test_a_window_of_no_later_keys_is_causal() -> None:
    b = CROSS.make("cpu", "fp32", seed=2)
    assert torch.equal(call(b, window_size=[-1, 0]), call(b, causal=True))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("softcap", 20.0),
        ("alibi_slopes", torch.ones(4)),
        ("block_table", torch.zeros(4, 1, dtype=torch.int32)),
        ("window_size", (128, 0)),
    ],
)
def test_what_is_not_served_is_refused_by_name(option: str, value: object) -> None:
    with pytest.raises(jagtile.UnsupportedError, match=f"^{option} is .*; served: "):
        call(CROSS.make("cpu", "fp32"), **{option: value})


@pytest.mark.parametrize("asked", [False, True])
def test_deterministic_gradients_of_a_gpu_are_for_torch_to_ask_for(asked: bool, monkeypatch) -> None:
    b = CROSS.make("cpu", "bf16")
    b = b._replace(q=b.q.to("meta"))  # not on the CPU
    monkeypatch.setattr(compat, "varlen_attention", lambda q, *_, **__: q)
    refused = pytest.raises(jagtile.UnsupportedError, match=r"^deterministic is True; served: ")
    torch.use_deterministic_algorithms(asked)
    try:
        assert call(b, deterministic=True) is b.q  # no gradients
        b.q.requires_grad_()
        assert call(b) is b.q
        with nullcontext() if asked else refused:
            assert call(b, deterministic=True) is b.q
    finally:
        torch.use_deterministic_algorithms(False)


def test_on_the_cpu_gradients_are_deterministic_as_they_are() -> None:
    b = CROSS.make("cpu", "fp32", seed=4)
    leaves = [x.requires_grad_() for x in b[:3]]
    first, second = (torch.autograd.grad(call(b, deterministic=True).sum(), leaves) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_the_arguments_are_flash_attentions_in_its_order() -> None:
    names = (
        "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p softmax_scale causal window_size softcap "
        "alibi_slopes deterministic return_attn_probs block_table"
    )
    assert list(inspect.signature(flash_attn_varlen_func).parameters) == names.split()
