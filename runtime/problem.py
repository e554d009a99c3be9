"""Problem: what the host knows of one call without asking the device, and the regimes that follow from it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from jagtile.generator.spec import Direction, DType, KernelSpec

REGIMES: tuple[str, ...] = ("tiny", "short", "medium", "long", "cross", "decode", "few", "huge")
FEW, HUGE = "few", "huge"

LookUp = tuple[str, ...]  # the regimes whose choices serve a call, in order: its own, then the neighbour's

# What ``regime_index`` gives an index into. A batch of few tiles is medium or long all the same and a huge one is long,
# and each is served as such where nothing is chosen for it; no other regime has a neighbour.
LOOK_UPS: tuple[LookUp, ...] = (
    *((name,) for name in REGIMES if name not in (FEW, HUGE)),
    (FEW, "medium"),
    (FEW, "long"),
    (HUGE, "long"),
)
_MEDIUM, _LONG = (LOOK_UPS.index((name,)) for name in ("medium", "long"))
_FEW_AND_MEDIUM, _FEW_AND_LONG = (LOOK_UPS.index((FEW, name)) for name in ("medium", "long"))
_HUGE = LOOK_UPS.index((HUGE, "long"))

DTYPE_NAMES: dict[torch.dtype, DType] = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

# Regime borders, in tokens of mean length; max_seqlen, where the caller gave it, counts an eighth, so that a batch with
# a few very long sequences is treated by those, which hold most of its work.
TINY_MEAN = 18
SHORT_MEAN = 96
# The same two on a GPU where others were measured, by direction, a class of head dims and causal setting.
_MEANS: dict[tuple[Direction, int, bool], tuple[int, int]] = {
    ("fwd", 64, False): (22, 128),
    ("fwd", 64, True): (24, 128),
    ("fwd", 128, False): (28, 96),
    ("fwd", 128, True): (28, 96),
    ("bwd", 64, True): (20, 256),
    ("bwd", 96, False): (24, 96),
    ("bwd", 96, True): (24, 96),
    ("bwd", 128, False): (24, 96),
    ("bwd", 128, True): (28, 96),
}
GROUP = 4  # query heads a kv head from which on nothing is tiny: packed, few tokens fill a tile
SHORT_MEAN_OF_GROUPS = 128
LONG_MEAN = 1024
HUGE_MEAN = 2048  # on a GPU
MAX_SHARE = 8
UNEQUAL_RATIO = 2  # total_k and total_q further apart than this make a cross (or decode) batch
DECODE_MEAN = 16  # queries a sequence, at most
# A forward on a GPU has few tiles below 2.5 of 128 rows for each of 132 multiprocessors. Tiles of 192 or 256 rows are
# fewer still: the longest takes longer than a multiprocessor's share of the work, or some have two and others one.
FEW_TILES = 330
FEW_ROWS = 128 * FEW_TILES  # of all heads
FEW_MEAN = 512  # tokens, at least


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

    @property
    def rows(self) -> int:
        """Of queries, over all heads."""
        return self.total_q * self.heads


def regimes_for(direction: Direction, device: str) -> tuple[str, ...]:
    """The regimes of a direction's specs on a kind of device or target; "few" is of GPUs' forwards, "huge" of GPUs."""
    missing = (FEW, HUGE) if device == "cpu" else (FEW,) if direction == "bwd" else ()
    return tuple(name for name in REGIMES if name not in missing)


def look_up_of(regime: str) -> LookUp:
    """Where a regime is asked for by its name and not for a batch: the last look-up that begins with it."""
    return next((each for each in reversed(LOOK_UPS) if each[0] == regime), (regime,))


def look_up(problem: Problem, device: str = "cuda") -> LookUp:
    """The regimes that serve a problem on a kind of device or target."""
    direction, on_gpu = problem.spec.direction, device != "cpu"
    return LOOK_UPS[
        regime_index(
            problem.batch,
            problem.total_q,
            problem.total_k,
            problem.max_seqlen_q or 0,
            problem.max_seqlen_k or 0,
            problem.heads // problem.heads_kv,
            counted_rows(direction, problem.rows, on_gpu),
            *short_means(direction, problem.spec.head_dim, problem.spec.head_dim_v, problem.spec.causal, on_gpu),
        )
    ]


def counted_rows(direction: Direction, rows: int, on_gpu: bool) -> int:
    """What ``regime_index`` takes for ``rows``: a forward's own on a GPU, enough for no backward to be few, else 0."""
    return 0 if not on_gpu else FEW_ROWS if direction == "bwd" else rows


def short_means(direction: Direction, head_dim: int, head_dim_v: int, is_causal: bool, on_gpu: bool) -> tuple[int, int]:
    """The longest mean that is tiny, and the longest that is short."""
    widest = head_dim if head_dim > head_dim_v else head_dim_v
    columns = 64 if widest <= 64 else 96 if widest <= 96 else 128 if widest <= 128 else 0
    return (on_gpu and _MEANS.get((direction, columns, is_causal))) or (TINY_MEAN, SHORT_MEAN)


def regime(problem: Problem, device: str = "cuda") -> str:
    """The regime of a problem on a kind of device or target, one of ``REGIMES``."""
    return look_up(problem, device)[0]


def regime_index(
    batch: int,
    total_q: int,
    total_k: int,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    group: int = 1,
    rows: int = 0,
    tiny_mean: int = TINY_MEAN,
    short_mean: int = SHORT_MEAN,
) -> int:
    """Index into ``LOOK_UPS``; max_seqlen 0 means unknown. Total, and monotone: longer never gives a shorter regime.

    tiny: both mean lengths up to ``tiny_mean``; short: up to ``short_mean``. With a ``group`` of 4 or more query heads
    a kv head, which the short regime packs into tiles, all up to 128 at least is short. Then, where queries and keys
    differ by more than a factor of two, decode (up to 16 queries a sequence against more keys) or cross. Otherwise
    medium below a mean of 1024, long from there on, huge from 2048 on; of these, from a mean of 512 on, few with less
    than ``FEW_ROWS`` rows.
    ``rows`` 0: never few or huge.
    """
    if group >= GROUP and short_mean < SHORT_MEAN_OF_GROUPS:
        short_mean = SHORT_MEAN_OF_GROUPS
    total = total_q if total_q > total_k else total_k
    longest = max_seqlen_q if max_seqlen_q > max_seqlen_k else max_seqlen_k
    if total <= short_mean * batch and longest <= short_mean * MAX_SHARE:
        return 0 if group < GROUP and total <= tiny_mean * batch and longest <= tiny_mean * MAX_SHARE else 1
    if total_k > UNEQUAL_RATIO * total_q:
        return 5 if total_q <= DECODE_MEAN * batch else 4
    if total_q > UNEQUAL_RATIO * total_k:
        return 4
    is_medium = total < LONG_MEAN * batch and longest < LONG_MEAN * MAX_SHARE
    if 0 < rows < FEW_ROWS and (total >= FEW_MEAN * batch or longest >= FEW_MEAN * MAX_SHARE):
        return _FEW_AND_MEDIUM if is_medium else _FEW_AND_LONG
    if is_medium:
        return _MEDIUM
    return _HUGE if rows > 0 and (total >= HUGE_MEAN * batch or longest >= HUGE_MEAN * MAX_SHARE) else _LONG
