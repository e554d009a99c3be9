"""Work lists: built on the device from cu_seqlens, once a batch, and reused by every layer that shares the offsets.

A list depends only on the two offset tensors, the tile sizes, the mask and how many items it has room for, by which it
is laid out; a backward's on the heads and the number of queries too. It is kept for as long as both tensors live, under
their versions: an in-place change through torch makes a new list. Writing to the offsets behind torch's back (a raw
pointer, a replayed graph) is not seen. Each stream has its own list, since a list also holds the tile counter of the
launch in flight. While a graph is being captured nothing is reused: the build is captured with the attention and runs
again at each replay, so offsets may change between replays.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch

from jagtile.runtime.cuda.params import work_list_bytes
from jagtile.runtime.errors import UnsupportedError

MAX_TOKENS = 1 << 30  # of the ragged maps (tensor_map.py)
MAX_TILES = 1 << 30  # counters are 32-bit

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
    max_items: int


class _Entry(NamedTuple):
    built: WorkList
    version_q: int
    version_k: int
    cu_seqlens_q: weakref.ref[torch.Tensor]
    cu_seqlens_k: weakref.ref[torch.Tensor]


# By the identities of both tensors and what else a list depends on. Not on the tensors themselves: an attribute of
# theirs would be copied and pickled with them.
_ENTRIES: dict[tuple[int, int, Hashable], _Entry] = {}


class Mirror(Protocol):
    """Who keeps the same lists. ``key``: identities of both tensors, and what is beside them the key of ``keep``."""

    def keep(
        self,
        key: tuple[int, int, Hashable],
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        buffer: torch.Tensor,
    ) -> None:
        """A list was made for the offsets as they are now."""
        ...

    def drop(self, key: tuple[int, int, Hashable]) -> None:
        """One of the tensors is no more."""
        ...


_mirror: Mirror | None = None


def mirror(to: Mirror | None) -> None:
    """Tell ``to`` of all lists, those that there are and those to come."""
    global _mirror
    _mirror = to
    for key, entry in list(_ENTRIES.items()):
        q, k = entry.cu_seqlens_q(), entry.cu_seqlens_k()
        if to is None or q is None or k is None:
            continue
        if (q._version, k._version) == (entry.version_q, entry.version_k):
            to.keep(key, q, k, entry.built.buffer)


def capacity(total: int, batch: int, block: int) -> int:
    """The most blocks of ``block`` tokens that sequences of so many tokens in all can give."""
    return total // block + batch


def find(cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, key: Hashable) -> WorkList | None:
    """The list made for these offsets as they are now, or None."""
    found = _ENTRIES.get((id(cu_seqlens_q), id(cu_seqlens_k), key))
    if (
        found is not None
        and found.cu_seqlens_q() is cu_seqlens_q
        and found.version_q == cu_seqlens_q._version
        and (
            cu_seqlens_k is cu_seqlens_q
            or (found.cu_seqlens_k() is cu_seqlens_k and found.version_k == cu_seqlens_k._version)
        )
    ):
        return found.built
    return None


def check_tokens(total_q: int, total_k: int) -> None:
    """UnsupportedError for more tokens than kernels can count."""
    if max(total_q, total_k) > MAX_TOKENS:
        raise UnsupportedError(f"{total_q} queries and {total_k} keys; served: up to {MAX_TOKENS} tokens each")


def allocate(cu_seqlens_q: torch.Tensor, max_items: int, extra_ints: int) -> WorkList:
    """An unbuilt list of the offsets with room for so many items, and for ints behind: tickets where keys are split
    (runtime/head_packs.py); the builder's scratch and two bits a query in a backward.
    """
    buffer = torch.empty(work_list_bytes(max_items, extra_ints), dtype=torch.uint8, device=cu_seqlens_q.device)
    return WorkList(buffer, buffer.data_ptr(), max_items)


def keep(cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, key: Hashable, built: WorkList) -> None:
    """Remember a built list for as long as both tensors live.

    Not one of inference tensors, which count no versions, nor one whose build a graph captured and has not run.
    """
    if cu_seqlens_q.is_inference() or cu_seqlens_k.is_inference() or torch._C._cuda_isCurrentStreamCapturing():
        return
    full_key = (id(cu_seqlens_q), id(cu_seqlens_k), key)

    def forget(_: object) -> None:
        _ENTRIES.pop(full_key, None)
        if _mirror is not None:
            _mirror.drop(full_key)

    _ENTRIES[full_key] = _Entry(
        built,
        cu_seqlens_q._version,
        cu_seqlens_k._version,
        weakref.ref(cu_seqlens_q, forget),
        weakref.ref(cu_seqlens_k, forget),
    )
    if _mirror is not None:
        _mirror.keep(full_key, cu_seqlens_q, cu_seqlens_k, built.buffer)
