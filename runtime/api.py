"""Packed attention as users call it, and ``warmup``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import torch

from jagtile.generator.spec import Direction, KernelSpec
from jagtile.runtime import native
from jagtile.runtime.checks import (
    bottom_right,
    check_flag,
    check_hints,
    check_tensors,
    softmax_scale,
)
from jagtile.runtime.device import resolved
from jagtile.runtime.dropout import arguments_of, check_dropout_p
from jagtile.runtime.errors import UnsupportedError
from jagtile.runtime.fallback import attention, why_no_kernel
from jagtile.runtime.layouts import Layout, checked
from jagtile.runtime.operators import forward_for
from jagtile.runtime.problem import DTYPE_NAMES, REGIMES
from jagtile.runtime.routes import prepare
from jagtile.runtime.trainable import requires_grad, why_no_backward

CausalAlignment = Literal["top_left", "bottom_right"]

# q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int | None, int | None]

_NO_DROPOUT = (0.0, None)


@overload
def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int | None = ...,
    max_seqlen_k: int | None = ...,
    *,
    is_causal: bool = ...,
    causal_alignment: CausalAlignment = ...,
    scale: float | None = ...,
    dropout_p: float = ...,
    return_lse: Literal[False] = ...,
) -> torch.Tensor: ...
@overload
def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int | None = ...,
    max_seqlen_k: int | None = ...,
    *,
    is_causal: bool = ...,
    causal_alignment: CausalAlignment = ...,
    scale: float | None = ...,
    dropout_p: float = ...,
    return_lse: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor]: ...
def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    is_causal: bool = False,
    causal_alignment: CausalAlignment = "top_left",
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention within each sequence of a packed jagged batch. Differentiable.

    Args:
        q: (total_q, H, D), float32, bfloat16 or float16; any strides whose last is 1.
        k: (total_k, H_kv, D), likewise; H is a multiple of H_kv (GQA, MQA).
        v: (total_k, H_kv, D_v), likewise; D and D_v are at most 256.
        cu_seqlens_q: (B+1,) int32 or int64 on q's device: sequence b holds rows cu_seqlens_q[b] to cu_seqlens_q[b+1].
        cu_seqlens_k: likewise for k and v. Lengths may be zero and need not equal those of q.
        max_seqlen_q: the longest query length, where it is known. Only a hint for choosing the kernel: a wrong one
            costs time, never correctness.
        max_seqlen_k: likewise for the keys.
        is_causal: whether a query sees only the keys up to its own position.
        causal_alignment: "top_left": query i of a sequence sees keys 0..i; "bottom_right": its last query sees all
            keys, as in FlashAttention. They differ where query and key lengths do.
        scale: of the scores; None is 1/sqrt(D).
        dropout_p: the rate, from 0 to 1, at which weights are dropped, whether in training or not, as in torch's
            function; those kept are divided by what is left. The random numbers come from torch's default generator
            of the device. Not on GPUs yet, but for what plain operations serve.
        return_lse: whether to return the log-sum-exp of each row's scaled scores as well. Dropout does not
            change it.

    Returns:
        out (total_q, H, D_v), contiguous, in q's dtype; with ``return_lse`` also lse, float32 (H, total_q), natural
        logarithm. A row that sees no key gives 0 and -inf. Rows from cu_seqlens_q[-1] on belong to no sequence: on the
        CPU they too give 0 and -inf, on CUDA their values are unspecified.

    The host never waits for the device: on CUDA the offsets' values are taken on trust. On the CPU they are checked.

    Raises:
        TypeError, ValueError: a bad argument; the message names it, what it was and what is accepted.
        UnsupportedError: (a NotImplementedError) a dtype that is not served, or dropout on a GPU.
        NoKernelError, CompilerNotFoundError, BuildError: no kernel can be had; the message says the ways out.
    """
    batch = (q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    learns = False
    if not torch.compiler.is_compiling() and native.serve is not None:
        served = native.serve(*batch, is_causal, causal_alignment, scale, dropout_p, return_lse)
        if served is not None and served is not False:
            return served
        learns = served is False
    layout = checked(check_tensors, q, k, v, cu_seqlens_q, cu_seqlens_k)
    check_hints(max_seqlen_q, max_seqlen_k)
    check_flag("is_causal", is_causal)
    check_flag("return_lse", return_lse)
    kind = (is_causal, bottom_right(causal_alignment), softmax_scale(scale, q.shape[2]))
    outputs = attend(batch, *kind, check_dropout_p(dropout_p), return_lse, layout)
    if learns:
        native.learn(batch, *kind, requires_grad(q, k, v), return_lse, layout)
    return (outputs[0], outputs[1]) if return_lse else outputs[0]


def attend(
    batch: Batch,
    is_causal: bool,
    bottom_right: bool,
    scale: float,
    dropout_p: float,
    return_lse: bool,
    layout: Layout | None,
) -> list[torch.Tensor]:
    """[out] or [out, lse] of checked arguments, by a kernel or by plain operations. UnsupportedError as above."""
    q, k, v = batch[:3]
    trained = requires_grad(q, k, v)
    reason = why_no_kernel(q, v, is_causal, trained, layout)
    dropout = arguments_of(dropout_p, q, v, is_causal, by_kernel=not reason) if dropout_p else _NO_DROPOUT
    call = (*batch, is_causal, bottom_right, scale, return_lse, *dropout)
    if reason:
        return attention(*call)
    serve = forward_for(q, k, v, trained, layout)
    return serve(*call) if layout is None else serve(*call, layout)


def warmup(
    head_dim: int,
    dtype: torch.dtype,
    *,
    head_dim_v: int | None = None,
    is_causal: bool = False,
    device: torch.device | str | None = None,
    regimes: Sequence[str] | None = None,
    training: bool = False,
    dropout: bool = False,
) -> tuple[str, ...]:
    """Build and load, ahead of time, every kernel that calls of one kind may take.

    Call it before serving, before capturing a CUDA graph and before torch.compile. It reads the tuning choices anew,
    so that it also makes a process see what was tuned since its first call.

    Args:
        head_dim: D of q and k.
        dtype: torch.float32, torch.bfloat16 or torch.float16.
        head_dim_v: D_v; None is D.
        is_causal: as in the calls to come.
        device: where they will run; None is the current CUDA device, the CPU where there is none.
        regimes: some of "tiny", "short", "medium", "long", "cross", "decode", "few", "huge"; None is all. A long or
            medium batch of few tiles is of "few", others of very long sequences are "huge" (docs/dispatch.md).
        training: whether gradients will be wanted: the backward kernels too, where there are any.
        dropout: whether there will be dropout: the kernels with it too.

    Returns:
        The names of the variants, each once. Errors as ``varlen_attention``.
    """
    check_flag("is_causal", is_causal)
    check_flag("training", training)
    check_flag("dropout", dropout)
    if dtype not in DTYPE_NAMES:
        raise UnsupportedError(f"dtype {dtype} is not served; served: {', '.join(map(str, DTYPE_NAMES))}")
    names = REGIMES if regimes is None else tuple(regimes)
    unknown = [name for name in names if name not in REGIMES]
    if unknown:
        raise ValueError(f"regimes holds {', '.join(map(repr, unknown))}; regimes are {', '.join(REGIMES)}")
    head_dim_v = head_dim if head_dim_v is None else head_dim_v
    trains = training and why_no_backward(dtype, head_dim, head_dim_v, resolved(device)) is None
    directions: tuple[Direction, ...] = ("fwd", "bwd") if trains else ("fwd",)
    specs = [
        KernelSpec(direction, DTYPE_NAMES[dtype], head_dim, head_dim_v, is_causal, drops)
        for drops in ((False, True) if dropout else (False,))
        for direction in directions
    ]
    variants = [variant.name for spec in specs for variant in prepare(spec, names, resolved(device))]
    if resolved(device).type == "cuda":
        native.start(wait=True)
    return tuple(variants)
