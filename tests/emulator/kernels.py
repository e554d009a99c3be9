"""Variants as artifacts that the emulated driver loads; kernels of a few lines, for the emulator's own tests."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from emulator.build import build, cache_folder
from emulator.driver import Function, Machine
from jagtile.generator import render as rendering
from jagtile.generator.render import Source, render
from jagtile.generator.tile import Variant
from jagtile.runtime.artifact import ABI_VERSION, Artifact, ArtifactMeta, CompileReport


def artifact(variant: Variant, change: Callable[[Source], Source] | None = None) -> Artifact:
    """A variant of target sm_90a, built for the emulator; ``change`` edits the rendered source first."""
    source = render(variant)
    binary = build(change(source) if change is not None else source)
    image = cache_folder() / f"{binary.stem}.image"  # what the driver is given to load: the name of the shared object
    private = image.with_suffix(f".{os.getpid()}")
    private.write_text(str(binary.absolute()))
    private.replace(image)
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


class Snippet:
    """A CUDA text that is no variant's; ``Snippet(text)("name", grid, threads, arguments..., smem=0)`` runs a kernel.

    Includes of templates/ work. Arguments are tensors (their address is passed), integers (int), floats (float) and
    bytes (a tensor map of driver.encode_map, of 128 bytes, for a parameter ``const __grid_constant__ TensorMap``).
    """

    def __init__(self, text: str) -> None:
        self._path = build(Source(text, ".cu", rendering._headers(text)))

    def __call__(
        self,
        name: str,
        grid: int,
        threads: int,
        *arguments: torch.Tensor | int | float | bytes,
        smem: int = 0,
        machine: Machine | None = None,
        dependent: bool = False,
    ) -> None:
        library = ctypes.CDLL(str(self._path))
        values = [_as_c(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        function = Function(library, self._path, name, 227 * 1024)
        at = ctypes.addressof(pointers)
        (machine or Machine()).launch(function, (grid, 1, 1), (threads, 1, 1), smem, at, dependent)


def _as_c(argument: torch.Tensor | int | float | bytes) -> ctypes._CData:
    if isinstance(argument, torch.Tensor):
        return ctypes.c_uint64(argument.data_ptr())
    if isinstance(argument, bytes):
        return ctypes.create_string_buffer(argument, len(argument))
    return ctypes.c_int(argument) if isinstance(argument, int) else ctypes.c_float(argument)


def substitution(old: str, new: str, count: int = 1) -> Callable[[Source], Source]:
    """An edit of a rendered kernel: ``old``, which must occur ``count`` times in it or its headers, becomes ``new``."""

    def change(source: Source) -> Source:
        found = source.text.count(old) + sum(text.count(old) for _, text in source.headers)
        if found != count:
            raise ValueError(f"{old!r} occurs {found} times, not {count}")
        headers = tuple((path, text.replace(old, new)) for path, text in source.headers)
        return replace(source, text=source.text.replace(old, new), headers=headers)

    return change
