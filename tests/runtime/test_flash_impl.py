"""torch's registry of flash-attention implementations: torch's own callers, with our kernels behind its operators.

The operators are overridden for the CPU, for which torch has none: the way from torch's functions to the kernels is the
one that CUDA tensors take.
"""

from __future__ import annotations

import inspect

import pytest
import torch
from torch.nn import attention
from torch.nn.functional import scaled_dot_product_attention

import jagtile
from jagtile.generator.oracle import errors, reference, tolerance
from jagtile.generator.workloads import Workload
from jagtile.runtime import flash_impl

HAS_REGISTRY = hasattr(attention, "register_flash_attention_impl")
needs_registry = pytest.mark.skipif(not HAS_REGISTRY, reason="this torch has no registry of flash attention")
needs_restore = pytest.mark.skipif(
    not hasattr(attention, "restore_flash_attention_impl"), reason="this torch does not give its operators back"
)
CROSS = Workload("cross", (3, 1, 17, 9), (9, 4, 0, 5), 4, 2, 16, 16)


@pytest.fixture
def overridden(oracle_kernels):
    """torch's operators are overridden on the CPU; returns what reached the kernels."""
    handle = flash_impl.override("CPU")
    yield oracle_kernels
    handle.remove()


@pytest.fixture
def b():
    return CROSS.make("cpu", torch.bfloat16, seed=1)


def has_cpu_kernel(name: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "CPU")


@needs_registry
def test_importing_registers_the_name_and_activates_nothing():
    assert "JAGTILE" in attention.list_flash_attention_impls()
    assert attention.current_flash_attention_impl() is None


@needs_restore
def test_activating_overrides_and_restoring_gives_back(monkeypatch, oracle_kernels):
    names = ("_flash_attention_forward", "_scaled_dot_product_flash_attention")
    attention.register_flash_attention_impl("JAGTILE on the CPU", register_fn=lambda: flash_impl.override("CPU"))
    assert not any(map(has_cpu_kernel, names))
    try:
        attention.activate_flash_attention_impl("JAGTILE on the CPU")
        assert all(map(has_cpu_kernel, names))
        assert attention.current_flash_attention_impl() == "JAGTILE on the CPU"
    finally:
        attention.restore_flash_attention_impl()
        monkeypatch.delitem(attention._registry._FLASH_ATTENTION_IMPLS, "JAGTILE on the CPU")
    assert not any(map(has_cpu_kernel, names))


@needs_restore
def test_the_registered_name_overrides_cuda():
    attention.activate_flash_attention_impl("JAGTILE")
    try:
        assert attention.current_flash_attention_impl() == "JAGTILE"
        assert torch._C._dispatch_has_kernel_for_dispatch_key("aten::_flash_attention_forward", "CUDA")
    finally:
        attention.restore_flash_attention_impl()


def test_a_torch_without_a_registry_is_left_alone(monkeypatch):
    monkeypatch.delattr(attention, "register_flash_attention_impl", raising=False)
    flash_impl.register()


# --- varlen_attn

varlen = pytest.importorskip("torch.nn.attention.varlen", reason="this torch has no varlen_attn")
VARLEN_OPTIONS = inspect.signature(varlen.varlen_attn).parameters


@pytest.mark.skipif("window_size" not in VARLEN_OPTIONS, reason="this torch's varlen_attn has no windows")
@pytest.mark.parametrize(("window", "is_causal"), [((-1, -1), False), ((-1, 0), True)])
def test_varlen_attn_runs_our_kernels(overridden, b, window, is_causal):
    out, lse = varlen.varlen_attn(
        *b[:5], b.max_seqlen_q, b.max_seqlen_k, return_aux=varlen.AuxRequest(lse=True), scale=0.3, window_size=window,
        **({"enable_gqa": True} if "enable_gqa" in VARLEN_OPTIONS else {}),
    )  # fmt: skip
    kind = {"is_causal": is_causal, "causal_alignment": "bottom_right", "scale": 0.3}
    expected, expected_lse = reference(*b[:5], **kind)
    assert errors(out, expected).rel <= tolerance(torch.bfloat16)
    # A row that sees no key: FlashAttention-2, whose backward pass reads this, has +inf.
    expected_lse = torch.where(expected_lse == float("-inf"), float("inf"), expected_lse)
    torch.testing.assert_close(lse, expected_lse.float(), rtol=1e-5, atol=1e-4)
    assert len(overridden.arguments) == 1
    assert overridden.arguments[0][8] is True  # bottom-right
    assert overridden.arguments[0][3] is b.cu_seqlens_q


@pytest.mark.skipif(not hasattr(varlen, "varlen_attn_out"), reason="this torch has no varlen_attn_out")
def test_varlen_attn_out_writes_into_what_it_is_given(overridden, b):
    out = torch.empty_like(b.q)
    varlen.varlen_attn_out(out, *b[:5], b.max_seqlen_q, b.max_seqlen_k, enable_gqa=True)
    assert errors(out, reference(*b[:5])[0]).rel <= tolerance(torch.bfloat16)


# --- dense attention


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("storage", ["token by token", "head by head", "packed projection"])
def test_dense_flash_attention_runs_our_kernels(overridden, is_causal, storage):
    shape = (2, 7, 3, 4, 8)  # batch, length, query and key and value, heads, head_dim
    q, k, v = (x.transpose(1, 2) for x in torch.randn(shape).bfloat16().unbind(2))
    if storage == "token by token":
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    elif storage == "head by head":
        q, k, v = (x.contiguous() for x in (q, k, v))
    out, lse, cum_q, cum_k, max_q, max_k, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        q, k, v, 0.0, is_causal, scale=0.3
    )
    expected = scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=is_causal, scale=0.3)
    assert out.shape == q.shape
    assert errors(out, expected).rel <= 2 * tolerance(torch.bfloat16)
    scores = (q.double() @ k.double().mT) * 0.3
    if is_causal:
        scores = scores.masked_fill(torch.ones(7, 7, dtype=torch.bool).triu(1), float("-inf"))
    torch.testing.assert_close(lse, scores.logsumexp(-1).float(), rtol=1e-5, atol=1e-4)
    assert lse.is_contiguous()
    assert (cum_q, cum_k, max_q, max_k) == (None, None, 7, 7)
    copied = overridden.arguments[0][0].untyped_storage().data_ptr() != q.untyped_storage().data_ptr()
    assert copied == (storage == "head by head")


def test_dense_keys_may_be_of_another_number_and_fewer_heads(overridden):
    q, k, v = (torch.randn(2, h, n, 8).bfloat16() for h, n in ((4, 3), (2, 6), (2, 6)))
    out = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
    expected = scaled_dot_product_attention(q.double(), k.double(), v.double(), enable_gqa=True)
    assert errors(out, expected).rel <= 2 * tolerance(torch.bfloat16)
    assert overridden.arguments[0][3].tolist() == [0, 3, 6]
    assert overridden.arguments[0][4].tolist() == [0, 6, 12]


def test_operands_that_require_grad_are_autograds_business(overridden, b):
    result = flash_impl.flash_attention_forward(
        b.q.requires_grad_(), *b[1:5], b.max_seqlen_q, b.max_seqlen_k, 0.0, False, False
    )
    assert not any(x.requires_grad for x in result)
    assert [x.dtype for x in result[2:4]] == [torch.uint64] * 2


# --- refusals

REFUSED = {
    "dropout": ({"dropout_p": 0.1}, "dropout_p is 0.1; served: 0"),
    "a debug mask": ({"return_debug_mask": True}, "return_debug_mask is True; served: False"),
    "a window": ({"window_size_left": 128, "window_size_right": 0}, r"window_size is \(128, 0\); served"),
    "used lengths": ({"seqused_k": torch.ones(4, dtype=torch.int32)}, "seqused_k is given; served: None"),
    "slopes": ({"alibi_slopes": torch.ones(4)}, "alibi_slopes is given; served: None"),
    "pages": ({"block_table": torch.ones(4, 1, dtype=torch.int32)}, "block_table is given; served: None"),
    "float32": ({"query": torch.ones(30, 4, 16)}, "dtype is torch.float32; served: torch.float16, torch.bfloat16"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_it_refuses_by_name_with_a_runtime_error(oracle_kernels, b, case):
    changes, message = REFUSED[case]
    given = {"query": b.q, "key": b.k, "value": b.v, "cum_seq_q": b.cu_seqlens_q, "cum_seq_k": b.cu_seqlens_k}
    given |= {"max_q": 17, "max_k": 9, "dropout_p": 0.0, "is_causal": False, "return_debug_mask": False}
    with pytest.raises(RuntimeError, match=f"JAGTILE flash attention: {message}.*restore_flash_attention_impl"):
        flash_impl.flash_attention_forward(**{**given, **changes})


def test_what_no_kernel_serves_is_a_runtime_error_with_the_reason(b, monkeypatch):
    def forward(*arguments):
        raise jagtile.UnsupportedError("no kernel for fwd_bf16_d12")

    monkeypatch.setattr(flash_impl, "forward", forward)
    with pytest.raises(jagtile.JagtileError, match="JAGTILE flash attention: no kernel for fwd_bf16_d12"):
        flash_impl.flash_attention_forward(*b[:5], 17, 9, 0.0, False, False)
