"""The variants that the CPU tests build, and jagged inputs whose every neighbour in memory is NaN."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from philox import kept_weights

from jagtile.generator.oracle import CausalAlignment, errors, reference, tolerance, torch_dtype
from jagtile.generator.oracle_gradients import gradient_tolerance, reference_gradients
from jagtile.generator.spaces.cpu_backward import CpuBackwardConfig, CpuBackwardSpace
from jagtile.generator.spaces.cpu_forward import CpuForwardConfig, CpuForwardSpace
from jagtile.generator.spec import KernelSpec
from jagtile.generator.tile import Variant
from jagtile.runtime.dropout import dropout_of
from jagtile.runtime.isa import host_isa, supports
from jagtile.runtime.kernel import BackwardKernel, ForwardKernel

SPACE = CpuForwardSpace()
BACKWARD = CpuBackwardSpace()
NAN = float("nan")


def _variant(name: str, isa: str, block_m: int, block_n: int, vectors: int, rows: int) -> Variant:
    spec = KernelSpec.parse(name)
    config = CpuForwardConfig if spec.direction == "fwd" else CpuBackwardConfig
    return Variant("cpu", spec, config(isa, block_m, block_n, vectors, rows))


def _default(name: str) -> Variant:
    spec = KernelSpec.parse(name)
    return Variant("cpu", spec, (SPACE if spec.direction == "fwd" else BACKWARD).default(spec))


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
    _variant("fwd_bf16_d40_dv72_causal_drop", "avx512bf16", 48, 26, 3, 9),
    _variant("fwd_fp32_d19_causal_drop", "avx2", 32, 12, 2, 6),
    _variant("fwd_fp16_d18_drop", "neon", 16, 24, 2, 12),
    _variant("fwd_bf16_d9_causal_drop", "generic", 12, 20, 3, 4),
)
_WANTED_BACKWARD = (
    _default("bwd_fp32_d64"),
    _default("bwd_bf16_d128_causal"),
    _default("bwd_fp16_d256_dv200_causal"),
    _variant("bwd_fp32_d1_dv80_causal", "avx512", 64, 48, 4, 6),
    _variant("bwd_bf16_d77_dv33", "avx512bf16", 48, 26, 3, 9),
    _variant("bwd_bf16_d5_dv3_causal", "avx512bf16", 32, 10, 1, 13),
    _variant("bwd_fp16_d17_dv50_causal", "avx2", 16, 8, 1, 5),
    _variant("bwd_fp32_d33_dv20_causal", "neon", 32, 24, 4, 6),
    _variant("bwd_bf16_d9_causal", "generic", 12, 20, 3, 4),
    _default("bwd_fp32_d64_drop"),
    _variant("bwd_bf16_d40_dv72_causal_drop", "avx512bf16", 64, 26, 4, 6),
    _variant("bwd_fp32_d33_dv20_drop", "neon", 32, 24, 2, 6),
    _variant("bwd_bf16_d9_causal_drop", "generic", 12, 20, 3, 4),
)
VARIANTS = [variant for variant in _WANTED if supports(host_isa(), variant.config.isa)]
BACKWARD_VARIANTS = [variant for variant in _WANTED_BACKWARD if supports(host_isa(), variant.config.isa)]


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
    layouts: tuple[str, str, str, str] = ("dense",) * 4  # of q, k, v and out (and their gradients)
    wide_q: bool = False  # cu_seqlens_q is int64
    wide_k: bool = False
    with_lse: bool = True
    spare: int = 0  # tokens of no sequence behind the last one
    dropout_p: float = 0.3  # of kernels with dropout
    seed: int = 0


class Inputs:
    """The tensors of a call, poisoned wherever a kernel has no business."""

    def __init__(self, spec: KernelSpec, call: Call) -> None:
        self.spec, self.call, self.dtype = spec, call, torch_dtype(spec.dtype)
        self.generator = torch.Generator().manual_seed(call.seed)
        offsets_q = torch.tensor([0, *(q for q, _ in call.lengths)]).cumsum(0)
        offsets_k = torch.tensor([0, *(k for _, k in call.lengths)]).cumsum(0)
        total_q, total_k = int(offsets_q[-1]) + call.spare, int(offsets_k[-1]) + call.spare
        heads = call.heads_kv * call.gqa_ratio
        self.shapes = (
            (total_q, heads, spec.head_dim),
            (total_k, call.heads_kv, spec.head_dim),
            (total_k, call.heads_kv, spec.head_dim_v),
            (total_q, heads, spec.head_dim_v),
        )
        self.q, self.k, self.v = (self.normal(which) for which in range(3))
        self.cu_q = offsets_q if call.wide_q else offsets_q.int()
        self.cu_k = offsets_k if call.wide_k else offsets_k.int()
        self.scale = spec.head_dim**-0.5 if call.scale is None else call.scale
        self.bottom_right = call.alignment == "bottom_right"
        self.meaning = {"is_causal": spec.causal, "causal_alignment": call.alignment, "scale": self.scale}
        self.dropout = None
        if spec.dropout:
            state = torch.randint(-(1 << 63), (1 << 63) - 1, (2,), generator=self.generator)
            self.dropout = dropout_of(call.dropout_p, state)
            self.meaning["kept"] = torch.zeros(heads, total_q, total_k, dtype=torch.float64)
            begins = zip(offsets_q.tolist(), offsets_k.tolist(), strict=True)
            for (q, k), (len_q, len_k) in zip(begins, call.lengths, strict=False):
                mask = kept_weights(self.dropout.kept, *state.tolist(), heads, range(q, q + len_q), range(k, k + len_k))
                block = self.meaning["kept"][:, q : q + len_q, k : k + len_k]
                block.copy_(torch.from_numpy(mask).double() * self.dropout.scale)

    def normal(self, which: int) -> torch.Tensor:
        """Random values in the layout of q, k, v or out; NaN for tokens of no sequence."""

        def fill(shape: tuple[int, ...]) -> torch.Tensor:
            values = torch.randn(shape, generator=self.generator)
            values[values.shape[0] - self.call.spare :] = NAN
            return values

        return jagged(self.shapes[which], self.dtype, self.call.layouts[which], fill)[0]

    def poisoned(self, which: int) -> tuple[torch.Tensor, torch.Tensor]:
        """An output like q, k, v or out, and the storage around it."""
        fill = lambda shape: torch.full(shape, NAN)  # noqa: E731
        return jagged(self.shapes[which], self.dtype, self.call.layouts[which], fill)


def check(kernel: ForwardKernel, spec: KernelSpec, call: Call) -> None:
    """Run a kernel on poisoned memory and compare with the oracle; nothing outside ``out`` may be written."""
    given = Inputs(spec, call)
    operands = (given.q, given.k, given.v, given.cu_q, given.cu_k)
    out, out_storage = given.poisoned(3)
    lse = torch.full((given.shapes[0][1], given.shapes[0][0]), NAN) if call.with_lse else None

    kernel.forward(*operands, out, lse, given.scale, given.bottom_right, given.dropout)

    expected, expected_lse = reference(*operands, **given.meaning)
    assert errors(out, expected).rel <= tolerance(given.dtype)
    if lse is not None:
        torch.testing.assert_close(lse.double(), expected_lse, rtol=2e-6, atol=2e-5)
    out.fill_(NAN)
    assert bool(out_storage.isnan().all()), "a kernel wrote outside of out"


def check_backward(kernel: BackwardKernel, spec: KernelSpec, call: Call) -> None:
    """As ``check``, the gradients: of out, and of lse where ``call.with_lse``. Rows without partners must get zeros."""
    given = Inputs(spec, call)
    operands = (given.q, given.k, given.v, given.cu_q, given.cu_k)
    exact_out, exact_lse = reference(*operands, **given.meaning)
    out = given.normal(3).copy_(exact_out)
    lse = exact_lse.float()
    # What no result depends on: gradients of rows that see no key.
    blind = exact_lse.isneginf()
    dout = given.normal(3)
    dout.masked_fill_(blind.T.unsqueeze(2), NAN)
    dlse = torch.randn(lse.shape, generator=given.generator).masked_fill_(blind, NAN) if call.with_lse else None
    grads, storages = zip(*(given.poisoned(which) for which in range(3)), strict=True)

    kernel.backward(*operands, out, lse, dout, dlse, *grads, given.scale, given.bottom_right, given.dropout)

    expected = reference_gradients(*operands, dout, dlse, **given.meaning)
    # Scores' gradients are differences dP - delta that may cancel, as delta's own terms may: an error is measured by
    # what they are made of.
    terms = dout.double() * exact_out
    by_dp = reference_gradients(*operands, dout, terms.sum(dim=2).T, **given.meaning)
    nothing = torch.zeros_like(dout).masked_fill_(blind.T.unsqueeze(2), NAN)
    by_delta = reference_gradients(*operands, nothing, terms.abs().sum(dim=2).T, **given.meaning)
    unseen = (reference_gradients(*operands, dout, **{**given.meaning, "kept": None}).dv == 0).all(dim=2)
    alone = (blind.T, unseen, unseen)
    sizes = [max(float(part.norm()) for part in parts) for parts in zip(expected, by_dp, by_delta, strict=True)]
    for name, grad, want, size, rows, storage in zip("qkv", grads, expected, sizes, alone, storages, strict=True):
        assert float((grad.double() - want).norm()) <= gradient_tolerance(given.dtype) * size, f"d{name}"
        assert not grad[rows].any(), f"d{name} of tokens without partners"
        grad.fill_(NAN)
        assert bool(storage.isnan().all()), f"a kernel wrote outside of d{name}"
