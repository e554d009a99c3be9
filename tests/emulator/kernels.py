"""Variants as artifacts that the emulated driver loads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from emulator.build import build, cache_folder
from jagtile.generator.render import Source, render
from jagtile.generator.tile import Variant
from jagtile.runtime.artifact import ABI_VERSION, Artifact, ArtifactMeta, CompileReport


def artifact(variant: Variant, change: Callable[[Source], Source] | None = None) -> Artifact:
    """A variant of target sm_90a, built for the emulator; ``change`` edits the rendered source first."""
    source = render(variant)
    binary = build(change(source) if change is not None else source)
    image = cache_folder() / f"{binary.stem}.image"  # what the driver is given to load: the name of the shared object
    if not image.exists():
        image.write_text(str(binary.absolute()))
    meta = ArtifactMeta(
        abi=ABI_VERSION,
        key=binary.stem,
        target=variant.target,
        spec=variant.spec.name,
        config=variant.config.to_dict(),
        symbol=variant.symbol,
        file=image.name,
        size=0,
        sha256="",
        source_sha256=source.sha256,
        compiler="emulator",
        launch=dict(variant.space.launch(variant.spec, variant.config)),
        report=CompileReport(),
    )
    return Artifact(meta, Path(image), "built")


def substitution(old: str, new: str, count: int = 1) -> Callable[[Source], Source]:
    """An edit of a rendered kernel: ``old``, which must occur ``count`` times in it or its headers, becomes ``new``."""

    def change(source: Source) -> Source:
        found = source.text.count(old) + sum(text.count(old) for _, text in source.headers)
        if found != count:
            raise ValueError(f"{old!r} occurs {found} times, not {count}")
        headers = tuple((path, text.replace(old, new)) for path, text in source.headers)
        return replace(source, text=source.text.replace(old, new), headers=headers)

    return change
