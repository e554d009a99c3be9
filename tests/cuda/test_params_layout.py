"""The bytes that Python packs are the bytes that kernels read."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from jagtile.generator.render import TEMPLATES
from jagtile.generator.toolchain import find_cxx
from jagtile.runtime.cuda import params


def _struct_fields(text: str, name: str) -> list[str]:
    body = re.search(rf"struct[^{{;]*\b{name} {{(.*?)\n}};", text, re.DOTALL)
    assert body is not None
    return re.findall(r"(\w+)(?:\[\d+\])?;", re.sub(r"//.*", "", body[1]))


def test_names_and_order_match_the_header() -> None:
    header = (TEMPLATES / "cuda/include/params.cuh").read_text()
    assert _struct_fields(header, "Params") == [*params.MAPS, *params.POINTERS, *params.INTEGERS, "scale_log2"]


def test_offsets_match_what_a_compiler_lays_out(tmp_path: Path) -> None:
    names = [*params.MAPS, *params.POINTERS, *params.INTEGERS, "scale_log2"]
    prints = "".join(f'  printf("%zu\\n", offsetof(Params, {name}));\n' for name in names)
    source = tmp_path / "layout.cpp"
    source.write_text(
        '#include <cstddef>\n#include <cstdio>\n#include "cuda/include/params.cuh"\n'
        f'int main() {{\n{prints}  printf("%zu\\n", sizeof(Params));\n}}\n'
    )
    program = tmp_path / "layout"
    subprocess.run([find_cxx().path, "-I", TEMPLATES, source, "-o", program], check=True)
    printed = [
        int(line) for line in subprocess.run([program], check=True, capture_output=True, text=True).stdout.split()
    ]
    pointers = params.SCALARS_OFFSET
    integers = pointers + 8 * len(params.POINTERS)
    expected = [128 * i for i in range(len(params.MAPS))]
    expected += [pointers + 8 * i for i in range(len(params.POINTERS))]
    expected += [integers + 4 * i for i in range(len(params.INTEGERS) + 1)]
    assert printed == [*expected, params.BLOCK_BYTES]


def test_every_scalar_is_packed() -> None:
    values = range(1, len(params.POINTERS) + len(params.INTEGERS) + 2)
    packed = params.SCALARS.pack(*values)
    assert list(params.SCALARS.unpack(packed)) == [float(v) if v == values[-1] else v for v in values]


@pytest.mark.parametrize(("max_items", "batch", "expected"), [(0, 0, 64 + 4), (10, 3, 64 + 640 + 16)])
def test_work_list_bytes(max_items: int, batch: int, expected: int) -> None:
    assert params.work_list_bytes(max_items, batch) == expected
