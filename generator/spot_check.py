"""The oracle on a part of a workload that is too large to compute whole: some heads, some rows of every sequence."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate

import torch

from jagtile.generator.oracle import Errors, errors, reference
from jagtile.generator.workloads import JaggedBatch, Workload

BUDGET_FLOPS = {"cuda": 2e12, "cpu": 4e9}  # of float64: about a second on each


@dataclass(frozen=True)
class SpotCheck:
    """What the oracle says of some output rows and heads."""

    rows: torch.Tensor  # indices of packed rows
    heads: slice
    expected: torch.Tensor  # float64 (rows, heads, D_v)
    share: float  # of all output elements

    def errors(self, out: torch.Tensor) -> Errors:
        """Of a packed output (total_q, H, D_v). All inf where any element, checked or not, is NaN or infinite."""
        if not bool(out.isfinite().all()):
            return Errors(float("inf"), float("inf"), float("inf"))
        return errors(out[self.rows, self.heads], self.expected)


def spot_check(batch: JaggedBatch, workload: Workload, max_flops: float) -> SpotCheck:
    """The oracle within ``max_flops``: first fewer heads, then, with one key head left, fewer rows a sequence."""
    heads_kv = int(max(1, min(workload.num_heads_kv, workload.num_heads_kv * max_flops // max(1, workload.flops))))
    group = workload.num_heads // workload.num_heads_kv
    heads = slice(workload.num_heads - heads_kv * group, workload.num_heads)
    part = replace(workload, num_heads=heads_kv * group, num_heads_kv=heads_kv)
    limit = max(workload.seqlens_q, default=0)
    while limit > 1 and _with_rows(part, limit).flops > max_flops:
        limit //= 2
    part = _with_rows(part, limit)
    # The last rows see the most keys. With top-left alignment and unequal lengths only a prefix keeps its diagonal.
    suffix = not workload.is_causal or part.causal_alignment == "bottom_right"
    begins = accumulate(workload.seqlens_q, initial=0)
    spans = [
        torch.arange(kept) + begin + (length - kept if suffix else 0)
        for begin, length, kept in zip(begins, workload.seqlens_q, part.seqlens_q, strict=False)
    ]
    rows = torch.cat(spans).to(batch.q.device) if spans else batch.cu_seqlens_q.new_empty(0)
    expected, _ = reference(
        batch.q[rows][:, heads],
        batch.k[:, workload.num_heads_kv - heads_kv :],
        batch.v[:, workload.num_heads_kv - heads_kv :],
        torch.tensor(list(accumulate(part.seqlens_q, initial=0))),
        batch.cu_seqlens_k,
        is_causal=workload.is_causal,
        causal_alignment=part.causal_alignment,
    )
    whole = workload.total_q * workload.num_heads
    return SpotCheck(rows, heads, expected, len(rows) * heads_kv * group / whole if whole else 1.0)


def _with_rows(workload: Workload, limit: int) -> Workload:
    """At most ``limit`` queries a sequence; equal lengths become bottom-right, which then means the same."""
    alignment = "bottom_right" if workload.seqlens_q == workload.seqlens_k else workload.causal_alignment
    return replace(workload, seqlens_q=tuple(min(limit, n) for n in workload.seqlens_q), causal_alignment=alignment)
