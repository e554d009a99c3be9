"""Tile configs of templates/cuda/sm90/packed.cu.j2: the Hopper forward for batches of many short sequences."""

from __future__ import annotations

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
from jagtile.generator.spaces.sm90_forward import SmemLayout
from jagtile.generator.spec import KernelSpec
from jagtile.generator.tile import Knob, TileConfig

BLOCK_M = 64  # rows of the packed queries: one math warpgroup's
# Fragments' registers that ptxas 13.0 fits into these without spilling: nine head dims compiled around each limit.
# First those that must be there at a time, then S, P and O together: a wide S is not used up before P is made.
FRAGMENT_LIMIT = {1: 180, 2: 112, 3: 88, 4: 52}
TOGETHER_LIMIT = {1: 192, 2: 152, 3: 112, 4: 88}


@dataclass(frozen=True, order=True)
class Sm90PackedConfig(TileConfig):
    """Knobs of the Hopper forward for short sequences."""

    algorithm: ClassVar[str] = "packed"
    block_n: int = field(metadata={"short": "n"})  # keys a step
    num_stages: int = field(metadata={"short": "s"})  # Q, K and V buffers each
    ctas_per_sm: int = field(metadata={"short": "c"})


# block_n, num_stages, ctas_per_sm; the last is legal for every head dim
_DEFAULTS = ((96, 2, 3), (64, 2, 2), (64, 1, 1))


def smem_layout(spec: KernelSpec, config: Sm90PackedConfig) -> SmemLayout:
    """The regions' sizes: panels of 64 columns (128 bytes), O shares Q's buffers."""
    panels, panels_v = panel_count(spec.head_dim), panel_count(spec.head_dim_v)
    tile_bytes, barrier_bytes = 8 * BLOCK_M + 16, 3 * 16
    control_bytes = config.num_stages * (tile_bytes + barrier_bytes)
    return SmemLayout(
        q_bytes=config.num_stages * BLOCK_M * max(panels, panels_v) * 128,
        k_bytes=config.num_stages * config.block_n * panels * 128,
        v_bytes=config.num_stages * config.block_n * panels_v * 128,
        control_bytes=-(-control_bytes // 128) * 128,
    )


def fragment_registers(spec: KernelSpec, config: Sm90PackedConfig) -> int:
    """Registers a thread for O and either S or P and the product of a panel; 4 more where panels differ in width."""
    out, panel = spec.head_dim_v // 2, min(spec.head_dim_v, PANEL) // 2
    unlike = 4 if spec.head_dim_v > PANEL and spec.head_dim_v % PANEL else 0
    return out + max(config.block_n // 2, config.block_n // 4 + panel) + unlike


class Sm90PackedSpace:
    """Legal configs of the Hopper forward for short sequences."""

    target = "sm_90a"
    algorithm = Sm90PackedConfig.algorithm
    template = "cuda/sm90/packed.cu.j2"
    config_type: type[TileConfig] = Sm90PackedConfig
    regimes = ("tiny",)  # in which its default goes before the persistent forward's

    def serves(self, spec: KernelSpec) -> str | None:
        """bf16 and fp16, head dims that are multiples of 8."""
        return tma_rejection(spec)

    def knobs(self, spec: KernelSpec) -> Mapping[str, tuple[Knob, ...]]:
        """The grid: as many CTAs an SM as registers may allow, and one fewer. Each waits for its own loads."""
        ctas = (3, 2, 4) if spec.head_dim_v <= 64 else (2, 3) if spec.head_dim_v <= 128 else (1, 2)
        return {"block_n": (96, 80, 64, 128, 112, 48, 160, 32), "num_stages": (2, 1, 3), "ctas_per_sm": ctas}

    def rejection(self, spec: KernelSpec, config: TileConfig) -> str | None:
        """Shared memory, accumulator registers and instruction shapes."""
        config = cast(Sm90PackedConfig, config)
        ctas = config.ctas_per_sm
        if config.block_n % 16 or not 16 <= config.block_n <= 256:
            return f"block_n must be a multiple of 16 from 16 to 256, as wgmma's shapes are, got {config.block_n}"
        if config.num_stages not in (1, 2, 3) or ctas not in FIVE_WARP_REGISTERS:
            return f"num_stages must be 1 to 3 and ctas_per_sm 1 to 4, got {config.num_stages} and {ctas}"
        smem = smem_layout(spec, config).total
        room = smem_room(ctas)
        if smem > room:
            return f"shared memory {smem} B > {room} B a CTA with {ctas} an SM"
        registers, limit = fragment_registers(spec, config), FRAGMENT_LIMIT[ctas]
        if registers > limit:
            return f"O and S, or P and a product, take {registers} registers a thread > {limit} with {ctas} CTAs an SM"
        together = config.block_n // 2 + config.block_n // 4 + spec.head_dim_v // 2
        if together > TOGETHER_LIMIT[ctas]:
            return f"S, P and O take {together} registers a thread > {TOGETHER_LIMIT[ctas]} with {ctas} CTAs an SM"
        return None

    def default(self, spec: KernelSpec) -> TileConfig:
        """The most CTAs an SM that the head dims allow, by arithmetic: nothing is measured yet."""
        for knobs in _DEFAULTS:
            config = Sm90PackedConfig(*knobs)
            if self.rejection(spec, config) is None:
                return config
        raise AssertionError(f"no default tile for {spec.name}")

    def context(self, spec: KernelSpec, config: TileConfig) -> Mapping[str, object]:
        """Panels, steps, registers and the shared-memory map."""
        config = cast(Sm90PackedConfig, config)
        panels, panels_v = panel_count(spec.head_dim), panel_count(spec.head_dim_v)
        return {
            "num_threads": FIVE_WARPS,
            "panels": panels,
            "panels_v": panels_v,
            "q_panels": max(panels, panels_v),
            "steps_qk": -(-spec.head_dim // 16),
            "v_widths": panel_widths(spec.head_dim_v),
            "element": ELEMENT[spec.dtype],
            "pack": f"pack_{spec.dtype}",
            "unpack": f"unpack_{spec.dtype}",
            "smem": smem_layout(spec, config),
        }

    def launch(self, spec: KernelSpec, config: TileConfig) -> Mapping[str, int]:
        """What runtime/cuda needs to encode tensor maps and launch."""
        config = cast(Sm90PackedConfig, config)
        return {
            "block_m": BLOCK_M,
            "block_n": config.block_n,
            "num_threads": FIVE_WARPS,
            "smem_bytes": smem_layout(spec, config).total,
            "ctas_per_sm": config.ctas_per_sm,
            "causal": int(spec.causal),
        }

    def compile_flags(self, spec: KernelSpec, config: TileConfig) -> tuple[str, ...]:
        """None beyond the target's."""
        return ()

    def predicted_registers(self, spec: KernelSpec, config: TileConfig) -> int:
        """The most that the launch allows; ptxas may report a few less."""
        return FIVE_WARP_REGISTERS[cast(Sm90PackedConfig, config).ctas_per_sm]
