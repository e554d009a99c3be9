"""The parameter block that the launcher packs is the one that the kernels read."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from jagtile.generator.render import TEMPLATES
from jagtile.generator.toolchain import find_cxx
from jagtile.runtime.cpu import params
from jagtile.runtime.errors import CompilerNotFoundError

HEADER = TEMPLATES / "cpu" / "params.h"


def test_the_block_has_the_header_s_layout(tmp_path: Path) -> None:
    try:
        compiler = find_cxx().path
    except CompilerNotFoundError as error:
        pytest.skip(f"no C++ compiler: {error}")
    offsets = {"q": 0, "cu_seqlens_k": 6 * 8, "q_strides": 7 * 8, "total_q": 17 * 8, "batch": 19 * 8}
    offsets |= {"scale": params.BLOCK.size - 24, "kept": params.BLOCK.size - 20, "offset": params.BLOCK.size - 8}
    checks = [f"offsetof(Params, {field}) == {offset}" for field, offset in offsets.items()]
    checks.append(f"sizeof(Params) == {params.BLOCK_BYTES}")
    gradients = {"dout": 0, "dv": 4 * 8, "dout_strides": 5 * 8, "dv_strides": 13 * 8}
    checks += [
        f"offsetof(GradientParams, {field}) == {params.BLOCK_BYTES + offset}" for field, offset in gradients.items()
    ]
    checks.append(f"sizeof(GradientParams) == {params.GRADIENT_BLOCK_BYTES}")
    checks.append(f"kBadOffsets == {params.BAD_OFFSETS} && kNoMemory == {params.NO_MEMORY}")
    source = tmp_path / "check.cpp"
    lines = ["#include <cstddef>", '#include "cpu/params.h"', *(f"static_assert({check});" for check in checks)]
    source.write_text("\n".join(lines) + "\n")
    subprocess.run([compiler, "-std=c++17", "-fsyntax-only", "-I", TEMPLATES, source], check=True)
