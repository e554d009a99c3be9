"""Hopper forward kernels against the float64 oracle: every mechanism of the template on nasty batches."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Sequence
from functools import cache

import pytest
import torch
from layouts import LAYOUTS, laid_out

from jagtile.generator.build import build_one
from jagtile.generator.oracle import errors, reference, tolerance
from jagtile.generator.spaces.sm90_forward import Sm90ForwardConfig, Sm90ForwardSpace
from jagtile.generator.spaces.sm90_split import Sm90SplitConfig, Sm90SplitSpace
from jagtile.generator.spec import KernelSpec
from jagtile.generator.tile import Variant
from jagtile.generator.workloads import JaggedBatch, Workload, random_workload
from jagtile.runtime import cuda
from jagtile.runtime.cuda import CudaForwardKernel

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(120),
    pytest.mark.skipif(not HOPPER, reason="needs a CUDA GPU of compute capability 9.0"),
]

SPECS = (
    "fwd_bf16_d8",
    "fwd_bf16_d32_causal",
    "fwd_bf16_d64",
    "fwd_bf16_d64_causal",
    "fwd_bf16_d72_causal",
    "fwd_bf16_d96",
    "fwd_bf16_d128",
    "fwd_bf16_d128_causal",
    "fwd_fp16_d128_causal",
    "fwd_fp16_d128",
    "fwd_bf16_d64_dv128",
    "fwd_bf16_d192_dv128_causal",
    "fwd_bf16_d256",
    "fwd_bf16_d256_causal",
    # Rows that TMA cannot address.
    "fwd_bf16_d1_dv20",  # a row of one number may cancel to nothing
    "fwd_bf16_d20",
    "fwd_fp16_d33_causal",
    "fwd_bf16_d64_dv20",
    "fwd_bf16_d100_dv50_causal",
    "fwd_bf16_d127",
    "fwd_fp16_d250_causal",
)
SPLIT = "heads packed, keys split"
SUMS = "rows summed up by products"
POLYNOMIAL = "a part of the exponentials by a polynomial"
PAIR_SUMS = {"tensor_sums": True, "cluster": 2}
MECHANISMS = {
    "default": {},
    "two Q buffers": {"q_stages": 2, "block_n": 64},
    "three stages": {"num_stages": 3, "block_n": 32, "q_stages": 2},
    "three math warpgroups": {"block_m": 192, "block_n": 48},
    "four math warpgroups": {"block_m": 256, "block_n": 32},
    "one math warpgroup": {"block_m": 64, "block_n": 32},
    "two CTAs an SM": {"block_m": 64, "block_n": 32, "ctas_per_sm": 2, "q_stages": 2},
    "three CTAs an SM": {"block_m": 64, "block_n": 48, "num_stages": 2, "ctas_per_sm": 3, "q_stages": 2},
    "four CTAs an SM": {"block_m": 64, "block_n": 32, "num_stages": 2, "ctas_per_sm": 4, "q_stages": 1},
    "O from registers": {"q_stages": 1, "epilogue": "direct"},
    "O from registers, three math warpgroups": {"block_m": 192, "block_n": 48, "q_stages": 1, "epilogue": "direct"},
    "warpgroups alternate": {"block_m": 192, "block_n": 48, "alternate": True},
    "warpgroups alternate, a spare Q buffer": {"block_n": 32, "q_stages": 1, "alternate": True},
    "pairs of CTAs": {"block_m": 128, "block_n": 64, "num_stages": 2, "q_stages": 1, "cluster": 2},
    "pairs of CTAs of three warpgroups": {"block_m": 192, "block_n": 48, "num_stages": 3, "q_stages": 1, "cluster": 2},
    SUMS: {"tensor_sums": True},
    f"{SUMS}, four math warpgroups": {"block_m": 256, "block_n": 32, "tensor_sums": True},
    f"{SUMS}, four CTAs an SM": {"block_m": 64, "block_n": 32, "num_stages": 2, "ctas_per_sm": 4, "tensor_sums": True},
    f"{SUMS}, pairs of CTAs": {"block_m": 192, "block_n": 128, **PAIR_SUMS},
    f"{SUMS}, pairs of CTAs, O from registers": {"block_m": 256, "block_n": 64, "epilogue": "direct", **PAIR_SUMS},
    POLYNOMIAL: {"polynomial": 4},
    f"{POLYNOMIAL}, {SUMS}": {"block_m": 256, "block_n": 32, "tensor_sums": True, "polynomial": 8},
    SPLIT: {},
    f"{SPLIT}, {SUMS}": {"tensor_sums": True},
    f"{SPLIT}, {POLYNOMIAL}": {"polynomial": 4},
    f"{SPLIT}, one math warpgroup": {"block_m": 64, "block_n": 32, "num_stages": 3},
    f"{SPLIT}, two CTAs an SM": {"block_m": 64, "block_n": 32, "num_stages": 2, "ctas_per_sm": 2, "q_stages": 2},
    f"{SPLIT}, three Q buffers": {"block_m": 64, "block_n": 32, "num_stages": 2, "ctas_per_sm": 2, "q_stages": 3},
    f"{SPLIT}, short neighbours share a tile": {"block_m": 64, "block_n": 48, "num_stages": 2, "pack_sequences": True},
    f"{SPLIT}, three math warpgroups": {"block_m": 192, "block_n": 48, "num_stages": 2},
    f"{SPLIT}, warpgroups alternate": {"block_m": 192, "block_n": 48, "num_stages": 2, "alternate": True},
}
EDGES = (0, 1, 63, 64, 65, 0, 129, 300, 1, 127, 128, 577)


@cache
def kernel(spec: KernelSpec, mechanism: str) -> CudaForwardKernel:
    split = mechanism.startswith(SPLIT)
    space, kind = (Sm90SplitSpace(), Sm90SplitConfig) if split else (Sm90ForwardSpace(), Sm90ForwardConfig)
    if reason := space.serves(spec):
        pytest.skip(f"{space.algorithm} does not serve {spec.name}: {reason}")
    base = space.default(spec).to_dict()
    base.pop("algorithm")
    config = kind(**{**base, **MECHANISMS[mechanism]})
    if reason := space.rejection(spec, config):
        pytest.skip(f"{config.name} is not legal: {reason}")
    return cuda.load(build_one(Variant("sm_90a", spec, config)), torch.device("cuda", torch.cuda.current_device()))


def in_nan(tensor: torch.Tensor) -> torch.Tensor:
    """The same values inside a larger NaN-filled buffer: strided rows and heads, NaN on every side."""
    tokens, heads, dim = tensor.shape
    storage = torch.full((tokens + 300, heads + 1, dim + 8), float("nan"), dtype=tensor.dtype, device=tensor.device)
    view = storage[150 : 150 + tokens, :heads, :dim]
    return view.copy_(tensor)


def run(
    loaded: CudaForwardKernel, w: Workload, b: JaggedBatch, scale: float, lse_wanted: bool = True
) -> tuple[torch.Tensor, torch.Tensor | None]:
    out = in_nan(torch.empty((w.total_q, w.num_heads, w.head_dim_v), dtype=b.q.dtype, device="cuda"))
    out.fill_(float("nan"))
    lse = torch.full((w.num_heads, w.total_q), float("nan"), device="cuda") if lse_wanted else None
    bottom_right = w.causal_alignment == "bottom_right"
    loaded.forward(b.q, b.k, b.v, b.cu_seqlens_q, b.cu_seqlens_k, out, lse, scale, bottom_right)
    return out, lse


def assert_right(loaded: CudaForwardKernel, w: Workload, seed: int, scale: float = 0.1) -> None:
    batch = w.make("cuda", loaded.meta.spec.split("_")[1], seed)  # type: ignore[arg-type]
    b = batch._replace(q=in_nan(batch.q), k=in_nan(batch.k), v=in_nan(batch.v))
    expected, expected_lse = reference(*b[:5], is_causal=w.is_causal, causal_alignment=w.causal_alignment, scale=scale)
    for lse_wanted in (True, False, True):  # the work list is built by the first and rewound by each
        out, lse = run(loaded, w, b, scale, lse_wanted)
        assert errors(out, expected).rel <= tolerance(out.dtype, w.head_dim_v)
        if lse is not None:
            torch.testing.assert_close(lse, expected_lse.float(), rtol=1e-4, atol=1e-3)


def workloads(spec: KernelSpec, rng: random.Random) -> list[Workload]:
    kind = (spec.head_dim, spec.head_dim_v, spec.causal)
    many = (300,) * 40
    few_keys = tuple((0, 1, 257)[i % 3] for i in range(40))
    return [
        Workload("edges", EDGES, EDGES, 4, 2, *kind),
        Workload("edges, cross", EDGES, EDGES[::-1], 2, 2, *kind, causal_alignment="bottom_right"),
        # Math warpgroups without rows hand back many key blocks.
        Workload("few queries", (5, 64, 130, 1), (2000, 700, 1500, 0), 4, 1, *kind, causal_alignment="bottom_right"),
        # Many tiles a CTA, some of them without any visible key.
        Workload("rows without keys", many, few_keys, 16, 4, *kind, causal_alignment="bottom_right"),
        # More pieces of keys than CTAs, and heads that leave rows of a tile over.
        Workload("one query", (1,), (40000,), 16, 16, *kind, causal_alignment="bottom_right"),
        Workload("few queries, many heads", (1, 0, 3, 70), (9000, 5, 2000, 300), 12, 1, *kind),
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


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_numbers_match_the_oracle(name: str, mechanism: str) -> None:
    spec = KernelSpec.parse(name)
    rng = random.Random(f"{name} {mechanism}")
    for w in workloads(spec, rng):
        if w.total_q and w.total_k:
            assert_right(kernel(spec, mechanism), w, seed=rng.randrange(1 << 30))


@pytest.mark.parametrize("scale", [-0.3, 0.0, 1e-3, 2.0])
def test_any_scale(scale: float) -> None:
    spec = KernelSpec.parse("fwd_bf16_d64_causal")
    w = Workload("edges", EDGES, EDGES, 4, 2, 64, 64, is_causal=True)
    batch = w.make("cuda", "bf16", 5)
    expected, _ = reference(*batch[:5], is_causal=True, scale=scale)
    out, _ = run(kernel(spec, "default"), w, batch, scale)
    assert errors(out, expected).rel <= tolerance(torch.bfloat16)


@pytest.mark.parametrize("name", ["fwd_bf16_d64", "fwd_fp16_d64_causal", "fwd_bf16_d128_causal", "fwd_bf16_d256"])
@pytest.mark.parametrize("growth", [0.1, 2.0, 40.0])
@pytest.mark.parametrize("mechanism", ["default", "three math warpgroups", "three stages", SUMS, POLYNOMIAL, SPLIT])
def test_scores_that_grow_from_block_to_block(name: str, growth: float, mechanism: str) -> None:
    """Blocks are visited from the first to the last: maxima outgrow their references, by more than float32 holds."""
    spec = KernelSpec.parse(name)
    w = Workload("growing", (130, 0, 700, 5), (130, 40, 1500, 700), 4, 2, spec.head_dim, spec.head_dim_v, spec.causal)
    b = w.make("cuda", spec.dtype, 11)
    b.q[:, :2] = b.q[:, :2].abs()  # of two heads the scores grow steadily, of the others in all directions
    age = torch.cat([torch.arange(length) for length in w.seqlens_k]).to("cuda")
    b.k.add_((growth / spec.head_dim * age)[:, None, None]).clamp_(-200, 200)
    expected, expected_lse = reference(*b[:5], is_causal=spec.causal, scale=0.5)
    out, lse = run(kernel(spec, mechanism), w, b, 0.5, lse_wanted=mechanism != SUMS)
    assert errors(out, expected).rel <= tolerance(out.dtype)
    if lse is not None:
        torch.testing.assert_close(lse, expected_lse.float(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["fwd_fp16_d64", "fwd_bf16_d64"])
@pytest.mark.parametrize("gap", [5.0, 9.0])
def test_many_small_probabilities_beside_a_large_one(name: str, gap: float) -> None:
    """The first key outdoes all others, but its value is 0: the output is theirs."""
    spec = KernelSpec.parse(name)
    length = 8192
    w = Workload("sink", (64,), (length,), 1, 1, 64, 64)
    b = w.make("cuda", spec.dtype, 13)
    b.q.zero_()[..., 0] = 1.0
    b.k.mul_(0.3)[0, :, 0] = gap
    b.v.add_(1.0)[0] = 0.0
    expected, _ = reference(*b[:5], scale=1.0)
    out, _ = run(kernel(spec, "default"), w, b, 1.0)
    assert errors(out, expected).rel <= tolerance(out.dtype)


@pytest.mark.parametrize("name", ["fwd_bf16_d64", "fwd_bf16_d64_causal"])
@pytest.mark.parametrize("heads_kv", [6, 2])
def test_more_heads_than_the_last_ones_that_go_together(name: str, heads_kv: int) -> None:
    spec = KernelSpec.parse(name)
    lengths = (*EDGES, *(700,) * 60)
    assert_right(kernel(spec, "default"), Workload("many", lengths, lengths, 6, heads_kv, 64, 64, spec.causal), seed=12)


def test_pieces_of_keys_give_the_same_bits_whoever_comes_last() -> None:
    spec = KernelSpec.parse("fwd_bf16_d128_causal")
    rng = random.Random(17)
    keys = tuple(rng.randrange(1, 9000) for _ in range(40))
    w = Workload("decode", (1, 2) * 20, keys, 16, 2, 128, 128, True, "bottom_right")
    b = w.make("cuda", "bf16", 14)
    first, first_lse = run(kernel(spec, SPLIT), w, b, 0.1)
    for _ in range(50):
        out, lse = run(kernel(spec, SPLIT), w, b, 0.1)
        assert torch.equal(out, first)
        assert torch.equal(lse, first_lse)


def assert_right_when_replayed(
    loaded: CudaForwardKernel, b: JaggedBatch, offsets: Iterable[Sequence[int]], of_queries: bool
) -> None:
    """Two calls, captured once and replayed with other offsets of keys, and of queries too."""
    out = torch.empty_like(b.q)

    def call() -> None:
        loaded.forward(*b[:5], out, None, 0.1, False)

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
        call()
    for numbers in offsets:
        new = torch.tensor(numbers, dtype=torch.int32)
        b.cu_seqlens_k.copy_(new)
        if of_queries:
            b.cu_seqlens_q.copy_(new)
        expected, _ = reference(*b[:5], scale=0.1)
        out.fill_(float("nan"))
        graph.replay()
        assert errors(out, expected).rel <= tolerance(torch.bfloat16)


def test_packed_sequences_in_a_replayed_graph_whose_offsets_change() -> None:
    loaded = kernel(KernelSpec.parse("fwd_bf16_d128"), f"{SPLIT}, short neighbours share a tile")
    lengths = ((1, 2, 300, 5, 7, 0, 1, 40, 9, 3), (36, 36, *(37,) * 8), (0, 1, 2, 3, 4, 5, 6, 7, 100, 240))
    b = Workload("before", lengths[0], lengths[0], 4, 4, 128, 128).make("cuda", "bf16", 16)
    offsets = [[0, *itertools.accumulate(some)] for some in (*lengths[1:], lengths[0])]
    assert_right_when_replayed(loaded, b, offsets, of_queries=True)


def test_split_keys_in_a_replayed_graph_whose_offsets_change() -> None:
    loaded = kernel(KernelSpec.parse("fwd_bf16_d128"), SPLIT)
    b = Workload("before", (1, 1, 2), (8000, 1000, 3000), 8, 2, 128, 128).make("cuda", "bf16", 15)
    offsets = ([0, 8000, 9000, 12000], [0, 10, 11990, 12000], [0, 4000, 4000, 12000])
    assert_right_when_replayed(loaded, b, offsets, of_queries=False)


@pytest.mark.parametrize("ratio", [1, 2, 3, 4, 5, 7, 8, 16, 48, 64, 128])
def test_any_ratio_of_heads_is_packed(ratio: int) -> None:
    spec = KernelSpec.parse("fwd_bf16_d64_causal")
    w = Workload("ratio", EDGES, EDGES[::-1], 2 * ratio, 2, 64, 64, True, "bottom_right")
    for mechanism in (SPLIT, f"{SPLIT}, one math warpgroup"):
        assert_right(kernel(spec, mechanism), w, seed=ratio)


def test_nan_in_one_sequence_stays_there() -> None:
    spec = KernelSpec.parse("fwd_bf16_d128")
    w = Workload("neighbours", (100, 77, 130, 5), (70, 200, 61, 9), 4, 2, 128, 128)
    b = w.make("cuda", "bf16", 6)
    expected, _ = reference(*b[:5])
    for q_begin, q_end, k_begin, k_end in ((100, 177, 70, 270), (307, 312, 331, 340)):
        b.q[q_begin:q_end] = float("nan")
        b.k[k_begin:k_end] = float("nan")
        b.v[k_begin:k_end] = float("nan")
    out, _ = run(kernel(spec, "default"), w, b, 128**-0.5)
    for begin, end in ((0, 100), (177, 307)):
        assert errors(out[begin:end], expected[begin:end]).rel <= tolerance(torch.bfloat16)


def test_int64_and_mixed_offsets() -> None:
    spec = KernelSpec.parse("fwd_bf16_d64")
    w = Workload("edges", EDGES, EDGES[::-1], 2, 2, 64, 64)
    b = w.make("cuda", "bf16", 7)
    expected, _ = reference(*b[:5])
    for q_type, k_type in ((torch.int64, torch.int64), (torch.int32, torch.int64), (torch.int64, torch.int32)):
        offsets = {"cu_seqlens_q": b.cu_seqlens_q.to(q_type), "cu_seqlens_k": b.cu_seqlens_k.to(k_type)}
        out, _ = run(kernel(spec, "default"), w, b._replace(**offsets), 64**-0.5)
        assert errors(out, expected).rel <= tolerance(torch.bfloat16)


def test_changed_offsets_are_seen() -> None:
    spec = KernelSpec.parse("fwd_bf16_d64")
    w = Workload("before", (64, 200), (64, 200), 2, 2, 64, 64)
    b = w.make("cuda", "bf16", 8)
    run(kernel(spec, "default"), w, b, 0.125)
    b.cu_seqlens_q[1] = 130
    b.cu_seqlens_k[1] = 130
    expected, _ = reference(*b[:5], scale=0.125)
    out, _ = run(kernel(spec, "default"), w, b, 0.125)
    assert errors(out, expected).rel <= tolerance(torch.bfloat16)


@pytest.mark.parametrize("name", ["fwd_bf16_d20", "fwd_fp16_d33_causal", "fwd_bf16_d50", "fwd_bf16_d64_dv20"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("heads", [3, 4])
def test_rows_of_any_alignment_are_read_in_place(name: str, layout: str, heads: int) -> None:
    spec = KernelSpec.parse(name)
    w = Workload("edges", EDGES, EDGES[::-1], heads, heads, spec.head_dim, spec.head_dim_v, spec.causal)
    b = w.make("cuda", spec.dtype, 9)
    operands = {x: laid_out(getattr(b, x), layout) for x in "qkv"}
    out = laid_out(torch.zeros(w.total_q, heads, w.head_dim_v, dtype=b.q.dtype, device="cuda"), layout)
    loaded = kernel(spec, "default")
    loaded.forward(*b._replace(**operands)[:5], out, None, 0.1, False)  # builds the work list
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    loaded.forward(*b._replace(**operands)[:5], out.fill_(float("nan")), None, 0.1, False)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    expected, _ = reference(*b[:5], is_causal=spec.causal, scale=0.1)
    assert errors(out, expected).rel <= tolerance(out.dtype)


def test_layouts_that_tma_cannot_address() -> None:
    spec = KernelSpec.parse("fwd_bf16_d64")
    w = Workload("edges", EDGES, EDGES, 2, 2, 64, 64)
    b = w.make("cuda", "bf16", 9)
    expected, _ = reference(*b[:5])

    def odd(tensor: torch.Tensor) -> torch.Tensor:
        tokens, heads, dim = tensor.shape
        storage = torch.empty(tokens * heads * (dim + 3) + 1, dtype=tensor.dtype, device="cuda")
        return storage[1:].view(tokens, heads, dim + 3)[..., :dim].copy_(tensor)

    out, _ = run(kernel(spec, "default"), w, b._replace(q=odd(b.q), k=odd(b.k), v=odd(b.v)), 0.125)
    assert errors(out, expected).rel <= tolerance(torch.bfloat16)
