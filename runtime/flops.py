"""What ``torch.utils.flop_counter`` counts for jagtile's operators: sequence by sequence, as torch does for its own.

A mask is not taken off, as in torch's formulas: a causal call counts as a full one.
"""

from __future__ import annotations

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula


def register() -> None:
    """Put the formulas into torch's registry."""
    operators = torch.ops.jagtile
    for operator, formula in (
        (operators.forward, forward_flops),
        (operators.differentiable_forward, forward_flops),
        (operators.backward, backward_flops),
    ):
        if operator not in flop_registry:
            register_flop_formula(operator, get_raw=True)(formula)


def forward_flops(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    *options: object,
    **also: object,
) -> int:
    """Two products: scores, and their weights on v."""
    scores = q.shape[1] * _pairs(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return 2 * scores * (q.shape[2] + v.shape[2])


def backward_flops(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    *options: object,
    **also: object,
) -> int:
    """Five products: the scores again, dQ and dK over head_dim; the gradient of the weights and dV over head_dim_v."""
    scores = q.shape[1] * _pairs(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return 2 * scores * (3 * q.shape[2] + 2 * v.shape[2])


def _pairs(
    q: torch.Tensor,
    k: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
) -> int:
    """Pairs of a query and a key of one sequence. Where the offsets have no values, of batches of equal lengths: the
    longest, where it is known, as torch counts, else the mean.
    """
    if type(cu_seqlens_q) is torch.Tensor and not cu_seqlens_q.is_meta:
        return int((cu_seqlens_q.diff().long() * cu_seqlens_k.diff().long()).sum())
    batch = cu_seqlens_q.shape[0] - 1
    if max_seqlen_q is not None and max_seqlen_k is not None:
        return batch * max_seqlen_q * max_seqlen_k
    return q.shape[0] * k.shape[0] // batch if batch else 0
