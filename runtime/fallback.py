"""What no kernel covers, in torch's own operations: any floating dtype up to float64, any head dim, any device.

Correct and slow, and said once for each reason. Autograd, functorch and torch.compile see plain operations. On the CPU
the work is a loop over the sequences. Elsewhere, and where a tracer looks on, the host must not read the offsets: every
query is held against every key, in blocks of bounded memory, and what lies in different sequences is masked.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from operator import index
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from jagtile.generator.spec import MAX_HEAD_DIM, KernelSpec
from jagtile.runtime import trainable
from jagtile.runtime.checks import check_offsets_on_host
from jagtile.runtime.device import device_id
from jagtile.runtime.dropout import Dropout, dropout_of, keep_mask
from jagtile.runtime.errors import JagtileWarning, UnsupportedError
from jagtile.runtime.layouts import Layout
from jagtile.runtime.problem import DTYPE_NAMES

_BLOCK_BYTES = 1 << 28  # of one block of scores; several such blocks are alive at a time

Case = tuple[torch.dtype, int, int, bool, torch.device, bool]

# Why no kernel serves a case, or None: filled by the first call of its kind.
_REASONS: dict[Case, str | None] = {}
_NO_TARGET: dict[torch.device, str | None] = {}


def why_no_kernel(
    q: torch.Tensor, v: torch.Tensor, is_causal: bool, trained: bool, layout: Layout | None
) -> str | None:
    """Why no kernel serves the packed operands q (total_q, H, D) and v (total_k, H_kv, D_v); None where one does.

    ``trained``: gradients are wanted, which takes a backward kernel too. Fake and meta tensors need no kernel. A
    JagtileWarning tells each reason once. Where one serves, the layout remembers it.
    """
    if layout is not None and (is_causal, trained) in layout.served:
        return None
    head_dim, head_dim_v = index(q.shape[2]), index(v.shape[2])  # no symbols
    reason = _reason_of(q.dtype, head_dim, head_dim_v, is_causal, q.device, trained)
    if layout is not None and reason is None:
        layout.served.add((is_causal, trained))
    return reason


def no_kernel(q: torch.Tensor, v: torch.Tensor, is_causal: bool, *, trained: bool) -> str | None:
    """As ``why_no_kernel``, without a word."""
    return _find_reason(q.dtype, q.shape[2], v.shape[2], is_causal, q.device, trained)


def _reason_of(*case: Any) -> str | None:
    if case not in _REASONS:
        reason = _find_reason(*case)
        said = reason in _REASONS.values()  # of another case
        _REASONS[case] = reason
        if reason is not None and not said:
            warnings.warn(f"{reason}: slow operations of torch serve this call", JagtileWarning, stacklevel=5)
    return _REASONS[case]


# What torch.compiler.assume_constant_result sets; the decorator itself would import the whole compiler.
_reason_of._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _find_reason(
    dtype: torch.dtype, head_dim: int, head_dim_v: int, is_causal: bool, device: torch.device, trained: bool
) -> str | None:
    reason = no_target(device)
    if reason is not None or _only_fake(device):
        return reason
    if dtype not in DTYPE_NAMES:
        return f"no kernel computes in {dtype}"
    if max(head_dim, head_dim_v) > MAX_HEAD_DIM:
        return f"no kernel takes a head_dim above {MAX_HEAD_DIM}, such as {max(head_dim, head_dim_v)}"
    from jagtile.runtime.dispatch import default_variant

    spec = KernelSpec("fwd", DTYPE_NAMES[dtype], head_dim, head_dim_v, is_causal)
    try:
        default_variant(spec, device_id(device).target)
    except UnsupportedError as error:
        return str(error)
    return trainable.why_no_backward(dtype, head_dim, head_dim_v, device) if trained else None


def no_target(device: torch.device) -> str | None:
    """Why no kernel at all is made for a device; None where some are, and where tensors are fake and need none."""
    if device not in _NO_TARGET:
        _NO_TARGET[device] = None
        if not _only_fake(device):
            try:
                device_id(device)
            except UnsupportedError as error:
                _NO_TARGET[device] = str(error)
    return _NO_TARGET[device]


no_target._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _only_fake(device: torch.device) -> bool:
    return device.type == "meta" or (device.type == "cuda" and not torch.cuda.is_available())


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    is_causal: bool,
    bottom_right: bool,
    scale: float,
    return_lse: bool,
    dropout_p: float = 0.0,
    dropout_state: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """As ``ops.forward``, arguments and result, for what no kernel serves. float64 has an lse in float64.

    Rows that belong to no sequence give 0 and -inf on every device. A NaN or an infinity stays in its sequence.
    """
    total_q, total_k = q.shape[0], k.shape[0]
    precision = torch.float64 if q.dtype == torch.float64 else torch.float32
    dropout = dropout_of(dropout_p, dropout_state) if dropout_p else None
    operands = (q.to(precision) * scale, k.to(precision), v.to(precision))
    if not q.is_cpu or torch.compiler.is_compiling() or _is_fake(cu_seqlens_q):
        parts = _masked(*operands, cu_seqlens_q, cu_seqlens_k, is_causal, bottom_right, dropout)
    else:
        check_offsets_on_host("cu_seqlens_q", cu_seqlens_q, total_q)
        check_offsets_on_host("cu_seqlens_k", cu_seqlens_k, total_k)
        parts = _by_sequence(*operands, cu_seqlens_q, cu_seqlens_k, is_causal, bottom_right, dropout)
    with _no_autocast(q.device.type):
        outs, lses = zip(*parts, strict=True)
    out = torch.cat(outs).to(q.dtype)
    return [out, torch.cat(lses, dim=1)] if return_lse else [out]


def _no_autocast(device_type: str) -> AbstractContextManager[object]:
    """Products keep their precision inside."""
    if device_type in ("cpu", "cuda") and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def _is_fake(tensor: torch.Tensor) -> bool:
    """Whether the values can't be read: a fake tensor, or any under a mode that makes tensors fake."""
    return type(tensor) is not torch.Tensor or torch._C._len_torch_dispatch_stack() > 0


def _by_sequence(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    is_causal: bool,
    bottom_right: bool,
    dropout: Dropout | None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(out, lse) of each sequence in turn, and of the rows that belong to none."""
    offsets_q, offsets_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for (begin_q, end_q), (begin_k, end_k) in zip(pairwise(offsets_q), pairwise(offsets_k), strict=True):
        rows, keys = slice(begin_q, end_q), slice(begin_k, end_k)
        len_q, len_k = end_q - begin_q, end_k - begin_k
        seen = torch.ones(len_q, len_k, dtype=torch.bool, device=q.device)
        if is_causal:
            seen = seen.tril(len_k - len_q if bottom_right else 0)
        kept = None
        if dropout is not None:
            kept = keep_mask(dropout, torch.arange(begin_q, end_q, device=q.device), q.shape[1], begin_k, len_k)
            kept = kept.to(q.dtype) * dropout.scale
        yield _block(q[rows], k[keys], v[keys], seen, kept)
    tail = q[offsets_q[-1] :]
    yield _block(tail, k[:0], v[:0], torch.ones(tail.shape[0], 0, dtype=torch.bool, device=q.device))


def _masked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    is_causal: bool,
    bottom_right: bool,
    dropout: Dropout | None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(out, lse) of blocks of rows, each against all keys; nothing is read by the host."""
    batch = cu_seqlens_q.shape[0] - 1
    sequence_q, position_q = _places(cu_seqlens_q, q.shape[0])
    sequence_k, position_k = _places(cu_seqlens_k, k.shape[0])
    last_seen = position_q
    if bottom_right:
        surplus = cu_seqlens_k.diff() - cu_seqlens_q.diff()
        last_seen = position_q + torch.cat([surplus, surplus.new_zeros(1)])[sequence_q]
    row = torch.arange(q.shape[0], device=q.device)
    # Zero times NaN is NaN: what is not finite is taken out of the products and put back where it is seen.
    (q, bad_q), (k, bad_k), (v, bad_v) = map(_finite, (q, k, v))
    bad_k = bad_k | bad_v

    def rows_against_all(rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        seen = (sequence_q[rows, None] == sequence_k) & (sequence_k < batch)
        if is_causal:
            seen = seen & (position_k <= last_seen[rows, None])
        kept = None
        if dropout is not None:
            kept = keep_mask(dropout, row[rows], q.shape[1], 0, k.shape[0]).to(q.dtype) * dropout.scale
        out, lse = _block(q[rows], k, v, seen, kept)
        spoilt = (seen.to(q.dtype) @ bad_k.to(q.dtype)) > 0  # (rows, H_kv)
        spoilt = spoilt.repeat_interleave(q.shape[1] // k.shape[1], dim=1) | (bad_q[rows] & seen.any(1, keepdim=True))
        return out.masked_fill(spoilt[..., None], float("nan")), lse.masked_fill(spoilt.T, float("nan"))

    # In the backward pass the scores are computed again: kept, they could fill a device.
    again = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    again = again and not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active())
    for rows in _blocks(q, k):
        if again:
            yield checkpoint(rows_against_all, rows, use_reentrant=False, preserve_rng_state=False)
        else:
            yield rows_against_all(rows)


def _places(cu_seqlens: torch.Tensor, total: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each row its sequence (B: none) and its position in it."""
    row = torch.arange(total, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens[1:], row, right=True)
    return sequence, row - cu_seqlens[sequence]


def _finite(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x (rows, heads, D) with what is not finite as 0, and (rows, heads) whether there was any."""
    finite = x.isfinite()
    return torch.where(finite, x, 0.0), ~finite.all(dim=-1)


def _blocks(q: torch.Tensor, k: torch.Tensor) -> Iterator[slice]:
    """Slices of the rows of q whose scores fit into a block. One for all in a graph: it must not depend on sizes."""
    if torch.compiler.is_compiling():
        yield slice(None)
        return
    rows = max(1, _BLOCK_BYTES // (q.element_size() * q.shape[1] * max(1, k.shape[0])))
    for first in range(0, max(1, q.shape[0]), rows):
        yield slice(first, first + rows)


def _block(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor, kept: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """out (n, H, D_v) and lse (H, n) of q (n, H, D), scaled, on k (m, H_kv, D) and v (m, H_kv, D_v).

    seen (n, m): which key a row sees. kept (H, n, m): by what dropout multiplies the weights.
    """
    rows, heads, head_dim = q.shape
    keys, heads_kv, head_dim_v = v.shape
    group = heads // heads_kv
    grouped = q.reshape(rows, heads_kv, group, head_dim).permute(1, 2, 0, 3)
    grouped = grouped.reshape(heads_kv, group * rows, head_dim)
    scores = (grouped @ k.permute(1, 2, 0)).view(heads_kv, group, rows, keys).masked_fill(~seen, float("-inf"))
    if keys == 0:
        peak = scores.new_zeros(heads_kv, group, rows, 1)
    else:
        peak = scores.detach().amax(-1, keepdim=True)
        peak = torch.where(peak == float("-inf"), 0.0, peak)
    weights = (scores - peak).exp()
    total = weights.sum(-1, keepdim=True)
    dead = total == 0
    total = torch.where(dead, 1.0, total)
    if kept is not None:
        weights = weights * kept.view(heads_kv, group, rows, keys)
    out = (weights.view(heads_kv, group * rows, keys) @ v.transpose(0, 1)).view(heads_kv, group, rows, head_dim_v)
    lse = torch.where(dead, float("-inf"), peak + total.log())
    return (out / total).permute(2, 0, 1, 3).reshape(rows, heads, head_dim_v), lse.view(heads, rows)
