"""Build variants: rendered sources -> ninja -> verified artifacts in the store.

The content key decides what is fresh; ninja only schedules what is missing, in a private folder, so file times never
matter. One variant's failure is its own result, never an exception of the batch.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shlex
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jagtile.generator import ptxas
from jagtile.generator.render import TEMPLATES, Source, render
from jagtile.generator.targets import TARGETS
from jagtile.generator.tile import Variant
from jagtile.generator.toolchain import Toolchain, find_ninja
from jagtile.runtime.artifact import ABI_VERSION, Artifact, ArtifactMeta, CompileReport
from jagtile.runtime.errors import BuildError, IllegalConfigError, RejectedVariantError
from jagtile.runtime.settings import settings
from jagtile.runtime.store import ArtifactStore

log = logging.getLogger("jagtile")

BuildState = Literal["ok", "illegal", "compile", "spill", "rejected"]
_ELF_MAGIC = b"\x7fELF"
_LOCKS_AT_ONCE = 128  # each is an open file
_SHOWN_OUTPUT = 4000  # characters of a compiler's output in a message


@dataclass(frozen=True)
class BuildResult:
    """What became of one variant."""

    variant: Variant
    state: BuildState
    artifact: Artifact | None = None
    reason: str = ""
    report: CompileReport | None = None


@dataclass(frozen=True)
class _Job:
    """One variant on its way through the compiler."""

    variant: Variant
    source: Source
    toolchain: Toolchain
    key: str

    @property
    def flags(self) -> tuple[str, ...]:
        return _flags(self.variant)

    def file(self, folder: Path, suffix: str) -> Path:
        return folder / (self.variant.symbol + suffix)

    @property
    def suffix(self) -> str:
        return TARGETS[self.variant.target].suffix


def artifact_key(variant: Variant) -> str:
    """The content address of a variant's artifact.

    sha256 over the ABI, target, compiler version, flags, and the rendered source with its headers.
    """
    return _job(variant).key


def build(
    variants: Sequence[Variant],
    *,
    jobs: int | None = None,
    on_result: Callable[[BuildResult], None] | None = None,
) -> list[BuildResult]:
    """Build variants side by side; results in the order given, and to ``on_result`` as each is ready.

    Cached ones come first. Raises CompilerNotFoundError where a target has no compiler; what befalls a single variant
    is in its result.
    """
    results: dict[Variant, BuildResult] = {}

    def deliver(result: BuildResult) -> None:
        results[result.variant] = result
        if on_result is not None:
            on_result(result)

    store = ArtifactStore()
    missing: list[_Job] = []
    for variant in dict.fromkeys(variants):
        try:
            job = _job(variant)
        except IllegalConfigError as error:
            deliver(BuildResult(variant, "illegal", reason=str(error)))
            continue
        cached = store.get(job.key)
        if cached is not None:
            deliver(BuildResult(variant, "ok", cached, report=cached.meta.report))
        else:
            missing.append(job)
    for start in range(0, len(missing), _LOCKS_AT_ONCE):
        for result in _build_locked(store, missing[start : start + _LOCKS_AT_ONCE], jobs or settings.jobs):
            deliver(result)
    return [results[variant] for variant in variants]


def build_one(variant: Variant) -> Artifact:
    """Build one variant, or raise IllegalConfigError, BuildError, RejectedVariantError or CompilerNotFoundError."""
    (result,) = build([variant])
    if result.artifact is not None:
        return result.artifact
    error = {"illegal": IllegalConfigError, "compile": BuildError}.get(result.state, RejectedVariantError)
    raise error(f"{variant.name}: {result.reason}" if result.state != "illegal" else result.reason)


def _job(variant: Variant) -> _Job:
    source = render(variant)
    toolchain = TARGETS[variant.target].find()
    identity = {
        "abi": ABI_VERSION,
        "target": variant.target,
        "compiler": toolchain.version,
        "flags": _flags(variant),
        "source": source.sha256,
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return _Job(variant, source, toolchain, key)


def _flags(variant: Variant) -> tuple[str, ...]:
    return TARGETS[variant.target].flags + variant.space.compile_flags(variant.spec, variant.config)


def _build_locked(store: ArtifactStore, missing: Sequence[_Job], jobs: int) -> Iterator[BuildResult]:
    """Build under the keys' locks; whoever had them first may have built some in the meantime."""
    with ExitStack() as stack:
        for job in sorted(missing, key=lambda job: job.key):  # one order for all processes: no deadlock
            stack.enter_context(store.lock(job.key))
        still_missing = []
        for job in missing:
            found = store.get(job.key)
            if found is not None:
                yield BuildResult(job.variant, "ok", found, report=found.meta.report)
            else:
                still_missing.append(job)
        if still_missing:
            folder = stack.enter_context(store.staging())
            yield from _run_ninja(store, still_missing, folder, jobs)


def _run_ninja(store: ArtifactStore, jobs: Sequence[_Job], folder: Path, parallel: int) -> Iterator[BuildResult]:
    for job in jobs:
        job.file(folder, job.source.suffix).write_text(job.source.text)
    (folder / "build.ninja").write_text(_ninja_file(jobs, folder))
    process = subprocess.Popen(
        [find_ninja(), "-k", "0", "-j", str(parallel)],
        cwd=folder,
        env={**os.environ, "TMPDIR": str(folder), "NINJA_STATUS": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that an interrupt takes the compilers along
    )
    waiting = {job.variant.symbol: job for job in jobs}
    try:
        assert process.stdout is not None
        said = []
        for line in process.stdout:  # a line a finished edge
            said.append(line)
            yield from _collect(store, waiting, folder)
        process.wait()
        yield from _collect(store, waiting, folder)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    for job in waiting.values():  # ninja itself failed
        yield BuildResult(
            job.variant, "compile", reason=f"ninja did not run it: {''.join(said).strip()[:_SHOWN_OUTPUT]}"
        )


def _ninja_file(jobs: Sequence[_Job], folder: Path) -> str:
    """One edge a variant. Its exit code goes to a file, so that one failure stops nothing and says when it ended."""
    lines = [
        "rule compile",
        "  command = touch $name.start; $compile $name$from -o $name$to > $name.log 2>&1; "
        "echo $$? > $name.tmp; mv $name.tmp $name.rc",
        "  description = $name",
        "",
    ]
    for job in jobs:
        command = [str(job.toolchain.path), *job.flags, "-I", str(TEMPLATES)]
        lines += [
            f"build {job.variant.symbol}.rc: compile",
            f"  name = {job.variant.symbol}",
            f"  from = {job.source.suffix}",
            f"  to = {job.suffix}",
            f"  compile = {_ninja_escape(shlex.join(command))}",
        ]
    return "\n".join(lines) + "\n"


def _ninja_escape(text: str) -> str:
    return text.replace("$", "$$")


def _collect(store: ArtifactStore, waiting: dict[str, _Job], folder: Path) -> Iterator[BuildResult]:
    for finished in sorted(folder.glob("*.rc")):
        job = waiting.pop(finished.stem, None)
        if job is not None:
            yield _result(store, job, folder, int(finished.read_text()))


def _result(store: ArtifactStore, job: _Job, folder: Path, exit_code: int) -> BuildResult:
    """Judge one finished compilation, and publish what may be used."""
    log_file, binary = job.file(folder, ".log"), job.file(folder, job.suffix)
    output = log_file.read_text(errors="replace")
    seconds = job.file(folder, ".rc").stat().st_mtime - job.file(folder, ".start").stat().st_mtime
    if exit_code or not _is_elf(binary):
        kept = store.keep_failure(
            job.key, {f"source{job.source.suffix}": job.source.text.encode(), "log.txt": output.encode()}
        )
        what = f"exit code {exit_code}" if exit_code else "no machine code"
        reason = (
            f"{job.toolchain.path.name} gave {what}; source and log are in {kept}\n{output.strip()[:_SHOWN_OUTPUT]}"
        )
        return BuildResult(job.variant, "compile", reason=reason)
    report = TARGETS[job.variant.target].report(output, job.variant.symbol, round(seconds, 3))
    rejected = ptxas.rejection(report)
    if rejected is not None:
        state, reason = rejected
        log.debug("%s is %s: %s", job.variant.name, state, reason)
        return BuildResult(job.variant, state, reason=reason, report=report)
    artifact = store.publish(job.key, binary, _meta(job, report))
    return BuildResult(job.variant, "ok", artifact, report=report)


def _is_elf(binary: Path) -> bool:
    try:
        with binary.open("rb") as file:
            return file.read(4) == _ELF_MAGIC
    except OSError:
        return False


def _meta(job: _Job, report: CompileReport) -> ArtifactMeta:
    """What is known before publishing; the store adds the file's name, size and hash."""
    variant = job.variant
    return ArtifactMeta(
        abi=ABI_VERSION,
        key=job.key,
        target=variant.target,
        spec=variant.spec.name,
        config=variant.config.to_dict(),
        symbol=variant.symbol,
        file="",
        size=0,
        sha256="",
        source_sha256=job.source.sha256,
        compiler=job.toolchain.version,
        launch=dict(variant.space.launch(variant.spec, variant.config)),
        report=report,
    )
