"""How the compiled host is had: from the cache, built, or not at all, without which Python serves all."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from jagtile.generator import host
from jagtile.runtime import native
from jagtile.runtime.errors import BuildError, CompilerNotFoundError, JagtileWarning
from jagtile.runtime.settings import settings


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """A process that has not begun to have it, with a CUDA driver. What gets connected."""
    connected: list[object] = []
    functions = SimpleNamespace(
        **dict.fromkeys(("cuLaunchKernel", "cuLaunchKernelEx", "cuStreamIsCapturing"), ctypes.CDLL(None).labs)
    )
    monkeypatch.setattr(native, "_begun", None)
    monkeypatch.setattr(native, "connect", lambda module, *_: connected.append(module))
    monkeypatch.setattr(native.ctypes, "CDLL", lambda _: functions)
    return connected


def refuse(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def built() -> None:
        raise error

    monkeypatch.setattr(host, "built", built)


def test_it_is_had_once_and_in_time_where_that_is_asked_for(fresh, extension):
    with settings.override(native_host="wait"):
        for _ in range(2):
            native.start()
            assert fresh == [extension]


def test_a_thread_imports_nothing_of_torch_while_it_connects(extension):
    """Modules that import each other must not be imported by two threads at a time."""
    program = """
import sys
from jagtile.generator import host
from jagtile.runtime import native
module = host.built()
before = set(sys.modules)
native.connect(module, 1, 1, 1, "cpu")
print(sorted(name for name in set(sys.modules) - before if name.startswith("torch")))
"""
    prologue = "import torch\ntorch._C._cuda_getCurrentRawStream = None\n"
    ran = subprocess.run([sys.executable, "-c", prologue + program], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_off_is_off(fresh):
    with settings.override(native_host="off"):
        native.start(wait=True)
    assert not fresh


def test_nothing_waits_for_it_by_default(fresh, monkeypatch):
    import threading

    go = threading.Event()
    monkeypatch.setattr(host, "built", lambda: go.wait(60))
    with settings.override(native_host="auto"):
        native.start()
        assert not fresh
        go.set()
        native.start(wait=True)
    assert fresh


def test_without_a_compiler_there_is_no_word(fresh, monkeypatch, recwarn):
    refuse(monkeypatch, CompilerNotFoundError("no C++ compiler was found"))
    with settings.override(native_host="wait"):
        native.start()
    assert not fresh
    assert not recwarn


@pytest.mark.filterwarnings("always")
def test_a_failure_is_told(fresh, monkeypatch):
    refuse(monkeypatch, BuildError("error: no member"))
    with settings.override(native_host="wait"), pytest.warns(JagtileWarning, match="no member"):
        native._have()
    assert not fresh


def test_what_is_in_the_cache_needs_no_compiler(extension, monkeypatch):
    monkeypatch.setattr(host, "find_cxx", lambda: pytest.fail("a compiler was looked for"))
    with settings.override(jit=False):
        assert host.built() is extension


def test_jit_may_be_forbidden(tmp_path):
    with settings.override(jit=False, cache_dir=tmp_path), pytest.raises(CompilerNotFoundError, match="JAGTILE_JIT"):
        host.built()


def test_a_compilers_words_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(host, "_sources", lambda: {"module.cpp": "#error no such torch\n"})
    with settings.override(cache_dir=tmp_path), pytest.raises(BuildError, match="no such torch"):
        host.built()
    assert list(tmp_path.glob("v1/failed/*/log"))


def test_the_key_has_torchs_version(monkeypatch):
    before = host._key()
    monkeypatch.setattr(torch, "__version__", "2.99")
    assert host._key() != before


def test_the_module_is_no_ordinary_import(extension):
    assert host.NAME not in sys.modules
