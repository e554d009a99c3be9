"""A fleet on the CPU through PostgreSQL: real tuners, one killed in the middle of a trial, one that joins late."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from postgres import server

from jagtile.generator.toolchain import find_cxx
from jagtile.runtime.errors import CompilerNotFoundError
from jagtile.tuning_db.schema import TuningRecord
from jagtile.tuning_db.store import Database, identity

SPEC, TRIALS = "fwd_fp32_d16", 12
MEMBER = Path(__file__).with_name("fleet_member.py")


@pytest.fixture(scope="module")
def storage():
    pytest.importorskip("psycopg", reason="needs psycopg: pip install 'jagtile[fleet]'")
    try:
        find_cxx()
    except CompilerNotFoundError as error:
        pytest.skip(str(error))
    with server() as url:
        yield url


class Machine:
    """A folder of its own for records; built kernels are shared, which saves time and changes nothing else."""

    def __init__(self, folder: Path, kernels: Path) -> None:
        folder.mkdir()
        kernels.mkdir(exist_ok=True)
        (folder / "v1").symlink_to(kernels)
        self.folder = folder

    def start(self, storage: str, **variables: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(MEMBER), "tune", SPEC, "--device", "cpu", "--regime", "short", "--json"]
        command += ["--budget", str(TRIALS), "--storage", storage, "--grace", "10"]
        environment = {**os.environ, "JAGTILE_CACHE_DIR": str(self.folder), "OMP_NUM_THREADS": "1", **variables}
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def records(self) -> list[TuningRecord]:
        return Database(self.folder / "tuning", self.folder / "nothing shipped").records()


def _wait_for(path: Path, process: subprocess.Popen[str]) -> str:
    for _ in range(600):
        if path.exists() and path.read_text():
            return path.read_text()
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)
    raise AssertionError(f"{path.name} never came")


def test_four_tuners_share_a_study_and_the_work_of_one_that_is_killed(storage, tmp_path):
    kernels = tmp_path / "kernels"
    first, second, third = (Machine(tmp_path / name, kernels) for name in ("first", "second", "third"))
    marker = tmp_path / "hanging"
    victim = third.start(storage, HANG_AT=str(marker))
    members = [first.start(storage), first.start(storage), second.start(storage)]
    try:
        claimed = _wait_for(marker, victim).split()
        victim.send_signal(signal.SIGKILL)
        members.append(second.start(storage))  # joins late
        results = []
        for member in members:
            out, err = member.communicate(timeout=120)
            assert member.returncode == 0, err
            results += json.loads(out)
    finally:
        for process in (victim, *members):
            process.kill()
            process.communicate()

    assert claimed
    assert third.records() == []
    for machine in (first, second):
        searched = [record for record in machine.records() if record.phase == "search"]
        assert {record.state for record in searched} == {"ok"}
        measured = Counter(json.dumps(record.config, sort_keys=True) for record in searched)
        assert set(measured.values()) == {1}
        assert len(measured) == TRIALS
        lines = [line for path in machine.folder.glob("tuning/*/records/*") for line in path.read_text().splitlines()]
        assert len(lines) == len(set(lines)) == len(machine.records())
    # On a busy machine the late one may start when the others are done, know their finals, and run its own.
    known = [{identity(record) for record in machine.records()} for machine in (first, second)]
    finals = {record.session for record in second.records() if record.phase == "final"}
    assert known[0] <= known[1]
    assert known[0] == known[1] or len(finals) > 1
    assert len({result["regimes"][0]["chosen"] for result in results}) <= len(finals)
    assert sum(result["records"] for result in results) == len(known[1])
