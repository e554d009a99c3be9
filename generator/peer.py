"""What ``bench`` asks of an implementation of jagged attention, and what several of them share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, cast

import torch

from jagtile.generator.spec import DType
from jagtile.generator.workloads import JaggedBatch, Workload

Call = Callable[[], Any]


class Prepared(NamedTuple):
    """A peer on one batch."""

    call: Call  # what is timed
    packed: Callable[[Any], torch.Tensor]  # its result as (total_q, H, D_v)


class Peer(Protocol):
    """An implementation that ``bench`` can run."""

    name: str

    def missing(self, device: torch.device) -> str | None:
        """None where it can be imported and runs on this kind of device, else the reason why not."""
        ...

    def refuses(self, workload: Workload, dtype: DType, device: torch.device) -> str | None:
        """None where it computes the workload as we define it, else the reason why not."""
        ...

    def prepare(self, workload: Workload, batch: JaggedBatch) -> Prepared:
        """The call to be timed. May raise anything."""
        ...


def as_it_is(out: Any) -> torch.Tensor:
    """The output of a call that gives the packed output, alone or first."""
    return cast(torch.Tensor, out[0] if isinstance(out, (tuple, list)) else out)


def unequal(workload: Workload) -> bool:
    """Whether keys and queries differ in length."""
    return workload.seqlens_q != workload.seqlens_k


def refuses_alignment(workload: Workload, served: str) -> str | None:
    """The reason why a peer of one alignment can not compute the workload, or None."""
    if workload.is_causal and unequal(workload) and workload.causal_alignment != served:
        return f"causal with unequal lengths is {served} only"
    return None


def only_16_bit(dtype: DType) -> str | None:
    """The reason why a peer of bf16 and fp16 refuses a dtype, or None."""
    return "bf16 and fp16 only" if dtype == "fp32" else None


def nested(workload: Workload, batch: JaggedBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v as nested tensors (B, H, j, D) whose lengths are cached; equal lengths share their offsets."""

    def view(values: torch.Tensor, offsets: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
        nested = torch.nested.nested_tensor_from_jagged(
            values, offsets, min_seqlen=min(lengths), max_seqlen=max(lengths)
        )
        return nested.transpose(1, 2)

    offsets_k = batch.cu_seqlens_k if unequal(workload) else batch.cu_seqlens_q
    return (
        view(batch.q, batch.cu_seqlens_q, workload.seqlens_q),
        view(batch.k, offsets_k, workload.seqlens_k),
        view(batch.v, offsets_k, workload.seqlens_k),
    )


def nested_values(out: torch.Tensor) -> torch.Tensor:
    """A nested result as (total_q, H, D_v)."""
    return out.transpose(1, 2).values()
