"""The oracle: jagged attention in float64, and the measures by which a result is compared with it."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from jagtile.generator.spec import DType

CausalAlignment = Literal["top_left", "bottom_right"]

TORCH_DTYPES: dict[DType, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# ‖out − ref‖ / ‖ref‖ that a kernel may reach. A sixteen-bit kernel rounds P and the output once each; FlashAttention-2
# does the same and the bar is 1.2x its error. fp32 is the bar of the exact mode.
_TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2.8e-3, torch.float16: 3.5e-4}

SHORT_ROW = 16  # rows of fewer elements may cancel to nearly nothing
# Of the bar, by how short a row is: float64 arithmetic with the same two roundings reaches 1.2x it in rows of 8, and
# 2.8x in rows of 1 of two sequences.
_SHORT_ROW_SLACK = {4: 4.0, SHORT_ROW: 1.5}

_SCORE_BYTES = 1 << 28  # of one block of float64 scores; several such blocks are alive at a time


class Errors(NamedTuple):
    """How far a result is from the reference. All are inf where an element is NaN or unwritten poison."""

    rel: float  # ‖out − ref‖ / ‖ref‖ over everything
    max_abs: float
    row_rel: float  # the worst row's own ‖out − ref‖ / ‖ref‖: one wrong row among many is invisible in ``rel``


def torch_dtype(dtype: DType | torch.dtype) -> torch.dtype:
    """The torch dtype of a spec's dtype name (a torch dtype is returned as it is)."""
    return dtype if isinstance(dtype, torch.dtype) else TORCH_DTYPES[dtype]


def tolerance(dtype: DType | torch.dtype, head_dim_v: int = SHORT_ROW) -> float:
    """The largest ``Errors.rel`` that a kernel of this dtype and head_dim_v may have against ``reference``."""
    slack = next((slack for below, slack in _SHORT_ROW_SLACK.items() if head_dim_v < below), 1.0)
    return _TOLERANCE[torch_dtype(dtype)] * slack


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    is_causal: bool = False,
    causal_alignment: CausalAlignment = "top_left",
    scale: float | None = None,
    kept: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of every sequence in float64, on the inputs' device.

    q (total_q, H, D), k (total_k, H_kv, D), v (total_k, H_kv, D_v), any strides; cu_seqlens (B+1,) of any integer
    dtype. kept (H, total_q, total_k): by what dropout multiplies the weights. Returns out float64 (total_q, H, D_v) and
    lse float64 (H, total_q), natural logarithm, which dropout leaves alone. A row that sees no key gives 0 and -inf,
    and so does a row of q that belongs to no sequence.
    """
    total_q, heads, head_dim = q.shape
    scale = head_dim**-0.5 if scale is None else scale
    out = q.new_zeros((total_q, heads, v.shape[2]), dtype=torch.float64)
    lse = q.new_full((heads, total_q), float("-inf"), dtype=torch.float64)
    offsets_q, offsets_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for begin_q, end_q, begin_k, end_k in zip(offsets_q, offsets_q[1:], offsets_k, offsets_k[1:], strict=False):
        len_q, len_k = end_q - begin_q, end_k - begin_k
        diagonal = None if not is_causal else 0 if causal_alignment == "top_left" else len_k - len_q
        if len_q and len_k:
            rows_q, rows_k = slice(begin_q, end_q), slice(begin_k, end_k)
            factors = None if kept is None else kept[:, rows_q, rows_k]
            _sequence(q[rows_q], k[rows_k], v[rows_k], out[rows_q], lse[:, rows_q], scale, diagonal, factors)
    return out, lse


def _sequence(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    diagonal: int | None,
    kept: torch.Tensor | None,
) -> None:
    """One sequence, in blocks of heads and rows that keep the scores small. Row i sees the keys j <= i + diagonal."""
    (len_q, heads, _), (len_k, heads_kv, _) = q.shape, k.shape
    group = heads // heads_kv
    rows = max(1, min(len_q, _SCORE_BYTES // (8 * len_k * group)))
    heads_at_once = max(1, min(heads_kv, _SCORE_BYTES // (8 * len_k * group * rows)))
    for kv in range(0, heads_kv, heads_at_once):
        kv_heads = slice(kv, min(kv + heads_at_once, heads_kv))
        q_heads = slice(kv * group, kv_heads.stop * group)
        keys = k[:, kv_heads].permute(1, 2, 0).double().repeat_interleave(group, dim=0)  # (h, D, len_k)
        values = v[:, kv_heads].transpose(0, 1).double().repeat_interleave(group, dim=0)  # (h, len_k, D_v)
        for first in range(0, len_q, rows):
            block = slice(first, min(first + rows, len_q))
            scores = (q[block, q_heads].transpose(0, 1).double() @ keys).mul_(scale)
            if diagonal is not None:
                last_seen = torch.arange(block.start, block.stop, device=q.device).unsqueeze(1) + diagonal
                scores.masked_fill_(torch.arange(len_k, device=q.device) > last_seen, float("-inf"))
            peak = scores.amax(dim=-1, keepdim=True)
            peak = torch.where(peak == float("-inf"), 0.0, peak)
            weights = scores.sub_(peak).exp_()
            total = weights.sum(dim=-1, keepdim=True)
            if kept is not None:
                weights = weights * kept[q_heads, block]
            result = (weights @ values) / torch.where(total == 0, 1.0, total)
            out[block, q_heads] = result.transpose(0, 1)
            lse[q_heads, block] = (peak + total.log()).squeeze(-1)


def errors(out: torch.Tensor, ref: torch.Tensor) -> Errors:
    """Distance of ``out`` (any float dtype) from ``ref`` (float64, same shape; the rows are along the last axis).

    Equal infinities count as equal. Works on rows of an lse too: give it as ``lse.T`` or as it is. For rows shorter
    than ``SHORT_ROW`` the ``row_rel`` says little.
    """
    if out.shape != ref.shape:
        raise ValueError(f"out has shape {tuple(out.shape)}, the reference {tuple(ref.shape)}")
    if ref.numel() == 0:
        return Errors(0.0, 0.0, 0.0)
    difference = torch.where(out == ref, 0.0, out.double() - ref)
    if not bool(difference.isfinite().all()):
        return Errors(float("inf"), float("inf"), float("inf"))
    row_error = difference.norm(dim=-1)
    row_size = torch.where(ref.isfinite(), ref, 0.0).norm(dim=-1)
    row_rel = torch.where(row_error == 0, 0.0, row_error / row_size)
    size, distance = float(row_size.norm()), float(row_error.norm())
    rel = 0.0 if distance == 0 else distance / size if size else float("inf")
    return Errors(rel, float(difference.abs().max()), float(row_rel.max()))
