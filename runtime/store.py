"""The content-addressed cache of built kernels: ``<root>/store/<key[:2]>/<key>/{<binary>, meta.json}``.

An entry is published whole, by renaming a private staging folder, and never changed afterwards; so an entry that
exists is complete. Readers verify it all the same: size at every look-up, sha256 once per process. What does not verify
is set aside under ``<key>.bad-<id>`` with a warning, and is a miss. Locks only avoid duplicate work: who can't have one
in time builds too, and the loser of a race uses the winner's entry or, where that can't be seen, its own copy.
"""

from __future__ import annotations

import errno
import getpass
import hashlib
import logging
import os
import shutil
import socket
import tempfile
import time
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from jagtile.runtime.artifact import ABI_VERSION, Artifact, ArtifactMeta
from jagtile.runtime.errors import CorruptArtifactError, JagtileWarning
from jagtile.runtime.settings import settings

log = logging.getLogger("jagtile")

_LAYOUT = "v1"  # of the folders below; another layout would be another folder
_META = "meta.json"
_STALE_STAGING_SECONDS = 24 * 3600
_LOST_RACE = {errno.EEXIST, errno.ENOTEMPTY}

_verified: set[tuple[Path, str]] = set()  # (binary, sha256) whose content this process has hashed
_fallbacks: dict[Path, Path] = {}  # a root that can't be written -> the temporary one used instead
_swept: set[Path] = set()


class ArtifactStore:
    """The store below a root folder (the user's cache folder unless given). Creating it touches no disk."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = (root or settings.cache_dir) / _LAYOUT

    def get(self, key: str) -> Artifact | None:
        """The verified artifact of a key, or None."""
        for root in (self.root, _fallbacks.get(self.root)):
            if root is not None and (found := _read(_entry(root, key), key)) is not None:
                return found
        return None

    def publish(self, key: str, binary: Path, meta: ArtifactMeta) -> Artifact:
        """Make a built binary the entry of its key. ``meta.size`` and ``meta.sha256`` are taken from the binary."""
        content = binary.read_bytes()
        meta = msgspec.structs.replace(
            meta, key=key, file=binary.name, size=len(content), sha256=hashlib.sha256(content).hexdigest()
        )
        with self.staging() as folder:
            _write(folder / binary.name, content)
            _write(folder / _META, msgspec.json.format(msgspec.json.encode(meta), indent=2) + b"\n")
            entry = _entry(folder.parent.parent, key)
            entry.parent.mkdir(parents=True, exist_ok=True)
            for _ in range(2):
                try:
                    folder.rename(entry)
                except OSError as error:
                    if error.errno not in _LOST_RACE:
                        raise
                    if (winner := _read(entry, key)) is not None:  # a corrupt one was set aside: try again
                        return winner
                else:
                    _sync(entry.parent)
                    return Artifact(meta, entry / binary.name, "built")
            return _own_copy(meta, binary.name, content)

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """A private folder on the store's file system; what is left of it at the end is removed."""
        folder = self._writable_root() / "staging" / f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex}"
        folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def lock(self, key: str, timeout: float = 120.0) -> Iterator[bool]:
        """Hold the key's build lock, or go on without it after ``timeout`` seconds; yields whether it is held."""
        import filelock

        lock = filelock.FileLock(_lock_root() / f"{key}.lock")
        held = True
        try:
            lock.acquire(timeout=timeout)
        except (filelock.Timeout, OSError) as error:
            held = False
            log.warning("going on without the build lock of %s: %s", key, error)
        try:
            yield held
        finally:
            if held:
                lock.release()

    def keep_failure(self, key: str, files: dict[str, bytes]) -> Path:
        """Keep a failed build's source and log for a person to read; returns their folder."""
        folder = self._writable_root() / "failed" / key
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            _write(folder / name, content)
        return folder

    def _writable_root(self) -> Path:
        """The root, or one temporary folder per process where it can't be written."""
        if self.root in _fallbacks:
            return _fallbacks[self.root]
        staging = self.root / "staging"
        try:
            staging.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=staging):
                pass
        except OSError as error:
            _fallbacks[self.root] = Path(tempfile.mkdtemp(prefix="jagtile-")) / _LAYOUT
            warnings.warn(
                f"the cache folder {self.root} can't be written ({error}); kernels built by this process go to "
                f"{_fallbacks[self.root]} and are not kept. JAGTILE_CACHE_DIR may name another folder",
                JagtileWarning,
                stacklevel=2,
            )
            return _fallbacks[self.root]
        if self.root not in _swept:
            _swept.add(self.root)
            _sweep(staging)
        return self.root


def _entry(root: Path, key: str) -> Path:
    return root / "store" / key[:2] / key


def _read(entry: Path, key: str) -> Artifact | None:
    if not entry.is_dir():
        return None
    try:
        meta = _verified_meta(entry, key)
    except CorruptArtifactError as error:
        _set_aside(entry, str(error))
        return None
    return Artifact(meta, entry / meta.file, "cache")


def _verified_meta(entry: Path, key: str) -> ArtifactMeta:
    try:
        meta = msgspec.json.decode((entry / _META).read_bytes(), type=ArtifactMeta)
        binary = entry / Path(meta.file).name
        size = binary.stat().st_size
    except (OSError, msgspec.MsgspecError) as error:
        raise CorruptArtifactError(f"{entry}: {error}") from None
    if (meta.key, meta.abi) != (key, ABI_VERSION):
        raise CorruptArtifactError(f"{entry}: key {meta.key} and ABI {meta.abi}, expected {key} and {ABI_VERSION}")
    if size != meta.size:
        raise CorruptArtifactError(f"{binary}: {size} bytes, {meta.size} expected")
    if (binary, meta.sha256) not in _verified:
        digest = hashlib.sha256(binary.read_bytes()).hexdigest()
        if digest != meta.sha256:
            raise CorruptArtifactError(f"{binary}: sha256 {digest}, {meta.sha256} expected")
        _verified.add((binary, meta.sha256))
    return meta


def _set_aside(entry: Path, reason: str) -> None:
    aside = entry.with_name(f"{entry.name}.bad-{uuid.uuid4().hex[:8]}")
    try:
        entry.rename(aside)
        kept = f"set aside as {aside.name}"
    except OSError as error:
        kept = f"it could not be set aside ({error})"
    warnings.warn(f"a cached kernel is corrupt and will be rebuilt: {reason}; {kept}", JagtileWarning, stacklevel=2)


def _own_copy(meta: ArtifactMeta, name: str, content: bytes) -> Artifact:
    """Where neither winning nor reading the winner worked (some network file systems): a copy for this process."""
    copy = Path(tempfile.mkdtemp(prefix="jagtile-")) / name
    _write(copy, content)
    return Artifact(meta, copy, "built")


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Make a rename durable; not every file system lets a folder be synced."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _sweep(staging: Path) -> None:
    """Remove what killed builders left behind long ago."""
    for folder in staging.iterdir():
        with suppress(OSError):
            if time.time() - folder.stat().st_mtime > _STALE_STAGING_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


def _lock_root() -> Path:
    """Node-local: locks over network file systems can't be trusted. Lock files are never deleted."""
    runtime_dir = os.environ.get("XDG_RUNTIME_DIR")
    base = Path(runtime_dir) if runtime_dir and os.access(runtime_dir, os.W_OK) else Path(tempfile.gettempdir())
    root = base / f"jagtile-locks-{getpass.getuser()}"
    root.mkdir(parents=True, exist_ok=True)
    return root
