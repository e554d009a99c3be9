"""Launching: threads, offsets that make no sense, memory borders, one OpenMP runtime, artifacts that do not fit."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import torch
from kernels import BACKWARD_VARIANTS, NAN, VARIANTS, Call, check

from jagtile.generator.tile import Variant
from jagtile.runtime.artifact import Artifact
from jagtile.runtime.cpu import load
from jagtile.runtime.errors import CorruptArtifactError
from jagtile.runtime.kernel import ForwardKernel

KernelOf = Callable[[Variant], ForwardKernel]
FP32 = VARIANTS[0]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def inputs(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(tokens, 4, 64, generator=generator) for _ in range(3))
    return q, k, v, torch.full_like(q, NAN)


@pytest.mark.usefixtures("threads")
def test_the_result_does_not_depend_on_the_number_of_threads(kernel_of: KernelOf) -> None:
    cu = torch.tensor([0, 700, 701, 950], dtype=torch.int32)
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        q, k, v, out = inputs(950)
        kernel_of(FP32).forward(q, k, v, cu, cu, out, None, 0.125, False)
        results.append(out)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_calls_from_several_threads_do_not_disturb_each_other(kernel_of: KernelOf) -> None:
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for round_ in range(5):
                check(kernel_of(FP32), FP32.spec, Call(((50 + seed, 60), (7, 90)), seed=10 * seed + round_))
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


def run_script(name: str, artifacts: list[Artifact]) -> None:
    """Run a script beside this file in a process of its own."""
    arguments = [str(Path(__file__).with_name(name))]
    for artifact in artifacts:
        arguments += [str(artifact.path), msgspec.json.encode(artifact.meta).decode()]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{name} ended with {done.returncode}: {done.stdout}{done.stderr}"


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="no /proc: threads can't be counted")
def test_kernels_run_on_the_threads_that_torch_has_started(built: Callable[[Variant], Artifact]) -> None:
    run_script("count_threads.py", [built(FP32)])


@pytest.mark.skipif(sys.platform != "linux", reason="guard pages are set by mprotect")
def test_no_byte_outside_of_the_tensors_is_touched(built: Callable[[Variant], Artifact]) -> None:
    run_script("guard_pages.py", [built(variant) for variant in VARIANTS + BACKWARD_VARIANTS])


@pytest.mark.parametrize("offsets", [[0, 9, 5, 10], [0, 5, 11], [-1, 4, 10]], ids=["falling", "too far", "negative"])
@pytest.mark.parametrize("side", ["queries", "keys"])
def test_offsets_that_make_no_sense_are_refused(offsets: list[int], side: str, kernel_of: KernelOf) -> None:
    q, k, v, out = inputs(10)
    good = torch.linspace(0, 10, len(offsets)).to(torch.int64)
    bad = torch.tensor(offsets, dtype=torch.int32)
    cu_q, cu_k = (bad, good) if side == "queries" else (good, bad)
    with pytest.raises(ValueError, match=r"cu_seqlens.* 10 tokens"):
        kernel_of(FP32).forward(q, k, v, cu_q, cu_k, out, None, 0.1, False)


def test_an_object_that_is_no_kernel_is_called_corrupt(built: Callable[[Variant], Artifact], tmp_path: Path) -> None:
    artifact = built(FP32)
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no shared object")
    with pytest.raises(CorruptArtifactError, match=r"broken\.so"):
        load(msgspec.structs.replace(artifact, path=broken))
    other = msgspec.structs.replace(artifact.meta, symbol="no_such_symbol")
    with pytest.raises(CorruptArtifactError, match="no_such_symbol"):
        load(msgspec.structs.replace(artifact, meta=other))
