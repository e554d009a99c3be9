"""The oracle of the backward: gradients of jagged attention in float64, written out rather than left to autograd."""

from __future__ import annotations

from typing import NamedTuple

import torch

from jagtile.generator.oracle import CausalAlignment, torch_dtype
from jagtile.generator.spec import DType

# ‖grad − ref‖ / ‖ref‖ that a backward kernel may reach. A sixteen-bit kernel rounds P and dS once more each.
_TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4.5e-3, torch.float16: 5e-4}

_SCORE_BYTES = 1 << 28  # of one block of float64 scores, or of its operands; several such blocks are alive at a time


class Gradients(NamedTuple):
    """Of a loss by q (total_q, H, D), k (total_k, H_kv, D) and v (total_k, H_kv, D_v)."""

    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor


def gradient_tolerance(dtype: DType | torch.dtype) -> float:
    """The largest ``Errors.rel`` that a gradient of a kernel of this dtype may have against ``reference_gradients``."""
    return _TOLERANCE[torch_dtype(dtype)]


def reference_gradients(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor | None = None,
    *,
    is_causal: bool = False,
    causal_alignment: CausalAlignment = "top_left",
    scale: float | None = None,
    kept: torch.Tensor | None = None,
) -> Gradients:
    """Gradients, in float64, of a loss whose gradients by ``oracle.reference``'s results are dout and dlse.

    dout (total_q, H, D_v), dlse (H, total_q) or None for zeros; kept and the rest as ``oracle.reference`` takes it. A
    row that sees no key, a key that no row sees, and rows of no sequence have zeros.
    """
    (heads, head_dim), heads_kv = q.shape[1:], k.shape[1]
    group = heads // heads_kv
    scale = head_dim**-0.5 if scale is None else scale
    found = Gradients(*(torch.zeros(x.shape, dtype=torch.float64, device=q.device) for x in (q, k, v)))
    dlse = q.new_zeros((heads, q.shape[0])) if dlse is None else dlse
    offsets_q, offsets_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for begin_q, end_q, begin_k, end_k in zip(offsets_q, offsets_q[1:], offsets_k, offsets_k[1:], strict=False):
        len_q, len_k = end_q - begin_q, end_k - begin_k
        if not len_q or not len_k:
            continue
        diagonal = len_k if not is_causal else 0 if causal_alignment == "top_left" else len_k - len_q
        wide = max(len_k, head_dim, v.shape[2])  # one row of the scores, or of an operand
        rows_at_once = max(1, min(len_q, _SCORE_BYTES // (8 * wide * group)))
        kv_heads_at_once = max(1, _SCORE_BYTES // (8 * wide * group * max(rows_at_once, head_dim, v.shape[2])))
        for first_kv in range(0, heads_kv, kv_heads_at_once):
            kv = slice(first_kv, min(first_kv + kv_heads_at_once, heads_kv))
            own = slice(kv.start * group, kv.stop * group)
            keys, values = (
                x[begin_k:end_k, kv].transpose(0, 1).double().repeat_interleave(group, dim=0) for x in (k, v)
            )
            for first in range(0, len_q, rows_at_once):
                last = min(first + rows_at_once, len_q)
                rows = slice(begin_q + first, begin_q + last)
                seen = torch.arange(len_k, device=q.device) <= (
                    torch.arange(first, last, device=q.device).unsqueeze(1) + diagonal
                )
                dq, dk, dv = _block(
                    q[rows, own].transpose(0, 1).double(),
                    keys,
                    values,
                    dout[rows, own].transpose(0, 1).double(),
                    dlse[own, rows].double(),
                    scale,
                    seen,
                    1.0 if kept is None else kept[own, rows, begin_k:end_k],
                )
                found.dq[rows, own] = dq.transpose(0, 1)
                for total, part in ((found.dk, dk), (found.dv, dv)):
                    total[begin_k:end_k, kv] += part.reshape(-1, group, *part.shape[1:]).sum(dim=1).transpose(0, 1)
    return found


def _block(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor,
    scale: float,
    seen: torch.Tensor,
    kept: torch.Tensor | float,
) -> Gradients:
    """Some rows of some heads (heads, rows, D) against all keys of their sequence (heads, keys, D); ``seen`` (rows,
    keys), ``kept`` (heads, rows, keys) or a number.
    """
    some = seen.any(dim=1, keepdim=True)
    scores = torch.where(seen, q @ k.mT * scale, float("-inf"))
    weights = torch.where(some, torch.where(some, scores, 0.0).softmax(dim=-1), 0.0)
    dout, dlse = torch.where(some, dout, 0.0), torch.where(some.squeeze(1), dlse, 0.0)
    dweights = dout @ v.mT * kept
    delta = (weights * dweights).sum(dim=-1) - dlse
    dscores = weights * (dweights - delta.unsqueeze(-1)) * scale
    return Gradients(dscores @ k, dscores.mT @ q, (weights * kept).mT @ dout)
