"""Whether gradients are wanted and a backward kernel can be had: what must be known before the forward runs."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch

from jagtile.generator.spec import KernelSpec
from jagtile.runtime.errors import UnsupportedError
from jagtile.runtime.problem import DTYPE_NAMES


def requires_grad(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether autograd is to differentiate what is computed of them."""
    return torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)


@lru_cache(maxsize=256)
def why_no_backward(dtype: torch.dtype, head_dim: int, head_dim_v: int, device: torch.device) -> str | None:
    """The reason; None where a kernel is there, and where not even the forward has one. Where only the backward has
    none, plain operations serve both. Fake tensors of a device that is not here ask any GPU's target.
    """
    from jagtile.generator.tile import spaces_of, targets
    from jagtile.runtime.device import device_id
    from jagtile.runtime.dispatch import default_variant

    if device.type == "meta":
        return None
    spec = KernelSpec("bwd", DTYPE_NAMES[dtype], head_dim, head_dim_v, causal=False)
    if device.type == "cuda" and not torch.cuda.is_available():
        candidates = [target for target in targets() if target != "cpu"]
    else:
        try:
            candidates = [device_id(device).target]
        except UnsupportedError:
            return None
    reason = None
    for target in candidates:
        if spaces_of(target, replace(spec, direction="fwd")):
            try:
                default_variant(spec, target)
            except UnsupportedError as error:
                reason = str(error)
            else:
                return None
    return reason
