"""Problem: what the host knows of one call without asking the device, and the regime that follows from it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from jagtile.generator.spec import DType, KernelSpec

REGIMES: tuple[str, ...] = ("tiny", "short", "medium", "long", "cross", "decode")

DTYPE_NAMES: dict[torch.dtype, DType] = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

# Regime borders, in tokens of mean length; max_seqlen, where the caller gave it, counts an eighth, so that a batch with
# a few very long sequences is treated by those, which hold most of its work.
TINY_MEAN = 18
SHORT_MEAN = 96
GROUP = 4  # query heads a kv head from which on nothing is tiny: packed, few tokens fill a tile
SHORT_MEAN_OF_GROUPS = 128
LONG_MEAN = 1024
MAX_SHARE = 8
UNEQUAL_RATIO = 2  # total_k and total_q further apart than this make a cross (or decode) batch
DECODE_MEAN = 16  # queries a sequence, at most


@dataclass(frozen=True)
class Problem:
    """One call: the spec and the plain host numbers. max_seqlen is None where the caller did not give it."""

    spec: KernelSpec
    batch: int
    total_q: int
    total_k: int
    heads: int
    heads_kv: int
    max_seqlen_q: int | None = None
    max_seqlen_k: int | None = None


def regime(problem: Problem) -> str:
    """The regime of a problem, one of ``REGIMES``."""
    return REGIMES[
        regime_index(
            problem.batch,
            problem.total_q,
            problem.total_k,
            problem.max_seqlen_q or 0,
            problem.max_seqlen_k or 0,
            problem.heads // problem.heads_kv,
        )
    ]


def regime_index(
    batch: int, total_q: int, total_k: int, max_seqlen_q: int = 0, max_seqlen_k: int = 0, group: int = 1
) -> int:
    """Index into ``REGIMES``; max_seqlen 0 means unknown. Total, and monotone: longer never gives a shorter regime.

    tiny: both mean lengths up to 18; short: up to 96. With a ``group`` of 4 or more query heads a kv head, which the
    short regime packs into tiles, all up to 128 is short. Then, where queries and keys differ by more than a factor of
    two, decode (up to 16 queries a sequence against more keys) or cross. Otherwise medium below a mean of 1024, long
    from there on.
    """
    short_mean = SHORT_MEAN if group < GROUP else SHORT_MEAN_OF_GROUPS
    total = total_q if total_q > total_k else total_k
    longest = max_seqlen_q if max_seqlen_q > max_seqlen_k else max_seqlen_k
    if total <= short_mean * batch and longest <= short_mean * MAX_SHARE:
        return 0 if group < GROUP and total <= TINY_MEAN * batch and longest <= TINY_MEAN * MAX_SHARE else 1
    if total_k > UNEQUAL_RATIO * total_q:
        return 5 if total_q <= DECODE_MEAN * batch else 4
    if total_q > UNEQUAL_RATIO * total_k:
        return 4
    return 2 if total < LONG_MEAN * batch and longest < LONG_MEAN * MAX_SHARE else 3
