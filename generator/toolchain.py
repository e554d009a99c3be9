"""Find the compilers and ninja, and the version strings that stand for them in artifact keys."""

from __future__ import annotations

import logging
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from jagtile.runtime.errors import CompilerNotFoundError
from jagtile.runtime.settings import settings

log = logging.getLogger("jagtile")

_USUAL_NVCC = "/usr/local/cuda/bin/nvcc"
_NVCC_FLAGS = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")  # nvcc adds these to every command line by itself
_ANSWER_SECONDS = 60


@dataclass(frozen=True)
class Toolchain:
    """A compiler. ``version`` identifies what it emits; ``path`` (absolute) is only where it happens to be."""

    path: Path
    version: str
    arguments: tuple[str, ...] = ()  # that belong before all others, as in CXX="ccache g++"

    @property
    def command(self) -> tuple[str, ...]:
        """How a command line begins."""
        return (str(self.path), *self.arguments)


def find_nvcc() -> Toolchain:
    """The CUDA compiler: JAGTILE_NVCC, pip and conda toolkits and CUDA_HOME, PATH, /usr/local/cuda.

    CompilerNotFoundError lists what was tried. A JAGTILE_NVCC that is no working nvcc is an error, never passed over.
    """
    flags = " ".join(filter(None, (os.environ.get(name, "").strip() for name in _NVCC_FLAGS)))
    toolkits = tuple(f"{name} ({os.environ.get(name) or 'not set'})" for name in ("CUDA_HOME", "CUDA_PATH"))
    return _nvcc(settings.nvcc, os.environ.get("PATH", ""), flags, toolkits)


def find_cxx() -> Toolchain:
    """The C++ compiler: CXX, then g++, c++ and clang++ on the PATH. CompilerNotFoundError lists what was tried.

    CXX may have several words, such as ``ccache g++``. One that does not work is passed over with a logged warning: the
    variable is not ours alone.
    """
    return _cxx(os.environ.get("CXX", "").strip(), os.environ.get("PATH", ""))


def find_ninja() -> Path:
    """The ninja of the ``ninja`` package, else the PATH's. CompilerNotFoundError where there is neither."""
    folder = _ninja_package()
    if folder is not None and os.access(folder / "ninja", os.X_OK):
        return folder / "ninja"
    found = shutil.which("ninja")
    if found is None:
        package = "not installed" if folder is None else f"nothing to run in {folder}"
        raise CompilerNotFoundError(
            f"no ninja was found; tried: the Python package ninja: {package}; PATH: none there. `pip install ninja` "
            f"brings one"
        )
    return Path(found).absolute()


def _ninja_package() -> Path | None:
    try:
        import ninja
    except ImportError:
        return None
    return Path(ninja.BIN_DIR)


@lru_cache(maxsize=8)
def _nvcc(setting: str | None, path: str, flags: str, toolkits: tuple[str, ...]) -> Toolchain:
    if setting:
        given = [(f"JAGTILE_NVCC ({setting})", _which(setting, path))]
        found, why = _first_working(given, _nvcc_version)
        if found is None:
            raise CompilerNotFoundError(f"no working nvcc: {why}. Correct it, or unset it to have one looked for")
    else:
        found, why = _first_working(_nvcc_places(path, toolkits), _nvcc_version)
        if found is None:
            raise CompilerNotFoundError(
                f"no CUDA compiler (nvcc) was found; tried: JAGTILE_NVCC: not set; {why}. "
                f"`pip install jagtile[nvcc]` brings one, or let JAGTILE_NVCC name one"
            )
    version = f"{found.version} {_without_folders(flags)}" if flags else found.version
    return Toolchain(_own_place(found.path), version)


def _nvcc_places(path: str, toolkits: tuple[str, ...]) -> Iterator[tuple[str, Path | None]]:
    wheel = _pathfinder_nvcc()
    yield ", ".join(("pip and conda toolkits", *toolkits)), Path(wheel) if wheel else None
    yield "PATH", _which("nvcc", path)
    yield _USUAL_NVCC, _which(_USUAL_NVCC, path)


@lru_cache(maxsize=8)
def _cxx(setting: str, path: str) -> Toolchain:
    tried = "CXX: not set"
    if setting:
        program, *arguments = _words(setting)
        given = [(f"CXX ({setting})", _which(program, path))]
        found, tried = _first_working(given, lambda place: _cxx_version(place, *arguments))
        if found is not None:
            flags = [_without_folders(word) for word in arguments if word.startswith("-")]
            return Toolchain(found.path, " ".join([found.version, *flags]), tuple(arguments))
        log.warning("passed over: %s", tried)
    usual = ((name, _which(name, path)) for name in ("g++", "c++", "clang++"))
    found, why = _first_working(usual, _cxx_version)
    if found is None:
        raise CompilerNotFoundError(
            f"no C++ compiler was found; tried: {tried}; {why}. Install one (such as `apt-get install g++`), or let "
            f"CXX name one"
        )
    return found


def _words(command: str) -> list[str]:
    try:
        return shlex.split(command) or [command]
    except ValueError:  # an unclosed quote
        return [command]


def _first_working(
    places: Iterable[tuple[str, Path | None]], version: Callable[[Path], str]
) -> tuple[Toolchain | None, str]:
    """The first program that tells its version, and what was wrong at the places before it."""
    tried = []
    for place, program in places:
        if program is None:
            tried.append(f"{place}: none there")
            continue
        try:
            return Toolchain(program.absolute(), version(program.absolute())), "; ".join(tried)
        except CompilerNotFoundError as error:
            tried.append(f"{place}: {error}")
    return None, "; ".join(tried)


def _which(name: str, path: str) -> Path | None:
    found = shutil.which(os.path.expanduser(name), path=path)  # noqa: PTH111 - Path's raises for an unknown user
    return Path(found) if found else None


def _own_place(nvcc: Path) -> Path:
    """Where nvcc really is: it looks for its toolkit beside the name it is called by. ccache's links are no nvcc."""
    target = nvcc.resolve()
    return target if target.name.startswith("nvcc") else nvcc


def _pathfinder_nvcc() -> str | None:
    from cuda.pathfinder import find_nvidia_binary_utility

    found: str | None = find_nvidia_binary_utility("nvcc")
    return found


def _nvcc_version(path: Path) -> str:
    text = _answer(path, "--version")
    release = re.search(r"release .*, V([\d.]+)", text)
    build = re.search(r"^Build (\S+)", text, re.MULTILINE)
    if release is None:
        raise CompilerNotFoundError(f"{path} --version does not answer as nvcc does: {text[:200]!r}")
    return f"nvcc {release[1]}" + (f" ({build[1]})" if build else "")


def _cxx_version(path: Path, *arguments: str) -> str:
    version = _answer(path, *arguments, "--version").splitlines()[0].strip()
    return f"{version} [{_answer(path, *arguments, '-dumpmachine')}]"


def _without_folders(flags: str) -> str:
    return re.sub(r"[^\s=,'\"]*/", "", flags)


def _answer(path: Path, *arguments: str) -> str:
    """What the program prints. CompilerNotFoundError where it can't be run, fails or says nothing."""
    command = shlex.join((str(path), *arguments))
    try:
        done = subprocess.run(
            [path, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            errors="replace",
            timeout=_ANSWER_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompilerNotFoundError(f"{command} can't be run: {error}") from None
    if done.returncode or not done.stdout.strip():
        said = done.stdout.strip()[:200]
        raise CompilerNotFoundError(f"{command} ended with exit code {done.returncode} and said {said!r}")
    return done.stdout.strip()
