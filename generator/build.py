"""Build variants: rendered sources -> compilers under ninja -> verified artifacts in the store.

The content key decides what is fresh; only what is missing is compiled, in a private folder, so file times never
matter. One variant's failure is its own result, never an exception of the batch.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import jinja2

from jagtile.generator import elf, ptxas
from jagtile.generator.ninja_run import SCRIPT, Compilation, Compiled, compile_all
from jagtile.generator.render import Source, render
from jagtile.generator.targets import TARGETS
from jagtile.generator.tile import Variant
from jagtile.generator.toolchain import Toolchain
from jagtile.runtime.artifact import ABI_VERSION, Artifact, ArtifactMeta, CompileReport
from jagtile.runtime.errors import BuildError, IllegalConfigError, RejectedVariantError
from jagtile.runtime.settings import settings
from jagtile.runtime.store import ArtifactStore

log = logging.getLogger("jagtile")

BuildState = Literal["ok", "illegal", "compile", "spill", "rejected"]
_LOCK_PATIENCE_SECONDS = 120.0  # without any progress; then what others hold is built here too
_LOCK_POLL_SECONDS = 0.05
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
    compiler: str = ""  # version of the one that had its say, if one had


@dataclass(frozen=True)
class _Job:
    """One variant on its way through the compiler."""

    variant: Variant
    source: Source
    toolchain: Toolchain
    flags: tuple[str, ...]
    launch: dict[str, int]

    @cached_property
    def key(self) -> str:
        """sha256 of all that the binary and its metadata depend on; no paths, no hosts, no devices."""
        identity = {
            "abi": ABI_VERSION,
            "variant": self.variant.name,
            "compiler": self.toolchain.version,
            "flags": self.flags,
            "source": self.source.sha256,
            "launch": self.launch,
        }
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    @property
    def binary_name(self) -> str:
        return self.variant.symbol + TARGETS[self.variant.target].suffix

    def compilation(self) -> Compilation:
        """Against the very headers that the key stands for, not what templates/ may hold by now."""
        source_name = self.variant.symbol + self.source.suffix
        files = {source_name: self.source.text, **{f"include/{path}": text for path, text in self.source.headers}}
        command = (*self.toolchain.command, *self.flags, "-I", "include", source_name, "-o", self.binary_name)
        return Compilation(self.key, command, files)


def artifact_key(variant: Variant) -> str:
    """The content address of a variant's artifact.

    Raises IllegalConfigError for a variant that its space rejects, CompilerNotFoundError where the target has no
    compiler: its version is part of the key.
    """
    return _job(variant).key


def build(
    variants: Sequence[Variant],
    *,
    jobs: int | None = None,
    on_result: Callable[[BuildResult], None] | None = None,
) -> list[BuildResult]:
    """Build variants side by side; results in the order given, and to ``on_result`` as each is ready.

    Cached ones come first. ``jobs`` compilers run at a time (default: ``settings.jobs``). What befalls a single variant
    is in its result; what concerns them all raises: CompilerNotFoundError where a target has no compiler, CacheError
    where nothing can be written, BuildError where ninja fails. An exception, an interrupt too, stops the compilers;
    what was published before stays.
    """
    results: dict[Variant, BuildResult] = {}

    def deliver(result: BuildResult) -> None:
        results[result.variant] = result
        if on_result is not None:
            on_result(result)

    store = ArtifactStore()
    missing: dict[str, _Job] = {}
    for variant in dict.fromkeys(variants):
        prepared = _prepare(variant)
        if isinstance(prepared, BuildResult):
            deliver(prepared)
        elif (cached := _from_store(store, prepared)) is not None:
            deliver(cached)
        else:
            missing[prepared.key] = prepared
    with closing(_build_missing(store, missing, jobs or settings.jobs)) as built:  # closing stops the compilers
        for result in built:
            deliver(result)
    return [results[variant] for variant in variants]


def build_one(variant: Variant) -> Artifact:
    """Build one variant, or raise IllegalConfigError, BuildError, RejectedVariantError or CompilerNotFoundError."""
    (result,) = build([variant])
    if result.artifact is not None:
        return result.artifact
    if result.state == "illegal":
        raise IllegalConfigError(result.reason)
    raise (BuildError if result.state == "compile" else RejectedVariantError)(f"{variant.name}: {result.reason}")


def _job(variant: Variant) -> _Job:
    source = render(variant)
    target, space = TARGETS[variant.target], variant.space
    flags = target.flags + space.compile_flags(variant.spec, variant.config)
    return _Job(variant, source, target.find(), flags, dict(space.launch(variant.spec, variant.config)))


def _prepare(variant: Variant) -> _Job | BuildResult:
    try:
        return _job(variant)
    except IllegalConfigError as error:
        return BuildResult(variant, "illegal", reason=str(error))
    except (jinja2.TemplateError, FileNotFoundError) as error:  # the latter: of an included header
        return BuildResult(variant, "compile", reason=f"templates/{variant.space.template} does not render: {error}")


def _from_store(store: ArtifactStore, job: _Job) -> BuildResult | None:
    artifact = store.get(job.key)
    if artifact is None:
        return None
    return BuildResult(job.variant, "ok", artifact, report=artifact.meta.report, compiler=artifact.meta.compiler)


def _build_missing(store: ArtifactStore, missing: dict[str, _Job], jobs: int) -> Generator[BuildResult, None, None]:
    """Compile what nobody else is compiling; meanwhile others may finish the rest, or give it up.

    No lock is waited for while others are held, so processes can't block each other.
    """
    waiting, patient_until = dict(missing), time.monotonic() + _LOCK_PATIENCE_SECONDS
    while waiting:
        with ExitStack() as all_locks:
            mine: dict[str, ExitStack] = {}
            for key in list(waiting)[:_LOCKS_AT_ONCE]:
                lock = all_locks.enter_context(ExitStack())
                if lock.enter_context(store.lock(key, timeout=0)) or time.monotonic() > patient_until:
                    mine[key] = lock
            compile_now = []
            for key, lock in mine.items():
                job = waiting.pop(key)
                found = _from_store(store, job)  # built by another since we looked
                if found is None:
                    compile_now.append(job)
                else:
                    lock.close()
                    yield found
            for result, key in _compile(store, compile_now, jobs):
                mine[key].close()
                yield result
        if mine:
            patient_until = time.monotonic() + _LOCK_PATIENCE_SECONDS
        else:
            time.sleep(_LOCK_POLL_SECONDS)


def _compile(store: ArtifactStore, jobs: Sequence[_Job], parallel: int) -> Iterator[tuple[BuildResult, str]]:
    if not jobs:
        return
    by_key = {job.key: job for job in jobs}
    with store.workspace() as workspace:
        for compiled in compile_all([job.compilation() for job in jobs], workspace, parallel):
            yield _judged(store, by_key[compiled.name], compiled), compiled.name


def _judged(store: ArtifactStore, job: _Job, compiled: Compiled) -> BuildResult:
    """Judge one finished compilation, and publish what may be used."""
    binary, compiler = compiled.folder / job.binary_name, job.toolchain.version
    problem = _exit_problem(compiled) or elf.defect(binary, job.variant.symbol)
    if problem is not None:
        return BuildResult(job.variant, "compile", reason=_failure(store, job, compiled, problem), compiler=compiler)
    report = TARGETS[job.variant.target].report(compiled.output, job.variant.symbol, compiled.seconds)
    rejected = ptxas.rejection(report)
    if rejected is not None:
        state, reason = rejected
        log.debug("%s is %s: %s", job.variant.name, state, reason)
        return BuildResult(job.variant, state, reason=reason, report=report, compiler=compiler)
    artifact = store.publish(job.key, binary, _meta(job, report))
    return BuildResult(job.variant, "ok", artifact, report=report, compiler=compiler)


def _exit_problem(compiled: Compiled) -> str | None:
    if compiled.exit_code == 0:
        return None
    if os.strerror(errno.ENOSPC) in compiled.output:  # says nothing of the variant
        raise BuildError(
            f"the disk of {compiled.folder.parent} is full; free some space, or let TMPDIR name a roomier folder:\n"
            f"{compiled.output.strip()[:_SHOWN_OUTPUT]}"
        )
    killed = f" (killed by signal {compiled.exit_code - 128})" if compiled.exit_code > 128 else ""
    return f"the compiler gave exit code {compiled.exit_code}{killed}"


def _failure(store: ArtifactStore, job: _Job, compiled: Compiled, problem: str) -> str:
    """What went wrong, the compiler's own words, and where to look."""
    compilation = job.compilation()
    kept = store.keep_failure(job.key, {**compilation.files, SCRIPT: compilation.script, "log": compiled.output})
    said = compiled.output.strip()
    if len(said) > _SHOWN_OUTPUT:
        said = f"{said[:_SHOWN_OUTPUT]}\n... and {len(said) - _SHOWN_OUTPUT} characters more"
    where = f"source, command and log are in {kept}" if kept else "its source could not be kept"
    return f"{problem}; {where} ({job.toolchain.version})\n{said}".rstrip()


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
        file=job.binary_name,
        size=0,
        sha256="",
        source_sha256=job.source.sha256,
        compiler=job.toolchain.version,
        launch=job.launch,
        report=report,
    )
