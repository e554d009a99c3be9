"""Other packages' functions, served by jagtile: change the import, keep the call."""

from __future__ import annotations

from functools import partial

import torch

from jagtile.runtime.api import varlen_attention
from jagtile.runtime.errors import UnsupportedError

__all__ = ["flash_attn_varlen_func"]


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, None]:
    """FlashAttention 2's ``flash_attn_varlen_func``: its signature and its meaning, bottom-right causal included.

    Args:
        q: (total_q, H, D); k: (total_k, H_kv, D); v: (total_k, H_kv, D_v), as ``varlen_attention`` takes them.
        cu_seqlens_q: (B+1,) int32 (or int64) offsets; likewise cu_seqlens_k.
        max_seqlen_q: the longest query length; here only a hint, likewise max_seqlen_k.
        dropout_p: as ``varlen_attention`` takes it.
        softmax_scale: of the scores; None is 1/sqrt(D).
        causal: a sequence's last query sees all its keys, the one before it all but the last, and so on.
        window_size: (-1, -1) for no window, or (-1, 0), which is another way to say causal.
        deterministic: the forward pass always is, and on the CPU the backward too. On a GPU gradients are where
            ``torch.use_deterministic_algorithms(True)`` is on.
        return_attn_probs: whether to return (out, lse, None), lse float32 (H, total_q).

    Returns:
        out (total_q, H, D_v), rows that see no key 0; or the triple.

    Raises:
        UnsupportedError: for softcap, alibi_slopes, block_table or a window in use, and for deterministic where
            grad is required on a GPU and torch does not ask for it. Other errors as ``varlen_attention``.
    """
    window = tuple(window_size)
    left_to_chance = deterministic and not q.is_cpu and not torch.are_deterministic_algorithms_enabled()
    left_to_chance = left_to_chance and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    asked = {
        "softcap": (softcap, softcap != 0.0, "0.0"),
        "alibi_slopes": (type(alibi_slopes).__name__, alibi_slopes is not None, "None"),
        "block_table": (type(block_table).__name__, block_table is not None, "None"),
        "deterministic": (True, left_to_chance, "False, or True under torch.use_deterministic_algorithms(True)"),
        "window_size": (window, window not in ((-1, -1), (-1, 0)), "(-1, -1), and (-1, 0) for causal"),
    }
    for name, (value, used, served) in asked.items():
        if used:
            raise UnsupportedError(f"{name} is {value}; served: {served}")
    attention = partial(
        varlen_attention,
        *(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k),
        is_causal=causal or window == (-1, 0),
        causal_alignment="bottom_right",
        scale=softmax_scale,
        dropout_p=dropout_p,
    )
    return (*attention(return_lse=True), None) if return_attn_probs else attention()
