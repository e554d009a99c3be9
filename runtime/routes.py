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
from jagtile.runtime.dispatch import Decision, choose_by_look_up, default_variant, packed_variants
from jagtile.runtime.errors import (
    BuildError,
    CompilerNotFoundError,
    JagtileError,
    JagtileWarning,
    NoKernelError,
    RejectedVariantError,
)
from jagtile.runtime.loader import kernel_table
from jagtile.runtime.problem import DTYPE_NAMES, LOOK_UPS, LookUp, regimes_for

if TYPE_CHECKING:
    from jagtile.runtime.kernel import BackwardKernel, ForwardKernel, Kernel

log = logging.getLogger("jagtile")

# dtype, head_dim, head_dim_v, is_causal, index of the CUDA device (-1: CPU), index of the regimes' look-up, dropout
Route = tuple[torch.dtype, int, int, bool, int, int, bool]

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
    dtype, head_dim, head_dim_v, is_causal, device_index, look_up, dropout = route
    device = torch.device("cpu") if device_index < 0 else torch.device("cuda", device_index)
    spec = KernelSpec(direction, DTYPE_NAMES[dtype], head_dim, head_dim_v, is_causal, dropout)
    decision = decide(spec, LOOK_UPS[look_up], device)
    kernel = _load(decision, device)
    log.debug("%s, regime %s on %s: %s (%s)", spec.name, decision.regime, device, kernel.meta.symbol, decision.source)
    return kernel


def decide(spec: KernelSpec, look_up: LookUp, device: torch.device) -> Decision:
    """What dispatch chooses for a spec and a look-up on a device, from the choices as they are on disk now."""
    from jagtile.runtime import packs
    from jagtile.tuning_db.store import Database

    identity = device_id(device)
    return choose_by_look_up(spec, look_up, identity, Database(), packs.fitting(identity))


def prepare(spec: KernelSpec, regimes: Sequence[str], device: torch.device) -> tuple[Variant, ...]:
    """Build and load the kernels of several regimes and remember their routes. Batches of a regime that the spec has
    not on the device are of its neighbours there. Returns the distinct variants.
    """
    from jagtile.runtime import native, packs

    packs.forget()
    native.forget()
    has = regimes_for(spec.direction, device.type)
    wanted = {look_up if look_up[0] in has else look_up[1:] for look_up in LOOK_UPS if look_up[0] in regimes}
    decisions = {at: decide(spec, look_up, device) for at, look_up in enumerate(LOOK_UPS) if look_up in wanted}
    variants = tuple(dict.fromkeys(decision.variant for decision in decisions.values()))
    kernel_table().build_missing(variants, device)
    dtype = next(torch_dtype for torch_dtype, name in DTYPE_NAMES.items() if name == spec.dtype)
    index = -1 if device.index is None else device.index
    for look_up, decision in decisions.items():
        route = (dtype, spec.head_dim, spec.head_dim_v, spec.causal, index, look_up, spec.dropout)
        routes = ROUTES if spec.direction == "fwd" else BACKWARD_ROUTES
        cast("dict[Route, Kernel]", routes)[route] = _load(decision, device)
    return variants


def _load(decision: Decision, device: torch.device) -> Kernel:
    """The decision's kernel, or the space's default where the compiler at hand makes nothing usable of the decision, or
    another one of a kernel pack where nothing can be built.
    """
    variant = decision.variant
    try:
        return kernel_table().kernel_for(variant, device)
    except (CompilerNotFoundError, NoKernelError) as error:
        kernel = _packed_instead(decision, device, error)
        if kernel is None:
            raise
        return kernel
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


def _packed_instead(decision: Decision, device: torch.device, error: JagtileError) -> Kernel | None:
    """A kernel pack's kernel for the decision's spec that is not the decision's own; None where there is none."""
    from jagtile.runtime import packs

    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():  # wanted is only what is loaded already
        return None
    wanted, identity = decision.variant, device_id(device)
    for variant in packed_variants(wanted.spec, decision.look_up, identity, packs.fitting(identity)):
        if variant == wanted or not packs.holds(variant, device):
            continue
        try:
            kernel = kernel_table().kernel_for(variant, device)
        except (CompilerNotFoundError, NoKernelError):  # it is damaged, as a JagtileWarning has told
            continue
        warnings.warn(
            f"{wanted.name} ({decision.source} choices) can't be had, {variant.config.name} of a kernel pack takes its "
            f"place: {error}",
            JagtileWarning,
            stacklevel=2,
        )
        return kernel
    return None


def forget() -> None:
    """Drop every route, loaded kernel and known pack of this process; the next call looks everything up anew."""
    from jagtile.runtime import native, packs

    packs.forget()
    native.forget()
    ROUTES.clear()
    BACKWARD_ROUTES.clear()
    kernel_table().clear()
