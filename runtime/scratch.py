"""This user's private folder on this node: build locks, compilations, and the spare cache where the real one fails."""

from __future__ import annotations

import os
import stat
import tempfile
from functools import lru_cache
from pathlib import Path


def private_folder(*, create: bool) -> Path | None:
    """``<temporary folder>/jagtile-<user id>``; None where it does not exist and ``create`` is false.

    Kernels are loaded from it, so it must be nobody else's: where another user owns that name or could write to the
    folder, this process takes a fresh one with a random name. OSError where none can be created.
    """
    folder = Path(tempfile.gettempdir()) / f"jagtile-{os.getuid()}"
    if create:
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
        except FileExistsError:  # not a folder
            return _process_folder(folder.parent)
    elif not os.path.lexists(folder):
        return None
    return folder if _is_private(folder) else _process_folder(folder.parent)


def _is_private(folder: Path) -> bool:
    status = folder.lstat()
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022


@lru_cache(maxsize=8)
def _process_folder(parent: Path) -> Path:
    return Path(tempfile.mkdtemp(prefix="jagtile-", dir=parent))
