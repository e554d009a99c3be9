"""One entry of the artifact cache: a folder with a binary and its meta.json, written whole, verified when read."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import uuid
import warnings
from contextlib import suppress
from pathlib import Path

import msgspec

from jagtile.runtime.artifact import ABI_VERSION, Artifact, ArtifactMeta
from jagtile.runtime.errors import CorruptArtifactError, JagtileWarning

log = logging.getLogger("jagtile")

_META = "meta.json"
_LOST_RACE = {errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR}
_ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)

_verified: set[tuple[Path, str]] = set()  # (binary, sha256) whose content this process has hashed


def read(entry: Path, key: str) -> Artifact | None:
    """The verified entry; None where there is none, it can't be read now, or it was corrupt and is set aside."""
    if not os.path.lexists(entry):
        return None
    try:
        meta = _verified_meta(entry, key)
    except CorruptArtifactError as error:
        _set_aside(entry, key, str(error))
        return None
    except OSError as error:  # no permission, too many open files, a stale handle, ...: says nothing of the content
        log.warning("a cached kernel can't be read: %s", error)
        return None
    return Artifact(meta, entry / meta.file, "cache")


def exists(entry: Path) -> bool:
    """Whether there is one, whole or not."""
    return (entry / _META).exists()


def _verified_meta(entry: Path, key: str) -> ArtifactMeta:
    try:
        meta = msgspec.json.decode((entry / _META).read_bytes(), type=ArtifactMeta)
        binary = entry / meta.file
        size = binary.stat().st_size
    except (*_ABSENT, msgspec.MsgspecError, ValueError) as error:
        raise CorruptArtifactError(f"{entry / _META}: {error}") from None
    if (meta.key, meta.abi) != (key, ABI_VERSION):
        raise CorruptArtifactError(f"{entry}: key {meta.key} and ABI {meta.abi}, expected {key} and {ABI_VERSION}")
    if Path(meta.file).name != meta.file or not binary.is_file():
        raise CorruptArtifactError(f"{entry / _META}: the binary {meta.file!r} is no file beside it")
    if size != meta.size:
        raise CorruptArtifactError(f"{binary}: {size} bytes, {meta.size} expected")
    if (binary, meta.sha256) not in _verified:
        digest = hashlib.sha256(binary.read_bytes()).hexdigest()
        if digest != meta.sha256:
            raise CorruptArtifactError(f"{binary}: sha256 {digest}, {meta.sha256} expected")
        _verified.add((binary, meta.sha256))
    return meta


def _set_aside(entry: Path, key: str, reason: str) -> None:
    aside = entry.with_name(f"{entry.name}.bad-{uuid.uuid4().hex[:8]}")
    try:
        entry.rename(aside)
    except FileNotFoundError:  # another reader was faster
        return
    except OSError as error:
        kept = f"it could not be set aside ({error})"
    else:
        kept = f"set aside as {aside.name}"
        with suppress(CorruptArtifactError, OSError):  # what was renamed may be what another process just repaired
            _verified_meta(aside, key)
            aside.rename(entry)
            return
    warnings.warn(f"a cached kernel is corrupt: {reason}; {kept}", JagtileWarning, stacklevel=2)


def publish(folder: Path, entry: Path, meta: ArtifactMeta, content: bytes) -> Artifact | None:
    """Fill a private folder on the same file system and rename it to be the entry. A valid entry there already wins.

    None where another's entry is in the way that can neither be read nor set aside. OSError where writing fails.
    """
    write(folder / meta.file, content)
    write(folder / _META, msgspec.json.format(msgspec.json.encode(meta), indent=2) + b"\n")
    _sync(folder)
    entry.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(2):
        try:
            folder.rename(entry)
        except OSError as error:
            if error.errno not in _LOST_RACE:
                raise
            if (winner := read(entry, meta.key)) is not None:  # a corrupt one was set aside: try again
                return winner
        else:
            _sync(entry.parent)
            return Artifact(meta, entry / meta.file, "built")
    return None


def write(path: Path, content: bytes) -> None:
    """Write a file and make it durable."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Make renames and new names durable; not every file system lets a folder be synced."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
