"""q, k, v and out of a forward call on their way into a parameter block."""

from __future__ import annotations

from collections.abc import Callable

import torch

from jagtile.runtime.cuda import params
from jagtile.runtime.cuda.block import ParameterBlock
from jagtile.runtime.cuda.tensor_map import MapCache, addressable

_BYTES = 2  # of an element


def fill_maps(
    block: ParameterBlock, maps: MapCache, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor
) -> bool:
    """Write the four tensor maps into a block. False where TMA cannot address a tensor (see ``forward_copies``)."""
    (tokens_q, heads, _), (tokens_k, heads_kv, _) = q.shape, v.shape
    layout = (tokens_q > 1, tokens_k > 1, heads, heads_kv, q.stride(), k.stride(), v.stride(), out.stride())
    return maps.fill(block, layout, (q, k, v, out), (q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr()))


def fill_rows(block: ParameterBlock, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> None:
    """Write the four tensors' addresses and strides into a block, for kernels that copy rows of any alignment."""
    params.ROWS.pack_into(
        block.data,
        params.ROWS_OFFSET,
        *(word for t in (q, k, v, out) for word in (t.data_ptr(), _BYTES * t.stride(0), _BYTES * t.stride(1))),
    )


def fill_out_rows(block: ParameterBlock, out: torch.Tensor) -> None:
    """As ``fill_rows``, of ``out`` alone, for kernels that store it from registers."""
    token, head, _ = out.stride()
    params.OUT_ROWS.pack_into(block.data, params.OUT_ROWS_OFFSET, out.data_ptr(), _BYTES * token, _BYTES * head)


def forward_copies(
    forward: Callable[..., None],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    out: torch.Tensor,
    *rest: object,
) -> None:
    """``forward`` with copies of what TMA cannot address; every ordinary layout, packed QKV views included, it can."""
    if k.shape[1] > 1 and k.stride(1) == v.stride(1) == 0:  # one head, expanded
        k, v = k[:, :1], v[:, :1]
    q, k, v = (t if addressable(t) else t.clone(memory_format=torch.contiguous_format) for t in (q, k, v))
    target = out if addressable(out) else torch.empty_like(out, memory_format=torch.contiguous_format)
    forward(q, k, v, cu_seqlens_q, cu_seqlens_k, target, *rest)
    if target is not out:
        out.copy_(target)
