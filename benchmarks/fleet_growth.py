"""How a fleet grows: trials an hour of 1, 2 and 4 tuners that share one study, without any device.

    python benchmarks/fleet_growth.py postgresql://USER@HOST/DATABASE [SECONDS_A_CALL]

Every tuner is a process with a stand-in for the device that takes SECONDS_A_CALL (0.5) to check a config and as long to
time a batch of six; so what is lost against one tuner is the study's doing: claims, waiting for each other, finals.
"""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
import time
import uuid
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "tune"))
from fakes import SPEC, FakeBuilder, FakeWorker

from jagtile.generator.tune import Budget, tune
from jagtile.tuning_db.store import Database

TRIALS = 96


def member(storage: str, delay: float, folder: str, barrier, seconds) -> None:
    database = Database(Path(folder) / uuid.uuid4().hex, Path(folder) / "shipped")
    barrier.wait()
    begin = time.monotonic()
    tune(
        SPEC,
        torch.device("cuda"),
        ("long",),
        budget=Budget(trials=TRIALS),
        database=database,
        storage=storage,
        build=FakeBuilder(),
        make_worker=lambda: FakeWorker(delay=delay),
    )
    seconds.put(time.monotonic() - begin)


def main() -> None:
    from sqlalchemy import create_engine, text

    storage, delay = sys.argv[1], float(sys.argv[2]) if len(sys.argv) > 2 else 0.5
    base, _, _ = storage.rpartition("/")
    admin = create_engine(storage.replace("postgresql://", "postgresql+psycopg://"), isolation_level="AUTOCOMMIT")
    one = 0.0
    print("tuners  seconds  trials/hour  against one")
    for count in (1, 2, 4):
        name = f"growth_{uuid.uuid4().hex[:8]}"
        with admin.connect() as connection:
            connection.execute(text(f"create database {name}"))
        context = multiprocessing.get_context("spawn")
        barrier, seconds = context.Barrier(count), context.SimpleQueue()
        with tempfile.TemporaryDirectory() as folder:
            arguments = (f"{base}/{name}", delay, folder, barrier, seconds)
            members = [context.Process(target=member, args=arguments) for _ in range(count)]
            for process in members:
                process.start()
            for process in members:
                process.join()
        took = max(seconds.get() for _ in members)
        one = one or took
        print(f"{count:6}  {took:7.1f}  {TRIALS / took * 3600:11.0f}  {one / took:10.2f}x", flush=True)


if __name__ == "__main__":
    main()
