"""Parent side of a trial: a spawned process that answers calls on one object, and that may hang or die without harm.

The process leads its own group, so Ctrl-C does not reach it and a kill takes its children too; it ends when its parent
does. After a failure of any kind it is killed, and the next call starts a fresh one: a CUDA context that saw an illegal
access is of no further use.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Literal

from jagtile.generator.memory_limit import cap_address_space

Note = Callable[[str], None]

STARTING = "start"  # the note of a process that could not be started


class WorkerFailure(Exception):  # noqa: N818 - an outcome to record, not a programming error
    """A call did not return. ``state`` is how it ended, ``note`` what the worker last said it was about to do."""

    def __init__(self, state: Literal["crash", "timeout"], reason: str, note: str) -> None:
        super().__init__(reason)
        self.state = state
        self.reason = reason
        self.note = note


class Worker:
    """A process that holds ``factory(*arguments)`` and runs its methods one at a time. A context manager.

    ``factory`` must be importable by name. A method is called as ``method(*arguments, note)``; by ``note(text)`` it
    says what it is about to do, which also restarts the time limit. ``cap_memory``: the process may allocate what is
    free when it starts, and no more.
    """

    def __init__(
        self,
        factory: Callable[..., object],
        *arguments: object,
        start_timeout: float = 120.0,
        cap_memory: bool = False,
    ) -> None:
        self._factory = factory
        self._arguments = arguments
        self._start_timeout = start_timeout
        self._cap_memory = cap_memory
        self._process: BaseProcess | None = None
        self._connection: Connection | None = None
        self.started = 0  # processes so far

    def call(self, method: str, *arguments: object, timeout: float) -> object:
        """The method's result. WorkerFailure where it raises, kills its process or says nothing for ``timeout`` s."""
        note = STARTING
        try:
            connection = self._connection or self._start()
            note = ""
            try:
                connection.send((method, arguments))
            except OSError:
                raise WorkerFailure("crash", _epitaph(self._process), note) from None
            while True:
                kind, payload = _receive(connection, timeout, self._process)
                if kind == "note":
                    note = str(payload)
                elif kind == "result":
                    return payload
                else:
                    raise WorkerFailure("crash", str(payload), note)
        except WorkerFailure as failure:
            self.stop()
            failure.note = note
            raise
        except BaseException:  # an interrupt leaves a reply in the pipe: the next call must not take it for its own
            self.stop()
            raise

    def stop(self) -> None:
        """Kill the process and all it started. The next call starts a fresh one."""
        process, connection = self._process, self._connection
        self._process = self._connection = None
        if connection is not None:
            connection.close()
        if process is not None and process.pid is not None:
            if process.is_alive():
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.kill()  # in case it does not lead its group yet
            process.join(10)

    def _start(self) -> Connection:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(
            target=_serve,
            args=(theirs, self._factory, self._arguments, self._cap_memory),
            name="jagtile-trial",
            daemon=True,
        )
        process.start()
        theirs.close()
        self._process, self._connection = process, ours
        self.started += 1
        kind, payload = _receive(ours, self._start_timeout, process)
        if kind != "ready":
            raise WorkerFailure("crash", f"the worker did not start: {payload}", STARTING)
        return ours

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _receive(connection: Connection, timeout: float, process: BaseProcess | None) -> tuple[str, object]:
    if not connection.poll(timeout):
        raise WorkerFailure("timeout", f"no answer within {timeout:g} s", "")
    try:
        kind, payload = connection.recv()
    except (EOFError, ConnectionResetError):
        raise WorkerFailure("crash", _epitaph(process), "") from None
    return kind, payload


def _epitaph(process: BaseProcess | None) -> str:
    if process is None:
        return "the worker died"
    process.join(10)
    code = process.exitcode
    if code is None or code >= 0:
        return f"the worker died with exit code {code}"
    return f"the worker was killed by {signal.Signals(-code).name}"


def _serve(
    connection: Connection, factory: Callable[..., object], arguments: tuple[object, ...], cap_memory: bool
) -> None:
    """The worker's main loop."""
    os.setpgid(0, 0)
    _die_with_parent()
    if cap_memory:
        cap_address_space()

    def note(text: str) -> None:
        connection.send(("note", text))

    try:
        held = factory(*arguments)
    except BaseException as error:
        connection.send(("error", _describe(error)))
        return
    connection.send(("ready", None))
    while True:
        try:
            method, arguments = connection.recv()
        except (EOFError, OSError):
            return
        try:
            reply = ("result", getattr(held, method)(*arguments, note))
        except BaseException as error:
            reply = ("error", _describe(error))
        connection.send(reply)


def _die_with_parent() -> None:
    """Ask Linux for a SIGKILL when the parent ends, however it ends; a hanging kernel would never notice otherwise."""
    parent = os.getppid()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)


def _describe(error: BaseException, characters: int = 1000) -> str:
    """The error's own text and the place that raised it."""
    text = "".join(traceback.format_exception_only(error)).strip()[:characters]
    frames = traceback.extract_tb(error.__traceback__)
    return f"{text} ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else text
