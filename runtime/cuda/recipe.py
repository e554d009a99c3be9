"""A launch but for addresses: what a plan comes to, for code that is not Python's to carry out (templates/host)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from jagtile.runtime.cuda.block import WORD
from jagtile.runtime.cuda.tensor_map import MAP_BYTES

Word = tuple[int, str, int]  # where in a block an address is, of which operand, and how many bytes beyond it


class Recipe(NamedTuple):
    """What a launcher does in every call of one plan. Operands are called as the launcher's arguments are, and
    ``work_list`` and ``scratch``; the address of one that is None is 0.
    """

    block: bytes
    words: tuple[Word, ...]
    kernels: tuple[tuple[Any, int, int, int], ...]  # function, CTAs, threads of a CTA, bytes of shared memory
    unaligned: int  # bits that no address of an operand with heads may have
    scratch_bytes: int = 0
    list_key: tuple[object, ...] | None = None  # of the work list that kernels read
    dependent: bool = False  # each kernel is launched while the one before may still run, and waits for it itself


def map_words(maps: Iterable[str]) -> list[Word]:
    """The base addresses of the tensor maps that come first in a block, which are called after operands."""
    return [(at * MAP_BYTES, name.removeprefix("map_").removeprefix("rows_"), 0) for at, name in enumerate(maps)]


def pointer_words(pointers: Iterable[str], offset: int, inside: dict[str, tuple[str, int] | None]) -> list[Word]:
    """The pointers that lie side by side at an offset: operands, or what is ``inside`` of one, or of none."""
    found = [(offset + at * WORD, inside.get(name, (name, 0))) for at, name in enumerate(pointers)]
    return [(at, *place) for at, place in found if place is not None]
