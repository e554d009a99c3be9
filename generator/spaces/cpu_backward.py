"""Tile configs of templates/cpu/backward.cpp.j2: the register-blocked backward for any CPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, cast

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
class CpuBackwardConfig(CpuTileConfig):
    """Knobs of the CPU backward. ``block_m`` rows share one copy of a block of K and V."""

    algorithm: ClassVar[str] = "recompute"


class Columns(NamedTuple):
    """How the columns of dK or dV are split among products: groups of so many vectors."""

    groups: int
    vectors: int


def columns_of(head_dim: int, config: CpuBackwardConfig) -> Columns:
    """Groups as even as can be, of at most ``config.vectors`` vectors."""
    vectors = ceil_div(head_dim, config.lanes)
    groups = ceil_div(vectors, config.vectors)
    return Columns(groups, ceil_div(vectors, groups))


@dataclass(frozen=True)
class Scratch:
    """What a thread keeps besides dK and dV, in scalars, rows and bytes."""

    depth: int  # scalars in a row of Q and K
    depth_v: int
    pitch_k: int
    pitch_v: int
    groups_q: int  # register blocks over head_dim
    rows_q: int  # rows of each
    query_rows: int
    columns: Columns  # of dK
    columns_v: Columns  # of dV
    score_rows: int
    row_bytes: int
    dq_bytes: int
    key_bytes: int
    score_bytes: int

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.row_bytes + self.dq_bytes + self.key_bytes + self.score_bytes


def scratch_of(spec: KernelSpec, config: CpuBackwardConfig) -> Scratch:
    """The buffers' shapes. Every scalar is four bytes: an fp32 number or a pair of bf16."""
    pairs = config.multiplies_pairs(spec)
    pack = 2 if pairs else 1
    depth, depth_v = ceil_div(spec.head_dim, pack), ceil_div(spec.head_dim_v, pack)
    groups_q = ceil_div(spec.head_dim, config.rows)
    rows_q = ceil_div(spec.head_dim, groups_q)
    query_rows = max(groups_q * rows_q, round_up(spec.head_dim, config.lanes))
    columns, columns_v = columns_of(spec.head_dim, config), columns_of(spec.head_dim_v, config)
    score_rows = round_up(config.block_n, config.rows)
    pitch_k = round_up(depth, config.lanes) if pairs else query_rows
    pitch_v = round_up(depth_v, config.lanes)
    column_vectors = columns.groups * columns.vectors + columns_v.groups * columns_v.vectors
    pair_rows = config.block_n // 2 if pairs else 0
    return Scratch(
        depth=depth,
        depth_v=depth_v,
        pitch_k=pitch_k,
        pitch_v=pitch_v,
        groups_q=groups_q,
        rows_q=rows_q,
        query_rows=query_rows,
        columns=columns,
        columns_v=columns_v,
        score_rows=score_rows,
        row_bytes=config.block_m * 4 * (depth + depth_v + column_vectors * config.lanes // pack),
        dq_bytes=config.block_m * query_rows * 4,
        key_bytes=4 * (score_rows * (pitch_k + pitch_v) + pair_rows * query_rows),
        score_bytes=4 * (2 * score_rows + pair_rows) * config.tile_rows,
    )


class CpuBackwardSpace(CpuSpace):
    """Legal configs of the CPU backward."""

    direction: ClassVar[Direction] = "bwd"
    algorithm = CpuBackwardConfig.algorithm
    template = "cpu/backward.cpp.j2"
    config_type: type[TileConfig] = CpuBackwardConfig

    def knobs(self, spec: KernelSpec) -> Mapping[str, tuple[Knob, ...]]:
        """The grid."""
        return {
            "isa": self.isas(),
            "block_m": (128, 256, 64, 192, 96),
            "block_n": (96, 64, 128, 48, 32),
            "vectors": (4, 2, 3, 1),
            "rows": (6, 13, 8, 4, 14, 2),
        }

    def rejection(self, spec: KernelSpec, config: TileConfig) -> str | None:
        """Instruction set, registers, and what must stay in L1 and L2."""
        config = cast(CpuBackwardConfig, config)
        return self.tile_rejection(config) or scratch_rejection(scratch_of(spec, config).total)

    def default(self, spec: KernelSpec) -> TileConfig:
        """The host's best instruction set, registers nearly full, the largest blocks that L2 holds."""
        isa = self.isas()[0]
        vectors, rows = (4, 6) if INSTRUCTION_SETS[isa].registers == 32 else (2, 6)
        for block_m in (128, 64):
            config = CpuBackwardConfig(isa, block_m, 96, vectors, rows)
            if self.rejection(spec, config) is None:
                return config
        raise AssertionError(f"no default tile for {spec.name}")

    def context(self, spec: KernelSpec, config: TileConfig) -> Mapping[str, object]:
        """Shapes of the scratch beside what every CPU template prints."""
        config = cast(CpuBackwardConfig, config)
        scratch = scratch_of(spec, config)
        return {
            **self.tile_context(spec, config),
            "scratch": scratch,
            **{
                name: getattr(scratch, name)
                for name in (
                    *("depth", "depth_v", "pitch_k", "pitch_v", "groups_q", "rows_q", "query_rows"),
                    *("columns", "columns_v", "score_rows"),
                )
            },
        }
