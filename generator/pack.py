"""Records and choices of one device -> a kernel pack: what dispatch would choose there, compiled, and its provenance.

The same records, choices, jagtile and compiler give the same bytes: no dates, hosts, paths or durations go in.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

import msgspec
import torch

import jagtile
from jagtile.generator import host as native_host
from jagtile.generator.build import BuildResult, build
from jagtile.generator.pack_place import check_free, place_folder
from jagtile.generator.spec import KernelSpec
from jagtile.generator.tile import Variant, spaces_of
from jagtile.runtime.artifact import ABI_VERSION, Artifact, ArtifactMeta, CompileReport
from jagtile.runtime.device import DeviceId, device_id
from jagtile.runtime.dispatch import ORIGINS, choose_for_regime, recorded_as
from jagtile.runtime.errors import BuildError, JagtileWarning, PackError, UnsupportedError
from jagtile.runtime.pack import (
    CHOICES,
    FORMAT,
    HOST,
    KERNELS,
    LICENCE,
    MANIFEST,
    RECORDS,
    Manifest,
    Pack,
    PackedFile,
    Provenance,
)
from jagtile.runtime.problem import regimes_for
from jagtile.tuning_db.schema import ChoiceEntry, Choices, DeviceFacts, TuningRecord
from jagtile.tuning_db.store import Database

SPDX = "BSD-3-Clause"
_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class PackPlan:
    """What goes into a pack."""

    choices: Choices  # of every packed spec, each regime spelled out but for what its neighbour's choice serves
    variants: tuple[Variant, ...]  # all that the choices name
    records: tuple[TuningRecord, ...]  # of the packed specs, by date

    @property
    def name(self) -> str:
        """Of the pack, its folder and its wheel."""
        return f"jagtile-kernels-{self.choices.device.slug}"


def plan_pack(slug: str, specs: Sequence[KernelSpec], database: Database) -> PackPlan:
    """What a pack of a device's kernels holds: for each spec and regime the variant that dispatch chooses.

    ``specs`` empty is every spec that has choices for the device, on a GPU those that dispatch answers with these
    choices (the other 16-bit dtype), and the backward of each forward. Backwards, and specs named, may be without
    choices: then a relative's, or the safe default; a CPU's default depends on the CPU, so it can be packed on such a
    machine only.
    PackError where the device is not known or nothing is to be packed; UnsupportedError for a spec without a template.
    """
    device = _device(slug, database)
    identity = DeviceId(**msgspec.structs.asdict(device))
    wanted = sorted(set(specs) or _usual_specs(device, database), key=lambda spec: spec.name)
    if not wanted:
        raise PackError(f"there are no choices for {slug}: `jagtile tune` records some, or name the SPECs to pack")
    entries: dict[str, ChoiceEntry] = {}
    variants: dict[Variant, None] = {}
    for spec in wanted:
        regimes = ("", *regimes_for(spec.direction, device.target))
        decisions = [choose_for_regime(spec, regime, identity, database) for regime in regimes]
        if device.target == "cpu" and any(d.source == "default" for d in decisions) and slug != _cpu().slug:
            raise PackError(
                f"{spec.name} has no choices for {slug}, and this machine ({_cpu().slug}) has another default"
            )
        variants.update(dict.fromkeys(decision.variant for decision in decisions))
        configs = {each.regime: each.variant.config.to_dict() for each in decisions if not each.is_borrowed}
        entries[f"{device.target}/{spec.name}"] = ChoiceEntry(default=configs.pop(""), regimes=configs)
    names = {spec.name for spec in wanted}
    records = [r for r in database.records(device=slug, target=device.target) if r.spec in names]
    return PackPlan(
        Choices(device=device, specs=entries),
        tuple(sorted(variants, key=lambda variant: variant.symbol)),
        tuple(sorted(records, key=lambda record: (record.date, _line(record)))),
    )


def build_pack(plan: PackPlan, folder: Path, version: str = jagtile.__version__, *, with_host: bool = False) -> Pack:
    """Compile what the plan names (cached kernels are taken) and write the pack to ``folder``, whole or not at all.

    with_host: also the native host, for the torch and Python at hand. A pack that is there already is replaced;
    PackError where anything else is. BuildError names what does not compile, CompilerNotFoundError what is missing.
    """
    check_free(folder)
    host = native_host.artifact() if with_host else None
    built = build(plan.variants)
    if failed := [result for result in built if result.artifact is None]:
        reasons = "; ".join(f"{result.variant.name} ({result.state}): {result.reason}" for result in failed)
        raise BuildError(f"{len(failed)} of {len(built)} kernels can't be packed: {reasons}")
    contents = {**_contents(plan, built), **_host_contents(host)}
    contents[MANIFEST] = _pretty(_manifest(plan, built, host, contents, version))
    place_folder(folder, contents)
    return Pack(folder)


def _cpu() -> DeviceId:
    return device_id(torch.device("cpu"))


def _device(slug: str, database: Database) -> DeviceFacts:
    """The facts of a device by its slug: as recorded with choices, else of a device of this machine."""
    for origin in ORIGINS:
        if (choices := database.choices(origin, slug)) is not None:
            return choices.device
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    here: dict[str, DeviceId] = {}
    for device in devices:
        with suppress(UnsupportedError):
            here[device_id(device).slug] = device_id(device)
    if slug in here:
        found = here[slug]
        return DeviceFacts(**{name: getattr(found, name) for name in DeviceFacts.__struct_fields__})
    known = sorted({*here, *(facts.slug for origin in ORIGINS for facts in database.devices(origin))})
    raise PackError(f"device {slug!r} has no choices and is not of this machine; known: {', '.join(known)}")


def _usual_specs(device: DeviceFacts, database: Database) -> set[KernelSpec]:
    """What dispatch answers from choices for the device, and how to train with it, with or without choices."""
    recorded = _recorded_specs(device, database)
    if device.target == "cpu" and device.slug != _cpu().slug:
        return recorded
    backwards = {replace(spec, direction="bwd") for spec in recorded}
    return recorded | {spec for spec in backwards if spaces_of(device.target, spec)}


def _recorded_specs(device: DeviceFacts, database: Database) -> set[KernelSpec]:
    """The specs that dispatch answers from choices for the device."""
    found: set[KernelSpec] = set()
    for origin in ORIGINS:
        choices = database.choices(origin, device.slug)
        for key in choices.specs if choices else ():
            target, _, name = key.partition("/")
            if target == device.target:
                try:
                    found.update(recorded_as(KernelSpec.parse(name), target))
                except ValueError as error:
                    warnings.warn(f"{key} is left out of the pack: {error}", JagtileWarning, stacklevel=3)
    return found


def _contents(plan: PackPlan, built: Sequence[BuildResult]) -> dict[str, bytes]:
    """Every file but the manifest, by its path in the pack."""
    contents = {
        CHOICES: _pretty(plan.choices),
        RECORDS: b"".join(_line(record) + b"\n" for record in plan.records),
        LICENCE: _licence(),
    }
    for result in built:
        assert result.artifact is not None
        meta, path = result.artifact.meta, result.artifact.path
        contents[f"{KERNELS}/{meta.symbol}.json"] = _pretty(_timeless(meta))
        contents[f"{KERNELS}/{meta.file}"] = path.read_bytes()
    return contents


def _host_contents(host: Artifact | None) -> dict[str, bytes]:
    if host is None:
        return {}
    meta = msgspec.structs.replace(_timeless(host.meta), file=f"{host.meta.key}.so")
    return {f"{HOST}/{meta.key}.json": _pretty(meta), f"{HOST}/{meta.file}": host.path.read_bytes()}


def _timeless(meta: ArtifactMeta) -> ArtifactMeta:
    """Without how long it took, which differs from run to run; what else the compiler said does not."""
    return msgspec.structs.replace(meta, report=msgspec.structs.replace(meta.report, seconds=CompileReport().seconds))


def _manifest(
    plan: PackPlan,
    built: Sequence[BuildResult],
    host: Artifact | None,
    contents: dict[str, bytes],
    version: str,
) -> Manifest:
    metas = {result.variant.name: result.artifact.meta for result in built if result.artifact}
    return Manifest(
        format=FORMAT,
        name=plan.name,
        version=version,
        abi=ABI_VERSION,
        device=plan.choices.device,
        licence=SPDX,
        provenance=Provenance(
            jagtile=jagtile.__version__,
            compilers=_distinct(meta.compiler for meta in (*metas.values(), *([host.meta] if host else []))),
            sources={name: meta.source_sha256 for name, meta in metas.items()},
        ),
        files={path: _packed_file(content) for path, content in contents.items()},
    )


def _packed_file(content: bytes) -> PackedFile:
    """What the manifest says of a file."""
    return PackedFile(size=len(content), sha256=hashlib.sha256(content).hexdigest())


def _distinct(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(set(values)))


def _pretty(value: msgspec.Struct) -> bytes:
    return msgspec.json.format(msgspec.json.encode(value, order="sorted"), indent=2) + b"\n"


def _line(record: TuningRecord) -> bytes:
    return msgspec.json.encode(record, order="sorted")


def _licence() -> bytes:
    """jagtile's own licence, which the kernels are under: of the source tree, else of the installed distribution."""
    with suppress(OSError):
        return (_ROOT / "LICENSE").read_bytes()
    with suppress(metadata.PackageNotFoundError):
        text = metadata.distribution("jagtile").read_text("licenses/LICENSE")
        if text:
            return text.encode()
    raise PackError(f"the text of jagtile's licence is neither in {_ROOT} nor in an installed distribution jagtile")
