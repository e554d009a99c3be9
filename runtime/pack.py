"""One kernel pack: tuned kernels of one kind of device, which need no compiler. Opened, verified, read.

A pack is a folder of ``manifest.json`` (what it is, and size and sha256 of every other file), ``choices.json``,
``records.jsonl``, ``LICENSE``, for each kernel ``kernels/<symbol>.json`` (its ArtifactMeta) beside its binary, and for
each native host, which is of one torch and Python, ``host/<key>.json`` beside its own.
Nothing is believed before its sha256 was compared. That finds damage, not malice: who can change a file can change the
manifest.
"""

from __future__ import annotations

import hashlib
from pathlib import Path, PurePosixPath
from typing import TypeVar

import msgspec

from jagtile.generator.tile import Variant
from jagtile.runtime.artifact import ABI_VERSION, Artifact, ArtifactMeta
from jagtile.runtime.errors import PackError
from jagtile.tuning_db.schema import SCHEMA, Choices, DeviceFacts

FORMAT = 1  # of the manifest and the folder; a pack of another format is not read
MANIFEST, CHOICES, RECORDS, LICENCE = "manifest.json", "choices.json", "records.jsonl", "LICENSE"
KERNELS, HOST = "kernels", "host"

T = TypeVar("T")


class PackedFile(msgspec.Struct, frozen=True, kw_only=True):
    """What a file must be."""

    size: int
    sha256: str


class Provenance(msgspec.Struct, frozen=True, kw_only=True):
    """What a pack was made with. Equal provenance and records give equal packs, byte for byte."""

    jagtile: str  # version
    compilers: tuple[str, ...]  # version strings
    sources: dict[str, str]  # by variant: sha256 of the rendered source and its headers


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """Contents of manifest.json."""

    format: int
    name: str  # "jagtile-kernels-sm90-132sm"
    version: str
    abi: int
    device: DeviceFacts
    licence: str  # an SPDX expression
    provenance: Provenance
    files: dict[str, PackedFile]  # by path in the pack, the manifest left out


class _Head(msgspec.Struct, frozen=True):
    """What is the same in every format."""

    format: int


class Pack:
    """A pack on disk, its manifest and its choices verified; kernels are verified as they are asked for."""

    def __init__(self, folder: Path) -> None:
        """PackError says why the folder holds no pack that this jagtile may use."""
        self.folder = folder
        self.manifest = _manifest(folder)
        self.choices = _decoded(CHOICES, self.read(CHOICES), Choices)
        if self.choices.schema != SCHEMA:
            raise PackError(f"{CHOICES} has schema {self.choices.schema}, this jagtile reads {SCHEMA}")
        if self.choices.device != self.device:
            raise PackError(f"{CHOICES} is for {self.choices.device.slug}, {MANIFEST} for {self.device.slug}")

    @property
    def name(self) -> str:
        """As of the wheel, e.g. ``jagtile-kernels-sm90-132sm``."""
        return self.manifest.name

    @property
    def device(self) -> DeviceFacts:
        """What it was tuned on."""
        return self.manifest.device

    def read(self, path: str) -> bytes:
        """The bytes of a file of the pack. PackError where they are not those that the manifest promises."""
        wanted = self.manifest.files.get(path)
        if wanted is None:
            raise PackError(f"{MANIFEST} lists no {path}")
        try:
            content = (self.folder / path).read_bytes()
        except OSError as error:
            raise PackError(f"{path} can't be read: {error.strerror or error}") from None
        if len(content) != wanted.size:
            raise PackError(f"{path} has {len(content)} bytes, {wanted.size} expected")
        if (digest := hashlib.sha256(content).hexdigest()) != wanted.sha256:
            raise PackError(f"{path} has sha256 {digest}, {wanted.sha256} expected")
        return content

    def holds(self, variant: Variant) -> bool:
        """Whether the pack has a kernel of this variant; looks at no file."""
        return variant.target == self.device.target and _meta_path(variant.symbol) in self.manifest.files

    def artifact(self, variant: Variant) -> Artifact:
        """The verified artifact of a variant that the pack holds. PackError where a file of it is damaged."""
        path = _meta_path(variant.symbol)
        meta = _decoded(path, self.read(path), ArtifactMeta)
        named = (meta.abi, meta.target, meta.spec, meta.config, meta.symbol)
        if named != (ABI_VERSION, variant.target, variant.spec.name, variant.config.to_dict(), variant.symbol):
            raise PackError(f"{path} describes another kernel than {variant.name} of ABI {ABI_VERSION}")
        return self._artifact(KERNELS, meta)

    def host(self, key: str) -> Artifact | None:
        """The verified native host of this key (generator/host.py), if it is here. PackError where one is damaged."""
        path = f"{HOST}/{key}.json"
        if path not in self.manifest.files:
            return None
        meta = _decoded(path, self.read(path), ArtifactMeta)
        named = (meta.abi, meta.target, meta.spec, meta.key, *sorted(meta.config))
        if named != (ABI_VERSION, HOST, HOST, key, "python", "torch"):
            raise PackError(f"{path} describes something else than the native host of that key and ABI {ABI_VERSION}")
        return self._artifact(HOST, meta)

    @property
    def symbols(self) -> tuple[str, ...]:
        """Of its kernels."""
        return self._described_in(KERNELS)

    @property
    def host_keys(self) -> tuple[str, ...]:
        """Of its native hosts."""
        return self._described_in(HOST)

    def _artifact(self, folder: str, meta: ArtifactMeta) -> Artifact:
        binary = f"{folder}/{meta.file}"
        self.read(binary)
        return Artifact(meta, self.folder / binary, f"pack:{self.name}")

    def _described_in(self, folder: str) -> tuple[str, ...]:
        paths = (PurePosixPath(path) for path in self.manifest.files)
        return tuple(path.stem for path in paths if str(path.parent) == folder and path.suffix == ".json")


def _meta_path(symbol: str) -> str:
    return f"{KERNELS}/{symbol}.json"


def _manifest(folder: Path) -> Manifest:
    try:
        text = (folder / MANIFEST).read_bytes()
    except OSError as error:
        raise PackError(f"{MANIFEST} can't be read: {error.strerror or error}") from None
    found = _decoded(MANIFEST, text, _Head).format
    if found != FORMAT:
        newer = "a newer jagtile made it: upgrade jagtile" if found > FORMAT else "make it anew: `jagtile pack build`"
        raise PackError(f"it has format {found}, this jagtile reads {FORMAT}; {newer}")
    manifest = _decoded(MANIFEST, text, Manifest)
    if manifest.abi != ABI_VERSION:
        raise PackError(
            f"its kernels have ABI {manifest.abi}, this jagtile launches {ABI_VERSION}; use a pack that was made with "
            f"a jagtile like this one (it was made with {manifest.provenance.jagtile})"
        )
    for path in manifest.files:
        parts = PurePosixPath(path).parts
        if not parts or path.startswith("/") or ".." in parts or "\\" in path:
            raise PackError(f"{MANIFEST} lists {path!r}, which is no path inside the pack")
    return manifest


def _decoded(path: str, content: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise PackError(f"{path} can't be understood: {error}") from None
