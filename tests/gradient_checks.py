"""What every Hopper backward is put through, on the emulator and on GPUs: its gradients against the float64 oracle."""

from __future__ import annotations

from typing import cast

import torch

from jagtile.generator.oracle import errors, reference
from jagtile.generator.oracle_gradients import Gradients, gradient_tolerance, reference_gradients
from jagtile.generator.spec import DType
from jagtile.generator.workloads import JaggedBatch, Workload
from jagtile.runtime.kernel import BackwardKernel

SCALE = 0.1


def in_nan(tensor: torch.Tensor) -> torch.Tensor:
    """The same values inside a larger NaN-filled buffer: strided rows and heads, NaN on every side."""
    tokens, heads, dim = tensor.shape
    storage = torch.full((tokens + 300, heads + 1, dim + 8), float("nan"), dtype=tensor.dtype, device=tensor.device)
    return storage[150 : 150 + tokens, :heads, :dim].copy_(tensor)


def batch(kernel: BackwardKernel, w: Workload, seed: int, device: str) -> tuple[JaggedBatch, torch.Tensor]:
    """Inputs of the kernel's dtype, and dout."""
    b = w.make(device, cast(DType, kernel.meta.spec.split("_")[1]), seed)
    generator = torch.Generator(device).manual_seed(seed)
    shape = (w.total_q, w.num_heads, w.head_dim_v)
    return b, torch.randn(shape, generator=generator, device=device).to(b.q.dtype)


def gradients(
    kernel: BackwardKernel,
    w: Workload,
    b: JaggedBatch,
    dout: torch.Tensor,
    dlse: torch.Tensor | None = None,
    *,
    scale: float = SCALE,
    launches: int = 1,
) -> Gradients:
    """Of the last of some launches, of which the first builds the work list and each rewinds it. Raises AssertionError
    where a launch leaves NaN in a gradient or writes outside of one.
    """
    out, lse = reference(*b[:5], is_causal=w.is_causal, causal_alignment=w.causal_alignment, scale=scale)
    saved = in_nan(out.to(b.q.dtype))
    bottom_right = w.causal_alignment == "bottom_right"
    for _ in range(launches):
        grads = Gradients(*(in_nan(torch.full_like(x, float("nan"))) for x in b[:3]))
        kernel.backward(*b[:5], saved, lse.float(), dout, dlse, *grads, scale, bottom_right)
    for grad in grads:
        around = grad._base
        assert around is not None
        outside = around.numel() - grad.numel()
        assert int(around.isnan().sum()) == outside, "NaN inside, or a write outside, of a gradient"
    return grads


def assert_right(
    kernel: BackwardKernel,
    w: Workload,
    seed: int = 5,
    *,
    scale: float = SCALE,
    with_dlse: bool = True,
    launches: int = 1,
    device: str = "cpu",
) -> None:
    """Against the oracle, every tensor that is read among rows of NaN."""
    b, dout = batch(kernel, w, seed, device)
    dlse = torch.linspace(-2, 2, w.num_heads * w.total_q, device=device).view(w.num_heads, -1) if with_dlse else None
    expected = reference_gradients(
        *b[:5], dout, dlse, is_causal=w.is_causal, causal_alignment=w.causal_alignment, scale=scale
    )
    b = b._replace(q=in_nan(b.q), k=in_nan(b.k), v=in_nan(b.v))
    found = gradients(kernel, w, b, in_nan(dout), dlse, scale=scale, launches=launches)
    for name, grad, truth in zip(Gradients._fields, found, expected, strict=True):
        assert errors(grad, truth).rel <= gradient_tolerance(grad.dtype), name
