"""The Hopper forward for short sequences on a GPU, against the float64 oracle: what the emulator shows, full size."""

from __future__ import annotations

import random
from functools import cache

import pytest
import torch
from short_workloads import EDGES, short_workloads

from jagtile.generator.build import build_one
from jagtile.generator.guard import guarded, guards_intact, poisoned
from jagtile.generator.oracle import errors, reference, tolerance
from jagtile.generator.spec import KernelSpec
from jagtile.generator.tile import Variant
from jagtile.generator.workloads import JaggedBatch, Workload
from jagtile.runtime import cuda

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(120),
    pytest.mark.skipif(not HOPPER, reason="needs a CUDA GPU of compute capability 9.0"),
]

VARIANTS = (
    "fwd_bf16_d8/packed_n160_s2_c2",
    "fwd_bf16_d32_causal/packed_n64_s1_c4",
    "fwd_bf16_d64/packed_n96_s2_c3",
    "fwd_bf16_d64/packed_n80_s1_c3",
    "fwd_bf16_d64/packed_n32_s3_c3",
    "fwd_bf16_d64_causal/packed_n128_s2_c2",
    "fwd_fp16_d64_causal/packed_n48_s3_c2",
    "fwd_bf16_d72_dv40_causal/packed_n64_s2_c2",
    "fwd_bf16_d96/packed_n64_s2_c2",
    "fwd_fp16_d128/packed_n64_s2_c2",
    "fwd_bf16_d128_causal/packed_n48_s2_c2",
    "fwd_bf16_d192_dv128_causal/packed_n64_s1_c1",
    "fwd_bf16_d256/packed_n64_s1_c1",
)
D64 = "fwd_bf16_d64/packed_n96_s2_c3"


@cache
def kernel(name: str) -> cuda.CudaPackedKernel:
    loaded = cuda.load(build_one(Variant.parse(f"sm_90a/{name}")), torch.device("cuda", torch.cuda.current_device()))
    assert isinstance(loaded, cuda.CudaPackedKernel)
    return loaded


def run(name: str, w: Workload, b: JaggedBatch, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    out = poisoned(b.q.new_empty((w.total_q, w.num_heads, w.head_dim_v)), b.q.dtype)
    lse = torch.full((w.num_heads, w.total_q), float("nan"), device="cuda")
    kernel(name).forward(*b[:5], out, lse, scale, w.causal_alignment == "bottom_right")
    assert guards_intact(out)
    return out, lse


def make(w: Workload, dtype: str, seed: int) -> JaggedBatch:
    b = w.make("cuda", dtype, seed)  # type: ignore[arg-type]
    return b._replace(q=guarded(b.q), k=guarded(b.k), v=guarded(b.v))


def assert_right(name: str, w: Workload, b: JaggedBatch, scale: float = 0.1) -> None:
    expected, expected_lse = reference(*b[:5], is_causal=w.is_causal, causal_alignment=w.causal_alignment, scale=scale)
    out, lse = run(name, w, b, scale)
    assert errors(out, expected).rel <= tolerance(out.dtype)
    torch.testing.assert_close(lse, expected_lse.float(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", VARIANTS)
def test_numbers_match_the_oracle(name: str) -> None:
    spec = KernelSpec.parse(name.split("/")[0])
    rng = random.Random(name)
    for w in short_workloads(spec, rng):
        assert_right(name, w, make(w, spec.dtype, rng.randrange(1 << 30)))


def test_results_are_the_same_every_time() -> None:
    w = Workload("short", EDGES * 20, EDGES * 20, 8, 4, 64, 64)
    b = make(w, "bf16", 3)
    first, first_lse = run(D64, w, b, 0.1)
    for _ in range(20):
        out, lse = run(D64, w, b, 0.1)
        assert torch.equal(out, first)
        assert torch.equal(lse, first_lse)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [D64, "fwd_bf16_d64_causal/packed_n128_s2_c2", "fwd_fp16_d128/packed_n64_s2_c2"])
def test_nan_and_infinity_stay_in_their_sequences(name: str, value: float) -> None:
    spec = KernelSpec.parse(name.split("/")[0])
    lengths = (3, 20, 1, 150, 2, 33) * 20
    w = Workload("neighbours", lengths, lengths, 2, 1, spec.head_dim, spec.head_dim_v, spec.causal)
    b = make(w, spec.dtype, 6)
    expected, _ = reference(*b[:5], is_causal=w.is_causal, scale=0.1)
    spoilt = torch.zeros(w.total_q, dtype=torch.bool)
    for sequence in range(1, len(lengths), 4):
        spoilt[b.cu_seqlens_q[sequence] : b.cu_seqlens_q[sequence + 1]] = True
    for tensor in (b.q, b.k, b.v):
        tensor[spoilt] = value
    out, _ = run(name, w, b, 0.1)
    assert errors(out[~spoilt], expected[~spoilt]).rel <= tolerance(out.dtype)
    assert out[spoilt].isnan().all()


def test_rows_of_no_sequence_are_zeros() -> None:
    w = Workload("middle", (200, 3, 90), (200, 3, 90), 2, 2, 64, 64)
    b = make(w, "bf16", 4)
    for q_type in (torch.int32, torch.int64):
        offsets = torch.tensor([100, 190, 190, 250], dtype=q_type, device="cuda")
        assert_right(D64, w, b._replace(cu_seqlens_q=offsets, cu_seqlens_k=offsets.int()))


def test_a_captured_launch_sees_changed_offsets() -> None:
    w = Workload("before", (64, 200, 10), (64, 200, 10), 2, 2, 64, 64)
    b = make(w, "bf16", 8)
    out = torch.empty_like(b.q)
    loaded = kernel(D64)
    loaded.forward(*b[:5], out, None, 0.1, False)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loaded.forward(*b[:5], out, None, 0.1, False)
    for offsets in ([0, 130, 200, 274], [0, 1, 2, 274]):
        b.cu_seqlens_q.copy_(torch.tensor(offsets))
        b.cu_seqlens_k.copy_(torch.tensor(offsets))
        graph.replay()
        assert errors(out, reference(*b[:5], scale=0.1)[0]).rel <= tolerance(out.dtype)


def test_a_million_sequences() -> None:
    """The search's four steps; the oracle would take hours, but a sequence of one token returns its value."""
    batch = 1 << 20
    cu = torch.arange(batch + 1, dtype=torch.int32, device="cuda")
    q, k, v = (torch.randn(batch, 1, 64, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    out = torch.empty_like(q)
    kernel(D64).forward(q, k, v, cu, cu, out, None, 0.1, False)
    assert torch.equal(out, v)
