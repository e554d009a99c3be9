"""A PostgreSQL server of the test's own: a free port, a temporary folder, no settings of the machine's."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest


def _folder() -> Path:
    """Where the server's programs are: Debian keeps them out of PATH."""
    found = [Path(name).parent for name in (shutil.which("initdb"), shutil.which("postgres")) if name]
    found += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    for folder in found:
        if (folder / "initdb").exists() and (folder / "postgres").exists():
            return folder
    pytest.skip("needs a PostgreSQL server: no initdb and postgres (Debian and Ubuntu: apt-get install postgresql)")


def _user() -> dict[str, object]:
    """Whom to run it as: PostgreSQL refuses to be root."""
    if os.geteuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
    pytest.skip("PostgreSQL refuses to run as root, and there is neither a user postgres nor nobody")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def server() -> Iterator[str]:
    """A running server; the URL of its one database."""
    programs, user, port = _folder(), _user(), _free_port()
    with tempfile.TemporaryDirectory(prefix="jagtile-pg-", ignore_cleanup_errors=True) as folder:
        data, log = Path(folder) / "data", Path(folder) / "log"
        if user:
            os.chown(folder, int(str(user["user"])), int(str(user["group"])))
        setup = [programs / "initdb", "-D", data, "-U", "tuner", "-A", "trust", "-E", "UTF8", "--no-locale", "-N"]
        done = subprocess.run(setup, cwd=folder, capture_output=True, text=True, **user)
        if done.returncode:
            pytest.skip(f"initdb fails here: {done.stderr.strip()[-300:]}")
        options = {"listen_addresses": "127.0.0.1", "unix_socket_directories": "", "fsync": "off"}
        command = [programs / "postgres", "-D", data, "-p", str(port)]
        command += [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
        with log.open("w") as out:
            process = subprocess.Popen(command, cwd=folder, stdout=out, stderr=subprocess.STDOUT, **user)
        try:
            _wait(process, port, log)
            yield f"postgresql://tuner@127.0.0.1:{port}/postgres"
        finally:
            process.send_signal(signal.SIGINT)  # a shutdown that does not wait for clients
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            process.kill()
            process.wait()


def _wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    for _ in range(200):
        if process.poll() is not None:
            break
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            if "ready to accept connections" in log.read_text():
                return
        time.sleep(0.1)
    raise AssertionError(f"PostgreSQL does not start: {log.read_text()[-500:]}")
