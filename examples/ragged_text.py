"""Real text, ragged by nature: the functions of Python's own standard library, a sequence of bytes each."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch

BYTES = 256  # the vocabulary


def functions(max_bytes: int) -> Iterator[bytes]:
    """The source of every function of the standard library's top-level modules, always in the same order."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for function in _functions_of(path):
            yield function[:max_bytes]


@cache
def _functions_of(path: Path) -> tuple[bytes, ...]:
    source = path.read_bytes()
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return ()
    lines = source.splitlines(keepends=True)
    found = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    return tuple(b"".join(lines[node.lineno - 1 : node.end_lineno]) for node in found)


class Batch(NamedTuple):
    """Nested tensors (B, j) of one raggedness."""

    tokens: torch.Tensor
    places: torch.Tensor  # of each token in its sequence


def nested_batch(texts: Sequence[bytes], device: torch.device) -> Batch:
    """Texts as a batch whose shortest and longest lengths are cached."""
    lengths = [len(text) for text in texts]
    offsets = torch.tensor([0, *accumulate(lengths)], device=device)
    rows = (
        torch.frombuffer(bytearray(b"".join(texts)), dtype=torch.uint8).long(),
        torch.cat([torch.arange(length) for length in lengths]),
    )
    return Batch(
        *(
            torch.nested.nested_tensor_from_jagged(
                values.to(device), offsets, min_seqlen=min(lengths), max_seqlen=max(lengths)
            )
            for values in rows
        )
    )
