"""The loader: memory, cache, build, in this order; one load each; the ways out where nothing may be built."""

from __future__ import annotations

import logging
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from jagtile.generator.spec import KernelSpec
from jagtile.generator.tile import Variant
from jagtile.runtime import loader
from jagtile.runtime.dispatch import default_variant
from jagtile.runtime.errors import BuildError, CompilerNotFoundError, NoKernelError
from jagtile.runtime.loader import KernelTable
from jagtile.runtime.settings import settings

CPU = torch.device("cpu")


@pytest.fixture
def variant(plain_spaces) -> Variant:
    return default_variant(KernelSpec("fwd", "fp32", 64, 64, False), "cpu")


@pytest.fixture
def world(monkeypatch):
    """A cache, a compiler and a way to load that only take notes."""
    notes = SimpleNamespace(cache={}, built=[], batches=[], loaded=[], compiler=True)

    def cached(variant: Variant):
        if not notes.compiler:
            raise CompilerNotFoundError("no C++ compiler: tried CXX, g++")
        return notes.cache.get(variant)

    def build_one(variant: Variant):
        notes.built.append(variant)
        return f"artifact of {variant.name}"

    def build(variants):
        notes.batches.append(list(variants))

    def load(artifact, device):
        notes.loaded.append((artifact, device))
        return SimpleNamespace(artifact=artifact)

    monkeypatch.setattr(loader, "cached", cached)
    monkeypatch.setattr(loader, "load", load)
    monkeypatch.setitem(sys.modules, "jagtile.generator.build", SimpleNamespace(build_one=build_one, build=build))
    return notes


def test_a_kernel_is_loaded_once_and_then_comes_from_memory(world, variant):
    world.cache[variant] = "cached artifact"
    table = KernelTable()
    assert not table.holds(variant, CPU)
    first = table.kernel_for(variant, CPU)
    assert table.kernel_for(variant, CPU) is first
    assert table.holds(variant, CPU)
    assert world.loaded == [("cached artifact", CPU)]
    assert world.built == []


def test_what_the_cache_lacks_is_built_and_said(world, variant, caplog):
    with caplog.at_level(logging.WARNING, logger="jagtile"):
        KernelTable().kernel_for(variant, CPU)
    assert world.built == [variant]
    assert [record.message for record in caplog.records] == [
        "building cpu/fwd_fp32_d64/plain_b64 for its first use; jagtile.warmup does so ahead of time"
    ]


def test_without_jit_a_cached_kernel_is_still_loaded(world, variant):
    world.cache[variant] = "cached artifact"
    with settings.override(jit=False):
        assert KernelTable().kernel_for(variant, CPU).artifact == "cached artifact"


def test_without_jit_a_missing_kernel_is_an_error_that_lists_the_ways_out(world, variant, tmp_path):
    with settings.override(jit=False, cache_dir=tmp_path), pytest.raises(NoKernelError) as raised:
        KernelTable().kernel_for(variant, CPU)
    message = str(raised.value)
    for part in ("cpu/fwd_fp32_d64/plain_b64", str(tmp_path), "JAGTILE_JIT=1", "warmup", "jagtile build", "CACHE_DIR"):
        assert part in message
    assert world.built == []


def test_without_jit_and_compiler_the_error_names_both(world, variant):
    world.compiler = False
    with (
        settings.override(jit=False),
        pytest.raises(NoKernelError, match=r"without a compiler: no C\+\+ compiler: tried"),
    ):
        KernelTable().kernel_for(variant, CPU)


def test_a_missing_compiler_is_told_as_such(world, variant):
    world.compiler = False
    with pytest.raises(CompilerNotFoundError, match=r"tried CXX, g\+\+"):
        KernelTable().kernel_for(variant, CPU)


def test_a_failed_build_leaves_the_table_as_it_was(world, variant, monkeypatch):
    def fails(variant):
        raise BuildError("line 3")

    table = KernelTable()
    with monkeypatch.context() as context:
        context.setattr(sys.modules["jagtile.generator.build"], "build_one", fails)
        with pytest.raises(BuildError):
            table.kernel_for(variant, CPU)
    assert not table.holds(variant, CPU)
    table.kernel_for(variant, CPU)
    assert table.holds(variant, CPU)


def test_threads_that_want_the_same_kernel_get_one(world, variant, monkeypatch):
    def slowly(artifact, device):
        time.sleep(0.05)
        world.loaded.append(artifact)
        return SimpleNamespace()

    monkeypatch.setattr(loader, "load", slowly)
    table, found = KernelTable(), []
    threads = [threading.Thread(target=lambda: found.append(table.kernel_for(variant, CPU))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(world.loaded) == 1
    assert len({id(kernel) for kernel in found}) == 1


def test_several_missing_kernels_are_built_side_by_side(world, variant):
    other = Variant("cpu", KernelSpec("fwd", "fp32", 32, 32, False), variant.config)
    table = KernelTable()
    table.build_missing([variant, other], CPU)
    assert world.batches == [[variant, other]]


def test_one_missing_kernel_is_built_ahead_too(world, variant):
    """Else its loading would say that warmup builds ahead of time, and it is warmup that asks."""
    KernelTable().build_missing([variant], CPU)
    assert world.batches == [[variant]]


def test_nothing_is_built_ahead_without_jit(world, variant):
    with settings.override(jit=False):
        KernelTable().build_missing([variant], CPU)
    assert world.batches == []


def test_nothing_is_loaded_while_a_cuda_graph_is_captured(world, variant, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    table = KernelTable()
    with pytest.raises(NoKernelError, match=r"while a CUDA graph is captured: call jagtile\.warmup"):
        table.kernel_for(variant, torch.device("cuda", 0))
    table.kernel_for(variant, CPU)


def test_a_cleared_table_loads_anew(world, variant):
    table = KernelTable()
    table.kernel_for(variant, CPU)
    table.clear()
    table.kernel_for(variant, CPU)
    assert len(world.loaded) == 2
