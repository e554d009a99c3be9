"""Putting a pack where it belongs: whole or not at all; and installing one, from a folder or a wheel."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from jagtile.generator.pack_check import check_pack
from jagtile.generator.pack_wheel import unpack_wheel
from jagtile.runtime.errors import PackError
from jagtile.runtime.pack import MANIFEST, Pack
from jagtile.runtime.settings import settings


def check_free(folder: Path) -> None:
    """PackError unless a pack may be put there: nothing is, or an empty folder, or a pack to be replaced."""
    if not os.path.lexists(folder) or (folder / MANIFEST).is_file():
        return
    if not folder.is_dir() or any(folder.iterdir()):
        raise PackError(f"{folder} is there already and is no kernel pack; name another folder")


def place_folder(folder: Path, contents: dict[str, bytes]) -> None:
    """Write files beside ``folder`` and rename them into place; what ``check_free`` allowed to be there goes."""
    folder = folder.absolute()
    staged, old = (folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}") for _ in range(2))
    try:
        for path, content in contents.items():
            (staged / path).parent.mkdir(parents=True, exist_ok=True)
            (staged / path).write_bytes(content)
        with suppress(FileNotFoundError):
            folder.rename(old)
        try:
            staged.rename(folder)
        except OSError:
            with suppress(OSError):
                old.rename(folder)
            raise
    finally:
        for rest in (staged, old):
            if rest.is_symlink():
                rest.unlink()
            else:
                shutil.rmtree(rest, ignore_errors=True)


@contextmanager
def opened(path: Path) -> Iterator[Pack]:
    """The pack in a folder or in a wheel, the latter unpacked for a while. PackError for what is neither."""
    if path.is_dir():
        yield Pack(path)
        return
    if not path.is_file():
        raise PackError(f"{path} is neither a folder nor a wheel of a kernel pack")
    with tempfile.TemporaryDirectory(prefix="jagtile-pack-") as temporary:
        folder = Path(temporary) / "pack"
        place_folder(folder, unpack_wheel(path))
        yield Pack(folder)


def install(path: Path) -> Pack:
    """Verify the pack in a folder or a wheel and copy it to the first folder of JAGTILE_PACKS.

    One of the same name is replaced. PackError where anything is wrong with it, or packs are switched off.
    """
    folders = settings.packs
    if not folders:
        raise PackError("JAGTILE_PACKS names no folder to install packs into")
    with opened(path) as pack:
        if problems := check_pack(pack):
            raise PackError(f"{path} is not installed: {'; '.join(problems)}")
        contents = {name: pack.read(name) for name in pack.manifest.files}
        contents[MANIFEST] = (pack.folder / MANIFEST).read_bytes()
        target = folders[0] / pack.name
    check_free(target)
    place_folder(target, contents)
    return Pack(target)
