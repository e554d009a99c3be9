"""Checks of the arguments of packed attention. Each error names the argument, what it was and what is accepted.

TypeError for a wrong Python type, ValueError for a wrong value, UnsupportedError for a valid request that is not
served. Nothing here reads device memory.
"""

from __future__ import annotations

import math

import torch

from jagtile.runtime.errors import UnsupportedError
from jagtile.runtime.problem import DTYPE_NAMES

ALIGNMENTS = ("top_left", "bottom_right")
MAX_SCALE = 1e30  # kernels take it as float32


def check_batch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
) -> None:
    """The packed batch of ``varlen_attention``: its tensors and the two hints."""
    check_tensors(q, k, v, cu_seqlens_q, cu_seqlens_k)
    check_hints(max_seqlen_q, max_seqlen_k)


def check_tensors(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor
) -> None:
    """The tensors of a packed batch. What is found follows from their types, shapes, strides, dtypes and devices."""
    check_packed("q", q, "(total_q, H, D)")
    check_packed("k", k, "(total_k, H_kv, D)")
    check_packed("v", v, "(total_k, H_kv, D_v)")
    check_operands(q, k, v, ("q", "k", "v"))
    device = q.device
    offsets_q = check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, device)
    if cu_seqlens_k is not cu_seqlens_q:
        offsets_k = check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, device)
        if offsets_q != offsets_k:
            raise ValueError(
                f"cu_seqlens_q has {offsets_q} offsets, cu_seqlens_k {offsets_k}: both must have one more than there "
                f"are sequences"
            )


def check_operands(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, names: tuple[str, str, str]) -> None:
    """q (total_q, H, D), k (total_k, H_kv, D), v (total_k, H_kv, D_v): one dtype, one device, shapes that fit."""
    q_name, k_name, v_name = names
    dtype, device = q.dtype, q.device
    if not (dtype == k.dtype == v.dtype and device == k.device == v.device):
        name, other = (v_name, v) if k.dtype == dtype and k.device == device else (k_name, k)
        if other.dtype != dtype:
            raise ValueError(f"{name} has dtype {other.dtype}, {q_name} {dtype}: all three must have the same dtype")
        raise ValueError(f"{name} is on {other.device}, {q_name} on {device}: all three must be on one device")
    if dtype not in DTYPE_NAMES and dtype != torch.float64:
        served = ", ".join(str(served) for served in (*DTYPE_NAMES, torch.float64))
        raise UnsupportedError(f"{q_name} has dtype {dtype}; served: {served}")
    _, heads, head_dim = q.shape
    total_k, heads_kv, head_dim_k = k.shape
    total_v, heads_v, head_dim_v = v.shape
    if head_dim_k != head_dim:
        raise ValueError(f"{k_name} has head_dim {head_dim_k}, {q_name} {head_dim}: they must be equal")
    if total_v != total_k or heads_v != heads_kv:
        raise ValueError(
            f"{v_name} has {total_v} tokens and {heads_v} heads, {k_name} {total_k} and {heads_kv}: they must be equal"
        )
    if not heads or not heads_kv or heads % heads_kv:
        raise ValueError(
            f"{q_name} has {heads} heads, {k_name} {heads_kv}: the former must be a multiple of the latter, both at "
            f"least 1"
        )
    if not (head_dim and head_dim_v):
        raise ValueError(f"{v_name if head_dim else q_name} has head_dim 0; it must be at least 1")


def check_packed(name: str, tensor: object, layout: str) -> None:
    """One of q, k, v: a dense tensor of three dimensions whose last stride is 1."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor {layout}, got {type(tensor).__name__}")
    if tensor.is_nested:
        raise ValueError(f"{name} is a nested tensor; varlen_attention takes packed ones {layout}: use jagtile.sdpa")
    if tensor.dim() != 3:
        raise ValueError(f"{name} must have three dimensions {layout}, got the shape {tuple(tensor.shape)}")
    if tensor.stride()[2] != 1 and tensor.shape[2] > 1:
        raise ValueError(f"{name} must have a last stride of 1, got the strides {tensor.stride()}: use .contiguous()")


def check_cu_seqlens(name: str, cu_seqlens: object, device: torch.device) -> int:
    """cu_seqlens: (B+1,), int32 or int64, contiguous, on the operands' device. Returns B+1."""
    if not isinstance(cu_seqlens, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor of B+1 offsets, got {type(cu_seqlens).__name__}")
    shape, dtype = cu_seqlens.shape, cu_seqlens.dtype
    if len(shape) != 1 or not shape[0]:
        raise ValueError(f"{name} must have the shape (B+1,), got {tuple(shape)}")
    if dtype != torch.int32 and dtype != torch.int64:
        raise ValueError(f"{name} must be int32 or int64, got {dtype}")
    if cu_seqlens.device != device:
        raise ValueError(f"{name} is on {cu_seqlens.device}, q on {device}: they must be on one device")
    if not cu_seqlens.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got the stride {cu_seqlens.stride(0)}: use .contiguous()")
    return shape[0]


def check_hints(max_seqlen_q: int | None, max_seqlen_k: int | None) -> None:
    """Both hints of a packed batch."""
    if max_seqlen_q is not None:
        check_max_seqlen("max_seqlen_q", max_seqlen_q)
    if max_seqlen_k is not None:
        check_max_seqlen("max_seqlen_k", max_seqlen_k)


def check_max_seqlen(name: str, max_seqlen: object) -> None:
    """The optional hint: a host integer."""
    if not isinstance(max_seqlen, int):
        raise TypeError(
            f"{name} must be an int or None, got {type(max_seqlen).__name__}; it is only a hint and may be left out"
        )
    if max_seqlen < 0:
        raise ValueError(f"{name} must be at least 0, got {max_seqlen}")


def check_flag(name: str, value: object) -> None:
    """A Python bool, neither a tensor nor a number."""
    if value is not True and value is not False:
        raise TypeError(f"{name} must be True or False, got {value!r}")


def bottom_right(causal_alignment: str) -> bool:
    """Whether the causal alignment is "bottom_right"; ValueError unless it is that or "top_left"."""
    if causal_alignment not in ALIGNMENTS:
        raise ValueError(f"causal_alignment must be one of {', '.join(ALIGNMENTS)}, got {causal_alignment!r}")
    return causal_alignment == "bottom_right"


def softmax_scale(scale: object, head_dim: int) -> float:
    """The scale of the scores: what was given, a finite host number, or 1/sqrt(head_dim) for None."""
    if scale is None:
        return 1.0 / math.sqrt(head_dim)
    if not isinstance(scale, (float, int)):
        raise TypeError(f"scale must be a float or None, got {type(scale).__name__}; float(scale) makes one")
    if not -MAX_SCALE <= scale <= MAX_SCALE:
        raise ValueError(f"scale must be finite, and at most {MAX_SCALE:g} in size, got {scale}")
    return float(scale)


def check_offsets_on_host(name: str, cu_seqlens: torch.Tensor, total: int) -> int:
    """The last of a CPU tensor of offsets; ValueError unless they begin at 0, never decrease and end by ``total``."""
    offsets: list[int] = cu_seqlens.tolist()
    if offsets[0] != 0:
        raise ValueError(f"{name} must begin with 0, got {offsets[0]}")
    if offsets[-1] > total:
        raise ValueError(f"{name} ends with {offsets[-1]}, beyond the {total} tokens there are")
    if offsets != sorted(offsets):
        at = next(i for i in range(1, len(offsets)) if offsets[i] < offsets[i - 1])
        raise ValueError(f"{name} must never decrease, got {offsets[at - 1]}, {offsets[at]} at {at - 1}, {at}")
    return offsets[-1]
