"""What every Hopper backward is put through on the emulator: gradients against the float64 oracle."""

from __future__ import annotations

import itertools

import torch

from emulator.driver import emulated
from jagtile.generator.oracle import errors, reference
from jagtile.generator.oracle_gradients import Gradients, gradient_tolerance, reference_gradients
from jagtile.generator.workloads import JaggedBatch, Workload
from jagtile.runtime import cuda
from jagtile.runtime.artifact import Artifact
from jagtile.runtime.cuda import CudaBackwardKernel

SCALE = 0.1
_seeds = itertools.count(1)  # no two runs share a schedule


def in_nan(tensor: torch.Tensor) -> torch.Tensor:
    """The same values inside a larger NaN-filled buffer: strided rows and heads, NaN on every side."""
    tokens, heads, dim = tensor.shape
    storage = torch.full((tokens + 300, heads + 1, dim + 8), float("nan"), dtype=tensor.dtype)
    return storage[150 : 150 + tokens, :heads, :dim].copy_(tensor)


def backward(
    artifact: Artifact,
    w: Workload,
    b: JaggedBatch,
    dout: torch.Tensor,
    dlse: torch.Tensor | None = None,
    *,
    scale: float = SCALE,
    launches: int = 1,
    processors: int = 2,
) -> Gradients:
    """The gradients of the last of some launches, of which the first builds the work list and each rewinds it. Raises
    AssertionError where a launch leaves NaN in a gradient or writes outside of one.
    """
    out, lse = reference(*b[:5], is_causal=w.is_causal, causal_alignment=w.causal_alignment, scale=scale)
    saved = in_nan(out.to(b.q.dtype))
    bottom_right = w.causal_alignment == "bottom_right"
    with emulated(processors=processors, seed=1000 * next(_seeds)):
        kernel = cuda.load(artifact, torch.device("cuda", 0))
        assert isinstance(kernel, CudaBackwardKernel)
        for _ in range(launches):
            grads = Gradients(*(in_nan(torch.full_like(x, float("nan"))) for x in b[:3]))
            kernel.backward(*b[:5], saved, lse.float(), dout, dlse, *grads, scale, bottom_right)
    for grad in grads:
        around = grad._base
        assert around is not None
        assert int(around.isnan().sum()) == around.numel() - grad.numel(), (
            "NaN inside, or a write outside, of a gradient"
        )
    return grads


def assert_right(
    artifact: Artifact, w: Workload, seed: int = 5, *, scale: float = SCALE, with_dlse: bool = True, launches: int = 1
) -> None:
    """Against the oracle, every tensor that is read among rows of NaN."""
    dtype = artifact.meta.spec.split("_")[1]
    b = w.make("cpu", dtype, seed)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    dout = torch.randn((w.total_q, w.num_heads, w.head_dim_v), generator=generator).to(b.q.dtype)
    dlse = torch.randn((w.num_heads, w.total_q), generator=generator) if with_dlse else None
    expected = reference_gradients(
        *b[:5], dout, dlse, is_causal=w.is_causal, causal_alignment=w.causal_alignment, scale=scale
    )
    b = b._replace(q=in_nan(b.q), k=in_nan(b.k), v=in_nan(b.v))
    found = backward(artifact, w, b, in_nan(dout), dlse, scale=scale, launches=launches)
    for name, grad, truth in zip(Gradients._fields, found, expected, strict=True):
        assert errors(grad, truth).rel <= gradient_tolerance(grad.dtype), name
