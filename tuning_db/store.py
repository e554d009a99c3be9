"""Records and choices on disk: the user's overlay over what is shipped.

<user cache>/tuning/<slug>/choices.json and records/<writer>.jsonl, one file a writer, merged at reading, no locks;
<tuning_db>/<slug>/choices.json and records.jsonl. A line or file that can't be read is never an error: it is skipped or
set aside with a JagtileWarning that names it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import re
import socket
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Literal

import msgspec

from jagtile.runtime.errors import DatabaseError, JagtileWarning
from jagtile.runtime.scratch import private_folder
from jagtile.runtime.settings import settings
from jagtile.tuning_db.schema import SCHEMA, Choices, DeviceFacts, TuningRecord

Origin = Literal["user", "shipped"]
ORIGINS: tuple[Origin, ...] = ("shipped", "user")

log = logging.getLogger("jagtile")

_LOCK_SECONDS = 60.0
_SLUG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SHIPPED = Path(__file__).resolve().parent


def identity(record: TuningRecord) -> bytes:
    """Equal for two copies of one record, whoever they came from."""
    return msgspec.json.encode(msgspec.structs.replace(record, by=""), order="sorted")


class RecordWriter:
    """Appends records to one file, a line each, on disk when ``append`` returns. A context manager.

    ``shared``: others may have the same file open. While it is open the file is locked against pruning.
    """

    def __init__(self, path: Path, *, shared: bool = False) -> None:
        self.path = path
        self._shared = shared
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise _not_writable(path, error) from error
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(self._fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        size = os.fstat(self._fd).st_size
        # A writer was killed half-way: its line must not swallow ours.
        self._torn = bool(size) and os.pread(self._fd, 1, size - 1) != b"\n"

    def append(self, record: TuningRecord) -> None:
        """Write one record. A single write of a file opened for appending: concurrent writers do not mix.

        DatabaseError where it can't be written whole; what was written before stays, and a later record may succeed.
        """
        line = (b"\n" if self._torn else b"") + msgspec.json.encode(record) + b"\n"
        size = os.fstat(self._fd).st_size
        try:
            written = os.write(self._fd, line)
            if written < len(line):
                raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} after {written} of {len(line)} bytes")
            os.fsync(self._fd)
            self._torn = False
        except OSError as error:
            self._torn = self._shared
            if not self._shared:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._fd, size)
            raise _not_writable(self.path, error) from error

    def close(self) -> None:
        """Close the file; one of our own that nothing was written to is removed."""
        empty = not self._shared and os.fstat(self._fd).st_size == 0
        os.close(self._fd)
        if empty:
            self.path.unlink(missing_ok=True)

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Database:
    """The user's records and choices over the shipped ones. Holds no state: every call reads the files anew."""

    def __init__(self, user_root: Path | None = None, shipped_root: Path | None = None) -> None:
        self._user_root = user_root
        self._shipped_root = shipped_root or _SHIPPED

    @property
    def user_root(self) -> Path:
        """Where the user's folders per device are."""
        return self._user_root or settings.cache_dir / "tuning"

    @property
    def shipped_root(self) -> Path:
        """Where the shipped folders per device are."""
        return self._shipped_root

    def folder(self, origin: Origin, slug: str) -> Path:
        """The folder of one device. ValueError for a slug that is no plain file name."""
        if _SLUG.fullmatch(slug) is None:
            raise ValueError(f"device slug {slug!r} must be of letters, digits, '.', '_' and '-'")
        return (self.user_root if origin == "user" else self.shipped_root) / slug

    def choices(self, origin: Origin, slug: str) -> Choices | None:
        """The choices for a device, or None where there are none or the file is corrupt (the user's is set aside)."""
        path = self.folder(origin, slug) / "choices.json"
        try:
            choices = msgspec.json.decode(path.read_bytes(), type=Choices)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, msgspec.DecodeError) as error:
            _set_aside(path, str(error), rename=origin == "user")
            return None
        if choices.schema != SCHEMA:
            _warn(f"{path} has schema {choices.schema}, this jagtile reads schema {SCHEMA}; it is ignored")
            return None
        return choices

    def devices(self, origin: Origin) -> list[DeviceFacts]:
        """The devices that have choices, by slug."""
        found = (self.choices(origin, slug) for slug in self.slugs(origin))
        return [choices.device for choices in found if choices is not None]

    def records(self, *origins: Origin, **filters: str) -> list[TuningRecord]:
        """Every readable record once, in order of date; of one date shipped ones first, then in order of writing.

        ``origins``: of these only. ``filters`` are field values that a record must have, e.g. ``device="sm90-132sm",
        spec="fwd_bf16_d128"``.
        """
        unknown = filters.keys() - set(TuningRecord.__struct_fields__)
        if unknown:
            raise ValueError(f"a record has no field {', '.join(sorted(unknown))}")
        found: dict[bytes, TuningRecord] = {}
        for origin in origins or ORIGINS:
            slugs = [filters["device"]] if "device" in filters else self.slugs(origin)
            for slug in slugs:
                for path in self.record_files(origin, slug):
                    for record in read_records(path):
                        if all(getattr(record, key) == value for key, value in filters.items()):
                            found.setdefault(identity(record), record)
        return sorted(found.values(), key=lambda record: record.date)

    def writer(self, slug: str, ship: bool) -> RecordWriter:
        """A writer of records for a device. DatabaseError, before anything is measured, where it can't be."""
        if ship:
            return RecordWriter(self.folder("shipped", slug) / "records.jsonl", shared=True)
        name = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.jsonl"
        return RecordWriter(self.folder("user", slug) / "records" / name)

    @contextlib.contextmanager
    def changing_choices(self, slug: str, ship: bool) -> Iterator[None]:
        """Keep this node's other processes from changing a device's choices between our reading and our writing them.

        Where no lock can be had the last writer wins.
        """
        import filelock

        path = self.folder("shipped" if ship else "user", slug).resolve()
        with contextlib.ExitStack() as held:
            try:
                folder = private_folder(create=True)
                assert folder is not None  # it was to be created
                (folder / "locks").mkdir(exist_ok=True)
                name = f"choices-{hashlib.sha256(str(path).encode()).hexdigest()[:32]}.lock"
                held.enter_context(filelock.FileLock(folder / "locks" / name, timeout=_LOCK_SECONDS))
            except (OSError, NotImplementedError) as error:  # filelock.Timeout is an OSError too
                log.warning("changing the choices in %s without a lock: %s", path, error)
            yield

    def write_choices(self, choices: Choices, ship: bool) -> Path:
        """Replace the choices of a device atomically; keys sorted and indented, so that a retune is a readable diff."""
        path = self.folder("shipped" if ship else "user", choices.device.slug) / "choices.json"
        text = msgspec.json.format(msgspec.json.encode(choices, order="sorted"), indent=2) + b"\n"
        try:
            replace_file(path, text)
        except OSError as error:
            raise _not_writable(path, error) from error
        return path

    def slugs(self, origin: Origin) -> list[str]:
        """The devices that have a folder."""
        root = self.user_root if origin == "user" else self.shipped_root
        try:
            entries = sorted(path.name for path in root.iterdir() if path.is_dir())
        except OSError:
            return []
        return [name for name in entries if _SLUG.fullmatch(name)]

    def record_files(self, origin: Origin, slug: str) -> list[Path]:
        """The files that hold a device's records."""
        folder = self.folder(origin, slug)
        return [folder / "records.jsonl"] if origin == "shipped" else sorted((folder / "records").glob("*.jsonl"))


def read_records(path: Path, skip: int = 0) -> Iterator[TuningRecord]:
    """The records of a file behind its first ``skip`` lines; lines that are none are skipped with a warning."""
    try:
        lines = path.read_bytes().split(b"\n")
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        _warn(f"{path} can't be read and is ignored: {error}")
        return
    decoder = msgspec.json.Decoder(TuningRecord)
    for number, line in enumerate(lines, start=1):
        if number <= skip or not line.strip():
            continue
        try:
            record = decoder.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            _warn(f"{path}, line {number} is no tuning record and is skipped: {error}")
            continue
        if record.schema == SCHEMA:
            yield record
        else:
            _warn(f"{path}, line {number} has schema {record.schema}, this jagtile reads {SCHEMA}; it is skipped")


def replace_file(path: Path, content: bytes) -> None:
    """Replace or make a file atomically: what was there stays where this fails, with an OSError."""
    staged = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with staged.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        staged.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            staged.unlink(missing_ok=True)
        raise


def _set_aside(path: Path, why: str, rename: bool) -> None:
    aside = path.with_name(f"{path.name}.bad-{uuid.uuid4().hex[:8]}")
    if rename:
        with contextlib.suppress(OSError):
            path.rename(aside)
            _warn(f"{path} is corrupt ({why}); it was set aside as {aside.name} and is ignored")
            return
    _warn(f"{path} is corrupt ({why}) and is ignored")


def _not_writable(path: Path, error: OSError) -> DatabaseError:
    return DatabaseError(
        f"tuning results can't be written to {path}: {error.strerror or error}; let JAGTILE_CACHE_DIR name a folder "
        f"that can be written to and has room (to ship results, tuning_db/ itself must)"
    )


def _warn(message: str) -> None:
    warnings.warn(message, JagtileWarning, stacklevel=3)
