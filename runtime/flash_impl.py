"""jagtile as one of torch's flash-attention implementations: ``activate_flash_attention_impl("JAGTILE")``.

While it is active, torch's own callers of FlashAttention on CUDA run jagtile's kernels: ``varlen_attn``, the flash
branch of dense ``F.scaled_dot_product_attention`` and that of torch's nested tensors. Causal is bottom-right, as
FlashAttention has it. Gradients come from torch's FlashAttention-2, which takes our output and log-sum-exp as its own.

Importing jagtile puts the name into torch's registry, where the torch at hand has one; nothing changes until it is
activated.
"""

from __future__ import annotations

import torch
from torch.library import Library

from jagtile.runtime.checks import check_batch, softmax_scale
from jagtile.runtime.errors import JagtileError, UnsupportedError
from jagtile.runtime.ops import forward

NAME = "JAGTILE"


class Handle:
    """Keeps the operators overridden as long as it is not removed."""

    def __init__(self, library: Library) -> None:
        self._library: Library | None = library

    def remove(self) -> None:
        """Give the operators back to torch."""
        self._library = None


def register() -> None:
    """Put the name into torch's registry; torch releases without one are left as they are."""
    put = getattr(torch.nn.attention, "register_flash_attention_impl", None)
    if put is not None:
        put(NAME, register_fn=override)


def override(key: str = "CUDA") -> Handle:
    """Override torch's forward operators for a dispatch key; those that the torch at hand lacks are left out."""
    library = Library("aten", "IMPL", key)  # type: ignore[no-untyped-call]
    for name, function in (
        ("_flash_attention_forward", flash_attention_forward),
        ("_flash_attention_forward_no_dropout_inplace", flash_attention_forward_inplace),
        ("_scaled_dot_product_flash_attention", scaled_dot_product_flash_attention),
    ):
        if hasattr(torch.ops.aten, name):
            library.impl(name, function, key)  # type: ignore[no-untyped-call]
    return Handle(library)


def flash_attention_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cum_seq_q: torch.Tensor | None,
    cum_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    num_splits: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``aten::_flash_attention_forward``: query (total_q, H, D) with offsets, or (B, length, H, D) without.

    Keys are never split, whatever ``num_splits``. JagtileError, a RuntimeError, for what is not served.
    """
    window = tuple(-1 if size is None else int(size) for size in (window_size_left, window_size_right))
    _refuse(
        dropout_p=(dropout_p, dropout_p != 0.0, "0"),
        return_debug_mask=(return_debug_mask, return_debug_mask, "False"),
        window_size=(window, window not in ((-1, -1), (-1, 0)), "(-1, -1), and (-1, 0) for causal"),
        seqused_k=("given", seqused_k is not None, "None"),
        alibi_slopes=("given", alibi_slopes is not None, "None"),
        block_table=("given", block_table is not None, "None"),
    )
    is_causal = is_causal or window == (-1, 0)
    if cum_seq_q is None or cum_seq_k is None:
        out, lse = _dense(query, key, value, is_causal, scale)
    else:
        out, lse = _run(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, is_causal, scale)
        # Where a row sees no key, FlashAttention-2's backward pass expects its own forward's +inf.
        lse.masked_fill_(lse == float("-inf"), float("inf"))
    return out, lse, *_unread(lse)


def flash_attention_forward_inplace(out: torch.Tensor, *arguments: object, **options: object) -> torch.Tensor:
    """``aten::_flash_attention_forward_no_dropout_inplace``: writes out, returns the log-sum-exp."""
    computed, lse, *_ = flash_attention_forward(*arguments, **options)  # type: ignore[arg-type]
    out.copy_(computed)
    return lse


def scaled_dot_product_flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, None, None, int, int, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``aten::_scaled_dot_product_flash_attention``: query (B, H, length, D), dense. Errors as above."""
    _refuse(
        dropout_p=(dropout_p, dropout_p != 0.0, "0"),
        return_debug_mask=(return_debug_mask, return_debug_mask, "False"),
    )
    out, lse = _dense(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), is_causal, scale)
    return out.transpose(1, 2), lse, None, None, query.shape[2], key.shape[2], *_unread(lse)


def _refuse(**asked: tuple[object, bool, str]) -> None:
    for name, (value, used, served) in asked.items():
        if used:
            raise JagtileError(
                f"{NAME} flash attention: {name} is {value}; served: {served}. "
                f"torch.nn.attention.restore_flash_attention_impl() brings torch's own back"
            )


def _dense(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """out (B, length, H, D) and lse (B, H, length) of operands (B, length, H, D): a batch of equal lengths."""
    batch, length_q, heads, _ = query.shape
    length_k = key.shape[1]
    q, k, v = (x.reshape(-1, x.shape[2], x.shape[3]) for x in (query, key, value))  # a view where strides allow one
    offsets_q = _even_offsets(batch, length_q, query.device)
    offsets_k = offsets_q if length_k == length_q else _even_offsets(batch, length_k, query.device)
    out, lse = _run(q, k, v, offsets_q, offsets_k, length_q, length_k, is_causal, scale)
    return out.unflatten(0, (batch, length_q)), lse.view(heads, batch, length_q).transpose(0, 1).contiguous()  # type: ignore[no-untyped-call]


def _even_offsets(batch: int, length: int, device: torch.device) -> torch.Tensor:
    return torch.arange(batch + 1, dtype=torch.int32, device=device) * length


def _run(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    offsets_q: torch.Tensor,
    offsets_k: torch.Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool,
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out (total_q, H, D_v), lse (H, total_q): the kernel itself, for autograd and tracers are behind us here."""
    _refuse(dtype=(query.dtype, query.dtype not in (torch.float16, torch.bfloat16), "torch.float16, torch.bfloat16"))
    query, key, value = (x if x.stride(2) == 1 else x.contiguous() for x in (query, key, value))
    scale = softmax_scale(scale, query.shape[2])
    try:
        with torch.no_grad():  # autograd has been here, and grad mode is left on
            check_batch(query, key, value, offsets_q, offsets_k, max_q, max_k)
            out, lse = forward(query, key, value, offsets_q, offsets_k, max_q, max_k, is_causal, True, scale, True)
    except UnsupportedError as error:  # a NotImplementedError, which the dispatcher might take for its own
        raise JagtileError(f"{NAME} flash attention: {error}") from error
    return out, lse


def _unread(lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The state of the random numbers, its offset and the debug mask: nobody reads them without dropout."""
    return lse.new_empty(2, dtype=torch.uint64), lse.new_empty((), dtype=torch.uint64), lse.new_empty(0)
