"""Script: a kernel's parallel region must run on the threads of torch's own OpenMP pool. Arguments: path, meta.json."""

import sys
from pathlib import Path

import msgspec
import torch

from jagtile.runtime.artifact import Artifact, ArtifactMeta
from jagtile.runtime.cpu import load


def threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


kernel = load(Artifact(msgspec.json.decode(sys.argv[2], type=ArtifactMeta), Path(sys.argv[1]), "built"))
torch.set_num_threads(3)
before = threads()
torch.randn(1 << 22).exp_()  # torch starts its pool
pool = threads()
x = torch.randn(4096, 4, 64)
offsets = torch.arange(0, 4097, 64)
kernel.forward(x, x, x, offsets, offsets, torch.empty_like(x), None, 0.125, False)
assert before < pool, "torch has not started its own threads, the count says nothing"
assert threads() == pool, f"{threads() - pool} threads more than torch's {pool}: a second OpenMP runtime"
