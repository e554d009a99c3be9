"""What jagtile finds on this machine, and what to do about what is missing. Asks everything, changes nothing."""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Literal

import msgspec
import torch

import jagtile
from jagtile.generator import host
from jagtile.generator.peers import PEERS
from jagtile.generator.toolchain import Toolchain, find_cxx, find_ninja, find_nvcc
from jagtile.runtime import packs
from jagtile.runtime.device import DeviceId, device_id
from jagtile.runtime.errors import CompilerNotFoundError, JagtileError, SettingError, UnsupportedError
from jagtile.runtime.settings import settings
from jagtile.tuning_db.store import Database

State = Literal["ok", "missing", "wrong"]

_PACKAGES = (
    "torch",
    "numpy",
    "jinja2",
    "ninja",
    "optuna",
    "click",
    "rich",
    "msgspec",
    "cuda-pathfinder",
    "cuda-bindings",
    "triton",
)


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing looked for. ``advice`` says what helps where the state is not ok."""

    topic: str
    name: str
    state: State
    value: str
    advice: str = ""


def examine() -> list[Finding]:
    """Everything, in a report's order: versions, devices, compilers, settings, cache, packs, tuning database, peers."""
    return [
        *_versions(),
        *_devices(),
        *_compilers(),
        *_settings(),
        *_cache(),
        *_native_host(),
        *_packs(),
        *_database(),
        *_peers(),
    ]


def _versions() -> Iterator[Finding]:
    yield _ok("versions", "jagtile", f"{jagtile.__version__} in {Path(jagtile.__file__).parent}")
    yield _ok("versions", "python", f"{platform.python_version()} on {platform.platform()}")
    for package in _PACKAGES:
        try:
            yield _ok("versions", package, metadata.version(package))
        except metadata.PackageNotFoundError:
            if _is_needed(package):
                advice = f"pip install {package}"
                yield Finding(topic="versions", name=package, state="missing", value="not installed", advice=advice)


def _is_needed(package: str) -> bool:
    """Triton only by a peer, cuda-bindings only where torch can use a GPU."""
    return package != "triton" and (package != "cuda-bindings" or torch.version.cuda is not None)


def _devices() -> Iterator[Finding]:
    yield _ok("devices", "cpu", _described(device_id(torch.device("cpu"))))
    yield _ok("devices", "CUDA of torch", torch.version.cuda or "none: this torch is built for the CPU")
    driver = _driver()
    has_gpu = torch.cuda.is_available()
    if driver is None:
        advice = "Nothing to do on a machine without an NVIDIA GPU; else install its driver."
        yield Finding(topic="devices", name="driver", state="missing", value="no NVIDIA driver", advice=advice)
    else:
        yield _ok("devices", "driver", driver)
        if not has_gpu:
            yield Finding(
                topic="devices",
                name="gpu",
                state="wrong",
                value="a driver is there, but torch finds no usable GPU",
                advice="Install a torch that is built for CUDA (pip install torch); see CUDA_VISIBLE_DEVICES.",
            )
    for index in range(torch.cuda.device_count() if has_gpu else 0):
        name = f"cuda:{index}"
        try:
            yield _ok("devices", name, _described(device_id(torch.device(name))))
        except UnsupportedError as error:
            advice = "Calls there raise; routed by jagtile.enable(), they go to torch."
            yield Finding(topic="devices", name=name, state="wrong", value=str(error), advice=advice)


def _compilers() -> Iterator[Finding]:
    for name, find in (("C++ (target cpu)", find_cxx), ("CUDA (target sm_90a)", find_nvcc)):
        yield _sought("compilers", name, lambda find=find: _toolchain(find))  # type: ignore[misc]
    yield _sought("compilers", "ninja", lambda: str(find_ninja()))


def _settings() -> Iterator[Finding]:
    try:
        for setting in settings.describe():
            given = os.pathsep.join(map(str, setting.value)) if isinstance(setting.value, tuple) else setting.value
            value = f"{'' if given is None else given} ({setting.origin}). {setting.doc}"
            yield _ok("settings", setting.variable, value.strip())
    except SettingError as error:
        advice = "Unset the variable or give it a value of that kind."
        yield Finding(topic="settings", name="environment", state="wrong", value=str(error), advice=advice)


def _cache() -> Iterator[Finding]:
    try:
        root = settings.cache_dir
    except SettingError:
        return  # already told
    place = next((path for path in (root, *root.parents) if path.exists()), Path("/"))
    if not os.access(place, os.W_OK | os.X_OK):
        advice = "Let JAGTILE_CACHE_DIR name a folder that can be written to; until then a temporary one is used."
        yield Finding(topic="cache", name="folder", state="wrong", value=f"{root} can't be written to", advice=advice)
    else:
        yield _ok("cache", "folder", f"{root}{'' if root.exists() else ' (made when it is first needed)'}")
    entries = list(root.glob("v1/store/*/*/meta.json"))
    size = sum(file.stat().st_size for meta in entries for file in meta.parent.iterdir())
    yield _ok("cache", "kernels", f"{len(entries)}, {size / 1e6:.1f} MB")
    bad = list(root.rglob("*.bad-*"))
    if bad:
        value = f"{len(bad)} corrupt files or folders set aside, the first {bad[0]}"
        yield Finding(
            topic="cache", name="set aside", state="wrong", value=value, advice="Look at them or delete them."
        )


def _native_host() -> Iterator[Finding]:
    topic, name = "cache", "native host"
    try:
        setting, may_build = settings.native_host, settings.jit
    except SettingError:
        return  # already told
    if setting == "off":
        yield _ok(topic, name, "off, as JAGTILE_NATIVE_HOST says")
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        origin = host.origin()
    for warning in caught:
        advice = "`jagtile pack verify` says all that is wrong."
        yield Finding(topic=topic, name=name, state="wrong", value=str(warning.message), advice=advice)
    hindrance = _hindrance(may_build)
    if origin is not None:
        yield _ok(topic, name, f"{origin}, for this torch and Python")
    elif hindrance is None:
        when = "the first use of a GPU waits for it" if setting == "wait" else "a thread does on the first use of a GPU"
        yield _ok(topic, name, f"not built yet: {when}, some 15 s")
    else:
        value, advice = hindrance
        advice = f"Without it Python launches kernels on a GPU, in two to four times the host time. {advice}"
        yield Finding(topic=topic, name=name, state="missing", value=f"not there, and {value}", advice=advice)


def _hindrance(may_build: bool) -> tuple[str, str] | None:
    """What keeps the native host from being built, and what helps."""
    pack = "or install a pack that was built with --host."
    if not may_build:
        return "JAGTILE_JIT=0 forbids building it", f"Set JAGTILE_JIT=1, {pack}"
    try:
        find_cxx()
    except CompilerNotFoundError:
        return "no compiler can build it", f"Install a C++ compiler, {pack}"
    return None


def _served_devices() -> Iterator[DeviceId]:
    yield device_id(torch.device("cpu"))
    for index in range(torch.cuda.device_count()):
        with suppress(UnsupportedError):
            yield device_id(torch.device("cuda", index))


def _packs() -> Iterator[Finding]:
    try:
        found = packs.discover()
    except SettingError:
        return  # already told
    if not found:
        value = "none installed" if settings.packs is not None else "none, as JAGTILE_PACKS says"
        yield _ok("packs", "packs", value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is refused is told below
        fit = {pack.folder for identity in _served_devices() for pack in packs.fitting(identity)}
    for place in found:
        if place.pack is None:
            advice = "Mend or remove it; `jagtile pack verify` says all that is wrong."
            value = f"{place.folder} is refused: {place.refusal}"
            yield Finding(topic="packs", name=place.folder.name, state="wrong", value=value, advice=advice)
            continue
        pack = place.pack
        value = f"{pack.manifest.version} ({place.origin}), {len(pack.symbols)} kernels for {pack.device.slug}"
        if place.folder in fit:
            yield _ok("packs", pack.name, f"{value}, in {place.folder}")
        else:
            yield _ok("packs", pack.name, f"{value}: no device of this machine, so not used here; in {place.folder}")


def _database() -> Iterator[Finding]:
    database = Database()
    here = {identity.slug for identity in _served_devices()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        records = database.records()
        specs: dict[str, set[str]] = {}
        for origin in ("shipped", "user"):
            for facts in database.devices(origin):
                choices = database.choices(origin, facts.slug)
                specs.setdefault(facts.slug, set()).update(choices.specs if choices else ())
    for slug in sorted({*specs, *here, *(record.device for record in records)}):
        own = sum(record.device == slug for record in records)
        value = f"{own} records, choices for {len(specs.get(slug, ()))} specs"
        if slug in here and not specs.get(slug):
            advice = "`jagtile tune SPEC` records some; until then a relative's choices or safe defaults are used."
            yield Finding(topic="tuning database", name=f"{slug} (here)", state="missing", value=value, advice=advice)
        else:
            yield _ok("tuning database", f"{slug} (here)" if slug in here else slug, value)
    for warning in caught:
        advice = "Repair or delete the file."
        yield Finding(topic="tuning database", name="file", state="wrong", value=str(warning.message), advice=advice)


def _peers() -> Iterator[Finding]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name, peer in PEERS.items():
        reason = peer.missing(device)
        value, advice = reason or f"runs on {device.type}", "Only `jagtile bench` would use it." if reason else ""
        yield Finding(topic="peers", name=name, state="missing" if reason else "ok", value=value, advice=advice)


def _ok(topic: str, name: str, value: str) -> Finding:
    return Finding(topic=topic, name=name, state="ok", value=value)


def _sought(topic: str, name: str, find: Callable[[], str]) -> Finding:
    try:
        return _ok(topic, name, find())
    except CompilerNotFoundError as error:
        what, _, advice = str(error).partition(". ")
        return Finding(topic=topic, name=name, state="missing", value=what, advice=advice)
    except JagtileError as error:
        return Finding(topic=topic, name=name, state="wrong", value=str(error))


def _toolchain(find: Callable[[], Toolchain]) -> str:
    found = find()
    return f"{found.version}, {found.path}"


def _described(identity: DeviceId) -> str:
    bandwidth = f", {identity.bandwidth_gbs / 1000:.2g} TB/s" if identity.bandwidth_gbs else ""
    return f"{identity.label}: {identity.slug}, {identity.units} units{bandwidth}, target {identity.target}"


def _driver() -> str | None:
    """The NVIDIA driver's version line as its kernel module tells it."""
    try:
        return Path("/proc/driver/nvidia/version").read_text().splitlines()[0].removeprefix("NVRM version: ").strip()
    except (OSError, IndexError):
        return None
