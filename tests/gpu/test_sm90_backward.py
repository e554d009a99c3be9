"""Hopper backward kernels against the float64 oracle: every head dim's default and the mechanisms of the templates."""

from __future__ import annotations

import random
from functools import cache

import gradient_checks
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import jagtile
from jagtile.generator.build import build_one
from jagtile.generator.oracle import CausalAlignment, errors, reference
from jagtile.generator.oracle_gradients import Gradients, gradient_tolerance, reference_gradients
from jagtile.generator.spec import KernelSpec
from jagtile.generator.tile import Knob, Variant, config_from_dict, spaces_of
from jagtile.generator.workloads import Workload, random_workload
from jagtile.runtime import cuda
from jagtile.runtime.cuda import CudaBackwardKernel

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(120),
    pytest.mark.skipif(not HOPPER, reason="needs a CUDA GPU of compute capability 9.0"),
]

# P and dS packed together, a late dQ, 128 or 64 queries a step.
LONG_STEPS: dict[str, Knob] = {
    "block_m": 128,
    "num_stages": 2,
    "overlap": True,
    "kv_stages": 2,
    "held": "none",
    "late_dq": True,
    "early_dv": False,
    "fused": False,
}
SHORT_STEPS: dict[str, Knob] = LONG_STEPS | {"block_m": 64, "overlap": False, "kv_stages": 1}
EIGHTY_STEPS: dict[str, Knob] = SHORT_STEPS | {"block_m": 80, "late_dq": False}
ONE_ROW_WARP: dict[str, Knob] = {"fused": True, "row_warps": 1}
EARLY_DV: dict[str, Knob] = SHORT_STEPS | {"late_dq": False, "early_dv": True}
# (spec, what differs from the default config of its space)
CASES = (
    ("bwd_bf16_d8", {}),
    ("bwd_bf16_d32_causal", {}),
    ("bwd_fp16_d32", {"block_m": 64, "block_n": 192, "held": "none", "overlap": False}),
    (
        "bwd_fp16_d32_causal",
        {"block_m": 128, "num_stages": 2, "dq": "red", "held": "v", "overlap": False, "late_dq": False},
    ),
    ("bwd_bf16_d64", {}),
    ("bwd_bf16_d64_causal", {"dq": "red", "fused": False}),
    ("bwd_bf16_d64", EARLY_DV | {"num_stages": 3, "kv_stages": 2, "held": "kv", "late_dq": True}),
    ("bwd_fp16_d64_causal", EARLY_DV | {"num_stages": 3, "kv_stages": 2, "held": "kv"}),
    ("bwd_bf16_d64", EARLY_DV | {"block_n": 64, "ctas_per_sm": 2}),
    ("bwd_bf16_d64_causal", EARLY_DV | {"block_n": 64, "ctas_per_sm": 2, "kv_stages": 2, "dq": "red"}),
    ("bwd_bf16_d64", LONG_STEPS),
    ("bwd_bf16_d64_causal", LONG_STEPS),
    ("bwd_fp16_d64_causal", LONG_STEPS | {"overlap": False, "late_dq": False}),
    ("bwd_fp16_d32_causal", LONG_STEPS | {"held": "kv"}),
    ("bwd_bf16_d64", SHORT_STEPS | {"num_stages": 3, "overlap": True, "kv_stages": 2, "held": "kv"}),
    ("bwd_bf16_d72_dv40_causal", {}),
    ("bwd_bf16_d96", {}),
    ("bwd_bf16_d96_causal", {"dq": "red", "overlap": False, "fused": False}),
    ("bwd_bf16_d120_causal", {}),
    ("bwd_bf16_d128", {}),
    ("bwd_bf16_d128_causal", {}),
    ("bwd_bf16_d128", EARLY_DV | {"dq": "red"}),
    ("bwd_bf16_d128_causal", SHORT_STEPS | {"num_stages": 3}),
    ("bwd_bf16_d96", SHORT_STEPS | {"held": "v"}),
    ("bwd_fp16_d128", {"dq": "red", "fused": False}),
    ("bwd_fp16_d128_causal", {"num_stages": 3, "fused": False}),
    ("bwd_fp16_d128_causal", {}),
    ("bwd_bf16_d32", SHORT_STEPS | {"block_n": 192, "kv_stages": 2, "late_dq": False, "fused": True}),
    ("bwd_fp16_d64_causal", SHORT_STEPS | {"block_n": 64, "ctas_per_sm": 2, "held": "v", "fused": True}),
    ("bwd_bf16_d64", LONG_STEPS | {"kv_stages": 1, "late_dq": False, "fused": True}),
    ("bwd_bf16_d64_causal", LONG_STEPS | {"kv_stages": 1, "late_dq": False, "fused": True, "claim_ahead": 5}),
    ("bwd_bf16_d64", SHORT_STEPS | {"late_dq": False, "fused": True, "claim_ahead": 2, "row_buffers": 4}),
    ("bwd_bf16_d128", {"claim_ahead": 5}),
    ("bwd_bf16_d128", EIGHTY_STEPS),
    ("bwd_fp16_d128_causal", EIGHTY_STEPS),
    ("bwd_bf16_d96_causal", EIGHTY_STEPS | {"fused": True, "row_buffers": 1}),
    ("bwd_bf16_d128", EIGHTY_STEPS | ONE_ROW_WARP | {"row_buffers": 1}),
    ("bwd_fp16_d128_causal", EIGHTY_STEPS | ONE_ROW_WARP | {"row_buffers": 1}),
    ("bwd_bf16_d128", ONE_ROW_WARP),
    ("bwd_bf16_d32", SHORT_STEPS | ONE_ROW_WARP | {"block_n": 192, "kv_stages": 2, "held": "kv"}),
    ("bwd_fp16_d64_causal", SHORT_STEPS | ONE_ROW_WARP | {"block_n": 64, "ctas_per_sm": 2, "held": "kv"}),
    ("bwd_bf16_d64", SHORT_STEPS | ONE_ROW_WARP | {"block_n": 192}),
    ("bwd_bf16_d64_causal", SHORT_STEPS | {"block_n": 192, "num_stages": 3, "late_dq": False}),
    ("bwd_bf16_d128_causal", ONE_ROW_WARP | {"overlap": True}),
    ("bwd_fp16_d96", SHORT_STEPS | ONE_ROW_WARP | {"held": "kv"}),
    ("bwd_fp16_d72", EIGHTY_STEPS | {"held": "v"}),
    ("bwd_bf16_d64", {"late_dq": False}),
    ("bwd_bf16_d64_causal", {"overlap": True}),
    ("bwd_fp16_d64_causal", {"late_dq": False, "polynomial": 4}),
    ("bwd_bf16_d32", {"polynomial": 2}),
    ("bwd_bf16_d64_causal", {"late_dq": False, "late_dk": True}),
    ("bwd_fp16_d64", {"late_dq": False, "late_dk": True, "polynomial": 4}),
    ("bwd_bf16_d128", {"late_dq": False, "fused": False, "late_dk": True}),
    ("bwd_bf16_d128_causal", {"late_dq": False, "row_buffers": 1, "late_dk": True}),
    ("bwd_bf16_d64", SHORT_STEPS | {"block_n": 64, "ctas_per_sm": 2, "late_dq": False, "late_dk": True}),
    ("bwd_bf16_d96_causal", EARLY_DV | {"block_n": 64}),
    ("bwd_bf16_d64", {"skip_unseen": True, "split_tail": True}),
    ("bwd_fp16_d64_causal", {"skip_unseen": True}),
    ("bwd_bf16_d128_causal", {"skip_unseen": True}),
    ("bwd_bf16_d96", SHORT_STEPS | {"dq": "red", "kv_stages": 2, "skip_unseen": True}),
    ("bwd_bf16_d32_causal", SHORT_STEPS | {"block_n": 192, "kv_stages": 2, "held": "kv", "skip_unseen": True}),
    ("bwd_bf16_d128", {"late_dq": False, "split_tail": True}),
    ("bwd_bf16_d64", SHORT_STEPS | ONE_ROW_WARP | {"block_n": 192, "kv_stages": 2, "claim_ahead": 5}),
    ("bwd_bf16_d32_causal", SHORT_STEPS | ONE_ROW_WARP | {"block_n": 192, "kv_stages": 2, "held": "kv"}),
    ("bwd_bf16_d64", {"in_turn": True}),
    ("bwd_fp16_d64_causal", {"skip_unseen": True, "in_turn": True}),
    ("bwd_bf16_d128", {"split_tail": True, "in_turn": True}),
    ("bwd_bf16_d128_causal", {"in_turn": True}),
    ("bwd_bf16_d96", SHORT_STEPS | ONE_ROW_WARP | {"held": "kv", "in_turn": True}),
    ("bwd_bf16_d96_causal", SHORT_STEPS | {"dq": "red", "kv_stages": 2, "in_turn": True}),
    ("bwd_fp16_d96", SHORT_STEPS | ONE_ROW_WARP | {"held": "kv", "split_tail": True}),
    ("bwd_fp16_d64_dv32", SHORT_STEPS | {"block_n": 64, "ctas_per_sm": 2, "fused": True, "split_tail": True}),
    ("bwd_bf16_d64_dv128", {}),
    ("bwd_bf16_d128_dv64_causal", {}),
    ("bwd_bf16_d256", {}),
    ("bwd_bf16_d256_causal", {}),
    ("bwd_bf16_d256", {"dq_panels": 2, "dq": "red"}),
    ("bwd_fp16_d256_causal", {"block_n": 64, "dout_stages": 2}),
    ("bwd_bf16_d192", {}),
    ("bwd_bf16_d192", {"dout_stages": 2}),
    ("bwd_bf16_d192", {"fused": True}),
    ("bwd_bf16_d192", {"dout_stages": 2, "split_tail": True}),
    ("bwd_fp16_d256", {"split_tail": True}),
    ("bwd_bf16_d192_dv128_causal", {"dout_stages": 1, "fused": True}),
    ("bwd_fp16_d256_causal", {"block_n": 64, "fused": True}),
    ("bwd_bf16_d192_causal", {"dq": "red"}),
    ("bwd_bf16_d192_causal", {"dq_panels": 2, "dq": "red"}),
    ("bwd_bf16_d192_dv128", {}),
    ("bwd_bf16_d192_dv128", {"block_n": 96, "q_stages": 3}),
    ("bwd_bf16_d192_dv128_causal", {"dq_panels": 2, "dq": "red"}),
    ("bwd_fp16_d192_dv128_causal", {}),
    ("bwd_bf16_d128_dv192_causal", {}),
    ("bwd_bf16_d136_dv200_causal", {"block_n": 32, "q_stages": 3}),
    ("bwd_fp16_d64_dv256", {}),
    ("bwd_bf16_d160_causal", {"block_n": 48}),
)
EDGES = (0, 1, 63, 64, 65, 0, 129, 300, 1, 127, 128, 577)


@cache
def loaded(name: str, change: tuple[tuple[str, Knob], ...] = ()) -> CudaBackwardKernel:
    spec = KernelSpec.parse(name)
    space, *_ = spaces_of("sm_90a", spec)
    config = config_from_dict("sm_90a", {**space.default(spec).to_dict(), **dict(change)})
    kernel = cuda.load(build_one(Variant("sm_90a", spec, config)), torch.device("cuda", torch.cuda.current_device()))
    assert isinstance(kernel, CudaBackwardKernel)
    return kernel


def workloads(spec: KernelSpec, rng: random.Random) -> list[Workload]:
    kind = (spec.head_dim, spec.head_dim_v, spec.causal)
    few_keys = tuple((0, 1, 257)[i % 3] for i in range(40))
    return [
        Workload("edges", EDGES, EDGES, 4, 2, *kind),
        Workload("edges, cross", EDGES, EDGES[::-1], 2, 2, *kind),
        Workload("edges, cross", EDGES, EDGES[::-1], 2, 2, *kind, causal_alignment="bottom_right"),
        Workload("few queries", (5, 64, 130, 1), (2000, 700, 1500, 0), 4, 1, *kind, causal_alignment="bottom_right"),
        Workload("few keys", (300,) * 40, few_keys, 16, 4, *kind, causal_alignment="bottom_right"),
        Workload("long queries", (2000, 700, 0, 1500), (5, 300, 130, 260), 4, 1, *kind),
        *(
            random_workload(
                rng,
                head_dim=spec.head_dim,
                head_dim_v=spec.head_dim_v,
                is_causal=spec.causal,
                max_seqlen=700,
                max_batch=20,
            )
            for _ in range(3)
        ),
    ]


@pytest.mark.parametrize(("name", "change"), CASES, ids=lambda x: x if isinstance(x, str) else "-".join(x) or "default")
def test_gradients_match_the_oracle(name: str, change: dict[str, Knob]) -> None:
    rng = random.Random(name)
    kernel = loaded(name, tuple(change.items()))
    for w in workloads(KernelSpec.parse(name), rng):
        if w.total_q and w.total_k:
            gradient_checks.assert_right(kernel, w, seed=rng.randrange(1 << 30), launches=3, device="cuda")


@pytest.mark.parametrize(
    "name", ["bwd_bf16_d64_causal", "bwd_bf16_d128", "bwd_bf16_d256_causal", "bwd_bf16_d192_dv128"]
)
@pytest.mark.parametrize("scale", [-0.1, 0.0, 1e-3])
def test_any_scale(name: str, scale: float) -> None:
    spec = KernelSpec.parse(name)
    w = Workload("edges", EDGES, EDGES, 4, 2, spec.head_dim, spec.head_dim_v, spec.causal)
    gradient_checks.assert_right(loaded(name), w, scale=scale, with_dlse=False, device="cuda")


IN_ORDER = (
    ("bwd_bf16_d64", {}),
    ("bwd_bf16_d64_causal", EARLY_DV | {"num_stages": 3, "kv_stages": 2, "held": "kv", "late_dq": True}),
    ("bwd_bf16_d128", EARLY_DV | {"dq": "red"}),
    ("bwd_bf16_d64", LONG_STEPS),
    ("bwd_bf16_d128_causal", SHORT_STEPS),
    ("bwd_bf16_d64_causal", {"dq": "red", "fused": False}),
    ("bwd_bf16_d128", {"dq": "red", "fused": False}),
    ("bwd_bf16_d128_causal", {}),
    ("bwd_bf16_d128_causal", {"claim_ahead": 5}),
    ("bwd_bf16_d128", {"split_tail": True}),
    ("bwd_bf16_d256", {}),
    ("bwd_bf16_d256_causal", {}),
    ("bwd_bf16_d256", {"dq_panels": 2, "dq": "red"}),
    ("bwd_bf16_d192", {}),
    ("bwd_bf16_d192_causal", {"dq": "red"}),
    ("bwd_bf16_d192_dv128_causal", {}),
)


@pytest.mark.parametrize(
    ("name", "change"), IN_ORDER, ids=lambda x: x if isinstance(x, str) else "-".join(x) or "default"
)
def test_deterministic_gradients_are_right_and_bitwise_equal_over_runs(name: str, change: dict[str, Knob]) -> None:
    spec, kernel = KernelSpec.parse(name), loaded(name, tuple(change.items()))
    lengths = ((3000, 70, 900, 0, 2000), (3000, 500, 100, 60, 2500))
    w = Workload("many key blocks", *lengths, 4, 2, spec.head_dim, spec.head_dim_v, spec.causal)
    b, dout = gradient_checks.batch(kernel, w, 9, "cuda")
    torch.use_deterministic_algorithms(True)
    try:
        gradient_checks.assert_right(kernel, w, device="cuda")
        first = gradient_checks.gradients(kernel, w, b, dout)
        for _ in range(10):
            for one, other in zip(first, gradient_checks.gradients(kernel, w, b, dout), strict=True):
                assert torch.equal(one, other)
    finally:
        torch.use_deterministic_algorithms(False)


def test_nan_in_one_sequence_stays_there() -> None:
    w = Workload("neighbours", (100, 77, 130, 5), (70, 200, 61, 9), 4, 2, 128, 128)
    kernel = loaded("bwd_bf16_d128")
    b, dout = gradient_checks.batch(kernel, w, 6, "cuda")
    expected = reference_gradients(*b[:5], dout)
    out, lse = (x.float() for x in reference(*b[:5]))
    for q_begin, q_end, k_begin, k_end in ((100, 177, 70, 270), (307, 312, 331, 340)):
        for x in (b.q, dout, out):
            x[q_begin:q_end] = float("nan")
        lse[:, q_begin:q_end] = float("nan")
        b.k[k_begin:k_end] = float("nan")
        b.v[k_begin:k_end] = float("nan")
    grads = Gradients(*(torch.empty_like(x) for x in b[:3]))
    kernel.backward(*b[:5], out.bfloat16(), lse, dout, None, *grads, 128**-0.5, False)
    for grad, want, clean in zip(grads, expected, ((0, 100, 177, 307), *((0, 70, 270, 331),) * 2), strict=True):
        for begin, end in (clean[:2], clean[2:]):
            assert errors(grad[begin:end], want[begin:end]).rel <= gradient_tolerance(torch.bfloat16)


def test_a_captured_backward_takes_what_the_offsets_are_at_replay() -> None:
    w = Workload("before", (64, 200), (64, 200), 2, 2, 64, 64)
    kernel = loaded("bwd_bf16_d64")
    b, dout = gradient_checks.batch(kernel, w, 7, "cuda")
    grads = Gradients(*(torch.empty_like(x) for x in b[:3]))
    out, lse = (torch.empty_like(b.q), torch.empty(2, w.total_q, device="cuda"))

    def backward() -> None:
        kernel.backward(*b[:5], out, lse, dout, None, *grads, 0.125, False)

    backward()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        backward()
    for border in (64, 130):
        b.cu_seqlens_q[1] = b.cu_seqlens_k[1] = border
        found_out, found_lse = reference(*b[:5], scale=0.125)
        out.copy_(found_out)
        lse.copy_(found_lse)
        graph.replay()
        for grad, want in zip(grads, reference_gradients(*b[:5], dout, scale=0.125), strict=True):
            assert errors(grad, want).rel <= gradient_tolerance(torch.bfloat16)


# --- autograd


@pytest.mark.parametrize("dim", [32, 64, 128, 256])
@pytest.mark.parametrize("alignment", ["top_left", "bottom_right"])
def test_varlen_attention_trains_on_a_gpu(dim: int, alignment: CausalAlignment) -> None:
    w = Workload("cross", (5, 0, 300, 64), (150, 7, 300, 20), 4, 2, dim, dim, True, alignment)
    b = w.make("cuda", "bf16", 11)
    leaves = [x.detach().requires_grad_() for x in b[:3]]
    out, lse = jagtile.varlen_attention(*leaves, *b[3:], is_causal=True, causal_alignment=alignment, return_lse=True)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    seen = lse.isfinite()
    found = torch.autograd.grad([out, lse], leaves, [dout, dlse * seen])
    expected = reference_gradients(*b[:5], dout, dlse, is_causal=True, causal_alignment=alignment)
    for grad, want in zip(found, expected, strict=True):
        assert errors(grad, want).rel <= gradient_tolerance(torch.bfloat16)


def test_nested_tensors_train_through_torchs_function_while_enabled() -> None:
    lengths = (5, 300, 64)
    w = Workload("nested", lengths, lengths, 4, 4, 64, 64, True)
    b = w.make("cuda", "bf16", 12)
    leaves = [x.detach().requires_grad_() for x in b[:3]]
    views = [torch.nested.nested_tensor_from_jagged(x, b.cu_seqlens_q).transpose(1, 2) for x in leaves]
    with jagtile.enabled():
        out = scaled_dot_product_attention(*views, is_causal=True)
    dout = torch.randn_like(b.q)
    out.transpose(1, 2).values().backward(dout)
    expected = reference_gradients(*b[:5], dout, is_causal=True)
    for leaf, want in zip(leaves, expected, strict=True):
        assert leaf.grad is not None
        assert errors(leaf.grad, want).rel <= gradient_tolerance(torch.bfloat16)
