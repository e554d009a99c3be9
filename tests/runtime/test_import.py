"""``import jagtile`` is light and changes nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import jagtile

ROOT = Path(__file__).resolve().parents[2]

PROBE = """
import json, logging, sys
import torch
from torch._library.simple_registry import singleton as registry
from torch.nested._internal import ops
from torch.nested._internal.nested_tensor import NestedTensor
import torch.utils.flop_counter  # jagtile's formulas need it; it imports triton where there is one
before, sdpa, handlers = set(sys.modules), ops.jagged_scaled_dot_product_attention, len(logging.getLogger().handlers)
import jagtile
print(json.dumps({
    "modules": sorted(set(sys.modules) - before),
    "cuda": torch.cuda.is_initialized(),
    "patched": ops.jagged_scaled_dot_product_attention is not sdpa,
    "rules": [name for name, entry in registry._data.items() if entry.torch_dispatch_rules.find(NestedTensor)],
    "handlers": len(logging.getLogger().handlers) - handlers + len(logging.getLogger("jagtile").handlers),
    "public": sorted(name for name in jagtile.__all__),
}))
"""


@pytest.fixture(scope="module")
def imported(tmp_path_factory) -> dict[str, object]:
    """What changed in a fresh process by importing jagtile after torch."""
    home = tmp_path_factory.mktemp("home")
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / ".pkg"),
        "HOME": str(home),
        "XDG_CACHE_HOME": str(home / "cache"),
        "JAGTILE_CACHE_DIR": str(home / "jagtile"),
        "PATH": str(home),  # no compiler can be looked up
    }
    done = subprocess.run(
        [sys.executable, "-c", PROBE], env=environment, cwd=home, capture_output=True, text=True, check=True
    )
    return {**json.loads(done.stdout), "files": [str(path) for path in home.rglob("*")], "stderr": done.stderr}


def test_it_imports_nothing_but_itself_and_torchs_registry_of_flops(imported):
    others = {name for name in imported["modules"] if name.partition(".")[0] != "jagtile"}
    assert others == set()


def test_it_imports_no_part_that_renders_builds_tunes_or_launches(imported):
    parts = {".".join(name.split(".")[:3]) for name in imported["modules"]}
    assert not parts & {
        "jagtile.generator.render",
        "jagtile.generator.build",
        "jagtile.generator.tune",
        "jagtile.runtime.cuda",
        "jagtile.runtime.cpu",
        "jagtile.runtime.store",
        "jagtile.tuning_db",
    }


def test_it_creates_no_cuda_context_file_or_log_handler(imported):
    assert (imported["cuda"], imported["files"], imported["handlers"]) == (False, [], 0)


def test_it_says_nothing(imported):
    assert imported["stderr"] == ""


def test_it_leaves_torch_alone(imported):
    assert not imported["patched"]
    assert imported["rules"] == []


def test_the_public_names_are_these(imported):
    assert imported["public"] == [
        "BuildError",
        "CompilerNotFoundError",
        "JagtileError",
        "JagtileWarning",
        "NoKernelError",
        "UnsupportedError",
        "__version__",
        "disable",
        "enable",
        "enabled",
        "explain",
        "sdpa",
        "varlen_attention",
        "warmup",
    ]


def test_the_version_is_that_of_the_distribution():
    assert f'version = "{jagtile.__version__}"' in (ROOT / "pyproject.toml").read_text()
