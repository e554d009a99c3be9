"""Tile configs of templates/cpu/forward.cpp.j2: the register-blocked forward for any CPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, cast

from jagtile.generator.spaces.cpu import (
    INSTRUCTION_SETS,
    CpuSpace,
    CpuTileConfig,
    ceil_div,
    round_up,
    scratch_rejection,
)
from jagtile.generator.spec import Direction, KernelSpec
from jagtile.generator.tile import Knob, TileConfig


@dataclass(frozen=True, order=True)
class CpuForwardConfig(CpuTileConfig):
    """Knobs of the CPU forward. ``block_m`` rows are a work item: they share one copy of K and V."""

    algorithm: ClassVar[str] = "tiled"


@dataclass(frozen=True)
class Scratch:
    """What a thread keeps, in scalars, rows and bytes."""

    depth: int  # scalars in a row of Q and K
    pitch_k: int
    pitch_v: int
    groups_v: int  # register blocks over head_dim_v
    rows_v: int  # rows of each
    out_rows: int
    score_rows: int
    v_rows: int
    q_bytes: int
    out_bytes: int
    k_bytes: int
    v_bytes: int
    score_bytes: int

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.q_bytes + self.out_bytes + self.k_bytes + self.v_bytes + self.score_bytes


def scratch_of(spec: KernelSpec, config: CpuForwardConfig) -> Scratch:
    """The buffers' shapes. Every scalar is four bytes: an fp32 number or a pair of bf16."""
    pairs = config.multiplies_pairs(spec)
    depth = ceil_div(spec.head_dim, 2) if pairs else spec.head_dim
    groups_v = ceil_div(spec.head_dim_v, config.rows)
    rows_v = ceil_div(spec.head_dim_v, groups_v)
    out_rows = max(groups_v * rows_v, round_up(spec.head_dim_v, config.lanes))
    score_rows = round_up(config.block_n, config.rows)
    v_rows = config.block_n // 2 if pairs else config.block_n
    pitch_k, pitch_v = round_up(depth, config.lanes), out_rows
    return Scratch(
        depth=depth,
        pitch_k=pitch_k,
        pitch_v=pitch_v,
        groups_v=groups_v,
        rows_v=rows_v,
        out_rows=out_rows,
        score_rows=score_rows,
        v_rows=v_rows,
        q_bytes=config.block_m * depth * 4,
        out_bytes=config.block_m * out_rows * 4,
        k_bytes=score_rows * pitch_k * 4,
        v_bytes=v_rows * pitch_v * 4,
        score_bytes=score_rows * config.tile_rows * 4,
    )


class CpuForwardSpace(CpuSpace):
    """Legal configs of the CPU forward."""

    direction: ClassVar[Direction] = "fwd"
    algorithm = CpuForwardConfig.algorithm
    template = "cpu/forward.cpp.j2"
    config_type: type[TileConfig] = CpuForwardConfig

    def knobs(self, spec: KernelSpec) -> Mapping[str, tuple[Knob, ...]]:
        """The grid."""
        return {
            "isa": self.isas(),
            "block_m": (256, 128, 384, 192, 64),
            "block_n": (128, 256, 96, 64),
            "vectors": (2, 3, 4, 1),
            "rows": (13, 8, 6, 14, 4, 16),
        }

    def rejection(self, spec: KernelSpec, config: TileConfig) -> str | None:
        """Instruction set, registers, and what must stay in L1 and L2."""
        config = cast(CpuForwardConfig, config)
        return self.tile_rejection(config) or scratch_rejection(scratch_of(spec, config).total)

    def default(self, spec: KernelSpec) -> TileConfig:
        """The host's best instruction set, registers nearly full, the largest blocks that L2 holds."""
        isa = self.isas()[0]
        vectors, rows = (2, 13) if INSTRUCTION_SETS[isa].registers == 32 else (2, 6)
        for block_m in (256, 128):
            config = CpuForwardConfig(isa, block_m, 128, vectors, rows)
            if self.rejection(spec, config) is None:
                return config
        raise AssertionError(f"no default tile for {spec.name}")

    def context(self, spec: KernelSpec, config: TileConfig) -> Mapping[str, object]:
        """Shapes of the scratch beside what every CPU template prints."""
        config = cast(CpuForwardConfig, config)
        scratch = scratch_of(spec, config)
        return {
            **self.tile_context(spec, config),
            "scratch": scratch,
            **{
                name: getattr(scratch, name)
                for name in ("depth", "pitch_k", "pitch_v", "groups_v", "rows_v", "out_rows", "score_rows", "v_rows")
            },
        }
