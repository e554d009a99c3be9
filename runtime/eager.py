"""Whether a call is a plain one of real tensors, which may take shortcuts past torch's dispatcher."""

from __future__ import annotations

import torch


def is_eager() -> bool:
    """Whether no compiler, mode or transform looks on."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
    )


def is_real(x: torch.Tensor | None) -> bool:
    """Whether it is no tensor subclass, and of a CPU or a CUDA device."""
    return x is None or ((type(x) is torch.Tensor or type(x) is torch.nn.Parameter) and (x.is_cuda or x.is_cpu))
