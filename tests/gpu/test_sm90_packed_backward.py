"""The Hopper backward for short sequences on a GPU, against the float64 oracle: what the emulator shows, full size."""

from __future__ import annotations

import random
from functools import cache

import gradient_checks
import pytest
import torch
from short_workloads import EDGES, short_workloads

from jagtile.generator.build import build_one
from jagtile.generator.oracle import errors, reference
from jagtile.generator.oracle_gradients import gradient_tolerance, reference_gradients
from jagtile.generator.spec import KernelSpec
from jagtile.generator.tile import Variant
from jagtile.generator.workloads import Workload
from jagtile.runtime import cuda

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(120),
    pytest.mark.skipif(not HOPPER, reason="needs a CUDA GPU of compute capability 9.0"),
]

VARIANTS = (
    "bwd_bf16_d8/packedrows_n96_s2_c2",
    "bwd_bf16_d32_causal/packedrows_n48_s2_c3",
    "bwd_bf16_d64/packedrows_n64_s2_c2",
    "bwd_bf16_d64/packedrows_n96_s1_c1",
    "bwd_fp16_d64_causal/packedrows_n48_s3_c2",
    "bwd_bf16_d64_causal/packedrows_n32_s1_c2",
    "bwd_bf16_d72_dv40_causal/packedrows_n64_s2_c2",
    "bwd_bf16_d96/packedrows_n64_s2_c1",
    "bwd_bf16_d96_dv128_causal/packedrows_n16_s1_c1",
    "bwd_fp16_d128/packedrows_n64_s2_c1",
    "bwd_bf16_d128_causal/packedrows_n32_s2_c1",
)
D64 = "bwd_bf16_d64/packedrows_n64_s2_c2"


@cache
def kernel(name: str) -> cuda.CudaPackedBackwardKernel:
    loaded = cuda.load(build_one(Variant.parse(f"sm_90a/{name}")), torch.device("cuda", torch.cuda.current_device()))
    assert isinstance(loaded, cuda.CudaPackedBackwardKernel)
    return loaded


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_match_the_oracle(name: str) -> None:
    spec = KernelSpec.parse(name.split("/")[0])
    rng = random.Random(name)
    for w in short_workloads(spec, rng):
        gradient_checks.assert_right(kernel(name), w, seed=rng.randrange(1 << 30), launches=2, device="cuda")


@pytest.mark.parametrize("scale", [-0.1, 0.0, 1e-3])
def test_any_scale(scale: float) -> None:
    w = Workload("edges", EDGES, EDGES, 4, 2, 64, 64)
    gradient_checks.assert_right(kernel(D64), w, scale=scale, with_dlse=False, device="cuda")


def test_gradients_are_the_same_every_time() -> None:
    w = Workload("short", EDGES * 20, EDGES * 20, 8, 4, 64, 64)
    b, dout = gradient_checks.batch(kernel(D64), w, 3, "cuda")
    first = gradient_checks.gradients(kernel(D64), w, b, dout)
    for _ in range(20):
        for one, other in zip(first, gradient_checks.gradients(kernel(D64), w, b, dout), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name", [D64, "bwd_bf16_d64_causal/packedrows_n32_s1_c2", "bwd_fp16_d128/packedrows_n64_s2_c1"]
)
def test_nan_and_infinity_stay_in_their_sequences(name: str, value: float) -> None:
    spec = KernelSpec.parse(name.split("/")[0])
    lengths = (3, 20, 1, 150, 2, 33) * 20
    w = Workload("neighbours", lengths, lengths, 2, 1, spec.head_dim, spec.head_dim_v, spec.causal)
    b, dout = gradient_checks.batch(kernel(name), w, 6, "cuda")
    expected = reference_gradients(*b[:5], dout, is_causal=w.is_causal, scale=0.1)
    spoilt = torch.zeros(w.total_q, dtype=torch.bool)
    for sequence in range(1, len(lengths), 4):
        spoilt[b.cu_seqlens_q[sequence] : b.cu_seqlens_q[sequence + 1]] = True
    for tensor in (b.q, b.k, b.v, dout):
        tensor[spoilt] = value
    out, lse = reference(*b[:5], is_causal=w.is_causal, scale=0.1)
    grads = [torch.full_like(x, 7.0) for x in b[:3]]
    kernel(name).backward(*b[:5], out.to(b.q.dtype), lse.float(), dout, None, *grads, 0.1, False)
    for grad, want in zip(grads, expected, strict=True):
        assert errors(grad[~spoilt], want[~spoilt]).rel <= gradient_tolerance(grad.dtype)
        assert grad[spoilt].isnan().any()


def test_a_captured_launch_sees_changed_offsets() -> None:
    w = Workload("before", (64, 200, 10), (64, 200, 10), 2, 2, 64, 64)
    b, dout = gradient_checks.batch(kernel(D64), w, 8, "cuda")
    out, lse = torch.empty_like(b.q), torch.empty((2, w.total_q), device="cuda")
    grads = [torch.empty_like(x) for x in b[:3]]
    call = (*b[:5], out, lse, dout, None, *grads, 0.1, False)
    kernel(D64).backward(*call)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel(D64).backward(*call)
    for offsets in ([0, 130, 200, 274], [0, 1, 2, 274]):
        b.cu_seqlens_q.copy_(torch.tensor(offsets))
        b.cu_seqlens_k.copy_(torch.tensor(offsets))
        for tensor, exact in zip((out, lse), reference(*b[:5], scale=0.1), strict=True):
            tensor.copy_(exact)
        graph.replay()
        for grad, want in zip(grads, reference_gradients(*b[:5], dout, scale=0.1), strict=True):
            assert errors(grad, want).rel <= gradient_tolerance(grad.dtype)


def test_a_million_sequences() -> None:
    """The oracle would take hours, but a sequence of one token has the gradient of its output as that of its value."""
    batch = 1 << 20
    cu = torch.arange(batch + 1, dtype=torch.int32, device="cuda")
    q, k, v, dout = (torch.randn(batch, 1, 64, dtype=torch.bfloat16, device="cuda") for _ in range(4))
    lse = (q.float() * k.float()).sum(-1).T * 0.1
    dq, dk, dv = (torch.empty_like(q) for _ in range(3))
    kernel(D64).backward(q, k, v, cu, cu, v, lse, dout, None, dq, dk, dv, 0.1, False)
    assert errors(dv, dout.double()).rel <= gradient_tolerance(dv.dtype)
    assert dq.abs().max() < 0.01  # what is left of P (dP - delta), which are alike
    assert dk.abs().max() < 0.01
