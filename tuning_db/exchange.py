"""Records as one file that can be handed to others: a header line, then a record a line."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from jagtile.runtime.errors import DatabaseError
from jagtile.tuning_db.schema import SCHEMA, DeviceFacts, TuningRecord
from jagtile.tuning_db.store import read_records, replace_file

KIND = "jagtile tuning records"


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """The first line."""

    kind: str = KIND
    schema: int = SCHEMA
    devices: tuple[DeviceFacts, ...] = ()


@dataclass(frozen=True)
class Export:
    """What such a file holds."""

    devices: dict[str, DeviceFacts]  # by slug
    records: tuple[TuningRecord, ...]


def write_export(path: Path, devices: Iterable[DeviceFacts], records: Iterable[TuningRecord], by: str = "") -> None:
    """Write records atomically, or raise DatabaseError. ``by``: whose they are, put into those that do not say."""
    signed = (record if record.by else msgspec.structs.replace(record, by=by) for record in records)
    lines = [Header(devices=tuple(devices)), *signed]
    try:
        replace_file(path, b"".join(msgspec.json.encode(line) + b"\n" for line in lines))
    except OSError as error:
        raise DatabaseError(f"{path} can't be written: {error.strerror or error}") from error


def read_export(path: Path) -> Export:
    """Read what ``write_export`` wrote; lines that are no records are skipped with a warning.

    DatabaseError where the file can't be read or is none of that kind or schema.
    """
    try:
        with path.open("rb") as file:
            header = msgspec.json.decode(file.readline(), type=Header)
    except OSError as error:
        raise DatabaseError(f"{path} can't be read: {error.strerror or error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DatabaseError(f"{path} was not written by `jagtile db export`: {error}") from error
    if (header.kind, header.schema) != (KIND, SCHEMA):
        raise DatabaseError(
            f"{path} holds {header.kind!r} of schema {header.schema}; this jagtile reads {KIND!r} of schema {SCHEMA}"
        )
    return Export({facts.slug: facts for facts in header.devices}, tuple(read_records(path, skip=1)))
