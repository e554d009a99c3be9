"""Everything that can be wrong with a pack, found by reading all of it; and whether its sources are today's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec

from jagtile.generator import elf
from jagtile.generator.tile import Variant, config_from_dict
from jagtile.runtime.artifact import ArtifactMeta
from jagtile.runtime.errors import PackError
from jagtile.runtime.pack import CHOICES, HOST, KERNELS, MANIFEST, RECORDS, Pack
from jagtile.tuning_db.schema import TuningRecord


def check_pack(pack: Pack) -> list[str]:
    """What is wrong, a sentence each; empty for a pack that is as it was made."""
    return [
        *_damaged(pack),
        *_unlisted(pack),
        *_bad_kernels(pack),
        *_bad_hosts(pack),
        *_missing(pack),
        *_bad_records(pack),
    ]


def outdated_sources(pack: Pack) -> list[str]:
    """The variants whose source this jagtile renders otherwise, or not at all: of use, but not the latest."""
    import jinja2

    from jagtile.generator.render import render_unchecked

    outdated = []
    for name, sha256 in sorted(pack.manifest.provenance.sources.items()):
        try:
            same = render_unchecked(Variant.parse(name)).sha256 == sha256  # another CPU's kernels are no less current
        except (ValueError, jinja2.TemplateError):
            same = False
        if not same:
            outdated.append(name)
    return outdated


def _damaged(pack: Pack) -> Iterator[str]:
    for path in pack.manifest.files:
        if (problem := _problem(pack, path)) is not None:
            yield problem


def _unlisted(pack: Pack) -> Iterator[str]:
    listed = {MANIFEST, *pack.manifest.files}
    for file in sorted(pack.folder.rglob("*")):
        path = file.relative_to(pack.folder).as_posix()
        if not file.is_dir() and path not in listed:
            yield f"{path} is not listed in {MANIFEST}"


def _bad_kernels(pack: Pack) -> Iterator[str]:
    """Of whole files: metadata that contradicts itself, binaries that are none."""
    for symbol in pack.symbols:
        path = f"{KERNELS}/{symbol}.json"
        if _problem(pack, path) is not None:
            continue
        try:
            meta = msgspec.json.decode(pack.read(path), type=ArtifactMeta)
            variant = Variant.parse(f"{meta.target}/{meta.spec}/{config_from_dict(meta.target, meta.config).name}")
        except (msgspec.MsgspecError, ValueError) as error:
            yield f"{path} can't be understood: {error}"
            continue
        if _problem(pack, f"{KERNELS}/{meta.file}") is not None:
            continue
        try:
            artifact = pack.artifact(variant)
        except PackError as error:
            yield str(error)
            continue
        if (defect := elf.defect(Path(artifact.path), meta.symbol)) is not None:
            yield f"{KERNELS}/{meta.file}: {defect}"
        if pack.manifest.provenance.sources.get(variant.name) != meta.source_sha256:
            yield f"{MANIFEST} and {path} disagree on the source of {variant.name}"


def _bad_hosts(pack: Pack) -> Iterator[str]:
    told = set(_damaged(pack))
    for key in pack.host_keys:
        try:
            artifact = pack.host(key)
        except PackError as error:
            if str(error) not in told:
                yield str(error)
            continue
        assert artifact is not None
        if (defect := elf.defect(artifact.path, artifact.meta.symbol)) is not None:
            yield f"{HOST}/{artifact.meta.file}: {defect}"


def _missing(pack: Pack) -> Iterator[str]:
    """What the choices name and the pack lacks."""
    named: dict[str, None] = {}
    for key, entry in pack.choices.specs.items():
        for config in (entry.default, *entry.regimes.values()):
            target = key.partition("/")[0]
            try:
                variant = Variant.parse(f"{key}/{config_from_dict(target, config).name}")
            except ValueError as error:
                named[f"{CHOICES} has a config for {key} that this jagtile does not know: {error}"] = None
                continue
            if not pack.holds(variant):
                named[f"{CHOICES} names {variant.name}, which is not in the pack"] = None
    yield from named


def _bad_records(pack: Pack) -> Iterator[str]:
    if _problem(pack, RECORDS) is not None:
        return
    decoder = msgspec.json.Decoder(TuningRecord)
    for number, line in enumerate(pack.read(RECORDS).splitlines(), start=1):
        try:
            decoder.decode(line)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            yield f"{RECORDS}, line {number} is no tuning record: {error}"


def _problem(pack: Pack, path: str) -> str | None:
    try:
        pack.read(path)
    except PackError as error:
        return str(error)
    return None
