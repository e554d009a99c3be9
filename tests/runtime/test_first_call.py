"""The first call of a spec in several processes at once: one compilation, one line each, the same result."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jagtile.generator.toolchain import find_cxx
from jagtile.runtime.errors import CompilerNotFoundError

CALL = """
import sys, time
import torch
import jagtile
open(sys.argv[1], "w").close()
while not all(map(__import__("os").path.exists, sys.argv[2:])):
    time.sleep(0.01)
q = torch.ones(3, 1, 8)
offsets = torch.tensor([0, 3])
print(jagtile.varlen_attention(q, q, q, offsets, offsets).sum().item())
"""


def test_processes_that_call_a_new_spec_at_once_compile_it_once_and_say_so_in_a_line(tmp_path):
    try:
        compiler = find_cxx()
    except CompilerNotFoundError as error:
        pytest.skip(str(error))
    log, wrapper = tmp_path / "compilations", tmp_path / "g++"
    real = shutil.which(str(compiler.path))
    wrapper.write_text(f'#!/bin/sh\ncase "$*" in *-shared*) echo once >> {log};; esac\nexec {real} "$@"\n')
    wrapper.chmod(0o755)
    here = {"JAGTILE_CACHE_DIR": str(tmp_path / "cache"), "CXX": str(wrapper), "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **here, "PYTHONPATH": str(Path(__file__).parents[2] / ".pkg")}
    ready = [str(tmp_path / f"ready{number}") for number in range(2)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CALL, own, *ready],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for own in ready
    ]
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert (process.returncode, float(out)) == (0, 24.0), err
        (line,) = err.splitlines()
        assert line.startswith("building cpu/fwd_fp32_d8/")
        assert line.endswith("for its first use; jagtile.warmup does so ahead of time")
    assert log.read_text().split() == ["once"]
