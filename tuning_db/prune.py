"""Removing records that serve nobody from the user's overlay. Never those of a tuner that is still writing."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from jagtile.runtime.errors import DatabaseError
from jagtile.tuning_db.schema import TuningRecord
from jagtile.tuning_db.store import Database, identity, read_records, replace_file


@dataclass(frozen=True)
class Pruned:
    """What became, or would become, of one file."""

    path: Path
    kept: int
    dropped: int
    in_use: bool  # it was left alone: a tuner writes to it, or it can't be locked


def prune(
    database: Database, slug: str, is_unwanted: Callable[[TuningRecord], bool], *, dry_run: bool = False
) -> list[Pruned]:
    """Drop a device's second copies, unreadable lines and unwanted records, a file at a time, atomically.

    DatabaseError where a file can't be replaced: it stays as it was.
    """
    seen = {identity(record) for path in database.record_files("shipped", slug) for record in read_records(path)}
    done = []
    for path in database.record_files("user", slug):
        with _locked(path) as locked:
            lines = [line for line in path.read_bytes().split(b"\n") if line.strip()]
            kept = []
            for record in read_records(path):
                own = identity(record)
                if own not in seen and not is_unwanted(record):
                    kept.append(record)
                seen.add(own)
            if not locked:
                done.append(Pruned(path, len(lines), 0, in_use=True))
                continue
            done.append(Pruned(path, len(kept), len(lines) - len(kept), in_use=False))
            if dry_run or len(kept) == len(lines):
                continue
            try:
                if kept:
                    replace_file(path, b"".join(msgspec.json.encode(record) + b"\n" for record in kept))
                else:
                    path.unlink()
            except OSError as error:
                raise DatabaseError(f"{path} can't be rewritten: {error.strerror or error}; it stays whole") from error
    return done


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Whether nobody writes to the file, for as long as we hold it."""
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
