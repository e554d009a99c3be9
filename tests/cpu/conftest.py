"""Fixtures of the CPU target's tests: one build of every kernel they need, and tensors among poisoned neighbours."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import pytest

from jagtile.generator.build import build
from jagtile.generator.tile import Variant
from jagtile.generator.toolchain import find_cxx
from jagtile.runtime.artifact import Artifact
from jagtile.runtime.cpu import load
from jagtile.runtime.errors import CompilerNotFoundError
from jagtile.runtime.kernel import Kernel
from jagtile.runtime.settings import settings

sys.path.insert(0, str(Path(__file__).parent))  # the helpers beside this file

from kernels import BACKWARD_VARIANTS, VARIANTS


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Variant], Artifact]:
    """The artifact of a listed variant; the first use builds them all in one run, for all workers of the session."""
    try:
        find_cxx()
    except CompilerNotFoundError as error:
        pytest.skip(f"no C++ compiler: {error}")
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with settings.override(cache_dir=shared / "cpu-kernels"):
        results = build(VARIANTS + BACKWARD_VARIANTS)
    assert {result.variant.name: result.reason for result in results if result.artifact is None} == {}
    return {result.variant: result.artifact for result in results}.__getitem__


@pytest.fixture(scope="session")
def kernel_of(built: Callable[[Variant], Artifact]) -> Callable[[Variant], Kernel]:
    """The loaded kernel of a listed variant."""
    return lru_cache(maxsize=None)(lambda variant: load(built(variant)))
