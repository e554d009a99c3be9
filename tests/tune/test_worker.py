"""A worker that hangs, dies or raises costs one call; the next call gets a fresh process."""

from __future__ import annotations

import os
import time
from pathlib import Path

import broken_jobs
import pytest

from jagtile.generator.worker import STARTING, Worker, WorkerFailure


@pytest.fixture(scope="module")  # a process takes seconds to start, and every test must cope with a used worker
def worker():
    with Worker(broken_jobs.Jobs) as worker:
        yield worker


def test_a_call_returns_the_methods_result_and_keeps_the_process(worker):
    assert worker.call("double", 21, timeout=60) == 42
    assert worker.call("pid", timeout=60) == worker.call("pid", timeout=60)


@pytest.mark.parametrize(
    ("method", "timeout", "state", "reason", "note"),
    [
        ("hang", 0.3, "timeout", "no answer within 0.3 s", "about to hang"),
        ("segfault", 60, "crash", "SIGSEGV", "about to segfault"),
        ("leave", 60, "crash", "exit code 3", ""),
        ("fail", 60, "crash", "an illegal memory access", ""),
    ],
)
def test_a_failure_is_told_and_the_next_call_is_served(worker, method, timeout, state, reason, note):
    worker.call("double", 1, timeout=60)
    started = worker.started
    with pytest.raises(WorkerFailure) as failure:
        worker.call(method, timeout=timeout)
    assert failure.value.state == state
    assert reason in failure.value.reason
    assert failure.value.note == note
    assert worker.call("double", 4, timeout=60) == 8
    assert worker.started == started + 1


def test_notes_restart_the_time_limit(worker):
    worker.call("double", 1, timeout=60)
    assert worker.call("take_long_but_talk", timeout=1.0) == "done"


def test_a_killed_worker_takes_its_children_along(worker, tmp_path):
    worker.call("double", 1, timeout=60)
    path = tmp_path / "pid"
    with pytest.raises(WorkerFailure):
        worker.call("hang_with_child", path, timeout=3)
    assert _gone(int(path.read_text()))


def test_a_worker_killed_from_outside_is_replaced(worker):
    os.kill(worker.call("pid", timeout=60), 9)
    with pytest.raises(WorkerFailure):
        worker.call("double", 1, timeout=60)
    assert worker.call("double", 1, timeout=60) == 2


def test_a_worker_that_can_not_start_says_why():
    with Worker(broken_jobs.Unmakeable) as worker, pytest.raises(WorkerFailure, match="no device here") as failure:
        worker.call("double", 1, timeout=60)
    assert failure.value.note == STARTING


def test_leaving_the_context_ends_the_process():
    with Worker(broken_jobs.Jobs) as worker:
        pid = worker.call("pid", timeout=60)
    assert _gone(pid)


def _gone(pid: int) -> bool:
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":  # dead, and its new parent has not looked yet
            return True
        time.sleep(0.05)
    return False
