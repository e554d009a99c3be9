"""The public API on a Hopper GPU, against the float64 oracle."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import warnings
from itertools import pairwise

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import jagtile
from jagtile.generator.oracle import errors, reference, tolerance
from jagtile.generator.workloads import Workload, random_workload
from jagtile.runtime import fallback
from jagtile.runtime.routes import forget

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HOPPER, reason="needs a CUDA GPU of compute capability 9.0"),
]

KINDS = {
    "full": {},
    "causal": {"is_causal": True},
    "causal, bottom right": {"is_causal": True, "causal_alignment": "bottom_right"},
}
HALVES = [torch.bfloat16, torch.float16]


def workload(lengths, lengths_k=None, heads=4, heads_kv=4, head_dim=64) -> Workload:
    return Workload("test", tuple(lengths), tuple(lengths_k or lengths), heads, heads_kv, head_dim, head_dim)


def assert_right(out: torch.Tensor, lse: torch.Tensor | None, b, **kind) -> None:
    expected, expected_lse = reference(*b[:5], **kind)
    assert errors(out, expected).rel <= tolerance(out.dtype)
    if lse is not None:
        torch.testing.assert_close(lse, expected_lse.float(), rtol=1e-3, atol=2e-3)


def njts(w: Workload, dtype: torch.dtype = torch.bfloat16, **cached: int) -> tuple[torch.Tensor, ...]:
    """query, key, value of a workload as NJTs (B, H, j, D); key and value share their offsets."""
    b = w.make("cuda", dtype)
    jagged = torch.nested.nested_tensor_from_jagged
    query = jagged(b.q, b.cu_seqlens_q.long(), **cached).transpose(1, 2)
    same = w.seqlens_q == w.seqlens_k
    key = jagged(b.k, query.offsets() if same else b.cu_seqlens_k.long()).transpose(1, 2)
    return query, key, jagged(b.v, key.offsets()).transpose(1, 2)


def assert_right_njt(out, query, key, value, **kind) -> None:
    packed = [x._values.transpose(0, 1) for x in (query, key, value)]
    assert_right(out._values.transpose(0, 1), None, (*packed, query.offsets(), key.offsets()), **kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("seed", range(3))
def test_varlen_attention_agrees_with_the_oracle(seed, head_dim, dtype, kind):
    b = random_workload(random.Random(seed), head_dim=head_dim, max_seqlen=700).make("cuda", dtype, seed)
    out, lse = jagtile.varlen_attention(*b, **KINDS[kind], return_lse=True)
    assert_right(out, lse, b, **KINDS[kind])


@pytest.mark.parametrize(
    "w",
    [
        workload([1] * 200),
        workload([0, 0, 129, 0]),
        workload([1000, 3, 64, 257]),
        workload([1100, 700], heads=8, heads_kv=2, head_dim=128),
        workload([1, 1, 1], [500, 0, 3000], heads=8, heads_kv=1),
        workload([32] * 4, [2000, 17, 1, 400], heads=8, heads_kv=2),
        workload([300, 7], [20, 900], heads=6, heads_kv=2, head_dim=128),
    ],
    ids=["one token each", "empty ones", "skewed", "few tiles, GQA", "decode, MQA", "cross, GQA", "unequal"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_every_regime_agrees_with_the_oracle(w, kind):
    b = w.make("cuda", torch.bfloat16)
    assert_right(*jagtile.varlen_attention(*b, **KINDS[kind], return_lse=True), b, **KINDS[kind])


def test_offsets_may_be_int64_and_hints_absent_or_wrong():
    b = workload([100, 300, 5]).make("cuda", torch.bfloat16)
    expected = jagtile.varlen_attention(*b[:5])
    wide = jagtile.varlen_attention(b.q, b.k, b.v, b.cu_seqlens_q.long(), b.cu_seqlens_k.long(), 1, 1)
    torch.testing.assert_close(wide, expected, rtol=0, atol=1e-2)


def test_views_of_a_packed_projection_are_served():
    cu = torch.tensor([0, 300, 405], device="cuda", dtype=torch.int32)
    q, k, v = torch.randn(405, 3, 4, 64, device="cuda", dtype=torch.bfloat16).unbind(1)
    assert_right(jagtile.varlen_attention(q, k, v, cu, cu), None, (q, k, v, cu, cu))


def test_rows_of_no_sequence_do_not_disturb_the_others():
    cu = torch.tensor([0, 300, 405], device="cuda", dtype=torch.int32)
    x = torch.randn(500, 4, 64, device="cuda", dtype=torch.bfloat16)
    x[405:] = float("nan")
    assert_right(jagtile.varlen_attention(x, x, x, cu, cu)[:405], None, (x[:405], x[:405], x[:405], cu, cu))


@pytest.mark.parametrize("cu", [(0,), (0, 0, 0)], ids=["no sequences", "empty sequences"])
def test_a_batch_without_tokens_is_served(cu):
    x = torch.empty(0, 4, 64, device="cuda", dtype=torch.bfloat16)
    offsets = torch.tensor(cu, device="cuda")
    out, lse = jagtile.varlen_attention(x, x, x, offsets, offsets, return_lse=True)
    assert (out.shape, lse.shape) == ((0, 4, 64), (4, 0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", HALVES)
def test_sdpa_on_nested_tensors_agrees_with_the_oracle(dtype, kind):
    query, key, value = njts(workload([200, 0, 31, 700], [200, 5, 90, 640], heads=8, heads_kv=2, head_dim=128), dtype)
    out = jagtile.sdpa(query, key, value, enable_gqa=True, **KINDS[kind])
    assert out.offsets() is query.offsets()
    assert_right_njt(out, query, key, value, **KINDS[kind])


def test_torchs_function_is_served_here_when_enabled():
    query, key, value = njts(workload([200, 31, 700]))
    with torch.no_grad():
        torchs = scaled_dot_product_attention(query, key, value)
        with jagtile.enabled():
            ours = scaled_dot_product_attention(query, key, value)
    assert ours._values.stride() == torchs._values.stride()
    assert_right_njt(ours, query, key, value)
    torch.testing.assert_close((ours + query)._values, (torchs + query)._values, rtol=0, atol=3e-2)


def test_autocast_casts_to_half():
    query, key, value = njts(workload([200, 31]), torch.float32)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        out = jagtile.sdpa(query, key, value)
    assert out.dtype == torch.bfloat16


def test_float32_is_served_by_plain_operations_which_is_said_once(monkeypatch):
    monkeypatch.setattr(fallback, "_REASONS", {})
    b = workload([200, 31]).make("cuda", torch.float32)
    with pytest.warns(jagtile.JagtileWarning, match="fwd_fp32_d64_causal on target sm_90a.*slow operations"):
        out, lse = jagtile.varlen_attention(*b, is_causal=True, return_lse=True)
    expected, expected_lse = reference(*b[:5], is_causal=True)
    assert errors(out, expected).rel <= 1e-4
    torch.testing.assert_close(lse, expected_lse.float(), rtol=1e-4, atol=1e-4)


def test_a_head_dim_that_is_no_multiple_of_8_has_a_forward_kernel_and_is_trained_by_plain_operations(monkeypatch):
    monkeypatch.setattr(fallback, "_REASONS", {})
    b = workload([200, 0, 31], heads=4, heads_kv=2, head_dim=50).make("cuda", torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out, lse = jagtile.varlen_attention(*b, is_causal=True, return_lse=True)
    assert_right(out, lse, b, is_causal=True)
    b.q.requires_grad_()
    with pytest.warns(jagtile.JagtileWarning, match="bwd_bf16_d50 on target sm_90a.*multiple of 8.*slow operations"):
        out = jagtile.varlen_attention(*b, is_causal=True)
    assert_right(out.detach(), None, b._replace(q=b.q.detach()), is_causal=True)
    out.sum().backward()
    assert b.q.grad is not None


def test_the_host_never_waits_for_the_device():
    b = workload([200, 0, 31, 700]).make("cuda", torch.bfloat16)
    query, key, value = njts(workload([200, 31, 700]))
    other = torch.nested.nested_tensor_from_jagged(value.transpose(1, 2)._values, value.offsets().clone())

    def calls() -> None:
        jagtile.varlen_attention(*b[:5], is_causal=True, return_lse=True)
        jagtile.sdpa(query, key, value)
        jagtile.sdpa(query, key, other.transpose(1, 2))

    calls()
    torch.cuda.set_sync_debug_mode("error")
    try:
        calls()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_call_can_be_captured_in_a_graph_after_warmup_and_follows_its_inputs():
    forget()
    names = jagtile.warmup(64, torch.bfloat16, is_causal=True, device="cuda")
    assert all(name.startswith("sm_90a/fwd_bf16_d64_causal/") for name in names)
    static = workload([256, 256, 88]).make("cuda", torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = jagtile.varlen_attention(*static[:5], is_causal=True)
    for seed, lengths in enumerate([[600, 0, 0], [1, 198, 401], [200, 200, 200]]):
        fresh = workload(lengths).make("cuda", torch.bfloat16, seed)
        for into, source in zip(static[:5], fresh[:5], strict=True):
            into.copy_(source)
        graph.replay()
        assert_right(out, None, fresh, is_causal=True)


def test_a_kernel_that_is_not_loaded_is_refused_during_capture():
    forget()
    b = workload([100, 200]).make("cuda", torch.bfloat16)
    with (
        pytest.raises(jagtile.NoKernelError, match="while a CUDA graph is captured"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        jagtile.varlen_attention(*b[:5])
    torch.cuda.synchronize()


def test_explain_tells_the_gpu_and_the_kernel_in_memory():
    b = workload([100, 200]).make("cuda", torch.bfloat16)
    jagtile.varlen_attention(*b)
    found = jagtile.explain(*b)
    units = torch.cuda.get_device_properties(0).multi_processor_count
    assert (found.device.slug, found.device.target) == (f"sm90-{units}sm", "sm_90a")
    assert found.device.bandwidth_gbs > 1000
    assert found.artifact == "memory"


def test_sequences_do_not_depend_on_their_neighbours():
    b = workload([300, 40, 512]).make("cuda", torch.bfloat16)
    together = jagtile.varlen_attention(*b[:5])
    for begin, end in pairwise([0, 300, 340, 852]):
        alone = torch.tensor([0, end - begin], device="cuda", dtype=torch.int32)
        single = jagtile.varlen_attention(b.q[begin:end], b.k[begin:end], b.v[begin:end], alone, alone)
        torch.testing.assert_close(single, together[begin:end], rtol=0, atol=1e-2)


DIFFERENT_OFFSETS = """
import torch, jagtile
def njt(*offsets):
    values = torch.randn(5, 2, 64, device="cuda", dtype=torch.bfloat16)
    return torch.nested.nested_tensor_from_jagged(values, torch.tensor(offsets, device="cuda")).transpose(1, 2)
jagtile.sdpa(njt(0, 2, 5), njt(0, 2, 5), njt(0, 3, 5))
torch.cuda.synchronize()
"""


def test_key_and_value_of_other_lengths_end_in_an_assertion_on_the_device():
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", DIFFERENT_OFFSETS], env=paths, capture_output=True, text=True)
    assert done.returncode != 0
    assert "assert" in done.stderr.lower()
