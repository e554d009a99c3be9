"""KernelSpec: what a kernel computes. Frozen, hashable, with one canonical name that can be parsed back."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, cast

Direction = Literal["fwd", "bwd"]
DType = Literal["fp32", "bf16", "fp16"]

DIRECTIONS: tuple[Direction, ...] = ("fwd", "bwd")
DTYPES: tuple[DType, ...] = ("fp32", "bf16", "fp16")
MAX_HEAD_DIM = 256

_NAME = re.compile(
    r"(?P<direction>[a-z]+)_(?P<dtype>[a-z]+\d+)_d(?P<d>\d+)(?:_dv(?P<dv>\d+))?(?P<causal>_causal)?(?P<dropout>_drop)?"
)


@dataclass(frozen=True, order=True)
class KernelSpec:
    """What changes the mathematics at compile time.

    Batch size, lengths, strides, numbers of heads, the GQA ratio, the scale, the causal alignment, the rate and the
    random numbers of dropout are run-time values and have no place here.
    """

    direction: Direction
    dtype: DType
    head_dim: int
    head_dim_v: int
    causal: bool
    dropout: bool = False

    def __post_init__(self) -> None:
        if self.direction not in DIRECTIONS:
            raise ValueError(f"direction must be one of {', '.join(DIRECTIONS)}, got {self.direction!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        for name, value in (("head_dim", self.head_dim), ("head_dim_v", self.head_dim_v)):
            if not 1 <= value <= MAX_HEAD_DIM:
                raise ValueError(f"{name} must be between 1 and {MAX_HEAD_DIM}, got {value}")

    @property
    def name(self) -> str:
        """Canonical name, e.g. ``fwd_bf16_d128_causal``, ``bwd_bf16_d192_dv128`` or ``fwd_fp32_d64_drop``."""
        dv = "" if self.head_dim_v == self.head_dim else f"_dv{self.head_dim_v}"
        kind = f"{'_causal' if self.causal else ''}{'_drop' if self.dropout else ''}"
        return f"{self.direction}_{self.dtype}_d{self.head_dim}{dv}{kind}"

    @staticmethod
    def parse(name: str) -> KernelSpec:
        """The spec of a canonical name; ValueError says what a name looks like."""
        match = _NAME.fullmatch(name)
        if match is None:
            raise ValueError(
                f"spec {name!r} is not a name like fwd_bf16_d128, fwd_bf16_d192_dv128 or bwd_fp16_d64_causal"
            )
        head_dim = int(match["d"])
        return KernelSpec(
            direction=cast(Direction, match["direction"]),
            dtype=cast(DType, match["dtype"]),
            head_dim=head_dim,
            head_dim_v=int(match["dv"] or head_dim),
            causal=match["causal"] is not None,
            dropout=match["dropout"] is not None,
        )
