"""The packs that this process can see, in look-up order, and which of them serve a device.

First those in the folders of JAGTILE_PACKS (by default the user's data folder), then installed wheels: distributions
with an entry point of the group ``jagtile.packs`` whose value is the name of the pack's folder. What is no usable pack
is told in a JagtileWarning and passed over. They are looked for once a process, and again after ``forget``.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from jagtile.generator.tile import Variant
from jagtile.runtime.artifact import Artifact
from jagtile.runtime.device import DeviceId, device_id, relatives
from jagtile.runtime.errors import JagtileWarning, PackError, UnsupportedError
from jagtile.runtime.pack import MANIFEST, Pack
from jagtile.runtime.settings import settings, user_packs

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

ENTRY_POINTS = "jagtile.packs"


@dataclass(frozen=True)
class Found:
    """A place where a pack is, or should be."""

    folder: Path
    origin: str  # "folder" or "wheel"
    pack: Pack | None
    refusal: str  # why there is no pack to use; empty where there is


def discover() -> tuple[Found, ...]:
    """Every place, in look-up order; the same answer until the setting changes or ``forget`` is called."""
    return _discovered(settings.packs)


def forget() -> None:
    """Look for packs anew when next asked."""
    _discovered.cache_clear()
    _fitting.cache_clear()


def fitting(device: DeviceId) -> tuple[Pack, ...]:
    """The usable packs for a device: its own, then its relatives', nearest first.

    A JagtileWarning tells what is refused; packs for other devices of its target only where none fits.
    """
    return _fitting(settings.packs, device)


def holds(variant: Variant, device: torch.device) -> bool:
    """Whether a pack for the device lists the variant; its files are not looked at."""
    return any(pack.holds(variant) for pack in _packs_for(device))


def artifact(variant: Variant, device: torch.device) -> Artifact | None:
    """The variant's verified artifact from the first pack for the device that has it whole.

    A JagtileWarning tells of damaged ones.
    """
    for pack in _packs_for(device):
        if pack.holds(variant):
            try:
                return pack.artifact(variant)
            except PackError as error:
                _warn(f"the kernel pack {pack.folder} is damaged: {error}; {variant.name} is sought elsewhere")
    return None


def host(key: str) -> Artifact | None:
    """The verified native host of this key (generator/host.py) from the first pack that has it whole.

    A JagtileWarning tells of damaged ones. The host is no device's: any pack's will do.
    """
    for pack in (found.pack for found in discover() if found.pack is not None):
        try:
            if (artifact := pack.host(key)) is not None:
                return artifact
        except PackError as error:
            _warn(f"the kernel pack {pack.folder} is damaged: {error}; the native host is sought elsewhere")
    return None


def _packs_for(device: torch.device) -> tuple[Pack, ...]:
    if not discover():  # the usual case: no need to ask the device who it is
        return ()
    try:
        return fitting(device_id(device))
    except UnsupportedError:
        return ()


@lru_cache(maxsize=4)
def _discovered(folders: tuple[Path, ...] | None) -> tuple[Found, ...]:
    if folders is None:
        return ()
    found: dict[Path, Found] = {}
    for folder in folders:
        packs = list(_in_folder(folder))
        if not packs and folder not in user_packs():
            packs = [Found(folder, "folder", None, "there is no pack in it")]
        found.update((place.folder, place) for place in packs if place.folder not in found)
    found.update((place.folder, place) for place in _installed() if place.folder not in found)
    return tuple(found.values())


def _in_folder(folder: Path) -> Iterator[Found]:
    """The folder itself if it is a pack, else those of its folders that are."""
    if (folder / MANIFEST).exists():
        yield _opened(folder, "folder")
        return
    try:
        inside = sorted(path for path in folder.iterdir() if (path / MANIFEST).exists())
    except OSError:
        return
    for path in inside:
        yield _opened(path, "folder")


def _installed() -> Iterator[Found]:
    """The packs that wheels brought. Only files that name the group are parsed: the standard library's
    ``entry_points`` parses all, 3.5 ms of a first call where 53 are installed (so 0.7).
    """
    from importlib.metadata import distributions

    points: dict[tuple[str, str], EntryPoint] = {}
    for dist in distributions():
        if f"[{ENTRY_POINTS}]" in (dist.read_text("entry_points.txt") or ""):
            for point in dist.entry_points.select(group=ENTRY_POINTS):
                points.setdefault((point.name, point.value), point)  # as in imports, the path's first hides the others
    for _, point in sorted(points.items()):
        if point.dist is not None:  # never imported: the folder holds no code
            yield _opened(Path(str(point.dist.locate_file(point.value))), "wheel")


def _opened(folder: Path, origin: str) -> Found:
    try:
        return Found(folder, origin, Pack(folder), "")
    except PackError as error:
        return Found(folder, origin, None, str(error))


@lru_cache(maxsize=64)
def _fitting(folders: tuple[Path, ...] | None, device: DeviceId) -> tuple[Pack, ...]:
    places = _discovered(folders)
    for place in places:
        if place.pack is None:
            _warn(f"the kernel pack {place.folder} is refused: {place.refusal}")
    packs = [place.pack for place in places if place.pack is not None]
    devices = {pack.device.slug: pack.device for pack in packs}
    slugs = [device.slug, *(facts.slug for facts in relatives(device, devices.values()))]
    fit = tuple(pack for slug in slugs for pack in packs if pack.device.slug == slug)
    if not fit:
        for pack in packs:
            if pack.device.target == device.target:
                _warn(
                    f"the kernel pack {pack.folder} is refused: it is for {pack.device.slug} "
                    f"({pack.device.label}), this device is {device.slug}"
                )
    return fit


def _warn(message: str) -> None:
    warnings.warn(message, JagtileWarning, stacklevel=3)
