"""Work lists: built on the device from cu_seqlens, once a batch, and reused by every layer that shares the offsets.

A list depends only on the two offset tensors, the tile sizes and the mask. It is kept on the query offsets tensor
itself (so it lives as long as they do), under the versions of both tensors: an in-place change through torch makes a
new list. Writing to the offsets behind torch's back (a raw pointer, a replayed graph) is not seen. Each stream has its
own list, since a list also holds the tile counter of the launch in flight. While a graph is being captured nothing is
reused: the build is captured with the attention and runs again at each replay, so offsets may change between replays.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from jagtile.runtime.cuda.params import work_list_bytes

_ATTRIBUTE = "_jagtile_work_lists"
_MAX_LISTS = 256  # on one offsets tensor: streams x tile shapes


_reused_while_capturing = False


@contextmanager
def reuse_while_capturing() -> Iterator[None]:
    """For graphs whose offsets never change, such as a timer's: captured launches use the lists that exist.

    It holds for the whole process. The lists must have been built on the stream that captures.
    """
    global _reused_while_capturing
    before, _reused_while_capturing = _reused_while_capturing, True
    try:
        yield
    finally:
        _reused_while_capturing = before


def rebuilt_now() -> bool:
    """Whether a launch now must bring its own list: it is being captured into a graph whose offsets may change."""
    return not _reused_while_capturing and torch._C._cuda_isCurrentStreamCapturing()


class WorkList(NamedTuple):
    """A buffer on the device and what it was made for."""

    buffer: torch.Tensor
    address: int
    batch: int
    max_items: int
    version_q: int
    version_k: int
    cu_seqlens_k: weakref.ref[torch.Tensor]


def capacity(total_q: int, batch: int, block_m: int) -> int:
    """The most items that offsets of these totals can give."""
    return total_q // block_m + batch


def find(cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, key: tuple[int, ...]) -> WorkList | None:
    """The list made for these offsets as they are now, or None."""
    lists: dict[tuple[int, ...], WorkList] | None = getattr(cu_seqlens_q, _ATTRIBUTE, None)
    if lists is None:
        return None
    found = lists.get((id(cu_seqlens_k), *key))
    if (
        found is not None
        and found.version_q == cu_seqlens_q._version
        and found.version_k == cu_seqlens_k._version
        and found.cu_seqlens_k() is cu_seqlens_k
    ):
        return found
    return None


def allocate(cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, total_q: int, block_m: int) -> WorkList:
    """An unbuilt list for the offsets."""
    batch = cu_seqlens_q.numel() - 1
    max_items = capacity(total_q, batch, block_m)
    buffer = torch.empty(work_list_bytes(max_items, batch), dtype=torch.uint8, device=cu_seqlens_q.device)
    tracked = not cu_seqlens_q.is_inference() and not cu_seqlens_k.is_inference()
    return WorkList(
        buffer,
        buffer.data_ptr(),
        batch,
        max_items,
        cu_seqlens_q._version if tracked else -1,
        cu_seqlens_k._version if tracked else -1,
        weakref.ref(cu_seqlens_k),
    )


def keep(cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, key: tuple[int, ...], built: WorkList) -> None:
    """Remember a list on its offsets. Inference tensors count no versions: their lists are never reused."""
    if built.version_q < 0:
        return
    lists: dict[tuple[int, ...], WorkList] | None = getattr(cu_seqlens_q, _ATTRIBUTE, None)
    if lists is None or len(lists) >= _MAX_LISTS:
        lists = {}
        setattr(cu_seqlens_q, _ATTRIBUTE, lists)
    full_key = (id(cu_seqlens_k), *key)
    lists[full_key] = built
