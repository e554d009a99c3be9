"""Jagged workloads: named ones (workloads.json), random ones, lengths read from a file, and those the tuner times."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch

from jagtile.generator.oracle import CausalAlignment, torch_dtype
from jagtile.generator.spec import Direction, DType, KernelSpec
from jagtile.runtime.problem import FEW, HUGE, Problem, regimes_for

_NAMED = Path(__file__).with_name("workloads.json")


class JaggedBatch(NamedTuple):
    """Packed inputs. q (total_q, H, D), k (total_k, H_kv, D), v (total_k, H_kv, D_v); cu_seqlens int32 (B+1,)."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int


@dataclass(frozen=True)
class Workload:
    """The lengths and heads of one jagged attention call."""

    name: str
    seqlens_q: tuple[int, ...]
    seqlens_k: tuple[int, ...]
    num_heads: int
    num_heads_kv: int
    head_dim: int
    head_dim_v: int
    is_causal: bool = False
    causal_alignment: CausalAlignment = "top_left"

    def __post_init__(self) -> None:
        if len(self.seqlens_q) != len(self.seqlens_k):
            raise ValueError(f"{self.name}: {len(self.seqlens_q)} query lengths but {len(self.seqlens_k)} key lengths")
        if min((*self.seqlens_q, *self.seqlens_k), default=0) < 0:
            raise ValueError(f"{self.name}: a length is negative")
        if self.num_heads_kv < 1 or self.num_heads % self.num_heads_kv:
            raise ValueError(
                f"{self.name}: num_heads {self.num_heads} is no multiple of num_heads_kv {self.num_heads_kv}"
            )

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return len(self.seqlens_q)

    @cached_property
    def total_q(self) -> int:
        """Query tokens in all."""
        return sum(self.seqlens_q)

    @cached_property
    def total_k(self) -> int:
        """Key tokens in all."""
        return sum(self.seqlens_k)

    @cached_property
    def pairs(self) -> int:
        """Unmasked (query, key) pairs of one head."""
        return sum(map(self._pairs, self.seqlens_q, self.seqlens_k))

    def _pairs(self, len_q: int, len_k: int) -> int:
        if not self.is_causal:
            return len_q * len_k
        seeing = min(len_q, len_k)
        if self.causal_alignment == "top_left":
            return seeing * (seeing + 1) // 2 + (len_q - seeing) * len_k
        return seeing * len_k - seeing * (seeing - 1) // 2

    @property
    def flops(self) -> int:
        """Of the forward pass: 2·(D + D_v)·H for each unmasked (query, key) pair."""
        return 2 * (self.head_dim + self.head_dim_v) * self.num_heads * self.pairs

    def flops_of(self, direction: Direction) -> int:
        """As ``flops``; of a backward 2·(3·D + 2·D_v)·H for each pair: five products, the scores' again included."""
        if direction == "fwd":
            return self.flops
        return 2 * (3 * self.head_dim + 2 * self.head_dim_v) * self.num_heads * self.pairs

    def input_bytes(self, element_size: int) -> int:
        """Bytes of q, k and v for elements of this many bytes."""
        per_key = self.num_heads_kv * (self.head_dim + self.head_dim_v)
        return element_size * (self.total_q * self.num_heads * self.head_dim + self.total_k * per_key)

    def spec(self, dtype: DType) -> KernelSpec:
        """The forward spec that computes this workload."""
        return KernelSpec("fwd", dtype, self.head_dim, self.head_dim_v, self.is_causal)

    def problem(self, dtype: DType, with_max: bool = True) -> Problem:
        """What the host knows of a call with this workload; ``with_max``: max_seqlen_q and max_seqlen_k too."""
        return Problem(
            spec=self.spec(dtype),
            batch=self.batch,
            total_q=self.total_q,
            total_k=self.total_k,
            heads=self.num_heads,
            heads_kv=self.num_heads_kv,
            max_seqlen_q=max(self.seqlens_q, default=0) if with_max else None,
            max_seqlen_k=max(self.seqlens_k, default=0) if with_max else None,
        )

    def make(self, device: torch.device | str, dtype: DType | torch.dtype, seed: int = 0) -> JaggedBatch:
        """Standard-normal inputs on a device; the same seed gives the same values on the same kind of device."""
        generator = torch.Generator(device=device).manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=torch_dtype(dtype))

        return JaggedBatch(
            q=normal(self.total_q, self.num_heads, self.head_dim),
            k=normal(self.total_k, self.num_heads_kv, self.head_dim),
            v=normal(self.total_k, self.num_heads_kv, self.head_dim_v),
            cu_seqlens_q=_offsets(self.seqlens_q, device),
            cu_seqlens_k=_offsets(self.seqlens_k, device),
            max_seqlen_q=max(self.seqlens_q, default=0),
            max_seqlen_k=max(self.seqlens_k, default=0),
        )


def _offsets(lengths: tuple[int, ...], device: torch.device | str) -> torch.Tensor:
    return torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32, device=device)


@lru_cache(maxsize=1)
def named() -> dict[str, Workload]:
    """The workloads of workloads.json by name. Where seqlens_k is not given it equals seqlens_q."""
    found = {}
    for name, fields in json.loads(_NAMED.read_text()).items():
        seqlens_q = tuple(fields.pop("seqlens_q"))
        seqlens_k = tuple(fields.pop("seqlens_k", seqlens_q))
        found[name] = Workload(name, seqlens_q, seqlens_k, **fields)
    return found


def from_lengths_file(
    path: Path | str,
    *,
    num_heads: int,
    head_dim: int,
    num_heads_kv: int | None = None,
    head_dim_v: int | None = None,
    is_causal: bool = False,
    causal_alignment: CausalAlignment = "top_left",
) -> Workload:
    """A workload whose lengths are read from a text file: a sequence a line, one length (queries and keys alike) or two
    (queries, keys), separated by blanks or a comma; ``#`` begins a comment. ValueError names the line that is not so.
    """
    path = Path(path)
    pairs = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        words = line.partition("#")[0].replace(",", " ").split()
        if not words:
            continue
        if len(words) > 2 or not all(word.isdecimal() for word in words):
            raise ValueError(f"{path}, line {number}: want one or two lengths (queries, keys), got {line.strip()!r}")
        pairs.append((int(words[0]), int(words[-1])))
    if not pairs:
        raise ValueError(f"{path} holds no lengths")
    return Workload(
        name=path.stem,
        seqlens_q=tuple(q for q, _ in pairs),
        seqlens_k=tuple(k for _, k in pairs),
        num_heads=num_heads,
        num_heads_kv=num_heads if num_heads_kv is None else num_heads_kv,
        head_dim=head_dim,
        head_dim_v=head_dim if head_dim_v is None else head_dim_v,
        is_causal=is_causal,
        causal_alignment=causal_alignment,
    )


def random_workload(
    rng: random.Random,
    *,
    head_dim: int,
    head_dim_v: int | None = None,
    is_causal: bool = False,
    causal_alignment: CausalAlignment | None = None,
    cross: bool | None = None,
    max_batch: int = 8,
    max_seqlen: int = 300,
) -> Workload:
    """A small nasty workload: empty sequences, length 1, lengths around powers of two, skew, GQA, keys unlike queries.

    What is left None (``causal_alignment``; ``cross``: key lengths of their own) is drawn from ``rng``.
    """
    powers = [1 << e for e in range(4, 12) if 1 << e < max_seqlen]

    def length() -> int:
        kind = rng.randrange(5)
        if kind == 0:
            return rng.choice((0, 0, 1, 2, 3))
        if kind == 1 and powers:
            return rng.choice(powers) + rng.choice((-1, 0, 1))
        if kind == 2:
            return max_seqlen
        return rng.randint(0, max_seqlen) if kind == 3 else rng.randint(0, max(1, max_seqlen // 8))

    batch = rng.randint(1, max_batch)
    seqlens_q = tuple(length() for _ in range(batch))
    cross = rng.random() < 0.5 if cross is None else cross
    heads_kv = rng.choice((1, 2, 3))
    return Workload(
        name="random",
        seqlens_q=seqlens_q,
        seqlens_k=tuple(length() for _ in range(batch)) if cross else seqlens_q,
        num_heads=heads_kv * rng.choice((1, 2, 4)),
        num_heads_kv=heads_kv,
        head_dim=head_dim,
        head_dim_v=head_dim if head_dim_v is None else head_dim_v,
        is_causal=is_causal,
        causal_alignment=causal_alignment or ("top_left" if rng.random() < 0.5 else "bottom_right"),
    )


def checks(spec: KernelSpec) -> tuple[Workload, ...]:
    """Small nasty workloads that a kernel of the spec must get right before it is timed; always the same ones."""
    edges = (0, 1, 63, 64, 65, 0, 129, 300, 1)
    alike = Workload("edges", edges, edges, 4, 2, spec.head_dim, spec.head_dim_v, spec.causal)
    cross = replace(alike, name="edges, cross", seqlens_k=edges[::-1], causal_alignment="bottom_right")
    tokens = (1, 2, 3, 4, 0, 0, 17) * 30
    short = replace(alike, name="many short", seqlens_q=tokens, seqlens_k=tokens)
    rng = random.Random(20)
    drawn = (
        random_workload(
            rng,
            head_dim=spec.head_dim,
            head_dim_v=spec.head_dim_v,
            is_causal=spec.causal,
            cross=own_keys,
            max_seqlen=600,
        )
        for own_keys in (False, True)
    )
    if spec.dtype == "fp32":  # averages over long keys cancel to less than its bar allows sums to err by
        return (alike, cross, short, *drawn)
    return (alike, cross, short, *drawn, *_few_queries(spec))


def _few_queries(spec: KernelSpec) -> tuple[Workload, ...]:
    """Long keys: more pieces of them than a GPU holds CTAs, and 1, 3 and 8 query heads a kv head. A single query has
    so many heads that the error in the mean is steady.
    """
    kind = (spec.head_dim, spec.head_dim_v, spec.causal)
    one = Workload("one query, long keys", (1,), (20000,), 16, 16, *kind, causal_alignment="bottom_right")
    few = replace(
        one,
        name="few queries, long keys",
        seqlens_q=(1, 17, 0, 1, 70),
        seqlens_k=(6000, 700, 40, 0, 2500),
        num_heads=8,
        num_heads_kv=1,
    )
    return (one, few, replace(few, name="few queries, long keys, three heads a kv head", num_heads=6, num_heads_kv=2))


_GPU_REPRESENTATIVES = {
    "tiny": ("one-token-d64",),
    "short": ("recsys-d64",),
    "medium": ("vit-d64",),
    "long": ("u4k-d128", "u1k-d128"),
    "cross": ("cross-d64", "mixed-d128-gqa-causal"),
    "decode": ("decode-d128-gqa",),
    "huge": ("u4k-d128", "skew-d128"),
}
# Of every head dim with as many heads, as these make tiles few. Between 1.5 and 2.4 tiles of 128 rows for each of 132
# multiprocessors, as long as they may be and of a mean length that is medium.
_FEW = tuple(
    Workload(name, lengths, lengths, heads, heads_kv, 128, 128)
    for name, lengths, heads, heads_kv in (
        ("3x4k-h2", (4000, 4358, 5031), 2, 2),
        ("8k-h4", (8192,), 4, 4),
        ("3x800-h16-gqa", (1300, 700, 500), 16, 2),
    )
)
# Of a backward: no sequence longer than 72, where half of a recommender's tokens are in sequences of more than 128.
_ALIKE = tuple(24 + 5 * i % 49 for i in range(1365))
_SHORT_ALIKE = Workload("1365x48", _ALIKE, _ALIKE, 8, 8, 64, 64)
# Sequences; a CPU has less to fill.
_CPU_SIZES = {"tiny": 512, "short": 96, "medium": 32, "long": 2, "cross": 8, "decode": 16}


def representative(spec: KernelSpec, regime: str, target: str) -> tuple[Workload, ...]:
    """What the tuner times for a regime: lengths of a named workload, heads such that heads x head_dim stays the same.

    On the CPU the batches are cut to what it computes in well under a second. ValueError lists the regimes of the spec.
    """
    has = regimes_for(spec.direction, target)
    if regime not in has:
        raise ValueError(f"no regime {regime!r} of {spec.name} on {target}; regimes: {', '.join(has)}")
    if regime == FEW:
        return tuple(_for_spec(replace(base, head_dim=spec.head_dim), spec, regime) for base in _FEW)
    bases = [named()[name] for name in _GPU_REPRESENTATIVES[regime]]
    if target == "cpu":
        bases = [_cut(named()["cpu-d64"] if regime == "medium" else bases[0], _CPU_SIZES[regime])]
    elif regime == "medium" and spec.causal:
        bases = [named()["sft-d128-gqa-causal"]]
    elif regime == "cross" and spec.causal:  # where lengths differ, a mask goes with decoding beside prefilling
        bases = bases[1:]
    elif regime == "short":
        bases.append(replace(bases[0], name=f"{bases[0].name}-gqa", num_heads_kv=bases[0].num_heads // 4))
        if spec.direction == "bwd":
            bases.append(_SHORT_ALIKE)
    elif regime == "long" and HUGE in has:
        bases = bases[1:]
    return tuple(_for_spec(base, spec, regime) for base in bases)


def _for_spec(base: Workload, spec: KernelSpec, regime: str) -> Workload:
    """A workload of a spec's head dims and mask, its number of kv heads scaled."""
    group = base.num_heads // base.num_heads_kv
    heads_kv = max(1, base.num_heads_kv * base.head_dim // spec.head_dim)
    return replace(
        base,
        name=f"{regime}:{base.name}",
        num_heads=group * heads_kv,
        num_heads_kv=heads_kv,
        head_dim=spec.head_dim,
        head_dim_v=spec.head_dim_v,
        is_causal=spec.causal,
    )


def _cut(workload: Workload, batch: int) -> Workload:
    """The first sequences of a workload, at most 2048 keys each, at most 256 wide over all heads."""
    group = workload.num_heads // workload.num_heads_kv
    heads_kv = max(1, min(workload.num_heads, 256 // workload.head_dim) // group)
    return replace(
        workload,
        seqlens_q=tuple(min(n, 2048) for n in workload.seqlens_q[:batch]),
        seqlens_k=tuple(min(n, 2048) for n in workload.seqlens_k[:batch]),
        num_heads=group * heads_kv,
        num_heads_kv=heads_kv,
    )
