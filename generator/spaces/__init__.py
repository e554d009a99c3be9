"""Every space, in order of preference within a target."""

from __future__ import annotations

from jagtile.generator.spaces.cpu_backward import CpuBackwardSpace
from jagtile.generator.spaces.cpu_forward import CpuForwardSpace
from jagtile.generator.spaces.sm90_backward import Sm90BackwardSpace
from jagtile.generator.spaces.sm90_backward_wide import Sm90BackwardWideSpace
from jagtile.generator.spaces.sm90_forward import Sm90ForwardSpace
from jagtile.generator.spaces.sm90_packed import Sm90PackedSpace
from jagtile.generator.spaces.sm90_packed_backward import Sm90PackedBackwardSpace
from jagtile.generator.spaces.sm90_split import Sm90SplitSpace
from jagtile.generator.tile import Space

ALL: tuple[Space, ...] = (
    Sm90ForwardSpace(),
    Sm90SplitSpace(),
    Sm90PackedSpace(),
    Sm90BackwardSpace(),
    Sm90BackwardWideSpace(),
    Sm90PackedBackwardSpace(),
    CpuForwardSpace(),
    CpuBackwardSpace(),
)
