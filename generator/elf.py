"""Whether a file is a whole ELF binary that defines a symbol: what a compiler's exit code alone does not promise."""

from __future__ import annotations

import struct
from pathlib import Path

_MAGIC = b"\x7fELF"
_HEADER_BYTES = 64
_CLASS_64, _LITTLE = 2, 1


def defect(binary: Path, symbol: str) -> str | None:
    """None where the file is whole and holds the symbol's name, else what is wrong with it."""
    try:
        content = binary.read_bytes()
    except FileNotFoundError:
        return "the compiler wrote no file"
    if len(content) < _HEADER_BYTES or content[:4] != _MAGIC or content[4] != _CLASS_64:
        return f"the compiler wrote {len(content)} bytes that are no 64-bit ELF file"
    order = "<" if content[5] == _LITTLE else ">"
    segments_at, sections_at = struct.unpack_from(f"{order}QQ", content, 32)
    segment_size, segments, section_size, sections = struct.unpack_from(f"{order}HHHH", content, 54)
    end = max(segments_at + segment_size * segments, sections_at + section_size * sections)
    if end > len(content):
        return f"the compiler wrote {len(content)} bytes of an ELF file of at least {end}"
    if symbol.encode() + b"\0" not in content:
        return f"the binary defines no {symbol}"
    return None
