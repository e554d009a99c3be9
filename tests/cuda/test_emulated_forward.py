"""The generated Hopper forward on the emulator: numbers against the float64 oracle, under several schedules."""

from __future__ import annotations

from functools import cache
from unittest import mock

import pytest
import torch
from emulator import kernels
from emulator.driver import emulated
from emulator.schedules import next_seed
from layouts import LAYOUTS, laid_out

from jagtile.generator.oracle import errors, reference, tolerance
from jagtile.generator.spaces.sm90_forward import Sm90ForwardConfig, Sm90ForwardSpace
from jagtile.generator.spec import KernelSpec
from jagtile.generator.tile import Variant
from jagtile.generator.workloads import JaggedBatch, Workload
from jagtile.runtime import cuda
from jagtile.runtime.artifact import Artifact

# Every mechanism of the template once: (spec, what differs from its default config).
CASES: tuple[tuple[str, dict[str, int | str]], ...] = (
    ("fwd_bf16_d64", {}),
    ("fwd_bf16_d64_causal", {"block_m": 64, "block_n": 32, "ctas_per_sm": 2, "q_stages": 2}),
    ("fwd_bf16_d128_causal", {"block_n": 64, "q_stages": 2}),
    ("fwd_fp16_d72_causal", {"block_m": 192, "block_n": 48, "q_stages": 1}),
    ("fwd_bf16_d32_causal", {"block_m": 256, "block_n": 16, "num_stages": 3}),
    ("fwd_fp16_d64_dv128", {"block_m": 64, "block_n": 32, "q_stages": 1}),
    ("fwd_bf16_d256", {}),
    ("fwd_bf16_d256_causal", {"block_n": 32, "q_stages": 1, "epilogue": "direct"}),
    ("fwd_fp16_d72_causal", {"block_m": 192, "block_n": 48, "q_stages": 1, "epilogue": "direct"}),
    ("fwd_bf16_d32_dv8", {"block_m": 64, "block_n": 32, "ctas_per_sm": 2, "q_stages": 1, "epilogue": "direct"}),
    # Warpgroups that take rows in turn: with a Q buffer each, a spare one that all share, two each, without TMA.
    ("fwd_bf16_d128_causal", {"block_m": 192, "block_n": 80, "q_stages": 1, "alternate": True}),
    ("fwd_bf16_d128_causal", {"block_m": 192, "block_n": 16, "q_stages": 1, "alternate": True}),
    ("fwd_bf16_d64_causal", {"block_m": 256, "block_n": 32, "q_stages": 2, "alternate": True}),
    ("fwd_fp16_d33_causal", {"block_n": 32, "q_stages": 1, "alternate": True}),
    # Pairs of CTAs, each of which loads half of the keys for both: with every other knob.
    ("fwd_bf16_d128_causal", {"block_m": 128, "block_n": 64, "num_stages": 2, "q_stages": 1, "cluster": 2}),
    ("fwd_bf16_d128", {"block_m": 192, "block_n": 48, "num_stages": 3, "q_stages": 1, "cluster": 2}),
    ("fwd_bf16_d64_causal", {"block_m": 128, "block_n": 32, "q_stages": 2, "alternate": True, "cluster": 2}),
    ("fwd_fp16_d72_causal", {"block_m": 128, "block_n": 16, "q_stages": 1, "epilogue": "direct", "cluster": 2}),
    ("fwd_bf16_d64_causal", {"block_m": 192, "block_n": 32, "q_stages": 1, "cluster": 2}),
    ("fwd_bf16_d64_causal", {"block_m": 192, "block_n": 32, "q_stages": 2, "alternate": True, "cluster": 2}),
    ("fwd_bf16_d64_causal", {"block_m": 256, "block_n": 32, "q_stages": 1, "alternate": True, "cluster": 2}),
    ("fwd_bf16_d64", {"block_m": 128, "block_n": 80, "tensor_sums": True, "cluster": 2}),
    # Rows summed up by products: in the same instructions as O, in others for the sake of V's columns or of registers.
    ("fwd_bf16_d64", {"tensor_sums": True}),
    ("fwd_fp16_d64_causal", {"block_m": 128, "block_n": 48, "tensor_sums": True, "epilogue": "direct"}),
    ("fwd_fp16_d32_causal", {"block_m": 256, "block_n": 16, "tensor_sums": True}),
    ("fwd_bf16_d64", {"block_m": 64, "block_n": 32, "num_stages": 2, "ctas_per_sm": 4, "tensor_sums": True}),
    # A part of the exponentials by a polynomial: alone, with sums by products, where warps copy rows.
    ("fwd_bf16_d32", {"polynomial": 4}),
    ("fwd_fp16_d64_causal", {"block_m": 128, "block_n": 48, "polynomial": 4}),
    ("fwd_bf16_d64_causal", {"block_m": 256, "block_n": 32, "tensor_sums": True, "alternate": True, "polynomial": 8}),
    ("fwd_fp16_d33_causal", {"block_n": 32, "q_stages": 1, "polynomial": 4}),
    ("fwd_bf16_d32_causal", {"block_m": 128, "block_n": 32, "cluster": 2, "polynomial": 8}),
    # Rows that TMA cannot address: pieces of 4, 8 and 16 bytes, rows that begin in the middle of a word.
    ("fwd_bf16_d1", {}),
    ("fwd_fp16_d33_causal", {"block_m": 64, "block_n": 32, "ctas_per_sm": 2, "q_stages": 1}),
    ("fwd_bf16_d100_dv50_causal", {"block_n": 64, "q_stages": 1}),
    ("fwd_bf16_d127", {"block_n": 48, "num_stages": 3}),
    ("fwd_fp16_d64_dv20", {"block_m": 192, "block_n": 16, "q_stages": 1}),
)
LENGTHS = (0, 1, 63, 64, 65, 0, 129, 200)


@cache
def built(name: str, change: tuple[tuple[str, int | str], ...]) -> Artifact:
    spec = KernelSpec.parse(name)
    base = Sm90ForwardSpace().default(spec).to_dict()
    base.pop("algorithm")
    return kernels.artifact(Variant("sm_90a", spec, Sm90ForwardConfig(**{**base, **dict(change)})))


def in_nan(tensor: torch.Tensor) -> torch.Tensor:
    """The same values inside a larger NaN-filled buffer: strided rows and heads, NaN on every side."""
    tokens, heads, dim = tensor.shape
    storage = torch.full((tokens + 300, heads + 1, dim + 8), float("nan"), dtype=tensor.dtype)
    return storage[150 : 150 + tokens, :heads, :dim].copy_(tensor)


def run(
    artifact: Artifact, w: Workload, b: JaggedBatch, scale: float = 0.1, launches: int = 1, lse_wanted: bool = True
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The outputs of the last of some launches, of which the first builds the work list and each rewinds it."""
    bottom_right = w.causal_alignment == "bottom_right"
    with emulated(processors=2 * artifact.meta.launch["cluster"], seed=next_seed()):
        kernel = cuda.load(artifact, torch.device("cuda", 0))
        for _ in range(launches):
            out = in_nan(torch.full((w.total_q, w.num_heads, w.head_dim_v), float("nan"), dtype=b.q.dtype))
            around = out._base
            assert around is not None
            lse = torch.full((w.num_heads, w.total_q), float("nan")) if lse_wanted else None
            kernel.forward(b.q, b.k, b.v, b.cu_seqlens_q, b.cu_seqlens_k, out, lse, scale, bottom_right)
        assert int(around.isnan().sum()) == around.numel() - out.numel(), (
            "NaN inside, or a write outside, of the output"
        )
    return out, lse


def assert_right(artifact: Artifact, w: Workload, b: JaggedBatch, scale: float = 0.1, launches: int = 1) -> None:
    expected, expected_lse = reference(
        *b[:5], is_causal=w.is_causal, causal_alignment=w.causal_alignment, scale=abs(scale)
    )
    for lse_wanted in (True, False) if artifact.meta.launch["lse_entry"] else (True,):
        out, lse = run(artifact, w, b, scale, launches, lse_wanted)
        assert errors(out, expected).rel <= tolerance(out.dtype)
        if lse is not None:
            torch.testing.assert_close(lse, expected_lse.float(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("name", "change"), CASES, ids=lambda x: x if isinstance(x, str) else "-".join(x) or "default")
def test_numbers_match_the_oracle(name: str, change: dict[str, int | str]) -> None:
    artifact = built(name, tuple(change.items()))
    spec = KernelSpec.parse(name)
    kind = (spec.head_dim, spec.head_dim_v, spec.causal)
    for w in (
        Workload("edges", LENGTHS, LENGTHS, 2, 2, *kind),
        Workload("cross", (200, 0, 5, 64, 130), (100, 70, 500, 0, 257), 2, 1, *kind, causal_alignment="bottom_right"),
        Workload("many tiles", (70,) * 6, (0, 1, 257) * 2, 4, 1, *kind),
    ):
        b = w.make("cpu", spec.dtype, 5)
        assert_right(artifact, w, b._replace(q=in_nan(b.q), k=in_nan(b.k), v=in_nan(b.v)), launches=2)


@pytest.mark.parametrize("heads", [(3, 3), (6, 2)])
def test_heads_side_by_side_sequence_by_sequence(heads: tuple[int, int]) -> None:
    """Causal sequences of two blocks of rows."""
    name, change = CASES[1]
    w = Workload("two blocks", (100,) * 12, (100,) * 12, *heads, 64, 64, is_causal=True)
    assert_right(built(name, tuple(change.items())), w, w.make("cpu", "bf16", 6), launches=2)


@pytest.mark.parametrize(
    "name", ["fwd_bf16_d20", "fwd_fp16_d33_causal", "fwd_bf16_d50", "fwd_bf16_d64_dv20", "fwd_bf16_d127"]
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_of_any_alignment(name: str, layout: str) -> None:
    spec = KernelSpec.parse(name)
    artifact = built(name, (("block_n", 32), ("q_stages", 1)))
    lengths = (70, 0, 5, 33)
    w = Workload("layouts", lengths, lengths[::-1], 3, 3, spec.head_dim, spec.head_dim_v, spec.causal, "bottom_right")
    b = w.make("cpu", spec.dtype, 9)
    with mock.patch.object(torch.Tensor, "clone", side_effect=AssertionError("a copy")):
        operands = {x: laid_out(getattr(b, x), layout) for x in "qkv"}
        out = laid_out(torch.zeros(w.total_q, 3, w.head_dim_v, dtype=b.q.dtype), layout).fill_(float("nan"))
        with emulated(processors=2, seed=next_seed()):
            kernel = cuda.load(artifact, torch.device("cuda", 0))
            kernel.forward(*b._replace(**operands)[:5], out, None, 0.1, True)
    expected, _ = reference(*b[:5], is_causal=spec.causal, causal_alignment="bottom_right", scale=0.1)
    assert errors(out, expected).rel <= tolerance(out.dtype)


def test_an_expanded_head_is_read_in_place() -> None:
    w = Workload("expanded", (70, 5), (33, 90), 4, 4, 33, 33, True)
    b = w.make("cpu", "fp16", 3)
    b = b._replace(k=b.k[:, :1].expand(-1, 4, -1), v=b.v[:, :1].expand(-1, 4, -1))
    assert_right(built("fwd_fp16_d33_causal", ()), w, b)


@pytest.mark.parametrize("growth", [0.1, 2.0, 40.0])
@pytest.mark.parametrize(
    "change", [("epilogue", "staged"), ("epilogue", "direct"), ("tensor_sums", True), ("polynomial", 4)]
)
def test_scores_that_grow_from_block_to_block(growth: float, change: tuple[str, str | bool]) -> None:
    """Blocks are visited from the first to the last: maxima outgrow their references and blocks are computed again."""
    w = Workload("growing", (130, 0, 300, 5), (130, 40, 500, 400), 2, 2, 64, 64)
    b = w.make("cpu", "bf16", 11)
    b.q[:, :1] = b.q[:, :1].abs()
    age = torch.cat([torch.arange(length) for length in w.seqlens_k])
    b.k.add_((growth / 64 * age)[:, None, None]).clamp_(-200, 200)
    assert_right(built("fwd_bf16_d64", (change,)), w, b, scale=0.5)


@pytest.mark.parametrize("name", ["fwd_bf16_d32", "fwd_fp16_d64_causal"])
@pytest.mark.parametrize("outlier", [300.0, 5000.0, 1e6])
def test_a_lone_score_outgrows_its_row_in_each_place(name: str, outlier: float) -> None:
    """By a polynomial or not: keys outdo all before them, by 2^430 and more, in ever other columns."""
    spec = KernelSpec.parse(name)
    w = Workload("outliers", (70, 5, 300), (520, 300, 512), 1, 1, spec.head_dim, spec.head_dim_v, spec.causal)
    b = w.make("cpu", spec.dtype, 3)
    b.q.zero_()[..., 0] = 1
    b.k.zero_()
    keys = torch.arange(0, len(b.k), 33)
    b.k[keys, :, 0] = torch.linspace(1, 64, len(keys)).to(b.k.dtype)[:, None]
    b.q[torch.cat([torch.arange(length) for length in w.seqlens_q]) % 16 < 8] = 0  # rows whose scores MUFU has
    assert_right(built(name, (("block_n", 32), ("polynomial", 4))), w, b, scale=outlier)


def test_the_same_offsets_of_more_tokens() -> None:
    """The list has room for an item for each block of queries, in either of two orders."""
    w = Workload("padded", (400, 390), (30, 70), 1, 1, 64, 64)
    b = w.make("cpu", "bf16", 5)
    expected, _ = reference(*b[:5])
    with emulated(processors=2, seed=next_seed()):
        kernel = cuda.load(built("fwd_bf16_d64", ()), torch.device("cuda", 0))
        for more in (0, 3000):
            q = torch.cat([b.q, b.q.new_full((more, *b.q.shape[1:]), float("nan"))])
            out = torch.full_like(q, float("nan"))
            kernel.forward(q, b.k, b.v, b.cu_seqlens_q, b.cu_seqlens_k, out, None, w.head_dim**-0.5, False)
            assert errors(out[: w.total_q], expected).rel <= tolerance(out.dtype)


def test_offsets_of_either_width() -> None:
    w = Workload("edges", LENGTHS, LENGTHS[::-1], 1, 1, 64, 64)
    b = w.make("cpu", "bf16", 7)
    for q_type, k_type in ((torch.int64, torch.int64), (torch.int32, torch.int64)):
        offsets = {"cu_seqlens_q": b.cu_seqlens_q.to(q_type), "cu_seqlens_k": b.cu_seqlens_k.to(k_type)}
        assert_right(built("fwd_bf16_d64", ()), w, b._replace(**offsets))


@pytest.mark.parametrize(
    ("dim", "change"),
    [(64, ()), (64, ("epilogue", "direct")), (64, ("tensor_sums", True)), (64, ("polynomial", 4)), (33, ())],
)
def test_nan_in_one_sequence_stays_there(dim: int, change: tuple[()] | tuple[str, str | bool]) -> None:
    w = Workload("neighbours", (100, 77, 130), (70, 200, 61), 1, 1, dim, dim)
    b = w.make("cpu", "bf16", 6)
    expected, _ = reference(*b[:5], scale=0.1)
    b.q[100:177] = b.k[70:270] = b.v[70:270] = float("nan")
    out = torch.full_like(b.q, float("nan"))
    with emulated(seed=4):
        kernel = cuda.load(built(f"fwd_bf16_d{dim}", (change,) if change else ()), torch.device("cuda", 0))
        kernel.forward(*b[:5], out, None, 0.1, False)
    for rows in (slice(0, 100), slice(177, None)):
        assert errors(out[rows], expected[rows]).rel <= tolerance(torch.bfloat16)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_key_that_is_no_number_shows_wherever_its_column_is(value: float) -> None:
    """Only rows that have a part of their exponentials by a polynomial see it, those from 56 on."""
    artifact = built("fwd_bf16_d32_causal", (("block_m", 64), ("block_n", 32), ("polynomial", 4)))
    w = Workload("one key", (64,), (64,), 1, 1, 32, 32, True)
    for key in range(56, 64):
        b = w.make("cpu", "bf16", 6)
        b.q.abs_().add_(0.1)
        b.k[key] = value
        out = torch.zeros_like(b.q)
        with emulated(seed=4):
            cuda.load(artifact, torch.device("cuda", 0)).forward(*b[:5], out, None, 0.1, False)
        shown = out.isnan()
        if value == -float("inf"):
            assert not shown.any()
        else:
            assert torch.equal(shown.all((1, 2)), torch.arange(64) >= key)
            assert torch.equal(shown.any((1, 2)), torch.arange(64) >= key)
