"""A pack as a wheel and back: a zip archive whose folder of data is found by its entry point, without any code.

The archive is the same, byte for byte, for the same pack and zlib: sorted names, fixed times and permissions.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import re
import sysconfig
import zipfile
from pathlib import Path

from jagtile.runtime.errors import PackError
from jagtile.runtime.pack import LICENCE, MANIFEST, Pack
from jagtile.runtime.packs import ENTRY_POINTS

_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest that zip can tell
_MODE = 0o100644 << 16
# Normalised versions only: pip compares names of files with versions in metadata.
_VERSION = re.compile(r"\d+(\.\d+)*((a|b|rc)\d+)?(\.post\d+)?(\.dev\d+)?(\+[a-z0-9]+(\.[a-z0-9]+)*)?")


def check_version(version: str) -> str:
    """The version. PackError for what is no normalised PEP 440 version, such as 0.1.0 or 0.1.0.post2."""
    if _VERSION.fullmatch(version) is None:
        raise PackError(f"version {version!r} must be as of PEP 440 and normalised: 0.1.0, 0.1.0.post2, 1.0rc1, ...")
    return version


def write_wheel(pack: Pack, folder: Path) -> Path:
    """Write the wheel of a pack into a folder; every file is verified. Returns its path."""
    module = _module(pack)
    info = f"{module}-{check_version(pack.manifest.version)}.dist-info"
    has_objects = any(path.endswith(".so") for path in pack.manifest.files)
    tag = f"py3-none-{_platform() if has_objects else 'any'}"
    files = {f"{module}/{path}": pack.read(path) for path in pack.manifest.files}
    files[f"{module}/{MANIFEST}"] = (pack.folder / MANIFEST).read_bytes()
    files[f"{info}/METADATA"] = _metadata(pack).encode()
    files[f"{info}/WHEEL"] = (
        f"Wheel-Version: 1.0\nGenerator: jagtile {pack.manifest.provenance.jagtile}\n"
        f"Root-Is-Purelib: {'true' if tag.endswith('any') else 'false'}\nTag: {tag}\n"
    ).encode()
    files[f"{info}/entry_points.txt"] = f"[{ENTRY_POINTS}]\n{pack.device.slug} = {module}\n".encode()
    files[f"{info}/licenses/{LICENCE}"] = pack.read(LICENCE)
    path = folder / f"{module}-{pack.manifest.version}-{tag}.whl"
    folder.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.part")
    with zipfile.ZipFile(staged, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name in sorted(files):
            _add(archive, name, files[name])
        _add(archive, f"{info}/RECORD", _record(files, f"{info}/RECORD"))  # last, as pip advises
    staged.replace(path)
    return path


def unpack_wheel(wheel: Path) -> dict[str, bytes]:
    """The files of the pack in a wheel, by path in the pack, not yet verified. PackError for what is no such wheel."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            manifests = [name for name in archive.namelist() if re.fullmatch(rf"[^/]+/{re.escape(MANIFEST)}", name)]
            if len(manifests) != 1:
                raise PackError(
                    f"{wheel} is no wheel of a kernel pack: it has {len(manifests)} folders with {MANIFEST}"
                )
            inside = manifests[0].removesuffix(MANIFEST)
            return {
                name.removeprefix(inside): archive.read(name)
                for name in archive.namelist()
                if name.startswith(inside) and not name.endswith("/")
            }
    except (zipfile.BadZipFile, zipfile.LargeZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        if isinstance(error, PackError):
            raise
        raise PackError(f"{wheel} is no whole wheel: {error}") from None


def _module(pack: Pack) -> str:
    return re.sub(r"[-_.]+", "_", pack.name).lower()


def _platform() -> str:
    """Of shared objects that were built here."""
    return re.sub(r"[-.]", "_", sysconfig.get_platform())


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    entry = zipfile.ZipInfo(name, _EPOCH)
    entry.external_attr = _MODE
    entry.create_system = 3  # Unix, wherever it is written
    archive.writestr(entry, content, zipfile.ZIP_DEFLATED, compresslevel=9)


def _record(files: dict[str, bytes], itself: str) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for name in sorted(files):
        digest = base64.urlsafe_b64encode(hashlib.sha256(files[name]).digest()).rstrip(b"=").decode()
        writer.writerow((name, f"sha256={digest}", len(files[name])))
    writer.writerow((itself, "", ""))
    return text.getvalue().encode()


def _metadata(pack: Pack) -> str:
    manifest, device = pack.manifest, pack.device
    return (
        "Metadata-Version: 2.4\n"
        f"Name: {manifest.name}\n"
        f"Version: {manifest.version}\n"
        f"Summary: Tuned attention kernels of jagtile for {device.slug} ({device.label}), ready to run\n"
        f"License-Expression: {manifest.licence}\n"
        f"License-File: {LICENCE}\n"
        "Requires-Python: >=3.10\n"
        "Description-Content-Type: text/plain\n"
        "\n"
        f"{len(pack.symbols)} kernels with ABI {manifest.abi}, made with jagtile {manifest.provenance.jagtile} and "
        f"{', '.join(manifest.provenance.compilers)}. jagtile finds them by itself; they need no compiler.\n"
    )
