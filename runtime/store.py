"""The content-addressed cache of built kernels: ``<root>/v1/store/<key[:2]>/<key>/{<binary>, meta.json}``.

An entry is published whole, by renaming a private folder, and never changed afterwards; so an entry that exists is
complete. Readers verify it all the same: size at every look-up, sha256 once per process. What does not verify is set
aside under ``<key>.bad-<id>`` with a warning, and is a miss. Locks only avoid duplicate work; the loser of a race uses
the winner's entry. Where the root can't be written, a spare of this user on this node takes its place.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import socket
import tempfile
import threading
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from jagtile.runtime import entries, scratch
from jagtile.runtime.artifact import Artifact, ArtifactMeta
from jagtile.runtime.errors import CacheError, JagtileWarning
from jagtile.runtime.settings import settings

log = logging.getLogger("jagtile")

_LAYOUT = "v1"  # of the folders below; another layout would be another folder
_STALE_SECONDS = {"staging": 24 * 3600, "failed": 30 * 24 * 3600}

_unwritable: set[Path] = set()  # roots that this process has given up writing to
_swept: set[Path] = set()
_guard = threading.Lock()  # of the two above


class ArtifactStore:
    """The store below a root folder (the user's cache folder unless given). Creating it touches no disk."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = (root or settings.cache_dir).absolute() / _LAYOUT
        self._id = hashlib.sha256(str(self.root).encode()).hexdigest()[:12]

    def get(self, key: str) -> Artifact | None:
        """The verified artifact of a key, or None. A corrupt one is set aside with a JagtileWarning naming it."""
        spare = self._spare(create=False)
        for root in (self.root, spare):
            if root is not None and (found := entries.read(_entry(root, key), key)) is not None:
                return found
        return None

    def holds(self, key: str) -> bool:
        """Whether there is an entry of a key; its content is not looked at."""
        roots = (self.root, self._spare(create=False))
        return any(root is not None and entries.exists(_entry(root, key)) for root in roots)

    def publish(self, key: str, binary: Path, meta: ArtifactMeta) -> Artifact:
        """Make a built binary the entry of its key; a valid entry that is there already wins.

        ``meta.key``, ``file``, ``size`` and ``sha256`` are filled in here. CacheError where nothing can be written.
        """
        content = binary.read_bytes()
        meta = msgspec.structs.replace(
            meta, key=key, file=binary.name, size=len(content), sha256=hashlib.sha256(content).hexdigest()
        )
        try:
            published = _publish(self._writable_root(), meta, content)
        except OSError as error:  # the disk is full, a quota is reached, ...
            self._give_up(error)
            published = None
        if published is None:  # or another's entry that this process can neither read nor replace
            try:
                published = _publish(self._spare_root(), meta, content)
            except OSError as error:
                raise CacheError(f"a built kernel can't be kept: {error}. {_ADVICE}") from None
        if published is None:
            raise CacheError(f"an entry of {key} can neither be read nor replaced in {self.root}. {_ADVICE}")
        return published

    @contextmanager
    def workspace(self) -> Iterator[Path]:
        """A private folder to compile in, on this node where possible; removed at the end with all that is in it."""
        try:
            root = scratch.private_folder(create=True)
            assert root is not None
            _prepare(root)
        except OSError:
            root = self._writable_root()
        with _workspace(root) as folder:
            yield folder

    @contextmanager
    def lock(self, key: str, timeout: float = 120.0) -> Iterator[bool]:
        """Hold the key's build lock. Yields False where another builder still holds it after ``timeout`` seconds.

        Where no lock can be had at all there is nobody to wait for: yields True.
        """
        import filelock

        held: filelock.BaseFileLock | None = None
        free = True
        try:
            lock = filelock.FileLock(self._lock_folder() / f"{self._id}-{key}.lock")
            lock.acquire(timeout=timeout)
            held = lock
        except filelock.Timeout:
            free = False
        except (OSError, NotImplementedError) as error:
            log.warning("building without a lock: %s", error)
        try:
            yield free
        finally:
            if held is not None:
                held.release()

    def keep_failure(self, key: str, files: Mapping[str, str]) -> Path | None:
        """Keep a failed build's files (names may have folders) for a person to read.

        Returns their folder; None where they can't be written.
        """
        try:
            folder = self._writable_root() / "failed" / key
            for name, text in files.items():
                _replace(folder / name, text.encode())
        except (OSError, CacheError) as error:
            log.warning("the source and log of a failed build can't be kept: %s", error)
            return None
        return folder

    def _writable_root(self) -> Path:
        """The root, swept of what killed builders left; the spare where it can't be written."""
        if self.root in _unwritable:
            return self._spare_root()
        try:
            _prepare(self.root)
        except OSError as error:
            self._give_up(error)
            return self._spare_root()
        return self.root

    def _give_up(self, error: OSError) -> None:
        with _guard:
            told = self.root in _unwritable
            _unwritable.add(self.root)
        if not told:
            warnings.warn(
                f"the cache folder {self.root} can't be written ({error}); what this process builds goes to "
                f"{self._spare_root()} instead. {_ADVICE}",
                JagtileWarning,
                stacklevel=2,
            )

    def _spare(self, *, create: bool) -> Path | None:
        with suppress(OSError):
            if (folder := scratch.private_folder(create=create)) is not None:
                return folder / "cache" / self._id
        return None

    def _spare_root(self) -> Path:
        root = self._spare(create=True)
        if root is None:
            raise CacheError(
                f"neither {self.root} nor a folder below {tempfile.gettempdir()} can be written. {_ADVICE}"
            )
        return root

    @staticmethod
    def _lock_folder() -> Path:
        """Node-local: locks over network file systems can't be trusted. Lock files are never deleted."""
        folder = scratch.private_folder(create=True)
        assert folder is not None
        (folder / "locks").mkdir(exist_ok=True)
        return folder / "locks"


_ADVICE = "Free some space, or let JAGTILE_CACHE_DIR name a folder that can be written"


def _entry(root: Path, key: str) -> Path:
    return root / "store" / key[:2] / key


def _publish(root: Path, meta: ArtifactMeta, content: bytes) -> Artifact | None:
    with _workspace(root) as folder:
        return entries.publish(folder, _entry(root, meta.key), meta, content)


@contextmanager
def _workspace(root: Path) -> Iterator[Path]:
    folder = root / "staging" / f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex}"
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _prepare(root: Path) -> None:
    """OSError unless a folder and a file of some bytes can be made in ``root``. Sweeps it, once per process."""
    staging = root / "staging"
    staging.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=staging) as file:
        file.write(bytes(4096))
        file.flush()
    with _guard:
        fresh = root not in _swept
        _swept.add(root)
    if fresh:
        for name, seconds in _STALE_SECONDS.items():
            _sweep(root / name, seconds)


def _replace(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        entries.write(part, content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _sweep(parent: Path, seconds: float) -> None:
    """Remove the folders that nobody has touched for so long."""
    with suppress(OSError):
        for folder in parent.iterdir():
            with suppress(OSError):
                if time.time() - folder.stat().st_mtime > seconds:
                    shutil.rmtree(folder, ignore_errors=True)
