"""``explain``: which variant a call would run, from which record, and where its kernel comes from. Launches nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from jagtile.generator.spec import KernelSpec
from jagtile.generator.tile import Variant, remark_on
from jagtile.runtime.checks import check_batch, check_flag
from jagtile.runtime.device import DeviceId, device_id, resolved
from jagtile.runtime.dispatch import ChoiceSource, Decision, choose
from jagtile.runtime.dropout import check_dropout_p, check_dropout_served
from jagtile.runtime.errors import CompilerNotFoundError, UnsupportedError
from jagtile.runtime.fallback import no_kernel
from jagtile.runtime.loader import cached, kernel_table
from jagtile.runtime.njt import pack
from jagtile.runtime.problem import DTYPE_NAMES, FEW, FEW_TILES, HUGE, HUGE_MEAN, MAX_SHARE, Problem
from jagtile.runtime.settings import settings
from jagtile.runtime.trainable import requires_grad


@dataclass(frozen=True)
class Explanation:
    """The answer of ``explain``; ``str()`` of it is a report for people."""

    problem: Problem
    device: DeviceId
    decision: Decision
    artifact: str  # "memory", "pack:<name>: <path>", "cache: <path>", "would build", or "none: <reason>"

    @property
    def variant(self) -> Variant:
        """The variant that would run."""
        return self.decision.variant

    def __str__(self) -> str:
        problem, device = self.problem, self.device
        bandwidth = f", {device.bandwidth_gbs:g} GB/s" if device.bandwidth_gbs else ""
        hints = "".join(
            f", {name} {value}"
            for name, value in (("max_seqlen_q", problem.max_seqlen_q), ("max_seqlen_k", problem.max_seqlen_k))
            if value is not None
        )
        remark = remark_on(self.variant.space, problem.heads, problem.heads_kv)
        lines = [
            f"spec      {problem.spec.name}",
            f"device    {device.slug} ({device.label}, {device.units} units{bandwidth}), target {device.target}",
            f"problem   {problem.batch} sequences, {problem.total_q} queries, {problem.total_k} keys, "
            f"{problem.heads} heads over {problem.heads_kv}{hints}",
            f"regime    {self.decision.regime}{self._why()}",
            *(f"look-up   {step.place}: {step.answer}" for step in self.decision.steps),
            f"variant   {self.variant.name}",
            *([f"tiles     {remark}"] if remark else []),
            f"source    {self.decision.source}",
            f"artifact  {self.artifact}",
        ]
        return "\n".join(lines)

    def _why(self) -> str:
        """Of the regimes that have a neighbour."""
        regime, *neighbours = self.decision.look_up
        whys = {
            FEW: f"{self.problem.rows} query rows in all heads, less than {FEW_TILES} tiles of 128",
            HUGE: f"{HUGE_MEAN} tokens or more in the mean, or {MAX_SHARE * HUGE_MEAN} in the longest sequence",
        }
        if regime not in whys:
            return ""
        served_as = f"; served as {neighbours[0]}, as nothing is chosen for it" if self.decision.is_borrowed else ""
        return f": {whys[regime]}{served_as}"


def explain(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    enable_gqa: bool = False,
) -> Explanation:
    """Which variant a call would run, from which record or default, and why. It builds and runs no kernel.

    Takes what ``varlen_attention`` takes, or three nested tensors as ``sdpa`` does (``enable_gqa`` is for those). Where
    the call would raise for its operands, so does this; where autocast would cast them, it does. UnsupportedError where
    no kernel would run, with the reason.
    ``print(jagtile.explain(...))`` shows every look-up step.
    """
    check_flag("is_causal", is_causal)
    drops = check_dropout_p(dropout_p) > 0
    if isinstance(q, torch.Tensor) and q.is_nested:
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k = pack(q, k, v, enable_gqa=enable_gqa)[0]
    elif cu_seqlens_q is None or cu_seqlens_k is None:
        raise TypeError("cu_seqlens_q and cu_seqlens_k must be tensors of B+1 offsets; only nested tensors go without")
    else:
        check_batch(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    reason = no_kernel(q, v, is_causal, trained=requires_grad(q, k, v))
    if reason is not None:
        raise UnsupportedError(f"{reason}: no kernel would run, slow operations of torch would serve this call")
    if drops:
        check_dropout_served(dropout_p, q, v, is_causal)
    problem = Problem(
        spec=KernelSpec("fwd", DTYPE_NAMES[q.dtype], q.shape[2], v.shape[2], is_causal, drops),
        batch=cu_seqlens_q.shape[0] - 1,
        total_q=q.shape[0],
        total_k=k.shape[0],
        heads=q.shape[1],
        heads_kv=k.shape[1],
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
    )
    return explain_problem(problem, q.device)


def explain_problem(
    problem: Problem, device: torch.device | str, *, database: ChoiceSource | None = None
) -> Explanation:
    """What would run for a problem on a device. Launches and builds nothing. UnsupportedError as the call itself.

    ``database`` None is the user's choices over the shipped ones.
    """
    from jagtile.runtime import packs

    if database is None:
        from jagtile.tuning_db.store import Database

        database = Database()
    device = resolved(device)
    identity = device_id(device)
    decision = choose(problem, identity, database, packs.fitting(identity))
    return Explanation(problem, identity, decision, artifact_origin(decision.variant, device))


def artifact_origin(variant: Variant, device: torch.device) -> str:
    """Where the kernel of a variant would come from: see ``Explanation.artifact``."""
    from jagtile.runtime import packs

    if kernel_table().holds(variant, device):
        return "memory"
    if (packed := packs.artifact(variant, device)) is not None:
        return f"{packed.origin}: {packed.path}"
    try:
        artifact = cached(variant)
    except CompilerNotFoundError as error:
        return f"none: {error}"
    if artifact is not None:
        return f"{artifact.origin}: {artifact.path}"
    return "would build" if settings.jit else "none: not in the cache, and JAGTILE_JIT=0 forbids building it"
