"""A toy kernel for both targets, a C++ compiler that counts its runs, and a cache folder for each test."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import pytest

from jagtile.generator import render, spaces
from jagtile.generator.spec import KernelSpec
from jagtile.generator.tile import Knob, TileConfig, Variant
from jagtile.generator.toolchain import find_cxx
from jagtile.runtime.errors import CompilerNotFoundError
from jagtile.runtime.settings import settings

CPP = """\
{% include "header.j2" %}
#include "toy/offset.h"
{% if config.trouble == "syntax" %}
this is no C++;
{% elif config.trouble == "undefined" %}
{{ nothing_of_this_name }}
{% endif %}
{% if config.trouble == "nosymbol" %}
static int hidden;
{% else %}
extern "C" __attribute__((visibility("default"))) int {{ symbol }}() { return {{ config.number }} + OFFSET; }
{% endif %}
"""
CUDA = """\
{% include "header.j2" %}
#include "toy/offset.h"
extern "C" __global__ void helper(float* p) { p[threadIdx.x] += OFFSET; }
{% if config.trouble == "spill" %}
extern "C" __global__ void __launch_bounds__(1024, 2) {{ symbol }}(float* p, int n) {
  float a[200];
#pragma unroll
  for (int i = 0; i < 200; i++) a[i] = p[i * n + threadIdx.x];
  for (int j = 0; j < n; j++) {
#pragma unroll
    for (int i = 0; i < 200; i++) a[i] = a[i] * a[(i * 7 + 1) % 200] + OFFSET;
  }
#pragma unroll
  for (int i = 0; i < 200; i++) p[i * n + threadIdx.x] = a[i];
}
{% elif config.trouble == "setmaxnreg" %}
extern "C" __global__ void {{ symbol }}(float* p) {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
  p[threadIdx.x] += {{ config.number }};
}
{% else %}
extern "C" __global__ void __launch_bounds__(128) {{ symbol }}(float* p) {
  __shared__ float shared[128];
  shared[threadIdx.x] = p[threadIdx.x];
  __syncthreads();
  p[threadIdx.x] = shared[127 - threadIdx.x] + {{ "no_such_name" if config.trouble == "syntax" else config.number }};
}
{% endif %}
"""
# Writes a line a compilation into $TOY_LOG, then runs what TOY_HOOK says, then the real compiler.
COMPILER = """\
#!/bin/sh
case "$*" in
  *" -o "*) echo run >> "$TOY_LOG"; eval "$TOY_HOOK" ;;
esac
exec {real} "$@"
"""


@dataclass(frozen=True)
class ToyConfig(TileConfig):
    algorithm = "toy"

    number: int = field(metadata={"short": "n"})
    trouble: str = field(default="none", metadata={"short": "t"})


class ToySpace:
    algorithm = "toy"
    config_type: type[TileConfig] = ToyConfig
    threads = 128
    flags: tuple[str, ...] = ()

    def __init__(self, target: str, template: str) -> None:
        self.target, self.template = target, template

    def serves(self, spec: KernelSpec) -> str | None:
        return None

    def knobs(self, spec: KernelSpec) -> Mapping[str, tuple[Knob, ...]]:
        return {"number": (1, 2), "trouble": ("none",)}

    def rejection(self, spec: KernelSpec, config: TileConfig) -> str | None:
        return "13 brings bad luck" if config.to_dict()["number"] == 13 else None

    def default(self, spec: KernelSpec) -> TileConfig:
        return ToyConfig(1)

    def context(self, spec: KernelSpec, config: TileConfig) -> Mapping[str, object]:
        return {}

    def launch(self, spec: KernelSpec, config: TileConfig) -> Mapping[str, int]:
        return {"threads": self.threads}

    def compile_flags(self, spec: KernelSpec, config: TileConfig) -> tuple[str, ...]:
        return self.flags

    def predicted_registers(self, spec: KernelSpec, config: TileConfig) -> int:
        return 0


class MakeVariant(Protocol):
    def __call__(self, number: int, trouble: str = "none", target: str = "cpu") -> Variant: ...


@pytest.fixture
def templates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A templates folder of the test's own, with the toy kernel and its header."""
    folder = tmp_path / "templates"
    (folder / "toy").mkdir(parents=True)
    (folder / "toy" / "offset.h").write_text("#define OFFSET 100\n")
    (folder / "toy.cpp.j2").write_text(CPP)
    (folder / "toy.cu.j2").write_text(CUDA)
    shutil.copy(render.TEMPLATES / "header.j2", folder)
    monkeypatch.setattr(render, "TEMPLATES", folder)
    for cache in (render.environment, render.render_unchecked):
        cache.cache_clear()
    yield folder
    for cache in (render.environment, render.render_unchecked):
        cache.cache_clear()


@pytest.fixture
def toy(templates: Path, monkeypatch: pytest.MonkeyPatch) -> MakeVariant:
    """``toy(number, trouble, target)``: a variant whose CPU kernel returns ``number + 100``."""
    monkeypatch.setattr(spaces, "ALL", (ToySpace("cpu", "toy.cpp.j2"), ToySpace("sm_90a", "toy.cu.j2")))
    spec = KernelSpec.parse("fwd_fp32_d8")

    def make(number: int, trouble: str = "none", target: str = "cpu") -> Variant:
        return Variant(target, spec, ToyConfig(number, trouble))

    return make


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder and an empty temporary folder, in force for the test."""
    folder, temporary = tmp_path / "cache", tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    with settings.override(cache_dir=folder):
        yield folder


class Compiler:
    """A C++ compiler that counts its runs and can be made to misbehave."""

    def __init__(self, folder: Path, real: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path = folder / "counting-compiler"
        self.path.write_text(COMPILER.format(real=real))
        self.path.chmod(0o755)
        self._log = folder / "compilations"
        self._environment = monkeypatch
        monkeypatch.setenv("CXX", str(self.path))
        monkeypatch.setenv("TOY_LOG", str(self._log))
        self.hook("")

    def hook(self, shell: str) -> None:
        """Shell text to run before each compilation."""
        self._environment.setenv("TOY_HOOK", shell)

    @property
    def runs(self) -> int:
        """Compilations begun so far."""
        return len(self._log.read_text().splitlines()) if self._log.exists() else 0


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    try:
        real = find_cxx().path
    except CompilerNotFoundError as error:
        pytest.skip(f"needs a C++ compiler: {error}")
    return Compiler(tmp_path, real, monkeypatch)
