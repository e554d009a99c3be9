"""Build the host side of eager calls (templates/host): an extension module of Python against torch's C++ headers.

It is an artifact like a kernel's, kept in the same store, and in a kernel pack where that was asked for. Its key has
torch's version and Python's ABI in the place of the compiler's version: what one compiler made serves where there is
none.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sysconfig
import warnings
from functools import lru_cache
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from types import ModuleType

import torch

from jagtile.generator import elf
from jagtile.generator.ninja_run import Compilation, compile_all
from jagtile.generator.toolchain import find_cxx
from jagtile.runtime import packs
from jagtile.runtime.artifact import ABI_VERSION, Artifact, ArtifactMeta, CompileReport
from jagtile.runtime.errors import BuildError, CompilerNotFoundError, JagtileWarning
from jagtile.runtime.pack import HOST
from jagtile.runtime.settings import settings
from jagtile.runtime.store import ArtifactStore

NAME = "_jagtile_host"
_FOLDER = Path(__file__).resolve().parent.parent / "templates" / "host"  # render.py, which knows it too, needs jinja2
_SYMBOL = f"PyInit_{NAME}"
_MAIN = "module.cpp"
_FLAGS = ("-std=c++20", "-O2", "-fPIC", "-shared", "-fvisibility=hidden")
_LIBRARIES = ("torch_python", "torch_cpu", "c10")
_MAPPED = ("torch", "python")  # what headers' folders are called in the binary, wherever they are
_SHOWN_OUTPUT = 4000  # characters of a compiler's output in a message


def built() -> ModuleType:
    """The module, from a pack, the cache or built. CompilerNotFoundError where it is not there and nothing can build
    it, BuildError where the compiler fails, ImportError where it can't be loaded.
    """
    packed = packs.host(_key())
    if packed is not None:
        try:
            return load(packed.path)
        except ImportError as error:  # of a newer C library than here, say
            what = f"the native host of the kernel pack {packed.path.parents[1]} can't be loaded: {error}"
            warnings.warn(f"{what}; it is sought elsewhere", JagtileWarning, stacklevel=2)
    return load(artifact(may_build=settings.jit).path)


def artifact(may_build: bool = True) -> Artifact:
    """The module on disk, from the cache or built, whatever packs have. CompilerNotFoundError where it is not there and
    nothing can or may build it, BuildError where the compiler fails.
    """
    store, key = ArtifactStore(), _key()
    kept = store.get(key)
    if kept is not None:
        return kept
    if not may_build:
        raise CompilerNotFoundError("the native host is not there, and JAGTILE_JIT=0 forbids building it")
    with store.lock(key):
        return store.get(key) or _build(store, key)


def origin() -> str | None:
    """Where ``built`` finds the module without building it: "pack:<name>", "cache", or None."""
    key = _key()
    packed = packs.host(key)
    if packed is not None:
        return packed.origin
    return "cache" if ArtifactStore().holds(key) else None


@lru_cache(maxsize=8)
def load(path: Path) -> ModuleType:
    """Import a built module."""
    loader = ExtensionFileLoader(NAME, str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_file_location(NAME, path, loader=loader))  # type: ignore[arg-type]
    loader.exec_module(module)
    return module


def _sources() -> dict[str, str]:
    return {
        path.name: path.read_text(encoding="utf-8")
        for path in sorted(_FOLDER.iterdir())
        if path.suffix in (".h", ".cpp")
    }


def _flags() -> tuple[str, ...]:
    return (*_FLAGS, f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}")


def _key() -> str:
    """sha256 of what the module depends on: sources, flags, torch, Python."""
    identity = {
        "abi": ABI_VERSION,
        "flags": _flags(),
        "mapped": _MAPPED,
        "python": sysconfig.get_config_var("SOABI"),
        "sources": _sources(),
        "torch": [torch.__version__, torch.version.git_version],
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _build(store: ArtifactStore, key: str) -> Artifact:
    compiler, binary = find_cxx(), f"{NAME}.so"
    torchs = Path(torch.__file__).parent
    includes = (torchs / "include", Path(sysconfig.get_path("include")))
    command = (
        *(*compiler.command, *_flags()),
        *(word for folder in includes for word in ("-isystem", str(folder))),
        *(f"-ffile-prefix-map={folder}={name}" for name, folder in zip(_MAPPED, includes, strict=True)),
        *(_MAIN, "-o", binary, "-L", str(torchs / "lib")),
        *(f"-l{library}" for library in _LIBRARIES),
    )
    compilation = Compilation(key, command, _sources())
    with store.workspace() as workspace:
        (compiled,) = compile_all([compilation], workspace, parallel=1)
        problem = f"the compiler gave exit code {compiled.exit_code}" if compiled.exit_code else None
        problem = problem or elf.defect(compiled.folder / binary, _SYMBOL)
        if problem is not None:
            kept = store.keep_failure(key, {**compilation.files, "log": compiled.output})
            raise BuildError(
                f"the native host does not build: {problem} ({compiler.version}); source and log are in {kept}\n"
                f"{compiled.output[:_SHOWN_OUTPUT]}"
            )
        meta = ArtifactMeta(
            abi=ABI_VERSION,
            key=key,
            target=HOST,
            spec=HOST,
            config={"torch": str(torch.__version__), "python": str(sysconfig.get_config_var("SOABI"))},
            symbol=_SYMBOL,
            file=binary,
            size=0,
            sha256="",
            source_sha256=hashlib.sha256("\0".join(_sources().values()).encode()).hexdigest(),
            compiler=compiler.version,
            launch={},
            report=CompileReport(seconds=compiled.seconds),
        )
        return store.publish(key, compiled.folder / binary, meta)
