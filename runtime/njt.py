"""Nested tensors of the jagged layout: ``sdpa`` on them.

What is private to torch is read in one place, ``pack`` and ``wrap``. An NJT (B, H, j, D) keeps its values as
(H, total, D), whatever their strides; the transposed view (total, H, D) of them is what the kernels take, uncopied.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch.nested._internal.nested_tensor import NestedTensor, nested_view_from_values_offsets_lengths

from jagtile.runtime import native
from jagtile.runtime.api import CausalAlignment, attend
from jagtile.runtime.checks import bottom_right, check_flag, check_operands, softmax_scale
from jagtile.runtime.dropout import arguments_of, check_dropout_p
from jagtile.runtime.eager import is_eager, is_real
from jagtile.runtime.errors import UnsupportedError
from jagtile.runtime.fallback import why_no_kernel
from jagtile.runtime.holes import close_holes, offsets_of, open_holes
from jagtile.runtime.layouts import Layout, checked
from jagtile.runtime.njt_answers import answer_at_once
from jagtile.runtime.njt_autograd import nested_attention
from jagtile.runtime.njt_form import form_of

Sdpa = Callable[..., torch.Tensor]

_NAMES = ("query", "key", "value")


class Packed(NamedTuple):
    """The packed views of three NJTs. max_seqlen: what torch had cached, else None."""

    q: torch.Tensor  # (total_q, H, D)
    k: torch.Tensor  # (total_k, H_kv, D)
    v: torch.Tensor  # (total_k, H_kv, D_v)
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_seqlen_q: int | None
    max_seqlen_k: int | None


def sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    causal_alignment: CausalAlignment = "top_left",
) -> torch.Tensor:
    """``F.scaled_dot_product_attention`` on nested tensors of the jagged layout, trained as ``varlen_attention`` is.

    Args:
        query: NJT (B, H, j, D), or (B, j, D) for all three; float32, bfloat16, float16, or, slowly, float64. Under
            autocast any but float64 is cast, as torch does. It may have holes (``lengths``), and so may the others.
        key: NJT (B, H_kv, j', D). Its lengths need not be those of query, and any may be zero.
        value: NJT (B, H_kv, j', D_v) with the lengths of key. Where it has not the same offsets tensor as key, the CPU
            compares the two; on CUDA what the host knows is compared here and the values by an assertion on the device.
        attn_mask: not accepted, as in torch.
        dropout_p: as in ``varlen_attention``.
        is_causal: whether a query sees only the keys up to its own position.
        scale: of the scores; None is 1/sqrt(D).
        enable_gqa: must be True where query has more heads than key and value (a multiple of theirs).
        causal_alignment: as in ``varlen_attention``; "top_left" is what torch documents.

    Returns:
        NJT (B, H, j, D_v) with query's offsets object (so that it can be added to query) and query's cached lengths.
        Its values are a contiguous (total, H, D_v) buffer: ``out.transpose(1, 2)`` is contiguous. Values beyond the
        last offset belong to no sequence: zero on the CPU, unspecified on CUDA. Holes of query are holes of the
        output, of value 0.

    A 4-D NJT that is ragged on dimension 1, (B, j, H, D), gets torch's own meaning: dense attention over H.

    Raises:
        ValueError, TypeError: a bad argument.
        UnsupportedError: (a NotImplementedError, hence a RuntimeError) a valid request that is not served:
            dropout on a GPU, other dtypes or numbers of dimensions.
        NoKernelError, CompilerNotFoundError, BuildError: no kernel can be had; the message says the ways out.
    """
    learns = False
    if not torch.compiler.is_compiling() and native.serve_nested is not None:
        given = (query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, causal_alignment)
        served = native.serve_nested(*given)
        if served is not None and served is not False:
            return served
        learns = served is False
    if _ragged_batch_like(query, key, value):
        return torch_sdpa()(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    trained = _trained_as_one_node(query, key, value)
    if trained:
        torch._C._set_grad_enabled(False)  # torch.no_grad at a fifth of its host time
    try:
        packed, layout = pack(query, key, value, enable_gqa=enable_gqa)
    finally:
        if trained:
            torch._C._set_grad_enabled(True)
    if attn_mask is not None:
        raise ValueError(f"attn_mask must be None for nested tensors, got {type(attn_mask).__name__}")
    check_flag("is_causal", is_causal)
    kind = (is_causal, bottom_right(causal_alignment), softmax_scale(scale, packed.q.shape[2]))
    dropout_p = check_dropout_p(dropout_p)
    if trained:
        if why_no_kernel(packed.q, packed.v, is_causal, True, layout) is None:
            answer_at_once(cast(NestedTensor, query))
            state = None
            if dropout_p:
                dropout_p, state = arguments_of(dropout_p, packed.q, packed.v, is_causal, by_kernel=True)
            options = (*packed[5:], *kind, dropout_p)
            out = cast(torch.Tensor, nested_attention(query, key, value, packed[:5], options, state, layout))
            if learns:
                native.learn(packed, *kind, trained, False, layout)
            return out
        packed, layout = pack(query, key, value, enable_gqa=enable_gqa)  # once more, for autograd to see
    out = wrap(attend(packed, *kind, dropout_p, False, layout)[0], cast(NestedTensor, query))
    if learns and not trained:
        native.learn(packed, *kind, trained, False, layout)
    return out


def _trained_as_one_node(query: object, key: object, value: object) -> bool:
    """Whether some require grad and autograd may see the call as one node: eager, plain, without holes."""
    if not (torch.is_grad_enabled() and is_eager()):
        return False
    for tensor in (query, key, value):
        if type(tensor) is not NestedTensor or tensor._lengths is not None or not is_real(tensor._values):
            return False
    nested = cast("tuple[NestedTensor, ...]", (query, key, value))
    with torch._C.DisableTorchFunctionSubclass():  # else each look costs a Python dispatch
        return nested[0].requires_grad or nested[1].requires_grad or nested[2].requires_grad


def pack(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, enable_gqa: bool
) -> tuple[Packed, Layout | None]:
    """Check three NJTs of one form and take their packed views, cast as autocast asks, and the views' layout. Errors as
    ``sdpa``.
    """
    _check_njts(query, key, value)
    query, key, value = cast(NestedTensor, query), cast(NestedTensor, key), cast(NestedTensor, value)
    if torch.compiler.is_compiling():
        of_query, of_key, of_value = _tracked_values(query), _tracked_values(key), _tracked_values(value)
    else:
        of_query, of_key, of_value = query._values, key._values, value._values
    heads = query._ragged_idx == 2
    if not (heads and of_query.dim() == of_key.dim() == of_value.dim() == 3):
        for name, tensor, values in zip(_NAMES, (query, key, value), (of_query, of_key, of_value), strict=True):
            _check_form(name, values.dim() + 1, tensor._ragged_idx)
    check_flag("enable_gqa", enable_gqa)
    _check_raggedness(query, key, value)
    if torch.is_grad_enabled():
        of_query, of_key, of_value = _followed(query), _followed(key), _followed(value)
    cast_to = _autocast_dtype(of_query.device.type)
    q, k, v = _packed(of_query, heads, cast_to), _packed(of_key, heads, cast_to), _packed(of_value, heads, cast_to)
    if query._lengths is not None:
        q = close_holes(q, query._offsets, query._lengths, q.shape[0])
    if key._lengths is not None or value._lengths is not None:
        rows = min(k.shape[0], v.shape[0])
        k, v = (close_holes(x, t._offsets, _lengths(t), rows) for x, t in ((k, key), (v, value)))
    cu_seqlens_q = _cu_seqlens(query)
    same = key._offsets is query._offsets and key._lengths is query._lengths
    cu_seqlens_k = cu_seqlens_q if same else _cu_seqlens(key)
    layout = checked(_check_packed, q, k, v, cu_seqlens_q, cu_seqlens_k)
    if q.shape[1] != k.shape[1] and not enable_gqa:
        raise ValueError(
            f"query has {q.shape[1]} heads, key and value {k.shape[1]}: pass enable_gqa=True to share key and value "
            f"heads among query heads"
        )
    return Packed(q, k, v, cu_seqlens_q, cu_seqlens_k, _max_seqlen(query), _max_seqlen(key)), layout


def wrap(out: torch.Tensor, query: NestedTensor) -> torch.Tensor:
    """A packed result (total_q, H, D_v) as an NJT of query's form with its raggedness and cached lengths."""
    offsets, lengths, heads = query._offsets, query._lengths, query._ragged_idx == 2
    if lengths is not None:
        out = open_holes(out, offsets, lengths, _tokens(query))
    if not (torch.compiler.is_compiling() or out.requires_grad):
        return form_of(query).nest(out)
    cached = {"min_seqlen": query._maybe_min_seqlen, "max_seqlen": query._maybe_max_seqlen}
    view = nested_view_from_values_offsets_lengths(out if heads else out.squeeze(1), offsets, lengths, **cached)  # type: ignore[no-untyped-call]
    return cast(torch.Tensor, view.transpose(1, 2) if heads else view)


def values_of(tensor: NestedTensor) -> torch.Tensor:
    """The values: what torch stores, or under a compiler, where reaching inside a graph input is fragile, a view."""
    return _tracked_values(tensor) if torch.compiler.is_compiling() else tensor._values


def _tracked_values(tensor: NestedTensor) -> torch.Tensor:
    """A view of the values that autograd and compilers follow."""
    return cast(torch.Tensor, tensor.values())  # type: ignore[no-untyped-call]


def _tokens(tensor: NestedTensor) -> int:
    return values_of(tensor).shape[tensor._ragged_idx - 1]


def _followed(tensor: NestedTensor) -> torch.Tensor:
    """The values, as a view where autograd is to follow it."""
    with torch._C.DisableTorchFunctionSubclass():  # else the look costs a Python dispatch
        requires_grad = tensor.requires_grad
    return _tracked_values(tensor) if requires_grad else values_of(tensor)


def _max_seqlen(tensor: NestedTensor) -> int | None:
    """What torch has cached."""
    cached = tensor._metadata_cache.get("max_seqlen")  # ``_maybe_max_seqlen`` is three calls of Python
    return None if cached is None else cached.shape[0]


def _ragged_batch_like(*tensors: object) -> bool:
    """Whether all are NJTs of at least four dimensions, ragged on dimension 1."""
    first = tensors[0]
    if isinstance(first, NestedTensor) and first._ragged_idx == 2:  # all that is usual
        return False
    return all(isinstance(t, NestedTensor) and t._ragged_idx == 1 and values_of(t).dim() >= 3 for t in tensors)


def _check_njts(query: object, key: object, value: object) -> None:
    if not (isinstance(query, NestedTensor) and isinstance(key, NestedTensor) and isinstance(value, NestedTensor)):
        name, tensor = next(
            pair for pair in zip(_NAMES, (query, key, value), strict=True) if not isinstance(pair[1], NestedTensor)
        )
        kind = f"a {tensor.layout} tensor" if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise ValueError(f"{name} must be a nested tensor of the jagged layout (B, H, j, D), got {kind}")
    if not query._ragged_idx == key._ragged_idx == value._ragged_idx:
        ragged = [tensor._ragged_idx for tensor in (query, key, value)]
        raise ValueError(f"query, key and value must be ragged on the same dimension, got {ragged}")


def _check_packed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *offsets: torch.Tensor) -> None:
    check_operands(q, k, v, _NAMES)


def _check_form(name: str, dims: int, ragged_idx: int) -> None:
    if dims < 3:
        raise ValueError(f"{name} must have at least three dimensions, got {dims}; served: (B, H, j, D) and (B, j, D)")
    if (dims, ragged_idx) not in ((4, 2), (3, 1)):
        raise UnsupportedError(
            f"{name} has {dims} dimensions and is ragged on dimension {ragged_idx}; served: (B, H, j, D), "
            f"ragged on dimension 2, e.g. x.view(B, -1, H, D).transpose(1, 2), and (B, j, D) for all three"
        )


def _check_raggedness(query: NestedTensor, key: NestedTensor, value: NestedTensor) -> None:
    """One batch size, and key and value of the same lengths, without reading device memory."""
    if query._offsets is key._offsets is value._offsets and query._lengths is key._lengths is value._lengths is None:
        return
    batch = query._offsets.shape[0] - 1
    for name, tensor in (("key", key), ("value", value)):
        if tensor._offsets.shape[0] - 1 != batch:
            raise ValueError(f"{name} has {tensor._offsets.shape[0] - 1} sequences, query {batch}: they must be equal")
    if key._offsets is value._offsets and key._lengths is value._lengths:
        return
    holes = key._lengths is not None or value._lengths is not None
    tokens_k, tokens_v = _tokens(key), _tokens(value)
    if tokens_k != tokens_v and not holes:
        raise ValueError(f"value has {tokens_v} tokens, key {tokens_k}: their sequences must have the same lengths")
    if key._offsets.device != value._offsets.device:
        raise ValueError(
            f"value is on {value._offsets.device}, key on {key._offsets.device}: all must be on one device"
        )
    of_key, of_value = (_lengths(key), _lengths(value)) if holes else (key._offsets, value._offsets)
    traced = torch.compiler.is_compiling() or type(of_key) is not torch.Tensor  # torch 2.11: not in all of its passes
    if traced or not of_key.is_cpu:
        torch._assert_async((of_key == of_value).all(), "key and value differ in their offsets")
    elif not torch.equal(of_key.long(), of_value.long()):
        raise ValueError("value has other offsets than key: their sequences must have the same lengths")


def _lengths(tensor: NestedTensor) -> torch.Tensor:
    return tensor._offsets.diff() if tensor._lengths is None else tensor._lengths


def _autocast_dtype(device_type: str) -> torch.dtype | None:
    """What autocast casts to on the device; None where it is off, and on other devices, some of which have none."""
    if device_type not in ("cpu", "cuda") or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def _packed(values: torch.Tensor, heads: bool, cast_to: torch.dtype | None) -> torch.Tensor:
    """The values as (total, H, D), one head where there are none; copied only for autocast or a strided last axis."""
    values = values.transpose(0, 1) if heads else values.unsqueeze(1)
    if cast_to is not None and values.is_floating_point() and values.dtype != torch.float64:
        values = values.to(cast_to)
    return values if values.stride(2) == 1 else values.contiguous()


def _cu_seqlens(tensor: NestedTensor) -> torch.Tensor:
    offsets = tensor._offsets
    if tensor._lengths is not None:
        offsets = offsets_of(tensor._lengths, offsets.dtype)
    if offsets.dtype != torch.int64 and offsets.dtype != torch.int32:
        offsets = offsets.long()
    return offsets if offsets.is_contiguous() else offsets.contiguous()


def torch_sdpa() -> Sdpa:
    """torch's own implementation for NJTs."""
    from torch.nested._internal.sdpa import jagged_scaled_dot_product_attention

    return cast(Sdpa, jagged_scaled_dot_product_attention)
