"""The variants that the CPU tests build, and jagged inputs whose every neighbour in memory is NaN."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from jagtile.generator.oracle import CausalAlignment, errors, reference, tolerance, torch_dtype
from jagtile.generator.spaces.cpu_forward import CpuForwardConfig, CpuForwardSpace
from jagtile.generator.spec import KernelSpec
from jagtile.generator.tile import Variant
from jagtile.runtime.isa import host_isa, supports
from jagtile.runtime.kernel import ForwardKernel

SPACE = CpuForwardSpace()
NAN = float("nan")


def _variant(spec: str, isa: str, block_m: int, block_n: int, vectors: int, rows: int) -> Variant:
    return Variant("cpu", KernelSpec.parse(spec), CpuForwardConfig(isa, block_m, block_n, vectors, rows))


def _default(spec: str) -> Variant:
    parsed = KernelSpec.parse(spec)
    return Variant("cpu", parsed, SPACE.default(parsed))


# Every dtype, every instruction set that the host may have, head dims from 1 to 256 with odd ones among them, blocks so
# small that short sequences have several.
_WANTED = (
    _default("fwd_fp32_d64"),
    _default("fwd_bf16_d128_causal"),
    _default("fwd_fp16_d256_dv200_causal"),
    _variant("fwd_fp32_d1_dv256_causal", "avx512", 64, 48, 4, 6),
    _variant("fwd_bf16_d77_dv33", "avx512bf16", 48, 26, 3, 9),
    _variant("fwd_bf16_d5_dv3_causal", "avx512bf16", 32, 10, 1, 24),
    _variant("fwd_fp16_d31_dv65_causal", "avx512", 32, 14, 2, 14),
    _variant("fwd_fp32_d19_causal", "avx2", 32, 12, 2, 6),
    _variant("fwd_fp16_d17_dv50_causal", "avx2", 16, 8, 1, 12),
    _variant("fwd_fp32_d33_dv20_causal", "neon", 32, 24, 4, 6),
    _variant("fwd_fp16_d18_causal", "neon", 16, 24, 2, 12),
    _variant("fwd_fp32_d10_dv66", "generic", 16, 12, 2, 6),
    _variant("fwd_bf16_d9_causal", "generic", 12, 20, 3, 4),
    _variant("fwd_fp16_d12_dv5", "generic", 8, 6, 1, 10),
)
VARIANTS = [variant for variant in _WANTED if supports(host_isa(), variant.config.isa)]


def jagged(
    shape: tuple[int, int, int], dtype: torch.dtype, layout: str, fill: Callable[[tuple[int, ...]], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """A (tokens, heads, dim) view of last stride 1 and the flat storage around it, NaN wherever the view isn't.

    Layouts: "dense"; "packed" (one of three in a fused projection); "heads_first"; "gaps" (odd strides, unaligned).
    """
    tokens, heads, dim = shape
    token, head, first = {
        "dense": (heads * dim, dim, 0),
        "packed": (3 * heads * dim, dim, heads * dim),
        "heads_first": (dim, tokens * dim, 0),
        "gaps": (heads * (dim + 3) + 5, dim + 3, 7),
    }[layout]
    margin = 64
    extent = first + max(tokens - 1, 0) * token + max(heads - 1, 0) * head + dim
    storage = torch.full((margin + extent + margin,), NAN, dtype=dtype)
    view = storage.as_strided((tokens, heads, dim), (token, head, 1), margin + first)
    view.copy_(fill(shape))
    return view, storage


@dataclass(frozen=True)
class Call:
    """One call of a kernel, but for the data."""

    lengths: tuple[tuple[int, int], ...]  # (queries, keys) of each sequence
    heads_kv: int = 2
    gqa_ratio: int = 1
    alignment: CausalAlignment = "top_left"
    scale: float | None = None
    layouts: tuple[str, str, str, str] = ("dense",) * 4  # of q, k, v and out
    wide_q: bool = False  # cu_seqlens_q is int64
    wide_k: bool = False
    with_lse: bool = True
    spare: int = 0  # tokens of no sequence behind the last one
    seed: int = 0


def check(kernel: ForwardKernel, spec: KernelSpec, call: Call) -> None:
    """Run a kernel on poisoned memory and compare with the oracle; nothing outside ``out`` may be written."""
    dtype = torch_dtype(spec.dtype)
    generator = torch.Generator().manual_seed(call.seed)
    offsets_q = torch.tensor([0, *(q for q, _ in call.lengths)]).cumsum(0)
    offsets_k = torch.tensor([0, *(k for _, k in call.lengths)]).cumsum(0)
    total_q, total_k = int(offsets_q[-1]) + call.spare, int(offsets_k[-1]) + call.spare
    heads = call.heads_kv * call.gqa_ratio

    def normal(shape: tuple[int, ...]) -> torch.Tensor:
        values = torch.randn(shape, generator=generator)
        values[values.shape[0] - call.spare :] = NAN
        return values

    q, _ = jagged((total_q, heads, spec.head_dim), dtype, call.layouts[0], normal)
    k, _ = jagged((total_k, call.heads_kv, spec.head_dim), dtype, call.layouts[1], normal)
    v, _ = jagged((total_k, call.heads_kv, spec.head_dim_v), dtype, call.layouts[2], normal)
    out, out_storage = jagged(
        (total_q, heads, spec.head_dim_v), dtype, call.layouts[3], lambda shape: torch.full(shape, NAN)
    )
    lse = torch.full((heads, total_q), NAN) if call.with_lse else None
    cu_q = offsets_q if call.wide_q else offsets_q.int()
    cu_k = offsets_k if call.wide_k else offsets_k.int()
    scale = spec.head_dim**-0.5 if call.scale is None else call.scale

    kernel.forward(q, k, v, cu_q, cu_k, out, lse, scale, call.alignment == "bottom_right")

    expected, expected_lse = reference(
        q, k, v, cu_q, cu_k, is_causal=spec.causal, causal_alignment=call.alignment, scale=scale
    )
    assert errors(out, expected).rel <= tolerance(dtype)
    if lse is not None:
        torch.testing.assert_close(lse.double(), expected_lse, rtol=2e-6, atol=2e-5)
    out.fill_(NAN)
    assert bool(out_storage.isnan().all()), "a kernel wrote outside of out"
