"""The bytes that Python packs are the bytes that kernels read."""

from __future__ import annotations

import hashlib
import re
import struct as struct_module
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from jagtile.generator.render import TEMPLATES
from jagtile.generator.toolchain import find_cxx
from jagtile.runtime.artifact import ABI_VERSION
from jagtile.runtime.cuda import backward_params, list_builder, packed_backward_params, params


def _struct_fields(text: str, name: str) -> list[str]:
    body = re.search(rf"struct[^{{;]*\b{name} {{(.*?)\n}};", text, re.DOTALL)
    assert body is not None
    return re.findall(r"(\w+)(?:\[\d+\])?;", re.sub(r"//.*", "", body[1]))


NAMES = [
    *params.MAPS,
    *params.POINTERS,
    *params.INTEGERS,
    "scale_log2",
    *params.SPLIT_INTEGERS,
    *params.SPLIT_POINTERS,
    *params.ROW_TENSORS,
]


def _names_of_backward(packing: ModuleType) -> list[str]:
    return [*packing.MAPS, *packing.POINTERS, *packing.STRIDES, *packing.INTEGERS, *packing.FLOATS]


BACKWARD_NAMES = _names_of_backward(backward_params)
PACKED_BACKWARD_NAMES = _names_of_backward(packed_backward_params)
STRUCTS = pytest.mark.parametrize(
    ("header", "struct", "names", "packing"),
    [
        ("params", "Params", NAMES, params),
        ("backward_params", "BackwardParams", BACKWARD_NAMES, backward_params),
        ("packed_backward_params", "PackedBackwardParams", PACKED_BACKWARD_NAMES, packed_backward_params),
    ],
    ids=["forward", "backward", "packed backward"],
)


def _members(name: str, packing: ModuleType) -> list[str]:
    """What is packed of a field: of a tensor of rows its three words."""
    if name not in getattr(packing, "ROW_TENSORS", ()):
        return [name]
    return [f"{name}.address", f"{name}.token_stride", f"{name}.head_stride"]


def test_parameters_of_other_names_are_another_abi() -> None:
    """Packs outlive the jagtile that made them, and work lists are shared: a new meaning has a new name and version."""
    names = " ".join((*NAMES, *BACKWARD_NAMES, *PACKED_BACKWARD_NAMES))
    assert (ABI_VERSION, hashlib.sha256(names.encode()).hexdigest()[:8]) == (8, "4f4467de")


@STRUCTS
def test_names_and_order_match_the_header(header: str, struct: str, names: list[str], packing: ModuleType) -> None:
    text = (TEMPLATES / f"cuda/include/{header}.cuh").read_text()
    assert _struct_fields(text, struct) == names


@STRUCTS
def test_offsets_match_what_a_compiler_lays_out(
    header: str, struct: str, names: list[str], packing: ModuleType, tmp_path: Path
) -> None:
    members = [member for name in names for member in _members(name, packing)]
    prints = "".join(f'  printf("%zu\\n", offsetof({struct}, {member}));\n' for member in members)
    source = tmp_path / "layout.cpp"
    source.write_text(
        f'#include <cstddef>\n#include <cstdio>\n#include "cuda/include/{header}.cuh"\n'
        f'int main() {{\n{prints}  printf("%zu\\n", sizeof({struct}));\n}}\n'
    )
    program = tmp_path / "layout"
    subprocess.run([find_cxx().path, "-I", TEMPLATES, source, "-o", program], check=True)
    printed = [
        int(line) for line in subprocess.run([program], check=True, capture_output=True, text=True).stdout.split()
    ]
    maps = len(packing.MAPS)
    sizes = [struct_module.calcsize(f"<{code}") for scalars in _structs(packing) for code in _codes(scalars)]
    begins = [packing.SCALARS_OFFSET + sum(sizes[:i]) for i in range(len(sizes))]
    assert printed == [*(128 * i for i in range(maps)), *begins, packing.BLOCK_BYTES]


@STRUCTS
def test_every_scalar_is_packed(header: str, struct: str, names: list[str], packing: ModuleType) -> None:
    count = 0
    for scalars in _structs(packing):
        values = range(1, len(_codes(scalars)) + 1)
        assert list(scalars.unpack(scalars.pack(*values))) == list(values)
        count += len(values)
    assert count == sum(len(_members(name, packing)) for name in names) - len(packing.MAPS)


def _structs(packing: ModuleType) -> list[struct_module.Struct]:
    return [packing.SCALARS, *([packing.SPLIT_SCALARS, packing.ROWS] if hasattr(packing, "SPLIT_SCALARS") else [])]


def _codes(scalars: struct_module.Struct) -> str:
    """One letter a scalar."""
    return "".join(int(count or 1) * code for count, code in re.findall(r"(\d*)([a-zA-Z])", scalars.format))


@pytest.mark.parametrize(("max_items", "extra_ints", "expected"), [(0, 0, 64), (10, 0, 64 + 640), (1, 6, 64 + 64 + 24)])
def test_work_list_bytes(max_items: int, extra_ints: int, expected: int) -> None:
    assert params.work_list_bytes(max_items, extra_ints) == expected


def test_scratch_of_a_backward_is_dq_in_float32_and_delta() -> None:
    total_q, heads, dim = 1000, 4, 96
    assert backward_params.scratch_bytes(total_q, heads, dim) == 4 * total_q * heads * (dim + 1)
    assert backward_params.scratch_bytes(total_q, heads, dim, others=60) == 4 * total_q * heads * (dim + 1) + 4 * 60


def test_tiles_in_pieces_have_sums_and_counters_each() -> None:
    assert backward_params.tail_words(0, 128, 128) == 0
    assert backward_params.tail_words(5, 128, 96 + 40) == 3 + 5 * (128 * (96 + 40) + 4)


def test_builders_are_launched_as_they_were_compiled() -> None:
    text = (TEMPLATES / "cuda/include/list_builder.cuh").read_text()
    found = {name: int(value) for name, value in re.findall(r"\b(k\w+) = (\d+)[,;]", text)}
    assert list_builder.ALONE_THREADS[1] == found["kAloneThreads"]
    assert list_builder.CLUSTER_THREADS[1] == found["kClusterThreads"]
    assert found["kClusterCtas"] == list_builder.CLUSTER_CTAS
    assert found["kPerThread"] * found["kAloneThreads"] == list_builder.MOST_SEQUENCES_ALONE
