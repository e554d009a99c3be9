"""The hot table: the plain facts of a call -> loaded kernel, one dict look-up; filled by dispatch and the loader."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch

from jagtile.generator.spec import Direction, KernelSpec
from jagtile.generator.tile import Variant
from jagtile.runtime.device import device_id
from jagtile.runtime.dispatch import Decision, choose_for_regime, default_variant
from jagtile.runtime.errors import BuildError, JagtileWarning, RejectedVariantError
from jagtile.runtime.loader import kernel_table
from jagtile.runtime.problem import DTYPE_NAMES, REGIMES

if TYPE_CHECKING:
    from jagtile.runtime.kernel import BackwardKernel, ForwardKernel, Kernel

log = logging.getLogger("jagtile")

# dtype, head_dim, head_dim_v, is_causal, index of the CUDA device (-1: CPU), index of the regime
Route = tuple[torch.dtype, int, int, bool, int, int]

# Read without a lock by every call, written by ``resolve`` only; the values are owned by the kernel table.
ROUTES: dict[Route, ForwardKernel] = {}
BACKWARD_ROUTES: dict[Route, BackwardKernel] = {}


def resolve(route: Route) -> ForwardKernel:
    """Choose, load (build, if need be) and remember the forward kernel of a route."""
    kernel = ROUTES[route] = cast("ForwardKernel", _resolve("fwd", route))
    return kernel


def resolve_backward(route: Route) -> BackwardKernel:
    """As ``resolve``, the backward kernel."""
    kernel = BACKWARD_ROUTES[route] = cast("BackwardKernel", _resolve("bwd", route))
    return kernel


def _resolve(direction: Direction, route: Route) -> Kernel:
    dtype, head_dim, head_dim_v, is_causal, device_index, regime_index = route
    device = torch.device("cpu") if device_index < 0 else torch.device("cuda", device_index)
    spec = KernelSpec(direction, DTYPE_NAMES[dtype], head_dim, head_dim_v, is_causal)
    decision = decide(spec, REGIMES[regime_index], device)
    kernel = _load(decision, device)
    log.debug("%s, regime %s on %s: %s (%s)", spec.name, decision.regime, device, kernel.meta.symbol, decision.source)
    return kernel


def decide(spec: KernelSpec, regime: str, device: torch.device) -> Decision:
    """What dispatch chooses for a spec and a regime on a device, from the choices as they are on disk now."""
    from jagtile.tuning_db.store import Database

    return choose_for_regime(spec, regime, device_id(device), Database())


def prepare(spec: KernelSpec, regimes: Sequence[str], device: torch.device) -> tuple[Variant, ...]:
    """Build and load the kernels of several regimes and remember their routes. Returns the distinct variants."""
    decisions = [decide(spec, regime, device) for regime in regimes]
    variants = tuple(dict.fromkeys(decision.variant for decision in decisions))
    kernel_table().build_missing(variants, device)
    dtype = next(torch_dtype for torch_dtype, name in DTYPE_NAMES.items() if name == spec.dtype)
    index = -1 if device.index is None else device.index
    for decision in decisions:
        route = (dtype, spec.head_dim, spec.head_dim_v, spec.causal, index, REGIMES.index(decision.regime))
        routes = ROUTES if spec.direction == "fwd" else BACKWARD_ROUTES
        cast("dict[Route, Kernel]", routes)[route] = _load(decision, device)
    return variants


def _load(decision: Decision, device: torch.device) -> Kernel:
    """The decision's kernel, or the space's default where the compiler at hand makes nothing usable of the decision."""
    variant = decision.variant
    try:
        return kernel_table().kernel_for(variant, device)
    except (BuildError, RejectedVariantError) as error:
        default = default_variant(variant.spec, variant.target)
        if default == variant:
            raise
        warnings.warn(
            f"{variant.name} ({decision.source} choices) can't be used, {default.config.name} takes its place: {error}",
            JagtileWarning,
            stacklevel=2,
        )
        return kernel_table().kernel_for(default, device)


def forget() -> None:
    """Drop every route and loaded kernel of this process; the next call looks everything up anew."""
    ROUTES.clear()
    BACKWARD_ROUTES.clear()
    kernel_table().clear()
