"""Run compilations side by side under ninja and hand each over as it ends.

ninja only schedules. Each compilation has its own folder with its sources, the command as a script that can be run
again by hand, its log and its exit code; a failure is an exit code like any other and stops nothing.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from jagtile.generator.toolchain import find_ninja
from jagtile.runtime.errors import BuildError

SCRIPT = "compile.sh"
_RULE = f"""\
rule compile
  command = cd $folder && touch started && sh {SCRIPT} > log 2>&1; echo $$? > exit.part && mv exit.part exit
  description = $folder
"""
_CPU_SECONDS = 1800  # of one compiler process: a runaway one ends
_PATIENCE_SECONDS = 5.0  # for ninja to end its compilers after a SIGTERM


@dataclass(frozen=True)
class Compilation:
    """One command line and the files it needs; all names are relative to the compilation's own folder."""

    name: str  # of the folder: unique, and plain enough to need no quoting
    command: tuple[str, ...]
    files: Mapping[str, str]  # name, which may have folders, to text

    @property
    def script(self) -> str:
        """The command as a shell script."""
        return f"ulimit -t {_CPU_SECONDS} 2>/dev/null\nexec {shlex.join(self.command)}\n"


@dataclass(frozen=True)
class Compiled:
    """How a compilation ended."""

    name: str
    folder: Path
    exit_code: int
    output: str
    seconds: float


def compile_all(compilations: Sequence[Compilation], workspace: Path, parallel: int) -> Iterator[Compiled]:
    """Run all of them, ``parallel`` at a time, in the order given; yield each as it ends.

    Closing the iterator early, or an exception such as KeyboardInterrupt inside it, stops the compilers. BuildError
    where ninja does not run them all or nothing can be written, CompilerNotFoundError where there is no ninja.
    """
    ninja = find_ninja()
    temporary = workspace / "tmp"  # what killed compilers leave behind goes with the workspace
    try:
        temporary.mkdir()
        _write(compilations, workspace)
    except OSError as error:
        raise BuildError(f"sources can't be written: {error}. Let TMPDIR name a folder with some space") from None
    process = subprocess.Popen(
        [ninja, "-k", "0", "-j", str(parallel)],
        cwd=workspace,
        env={**os.environ, "TMPDIR": str(temporary), "NINJA_STATUS": ""},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,  # an interrupt reaches us alone, and we stop ninja in order
    )
    try:
        yield from _as_they_end(process, [compilation.name for compilation in compilations], workspace)
    finally:
        _stop(process)


def _write(compilations: Sequence[Compilation], workspace: Path) -> None:
    for compilation in compilations:
        for name, text in {**compilation.files, SCRIPT: compilation.script}.items():
            path = workspace / compilation.name / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    edges = [f"build {one.name}/exit: compile\n  folder = {one.name}\n" for one in compilations]
    (workspace / "build.ninja").write_text(_RULE + "".join(edges), encoding="utf-8")


def _as_they_end(process: subprocess.Popen[str], names: Sequence[str], workspace: Path) -> Iterator[Compiled]:
    assert process.stdout is not None
    waiting = dict.fromkeys(names)
    said = []
    for line in process.stdout:  # ninja says a line whenever an edge ends
        said.append(line)
        ended = [name for name in waiting if (workspace / name / "exit").exists()]
        for name in ended:
            del waiting[name]
            yield _compiled(workspace / name)
    process.wait()
    for name in [name for name in waiting if (workspace / name / "exit").exists()]:
        del waiting[name]
        yield _compiled(workspace / name)
    if waiting:
        raise BuildError(
            f"ninja ended with exit code {process.returncode} before {len(waiting)} of {len(names)} compilations: "
            f"{''.join(said).strip() or 'it said nothing'}"
        )


def _compiled(folder: Path) -> Compiled:
    seconds = (folder / "exit").stat().st_mtime - (folder / "started").stat().st_mtime
    output = (folder / "log").read_text(encoding="utf-8", errors="replace")
    return Compiled(folder.name, folder, int((folder / "exit").read_text()), output, round(seconds, 3))


def _stop(process: subprocess.Popen[str]) -> None:
    """End ninja, if it still runs, and its compilers: on SIGTERM it ends their process groups, on SIGKILL it can't.

    Its output is read to the end: writing to a closed or full pipe, it would die or hang before it got to that.
    """
    try:
        if process.poll() is None:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=_PATIENCE_SECONDS)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()
