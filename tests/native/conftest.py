"""The compiled host and Python's launchers before one driver, on tensors of the CPU."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from jagtile.generator import host
from jagtile.generator.spec import KernelSpec
from jagtile.generator.tile import Variant, space_for
from jagtile.runtime import fallback, layouts, native, routes
from jagtile.runtime.cuda import driver, load, tensor_map, work_list
from jagtile.runtime.problem import LOOK_UPS
from jagtile.runtime.settings import settings

sys.path.insert(0, str(Path(__file__).parent))

from stand_in import SERIALIZATION, Batch, Recorder, connect


@pytest.fixture(scope="session")
def extension() -> Any:
    """The compiled host, in the tests' cache."""
    return host.built()


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch, extension: Any) -> Iterator[Recorder]:
    """Every call is served by what ``kernels`` loads, and by the compiled host once it is taught."""
    recorder = Recorder()
    results = SimpleNamespace(CUDA_SUCCESS=0, CUDA_ERROR_INVALID_CONTEXT=201)
    bindings = SimpleNamespace(
        CUresult=results,
        CUlaunchAttributeID=SimpleNamespace(CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION=SERIALIZATION),
        **dict.fromkeys(("CUlaunchAttribute", "CUlaunchAttributeValue", "CUlaunchConfig"), SimpleNamespace),
        cuLaunchKernel=recorder.python_launch,
        cuLaunchKernelEx=recorder.python_launch_ex,
    )
    for name, answer in {
        "_cuda_getDevice": lambda: recorder.device,
        "_cuda_getCurrentRawStream": lambda _: recorder.stream,
        "_cuda_isCurrentStreamCapturing": lambda: recorder.capturing,
    }.items():
        monkeypatch.setattr(torch._C, name, answer, raising=False)
    monkeypatch.setattr(torch.cuda, "device", lambda _: torch.no_grad())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132))
    monkeypatch.setattr(driver, "bindings", lambda: bindings)
    monkeypatch.setattr(driver, "call", lambda *_: 0)
    monkeypatch.setattr(driver, "function", recorder.function)
    monkeypatch.setattr(driver, "launches_dependents", lambda: recorder.launches_dependents)
    monkeypatch.setattr(tensor_map, "encode", lambda address, *_: address.to_bytes(8, "little").ljust(128, b"\0"))
    monkeypatch.setattr(tensor_map, "address_comes_first", lambda: True)
    monkeypatch.setattr(work_list, "_ENTRIES", {})
    monkeypatch.setattr(layouts, "_KNOWN", {})
    monkeypatch.setattr(fallback, "_REASONS", {})
    monkeypatch.setattr(routes, "_load", lambda *_: pytest.fail("a route was resolved"))
    tables = [dict(table) for table in (routes.ROUTES, routes.BACKWARD_ROUTES)]
    real = native.serve is not None
    with settings.override(native_host="off"):
        connect(extension, recorder)
        yield recorder
        native.disconnect()
        gc.collect()
    if real:  # there is a GPU, whose tests are next
        native._have()
    for table, kept in zip((routes.ROUTES, routes.BACKWARD_ROUTES), tables, strict=True):
        table.clear()
        table.update(kept)  # type: ignore[arg-type]


@pytest.fixture
def kernels(recorder: Recorder) -> Callable[..., Any]:
    """Loads the default kernel of an algorithm for a spec, of which other launch facts may be given, and serves all
    calls by it.
    """

    def kernels(spec: KernelSpec, algorithm: str, **facts: int) -> Any:
        space = space_for("sm_90a", algorithm)
        variant = Variant("sm_90a", spec, space.default(spec))
        first = len(recorder.symbols)
        meta = SimpleNamespace(
            launch={**space.launch(spec, variant.config), **facts},
            config=variant.config.to_dict(),
            spec=spec.name,
            symbol=algorithm,
        )
        artifact = SimpleNamespace(meta=meta, path=SimpleNamespace(read_bytes=bytes))
        kernel: Any = load(artifact, torch.device("cuda", 0))  # type: ignore[arg-type]
        for symbol in recorder.symbols[first:]:
            recorder.sizes[symbol] = len(kernel._block.data)
        table: Any = routes.ROUTES if spec.direction == "fwd" else routes.BACKWARD_ROUTES
        for look_up in range(len(LOOK_UPS)):
            table[torch.bfloat16, spec.head_dim, spec.head_dim_v, spec.causal, -1, look_up, False] = kernel
        return kernel

    return kernels


@pytest.fixture
def default_kernels(kernels: Callable[..., Any]) -> None:
    """Of head dims of 64, without a mask."""
    kernels(KernelSpec("fwd", "bf16", 64, 64, causal=False), "persistent")
    kernels(KernelSpec("bwd", "bf16", 64, 64, causal=False), "keyblocks")


@pytest.fixture
def batch() -> Batch:
    return Batch()
