"""Real text, ragged by nature: the functions of Python's own standard library, a sequence of bytes each."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch

BYTES = 256  # the vocabulary


def functions(max_bytes: int) -> Iterator[bytes]:
    """The source of every function of the standard library's top-level modules, always in the same order."""
    for path in _modules():
        for function in _functions_of(path):
            yield function[:max_bytes]


def documents() -> Iterator[bytes]:
    """Longer texts: the source of every class and function that is not part of another, whole."""
    for path in _modules():
        source = path.read_bytes()
        yield from _sources(source, (n for n in _parsed(source).body if isinstance(n, ast.FunctionDef | ast.ClassDef)))


def _modules() -> list[Path]:
    return sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))


@cache
def _functions_of(path: Path) -> tuple[bytes, ...]:
    source = path.read_bytes()
    return tuple(_sources(source, (n for n in ast.walk(_parsed(source)) if isinstance(n, ast.FunctionDef))))


def _parsed(source: bytes) -> ast.Module:
    try:
        return ast.parse(source)
    except SyntaxError:
        return ast.Module([], [])


def _sources(source: bytes, nodes: Iterable[ast.FunctionDef | ast.ClassDef]) -> Iterator[bytes]:
    lines = source.splitlines(keepends=True)
    for node in nodes:
        yield b"".join(lines[node.lineno - 1 : node.end_lineno])


class Batch(NamedTuple):
    """Nested tensors (B, j) of one raggedness."""

    tokens: torch.Tensor
    places: torch.Tensor  # of each token in its sequence


def byte_tokens(text: bytes) -> torch.Tensor:
    """A text as tokens (length,)."""
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def nested_batch(sequences: Sequence[torch.Tensor], device: torch.device) -> Batch:
    """Token sequences (length,) as a batch whose shortest and longest lengths are cached."""
    lengths = [len(sequence) for sequence in sequences]
    offsets = torch.tensor([0, *accumulate(lengths)], device=device)
    rows = torch.cat(list(sequences)), torch.cat([torch.arange(length) for length in lengths])
    return Batch(
        *(
            torch.nested.nested_tensor_from_jagged(
                values.to(device), offsets, min_seqlen=min(lengths), max_seqlen=max(lengths)
            )
            for values in rows
        )
    )
