"""The first call on a GPU: from a pack where nothing can be built, and built where there is a compiler and no pack."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from jagtile.generator.pack import build_pack, plan_pack
from jagtile.generator.spec import KernelSpec
from jagtile.generator.toolchain import find_nvcc
from jagtile.runtime.device import device_id
from jagtile.runtime.errors import CompilerNotFoundError
from jagtile.tuning_db.store import Database

pytestmark = pytest.mark.gpu

DEVICE, DTYPE = "cuda", "bf16"
SPECS = [KernelSpec.parse(f"{way}_{DTYPE}_d64") for way in ("fwd", "bwd")]

# argv: modules to hide. Prints how wrong a call and its gradients are, and the CPU's seconds of forward and backward,
# compilers' included, and of the calling thread in the forward: the time that passes depends on who else wants the CPU.
CALL = f"""
import json, os, sys, time
for name in sys.argv[1:]:
    sys.modules[name] = None
import torch, jagtile
dtype = {{"bf16": torch.bfloat16, "fp32": torch.float32}}["{DTYPE}"]
torch.manual_seed(0)
q, k, v = (torch.randn(10, 2, 64, device="{DEVICE}", dtype=dtype).requires_grad_() for _ in range(3))
cu = torch.tensor([0, 3, 3, 10], dtype=torch.int32, device="{DEVICE}")
def attend(q, k, v):
    parts = [torch.nn.functional.scaled_dot_product_attention(*(x[a:b].transpose(0, 1) for x in (q, k, v)))
             for a, b in ((0, 3), (3, 10))]
    return torch.cat([part.transpose(0, 1) for part in parts])
wanted = attend(q, k, v)
wanted = (wanted, *torch.autograd.grad(wanted.float().square().sum(), (q, k, v)))
settle = torch.cuda.synchronize if "{DEVICE}" == "cuda" else lambda: None
settle()
begin, called = sum(os.times()[:4]), time.thread_time()
out = jagtile.varlen_attention(q, k, v, cu, cu)
settle()
returned = time.thread_time()
middle = sum(os.times()[:4])
found = (out, *torch.autograd.grad(out.float().square().sum(), (q, k, v)))
settle()
end = sum(os.times()[:4])
error = max(((a - b).float().norm() / b.float().norm()).item() for a, b in zip(found, wanted))
print(json.dumps({{"error": error, "forward": middle - begin, "backward": end - middle,
                  "thread": returned - called}}))
"""


def process(*hidden: str, **environment: str) -> tuple[dict[str, float], list[str]]:
    """What ``CALL`` prints, and the lines on standard error."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("JAGTILE_", "PYTHON"))}
    done = subprocess.run(
        [sys.executable, "-c", CALL, *hidden],
        env={**clean, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr.splitlines()


@pytest.fixture(scope="module", autouse=True)
def compiler():
    try:
        find_nvcc()
    except CompilerNotFoundError as error:
        pytest.skip(str(error))


def test_a_pack_serves_a_gpu_without_a_compiler_and_fast(tmp_path):
    plan = plan_pack(device_id(torch.device(DEVICE)).slug, SPECS, Database(tmp_path / "user"))
    build_pack(plan, tmp_path / plan.name)
    environment = {
        "JAGTILE_PACKS": str(tmp_path),
        "JAGTILE_CACHE_DIR": str(tmp_path / "cache"),
        "PYTHONPYCACHEPREFIX": str(tmp_path / "pycache"),
        "PATH": "/nowhere",
    }
    seconds = []
    for _ in range(4):  # the first one caches the modules' byte code
        found, said = process("jinja2", "optuna", "ninja", "click", "rich", **environment)
        assert found["error"] < 1e-2
        assert not [line for line in said if "JagtileWarning" in line]
        seconds.append(found["thread"])
    assert min(seconds) < 0.05


def test_without_a_pack_the_first_call_builds_in_time_and_says_so_in_a_line(tmp_path):
    seconds = []
    for attempt in range(2):
        found, said = process(JAGTILE_PACKS="none", JAGTILE_CACHE_DIR=str(tmp_path / str(attempt)))
        assert found["error"] < 1e-2
        lines = [line for line in said if line.startswith("building ")]
        assert [line.split("/")[1] for line in lines] == [spec.name for spec in SPECS]
        seconds.append(max(found["forward"], found["backward"]))
    assert min(seconds) < 3
