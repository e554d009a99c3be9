"""Host cost of ways to launch a cubin's kernel, microseconds a call (numbers: docs/launch.md).

Needs a GPU of compute capability 9.0, nvcc, and for the C launcher a C++ compiler.
Run: python benchmarks/launch_paths.py
"""

from __future__ import annotations

import ctypes
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import jagtile
from jagtile.generator.build import build_one
from jagtile.generator.spec import KernelSpec
from jagtile.generator.tile import Variant, spaces_of
from jagtile.generator.toolchain import find_cxx
from jagtile.generator.workloads import named
from jagtile.runtime import cuda
from jagtile.runtime.cuda import driver, params, tensor_map

_C_LAUNCHER = """
extern "C" int cuLaunchKernel(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*,
                              void**, void**);
extern "C" int launch(void* kernel, unsigned grid, unsigned threads, unsigned smem, void* stream, void* block) {
  void* arguments[] = {block};
  return cuLaunchKernel(kernel, grid, 1, 1, threads, 1, 1, smem, stream, arguments, nullptr);
}
"""


def microseconds(call: Callable[[], object], repeats: int = 15, calls: int = 200) -> float:
    """Median host time of a call over batches that stay below the launch queue's depth."""
    batches = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        batches.append((time.perf_counter() - start) / calls * 1e6)
    return statistics.median(batches)


def c_launcher(folder: Path) -> ctypes.PyDLL:
    """A launcher in C, compiled here; called without releasing the interpreter lock."""
    source, library = folder / "launch.cpp", folder / "launch.so"
    source.write_text(_C_LAUNCHER)
    command = [find_cxx().path, "-O2", "-shared", "-fPIC", source, "-o", library, "-l:libcuda.so.1"]
    subprocess.run([str(word) for word in command], check=True)
    loaded = ctypes.PyDLL(str(library))
    pointer, u32 = ctypes.c_void_p, ctypes.c_uint
    loaded.launch.argtypes = [pointer, u32, u32, u32, pointer, pointer]
    return loaded


def main() -> None:
    """Print a line a path."""
    device = torch.device("cuda", torch.cuda.current_device())
    workload = named()["tiny-d64"]
    batch = workload.make(device, "bf16")
    spec = KernelSpec.parse("fwd_bf16_d64")
    space, *_ = spaces_of("sm_90a", spec)
    artifact = build_one(Variant("sm_90a", spec, space.default(spec)))
    module = driver.load_module(artifact.path.read_bytes())
    builder = driver.function(module, "jagtile_build_work_list")
    # A work list of no sequences: the smallest kernel there is behind a real parameter block.
    block = ctypes.create_string_buffer(params.BLOCK_BYTES)
    work_list = torch.zeros(params.work_list_bytes(0), dtype=torch.uint8, device=device)
    offsets = torch.zeros(1, dtype=torch.int32, device=device)
    pointers = (offsets.data_ptr(), offsets.data_ptr(), work_list.data_ptr(), 0)
    params.SCALARS.pack_into(block, params.SCALARS_OFFSET, *pointers, *([0] * 8), 64, 64, 0, 1.0)
    arguments = (ctypes.c_void_p * 1)(ctypes.addressof(block))
    stream = torch.cuda.current_stream().cuda_stream
    handle = int(builder)
    lib = ctypes.CDLL("libcuda.so.1")
    pointer, u32 = ctypes.c_void_p, ctypes.c_uint
    lib.cuLaunchKernel.argtypes = [pointer, u32, u32, u32, u32, u32, u32, u32, pointer, pointer, pointer]
    launch = driver.Launcher(device.index)
    rows: list[tuple[str, Callable[[], object]]] = [
        ("ctypes, cuLaunchKernel", lambda: lib.cuLaunchKernel(handle, 1, 1, 1, 1024, 1, 1, 0, stream, arguments, None)),
        ("cuda-bindings, cuLaunchKernel", lambda: launch(builder, 1, 1024, 0, stream, ctypes.addressof(arguments))),
    ]
    with tempfile.TemporaryDirectory() as folder:
        try:
            launcher = c_launcher(Path(folder))
            address = ctypes.addressof(block)
            rows.append(("C launcher through ctypes", lambda: launcher.launch(handle, 1, 1024, 0, stream, address)))
        except (subprocess.CalledProcessError, OSError) as error:
            print(f"C launcher: {error}")

    kernel = cuda.load(artifact, device)
    out = torch.empty(batch.q.shape, dtype=batch.q.dtype, device=device)
    kv = (batch.k, batch.v, batch.cu_seqlens_q, batch.cu_seqlens_k)
    rows += [
        ("encode one tensor map", lambda: tensor_map.encode(batch.q.data_ptr(), "bf16", 64, 8, 1024, 128, 64)),
        (
            "kernel.forward: block, work list look-up, launch",
            lambda: kernel.forward(batch.q, *kv, out, None, 0.1, False),
        ),
        ("jagtile.varlen_attention", lambda: jagtile.varlen_attention(batch.q, *kv)),
        ("torch.empty_like", lambda: torch.empty_like(batch.q)),
    ]
    for label, call in rows:
        for _ in range(50):
            call()
        print(f"{label:52s} {microseconds(call):8.2f}")


if __name__ == "__main__":
    main()
