"""Checks of the arguments of packed attention. Each error names the argument, what it was and what is accepted.

TypeError for a wrong Python type, ValueError for a wrong value, UnsupportedError for a valid request that is not
served. Nothing here reads device memory.
"""

from __future__ import annotations

import math

import torch

from jagtile.generator.spec import MAX_HEAD_DIM
from jagtile.runtime.device import SERVED_DEVICES
from jagtile.runtime.errors import UnsupportedError
from jagtile.runtime.problem import DTYPE_NAMES

ALIGNMENTS = ("top_left", "bottom_right")


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
    check_packed("q", q, "(total_q, H, D)")
    check_packed("k", k, "(total_k, H_kv, D)")
    check_packed("v", v, "(total_k, H_kv, D_v)")
    check_operands(q, k, v, ("q", "k", "v"))
    device = q.device
    check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, device)
    check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, device)
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"cu_seqlens_q has {cu_seqlens_q.shape[0]} offsets, cu_seqlens_k {cu_seqlens_k.shape[0]}: both must have "
            f"one more than there are sequences"
        )
    if max_seqlen_q is not None:
        check_max_seqlen("max_seqlen_q", max_seqlen_q)
    if max_seqlen_k is not None:
        check_max_seqlen("max_seqlen_k", max_seqlen_k)


def check_operands(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, names: tuple[str, str, str]) -> None:
    """q (total_q, H, D), k (total_k, H_kv, D), v (total_k, H_kv, D_v): one dtype, one device, shapes that fit."""
    q_name, k_name, v_name = names
    q_shape, k_shape, v_shape = q.shape, k.shape, v.shape
    dtype, device = q.dtype, q.device
    for name, tensor in ((k_name, k), (v_name, v)):
        if tensor.dtype != dtype:
            raise ValueError(f"{name} has dtype {tensor.dtype}, {q_name} {dtype}: all three must have the same dtype")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, {q_name} on {device}: all three must be on one device")
    if not (q.is_cuda or q.is_cpu or q.is_meta):
        raise UnsupportedError(f"{q_name} is on {device}; served: {SERVED_DEVICES}")
    if dtype not in DTYPE_NAMES:
        served = ", ".join(str(served) for served in DTYPE_NAMES)
        raise UnsupportedError(f"{q_name} has dtype {dtype}; served: {served}")
    if k_shape[2] != q_shape[2]:
        raise ValueError(f"{k_name} has head_dim {k_shape[2]}, {q_name} {q_shape[2]}: they must be equal")
    if k_shape[:2] != v_shape[:2]:
        raise ValueError(
            f"{v_name} has {v_shape[0]} tokens and {v_shape[1]} heads, {k_name} {k_shape[0]} and {k_shape[1]}: "
            f"they must be equal"
        )
    if not q_shape[1] or not k_shape[1] or q_shape[1] % k_shape[1]:
        raise ValueError(
            f"{q_name} has {q_shape[1]} heads, {k_name} {k_shape[1]}: the former must be a multiple of the latter, "
            f"both at least 1"
        )
    for name, head_dim in ((q_name, q_shape[2]), (v_name, v_shape[2])):
        if head_dim < 1:
            raise ValueError(f"{name} has head_dim 0; it must be between 1 and {MAX_HEAD_DIM}")
        if head_dim > MAX_HEAD_DIM:
            raise UnsupportedError(f"{name} has head_dim {head_dim}; served: 1 to {MAX_HEAD_DIM}")
    if torch.is_grad_enabled():
        for name, tensor in zip(names, (q, k, v), strict=True):
            if tensor.requires_grad:
                refuse_grad(name)


def refuse_grad(name: str) -> None:
    """Raise the UnsupportedError for an operand that requires grad."""
    raise UnsupportedError(
        f"{name} requires grad and grad mode is on, but only the forward pass is served: call under torch.no_grad() or "
        f"torch.inference_mode(), or pass {name}.detach()"
    )


def check_packed(name: str, tensor: object, layout: str) -> None:
    """One of q, k, v: a dense tensor of three dimensions whose last stride is 1."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor {layout}, got {type(tensor).__name__}")
    if tensor.is_nested:
        raise ValueError(f"{name} is a nested tensor; varlen_attention takes packed ones {layout}: use jagtile.sdpa")
    if tensor.dim() != 3:
        raise ValueError(f"{name} must have three dimensions {layout}, got the shape {tuple(tensor.shape)}")
    if tensor.stride(2) != 1 and tensor.shape[2] > 1:
        raise ValueError(f"{name} must have a last stride of 1, got the strides {tensor.stride()}: use .contiguous()")


def check_cu_seqlens(name: str, cu_seqlens: object, device: torch.device) -> None:
    """cu_seqlens: (B+1,), int32 or int64, contiguous, on the operands' device."""
    if not isinstance(cu_seqlens, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor of B+1 offsets, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dim() != 1 or not cu_seqlens.shape[0]:
        raise ValueError(f"{name} must have the shape (B+1,), got {tuple(cu_seqlens.shape)}")
    if cu_seqlens.dtype != torch.int32 and cu_seqlens.dtype != torch.int64:
        raise ValueError(f"{name} must be int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.device != device:
        raise ValueError(f"{name} is on {cu_seqlens.device}, q on {device}: they must be on one device")
    if cu_seqlens.stride(0) != 1 and cu_seqlens.shape[0] > 1:
        raise ValueError(f"{name} must be contiguous, got the stride {cu_seqlens.stride(0)}: use .contiguous()")


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
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
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
