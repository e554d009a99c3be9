"""Variant -> loaded kernel: from memory, a kernel pack, the cache, else built. One table, one owner, one lock."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING

import torch

from jagtile.generator.tile import Variant
from jagtile.runtime.errors import CompilerNotFoundError, JagtileError, JagtileWarning, NoKernelError
from jagtile.runtime.settings import settings

if TYPE_CHECKING:  # at run time these would make `import jagtile` import msgspec
    from jagtile.runtime.artifact import Artifact
    from jagtile.runtime.kernel import Kernel

log = logging.getLogger("jagtile")


def load(artifact: Artifact, device: torch.device) -> Kernel:
    """A launchable kernel of an artifact on a device."""
    if artifact.meta.target == "cpu":
        from jagtile.runtime import cpu

        return cpu.load(artifact)
    from jagtile.runtime import cuda

    return cuda.load(artifact, device)


def cached(variant: Variant) -> Artifact | None:
    """The variant's artifact where the cache holds it. CompilerNotFoundError: the compiler's version is in the key."""
    try:
        from jagtile.generator.build import artifact_key
    except ModuleNotFoundError as error:  # a slim installation, which lives on kernel packs
        raise CompilerNotFoundError(f"{error}: `pip install {error.name}`, without it nothing can be built") from None
    from jagtile.runtime.store import ArtifactStore

    return ArtifactStore().get(artifact_key(variant))


class KernelTable:
    """The kernels loaded in this process, by variant and device."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._kernels: dict[tuple[Variant, torch.device], Kernel] = {}

    def kernel_for(self, variant: Variant, device: torch.device) -> Kernel:
        """The loaded kernel of a variant, built if need be.

        Raises NoKernelError where it may not be built or loaded now, CompilerNotFoundError, BuildError or
        RejectedVariantError where building it fails.
        """
        kernel = self._kernels.get((variant, device))
        if kernel is not None:
            return kernel
        with self._lock:
            kernel = self._kernels.get((variant, device))
            if kernel is None:
                _refuse_during_capture(variant, device)
                kernel = self._kernels[variant, device] = _loaded(variant, device)
            return kernel

    def holds(self, variant: Variant, device: torch.device) -> bool:
        """Whether the kernel is loaded."""
        return (variant, device) in self._kernels

    def build_missing(self, variants: Iterable[Variant], device: torch.device) -> None:
        """Build, side by side, those variants that are nowhere yet; failures show when they are loaded."""
        from jagtile.runtime import packs

        missing = [v for v in variants if not self.holds(v, device) and not packs.holds(v, device)]
        if missing and settings.jit:
            with suppress(ModuleNotFoundError, CompilerNotFoundError):
                from jagtile.generator.build import build

                build(missing)

    def clear(self) -> None:
        """Forget every loaded kernel."""
        with self._lock:
            self._kernels.clear()


def _loaded(variant: Variant, device: torch.device) -> Kernel:
    from jagtile.runtime import packs

    packed = packs.artifact(variant, device)
    if packed is not None:
        try:
            return load(packed, device)
        except JagtileError as error:  # it wants a newer C library or driver than there is, say
            warnings.warn(f"{packed.origin}: {error}; it is sought elsewhere", JagtileWarning, stacklevel=2)
    return load(_artifact(variant), device)


def _artifact(variant: Variant) -> Artifact:
    if not settings.jit:
        return _artifact_without_building(variant)
    try:
        artifact = cached(variant)
    except CompilerNotFoundError as error:
        raise CompilerNotFoundError(
            f"{variant.name} can't be had: {error}. Or install a kernel pack that holds it (`jagtile pack install`)"
        ) from None
    if artifact is None:
        from jagtile.generator.build import build_one

        log.warning("building %s for its first use; jagtile.warmup does so ahead of time", variant.name)
        artifact = build_one(variant)
    return artifact


def _artifact_without_building(variant: Variant) -> Artifact:
    try:
        artifact = cached(variant)
        why = f"it is not in the cache {settings.cache_dir}"
    except CompilerNotFoundError as error:
        artifact, why = None, f"the cache can't be asked for it without a compiler: {error}"
    if artifact is None:
        raise NoKernelError(
            f"{variant.name} can't be loaded: {why}, and JAGTILE_JIT=0 forbids building it now. Ways out: set "
            f"JAGTILE_JIT=1; build it beforehand, with jagtile.warmup(...) or `jagtile build {variant.name}`; "
            f"let JAGTILE_CACHE_DIR name a cache that holds it; or install a kernel pack that does, with `jagtile pack "
            f"install`"
        )
    return artifact


def _refuse_during_capture(variant: Variant, device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise NoKernelError(
            f"{variant.name} is not loaded on {device} and can't be while a CUDA graph is captured: "
            f"call jagtile.warmup(...), or run the same call once, before the capture"
        )


_table = KernelTable()


def kernel_table() -> KernelTable:
    """The process's one table."""
    return _table


def kernel_for(variant: Variant, device: torch.device) -> Kernel:
    """``KernelTable.kernel_for`` of the process's table."""
    return _table.kernel_for(variant, device)
