"""Tile configs of templates/cuda/sm90/packed_backward.cu.j2: the Hopper backward for many short sequences."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, cast

from jagtile.generator.spaces.sm90 import (
    ELEMENT,
    FIVE_WARP_REGISTERS,
    FIVE_WARPS,
    PANEL,
    panel_count,
    panel_widths,
    smem_room,
    tma_rejection,
)
from jagtile.generator.spaces.sm90_backward import MAX_HEAD_DIM
from jagtile.generator.spec import Direction, KernelSpec
from jagtile.generator.tile import Knob, TileConfig

TILE_ROWS = 64  # of the packed queries or keys: one math warpgroup's
# Accumulators and fragments that ptxas 13.0 fits into a thread's registers without spilling, by CTAs an SM: some 560
# configs compiled at and around the limits, of all kinds of head dims.
REGISTER_LIMIT = {1: 192, 2: 128, 3: 88}


@dataclass(frozen=True, order=True)
class Sm90PackedBackwardConfig(TileConfig):
    """Knobs of the Hopper backward for short sequences."""

    algorithm: ClassVar[str] = "packedrows"
    block_n: int = field(metadata={"short": "n"})  # keys, or queries, a step
    num_stages: int = field(metadata={"short": "s"})  # buffers of tiles and of blocks each
    ctas_per_sm: int = field(metadata={"short": "c"})


@dataclass(frozen=True)
class SmemLayout:
    """Bytes of each region of shared memory, in order."""

    tile_bytes: int
    block_bytes: int
    control_bytes: int

    @property
    def total(self) -> int:
        """Bytes a CTA asks for."""
        return self.tile_bytes + self.block_bytes + self.control_bytes


# block_n, num_stages, ctas_per_sm; the last is legal for every head dim
_DEFAULTS = ((48, 2, 2), (32, 2, 2), (48, 2, 1), (32, 2, 1), (32, 1, 1))


def smem_layout(spec: KernelSpec, config: Sm90PackedBackwardConfig) -> SmemLayout:
    """The regions' sizes: panels of 64 columns (128 bytes); gradients share the tiles' buffers."""
    row_bytes = 128 * (panel_count(spec.head_dim) + panel_count(spec.head_dim_v))
    stats_bytes = 8 * (TILE_ROWS + config.block_n)
    control_bytes = config.num_stages * (8 * TILE_ROWS + 16 + stats_bytes + 2 * 16)
    return SmemLayout(
        tile_bytes=config.num_stages * TILE_ROWS * row_bytes,
        block_bytes=config.num_stages * config.block_n * row_bytes,
        control_bytes=-(-control_bytes // 128) * 128,
    )


def registers(spec: KernelSpec, config: Sm90PackedBackwardConfig) -> int:
    """Registers a thread for dK and dV and the largest of S and dP, P and dS packed and a panel's product.

    With two CTAs an SM more count, as compiling shows, where one head dim has a second panel and the other has not.
    """
    dim, dim_v = spec.head_dim, spec.head_dim_v
    panel = min(max(dim, dim_v), PANEL) // 2
    fragments = 2 * config.block_n // 4
    unlike = config.ctas_per_sm == 2 and (dim > PANEL) != (dim_v > PANEL) and max(dim, dim_v) >= 88
    return (dim + dim_v) // 2 + max(config.block_n, fragments + panel) + (12 if dim_v >= 112 else 8) * unlike


class Sm90PackedBackwardSpace:
    """Legal configs of the Hopper backward for short sequences."""

    target = "sm_90a"
    direction: ClassVar[Direction] = "bwd"
    algorithm = Sm90PackedBackwardConfig.algorithm
    template = "cuda/sm90/packed_backward.cu.j2"
    config_type: type[TileConfig] = Sm90PackedBackwardConfig
    regimes = ("tiny",)  # in which its default goes before that of the persistent backward

    def serves(self, spec: KernelSpec) -> str | None:
        """bf16 and fp16, head dims that are multiples of 8, up to what registers have room for."""
        if max(spec.head_dim, spec.head_dim_v) > MAX_HEAD_DIM:
            return (
                f"head_dim and head_dim_v must be at most {MAX_HEAD_DIM} in this backward, got {spec.head_dim} and "
                f"{spec.head_dim_v}"
            )
        return tma_rejection(spec)

    def knobs(self, spec: KernelSpec) -> Mapping[str, tuple[Knob, ...]]:
        """The grid; most of it is cut by registers."""
        return {"block_n": (64, 32, 96, 48, 128, 16), "num_stages": (2, 1, 3), "ctas_per_sm": (2, 1, 3)}

    def rejection(self, spec: KernelSpec, config: TileConfig) -> str | None:
        """Shared memory, registers and instruction shapes."""
        config = cast(Sm90PackedBackwardConfig, config)
        ctas = config.ctas_per_sm
        if config.block_n % 16 or not 16 <= config.block_n <= 256:
            return f"block_n must be a multiple of 16 from 16 to 256, as wgmma's shapes are, got {config.block_n}"
        if config.num_stages not in (1, 2, 3) or ctas not in REGISTER_LIMIT:
            return f"num_stages must be 1 to 3 and ctas_per_sm 1 to 3, got {config.num_stages} and {ctas}"
        smem = smem_layout(spec, config).total
        room = smem_room(ctas)
        if smem > room:
            return f"shared memory {smem} B > {room} B a CTA with {ctas} an SM"
        needed, limit = registers(spec, config), REGISTER_LIMIT[ctas]
        if needed > limit:
            return (
                f"dK, dV, S and dP, or P, dS and a product, take {needed} registers a thread > {limit} with {ctas} "
                "CTAs an SM"
            )
        return None

    def default(self, spec: KernelSpec) -> TileConfig:
        """The most CTAs an SM that the head dims allow; with two stages 48 rows were the fastest at one-token-d64."""
        for knobs in _DEFAULTS:
            config = Sm90PackedBackwardConfig(*knobs)
            if self.rejection(spec, config) is None:
                return config
        raise AssertionError(f"no default tile for {spec.name}")

    def context(self, spec: KernelSpec, config: TileConfig) -> Mapping[str, object]:
        """Panels, steps, widths and the shared-memory map."""
        config = cast(Sm90PackedBackwardConfig, config)
        widths, v_widths = panel_widths(spec.head_dim), panel_widths(spec.head_dim_v)
        return {
            "num_threads": FIVE_WARPS,
            "box_rows": _box_rows(config),
            "panels": len(widths),
            "panels_v": len(v_widths),
            "steps_qk": -(-spec.head_dim // 16),
            "steps_v": -(-spec.head_dim_v // 16),
            "widths": widths,
            "v_widths": v_widths,
            "all_widths": sorted({*widths, *v_widths}, reverse=True),
            "element": ELEMENT[spec.dtype],
            "pack": f"pack_{spec.dtype}",
            "unpack": f"unpack_{spec.dtype}",
            "smem": smem_layout(spec, config),
        }

    def launch(self, spec: KernelSpec, config: TileConfig) -> Mapping[str, int]:
        """What runtime/cuda needs to encode tensor maps and launch."""
        config = cast(Sm90PackedBackwardConfig, config)
        return {
            "tile_rows": TILE_ROWS,
            "box_rows": _box_rows(config),
            "num_threads": FIVE_WARPS,
            "smem_bytes": smem_layout(spec, config).total,
            "ctas_per_sm": config.ctas_per_sm,
            "dependent": 1,  # its kernels wait for those before them themselves
        }

    def compile_flags(self, spec: KernelSpec, config: TileConfig) -> tuple[str, ...]:
        """None beyond the target's."""
        return ()

    def predicted_registers(self, spec: KernelSpec, config: TileConfig) -> int:
        """The most that the launch allows; ptxas may report a few less."""
        return FIVE_WARP_REGISTERS[cast(Sm90PackedBackwardConfig, config).ctas_per_sm]


def _box_rows(config: Sm90PackedBackwardConfig) -> int:
    """Rows that are copied at once: tiles and blocks share their tensor maps."""
    return math.gcd(TILE_ROWS, config.block_n)
