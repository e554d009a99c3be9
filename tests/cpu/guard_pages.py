"""Script: run kernels on tensors that end, or begin, where a protected page lies. Arguments: path, meta.json, ..."""

import ctypes
import mmap
import sys
from pathlib import Path

import msgspec
import torch

from jagtile.generator.oracle import errors, reference, tolerance, torch_dtype
from jagtile.generator.oracle_gradients import reference_gradients
from jagtile.generator.spec import KernelSpec
from jagtile.runtime.artifact import Artifact, ArtifactMeta
from jagtile.runtime.cpu import load

PAGE = mmap.PAGESIZE
PROT_NONE = 0
libc = ctypes.CDLL(None, use_errno=True)


def guarded(tensor: torch.Tensor, at_end: bool) -> torch.Tensor:
    """A copy whose last byte lies before, or whose first byte lies behind, a page that must not be touched."""
    size = tensor.numel() * tensor.element_size()
    pages = -(-size // PAGE)
    memory = mmap.mmap(-1, (pages + 2) * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (start, start + (pages + 1) * PAGE):
        assert libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(PAGE), PROT_NONE) == 0
    offset = PAGE + (pages * PAGE - size if at_end else 0)
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset).view(tensor.shape)
    return copy.copy_(tensor)


def run_forward(artifact: Artifact, lengths: tuple[int, ...], at_end: bool) -> None:
    spec = KernelSpec.parse(artifact.meta.spec)
    dtype = torch_dtype(spec.dtype)
    tokens = sum(lengths)
    offsets = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    q, k = (torch.randn(tokens, 2, spec.head_dim).to(dtype) for _ in range(2))
    v = torch.randn(tokens, 2, spec.head_dim_v).to(dtype)
    tensors = (q, k, v, offsets, offsets, torch.zeros_like(v), torch.zeros(2, tokens))
    q, k, v, cu_q, cu_k, out, lse = (guarded(tensor, at_end) for tensor in tensors)
    load(artifact).forward(q, k, v, cu_q, cu_k, out, lse, 0.3, False)
    expected, _ = reference(q, k, v, cu_q, cu_k, is_causal=spec.causal, scale=0.3)
    assert errors(out, expected).rel <= tolerance(dtype)


def run_backward(artifact: Artifact, lengths: tuple[int, ...], at_end: bool) -> None:
    spec = KernelSpec.parse(artifact.meta.spec)
    dtype = torch_dtype(spec.dtype)
    tokens = sum(lengths)
    offsets = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    q, k = (torch.randn(tokens, 2, spec.head_dim).to(dtype) for _ in range(2))
    v, dout = (torch.randn(tokens, 2, spec.head_dim_v).to(dtype) for _ in range(2))
    out, lse = reference(q, k, v, offsets, offsets, is_causal=spec.causal, scale=0.3)
    dlse = torch.randn(lse.shape)
    tensors = (q, k, v, offsets, offsets, out.to(dtype), lse.float(), dout, dlse, *map(torch.zeros_like, (q, k, v)))
    operands = [guarded(tensor, at_end) for tensor in tensors]
    load(artifact).backward(*operands, 0.3, False)
    expected = reference_gradients(q, k, v, offsets, offsets, dout, dlse, is_causal=spec.causal, scale=0.3)
    for grad, want in zip(operands[-3:], expected, strict=True):
        # Roughly: gradients of a few tokens may cancel, and what counts here is that nothing else was read.
        assert float((grad.double() - want).norm()) <= 0.05 * max(1.0, float(want.norm()))


torch.manual_seed(0)
for path, meta in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
    artifact = Artifact(msgspec.json.decode(meta, type=ArtifactMeta), Path(path), "built")
    print(artifact.meta.symbol, flush=True)  # a crash is the last one's
    for lengths in ((35, 67), (1,), (16, 3, 130)):
        for at_end in (True, False):
            (run_backward if artifact.meta.spec.startswith("bwd_") else run_forward)(artifact, lengths, at_end)
