"""For every test: a cache folder of the run's own, no packs, and skips with their reason for lack of a GPU or nvcc."""

from __future__ import annotations

import gc
import os
import shutil
import sys
import tempfile
import zlib
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # philox.py

_CACHE = "JAGTILE_CACHE_DIR"
_KEPT = "JAGTILE_TEST_CACHE"  # where set, kernels (and nothing else) are kept there from run to run
_SEED = "JAGTILE_TEST_SEED"  # set for other random numbers than those of every run
_GPU_BYTES = 10 << 30  # of a worker: the largest batches with their float64 oracles, and what torch keeps
_owned: list[Path] = []


def pytest_configure(config: pytest.Config) -> None:
    """The run's cache: never the user's. xdist's workers inherit it, so that a kernel is built once a run."""
    os.environ.pop("JAGTILE_JIT", None)
    os.environ["JAGTILE_PACKS"] = "none"  # whatever is installed here
    # Threads of torch that wait actively take the cores from xdist's other workers: half of the time was spent so.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if hasattr(config, "workerinput"):
        return
    cache = Path(tempfile.mkdtemp(prefix="jagtile-tests-"))
    _owned.append(cache)
    os.environ[_CACHE] = str(cache)
    if kept := os.environ.get(_KEPT):
        kernels = Path(kept).absolute() / "v1"
        kernels.mkdir(parents=True, exist_ok=True)
        (cache / "v1").symlink_to(kernels)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int | None:
    """A GPU's memory limits the workers as cores do: ten of them met the end of 80 GB."""
    import torch

    if not torch.cuda.is_available():
        return None
    gpu_bytes = torch.cuda.get_device_properties(0).total_memory
    return max(1, min(len(os.sched_getaffinity(0)), gpu_bytes // _GPU_BYTES))


def pytest_unconfigure(config: pytest.Config) -> None:
    while _owned:
        shutil.rmtree(_owned.pop(), ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for marker, missing in (("gpu", _missing_gpu), ("nvcc", _missing_nvcc)):
        marked = [item for item in items if item.get_closest_marker(marker)]
        if marked and (reason := missing()):
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> None:
    """A test's random numbers are its own: not by chance of what ran before it in the same worker."""
    import torch

    torch.manual_seed(zlib.crc32(f"{os.environ.get(_SEED, '')}{request.node.nodeid}".encode()))


def pytest_collection_finish(session: pytest.Session) -> None:
    """What was imported stays: garbage collection need not go through it, nor the emulator, which looks for tensors."""
    gc.collect()
    gc.freeze()


def _missing_gpu() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "needs a CUDA GPU, and torch sees none"


def _missing_nvcc() -> str | None:
    from jagtile.generator.toolchain import find_nvcc
    from jagtile.runtime.errors import CompilerNotFoundError

    try:
        find_nvcc()
    except CompilerNotFoundError as error:
        return f"needs nvcc: {error}"
    return None
