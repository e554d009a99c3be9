"""Many builders of one cache: work is done once, and a builder that is interrupted or killed harms nobody."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from jagtile.generator import build as build_module
from jagtile.generator.build import artifact_key, build, build_one
from jagtile.generator.tile import Variant
from jagtile.runtime.store import ArtifactStore

pytestmark = pytest.mark.usefixtures("cache", "compiler")
FORK = multiprocessing.get_context("fork")  # the toy space is patched into this process
PATIENCE_SECONDS = 60
HANG = 'echo $$ >> "$TOY_LOG.pids"; sleep 120'


def _build_and_tell(variants: Sequence[Variant], barrier, told) -> None:
    barrier.wait(PATIENCE_SECONDS)
    results = build(variants, jobs=1)
    told.put([(result.state, result.artifact.meta.sha256, result.artifact.path.exists()) for result in results])


def in_processes(batches: Sequence[Sequence[Variant]]) -> list[list[tuple[str, str, bool]]]:
    barrier, told = FORK.Barrier(len(batches)), FORK.Queue()
    processes = [FORK.Process(target=_build_and_tell, args=(batch, barrier, told)) for batch in batches]
    for process in processes:
        process.start()
    answers = [told.get(timeout=PATIENCE_SECONDS) for _ in processes]
    for process in processes:
        process.join(PATIENCE_SECONDS)
    assert [process.exitcode for process in processes] == [0] * len(processes)
    return answers


def wait_for_lines(path: Path, count: int) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (path.exists() and path.read_text().count("\n") == count):
        assert time.monotonic() < deadline, f"{path} did not get {count} lines"
        time.sleep(0.02)


def ends(pid: int) -> bool:
    """Whether a process that was sent a signal goes, or is dead and only not waited for.

    That may take a moment: ninja waits for its shells, not for what these run.
    """
    deadline = time.monotonic() + 10  # it would run for two minutes
    with suppress(FileNotFoundError, ProcessLookupError):
        while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
    return True


def test_twelve_processes_with_a_cold_cache_compile_once(toy, compiler):
    compiler.hook("sleep 0.3")
    answers = in_processes([[toy(1)]] * 12)
    assert compiler.runs == 1
    assert len({sha for ((state, sha, exists),) in answers if state == "ok" and exists}) == 1
    assert len(answers) == 12


def test_batches_in_opposite_order_neither_block_nor_repeat_each_other(toy, compiler):
    compiler.hook("sleep 0.1")
    variants = [toy(number) for number in range(1, 6)]
    answers = in_processes([variants, variants[::-1], variants[2:] + variants[:2]])
    assert all(state == "ok" and exists for answer in answers for state, _, exists in answer)
    assert compiler.runs == len(variants)


def test_threads_of_one_process_compile_once(toy, compiler):
    compiler.hook("sleep 0.3")
    built = []
    threads = [threading.Thread(target=lambda: built.append(build_one(toy(1)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_SECONDS)
    assert len({artifact.path for artifact in built}) == 1
    assert (len(built), compiler.runs) == (4, 1)


def test_a_lock_that_is_never_released_delays_but_does_not_prevent(toy, monkeypatch):
    monkeypatch.setattr(build_module, "_LOCK_PATIENCE_SECONDS", 0.3)
    with ArtifactStore().lock(artifact_key(toy(1)), timeout=5):
        assert build_one(toy(1)).origin == "built"


def test_what_another_gives_up_is_built_here(toy, compiler):
    """The holder of the lock ends without an artifact; the waiting builder takes over."""
    with ArtifactStore().lock(artifact_key(toy(1)), timeout=5):
        results = []
        waiting = threading.Thread(target=lambda: results.extend(build([toy(1)])))
        waiting.start()
        time.sleep(0.2)
        assert compiler.runs == 0
    waiting.join(PATIENCE_SECONDS)
    assert [result.state for result in results] == ["ok"]


def _build_interruptibly(variants) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it runs in the background
    build(variants, jobs=2)


def _start_hanging_build(toy, compiler, tmp_path: Path):
    """A builder whose two compilations both run: one begun after it is killed would be counted as its successor's."""
    compiler.hook(HANG)
    variants = [toy(1), toy(2)]
    process = FORK.Process(target=_build_interruptibly, args=(variants,))
    process.start()
    pids = tmp_path / "compilations.pids"
    wait_for_lines(pids, len(variants))
    return process, pids


def test_an_interrupt_ends_the_compilers_and_leaves_nothing_behind(toy, compiler, cache, tmp_path):
    process, pids = _start_hanging_build(toy, compiler, tmp_path)
    os.kill(process.pid, signal.SIGINT)
    process.join(PATIENCE_SECONDS)
    assert process.exitcode == 1
    assert all(ends(int(pid)) for pid in pids.read_text().split())
    assert not list(tmp_path.rglob("staging/*"))
    assert not list(tmp_path.rglob("store/*/*"))
    compiler.hook("")
    assert build_one(toy(1)).origin == "built"


def test_a_builder_killed_half_way_leaves_a_usable_cache(toy, compiler, cache, tmp_path):
    process, pids = _start_hanging_build(toy, compiler, tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    process.join(PATIENCE_SECONDS)
    compiler.hook("")
    started = compiler.runs
    try:
        assert [result.state for result in build([toy(1), toy(2)])] == ["ok", "ok"]
        assert compiler.runs == started + 2
    finally:
        for pid in pids.read_text().split():  # a killed builder can't end them
            os.kill(int(pid), signal.SIGKILL)


def test_what_was_delivered_before_an_interrupt_stays(toy, compiler):
    compiler.hook(f'case "$*" in *n2*) {HANG} ;; esac')

    def interrupt(result) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build([toy(1), toy(2)], jobs=2, on_result=interrupt)
    compiler.hook("exit 1")
    assert [result.state for result in build([toy(1), toy(2)])] == ["ok", "compile"]
