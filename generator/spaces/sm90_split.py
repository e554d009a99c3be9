"""Tile configs of templates/cuda/sm90/forward.cu.j2 for few queries and many keys: heads packed, keys split."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, cast

from jagtile.generator.spaces.sm90 import panel_widths, tma_rejection
from jagtile.generator.spaces.sm90_forward import Sm90ForwardConfig, Sm90ForwardSpace
from jagtile.generator.spec import KernelSpec
from jagtile.generator.tile import Knob, TileConfig
from jagtile.runtime.head_packs import ROWS, packed_heads

# (block_m, block_n, num_stages): bytes on their way from memory are what counts, so deep rings first; the last is legal
# for every head dim.
_DEFAULT_TILES = ((128, 128, 4), (128, 128, 3), (128, 128, 2), (128, 112, 2), (128, 96, 2), (128, 80, 2))


@dataclass(frozen=True, order=True)
class Sm90SplitConfig(Sm90ForwardConfig):
    """The knobs of the persistent forward; ``block_m`` counts rows, which the query heads of a kv head share."""

    algorithm: ClassVar[str] = "split"
    # Short neighbours share a tile (templates/cuda/include/sequence_packs.cuh).
    pack_sequences: bool = field(default=False, metadata={"short": "k"})


class Sm90SplitSpace(Sm90ForwardSpace):
    """The persistent Hopper forward with the query heads of a kv head in one tile and long keys split over CTAs."""

    algorithm = Sm90SplitConfig.algorithm
    config_type: type[TileConfig] = Sm90SplitConfig
    regimes = ("cross", "decode")  # in which its default goes before the persistent forward's

    def serves(self, spec: KernelSpec) -> str | None:
        """bf16 and fp16, head dims that are multiples of 8."""
        return tma_rejection(spec)

    def remark(self, heads: int, heads_kv: int) -> str:
        """What it makes of a call's heads."""
        together = packed_heads(heads // heads_kv)
        rows = f"{together} of a kv head's {heads // heads_kv} query heads" if together > 1 else "one query head"
        return f"rows of {rows} in a tile, long keys split over CTAs"

    def knobs(self, spec: KernelSpec) -> Mapping[str, tuple[Knob, ...]]:
        """As the persistent forward's, with up to six stages, fewer widths and no tile of four math warpgroups."""
        return {
            **super().knobs(spec),
            "block_m": (128, 64, 192),
            "block_n": (128, 64, 96, 32, 80, 112, 48, 160, 192),
            "num_stages": (3, 2, 4, 6),
            "epilogue": ("staged",),
            "cluster": (1,),
            "pack_sequences": (False, True),
        }

    def rejection(self, spec: KernelSpec, config: TileConfig) -> str | None:
        """As the persistent forward's; the sum of the pieces of a tile's keys leaves through the Q buffer."""
        config = cast(Sm90SplitConfig, config)
        if config.epilogue != "staged":
            return f"epilogue must be staged where keys are split, got {config.epilogue!r}"
        if config.cluster != 1:
            return f"cluster must be 1 where keys are split, got {config.cluster}"
        if config.pack_sequences and config.warpgroups != 1:
            return f"pack_sequences: tiles of one math warpgroup: block_m must be 64, got {config.block_m}"
        return super().rejection(spec, config)

    def default(self, spec: KernelSpec) -> TileConfig:
        """The first legal one of a few tiles with much memory in flight (docs/performance-log.md, section 16)."""
        for block_m, block_n, num_stages in _DEFAULT_TILES:
            config = Sm90SplitConfig(block_m, block_n, num_stages, q_stages=1, ctas_per_sm=1)
            if self.rejection(spec, config) is None:
                return config
        raise AssertionError(f"no default tile for {spec.name}")

    def context(self, spec: KernelSpec, config: TileConfig) -> Mapping[str, object]:
        """As the persistent forward's, with what is split switched on."""
        config = cast(Sm90SplitConfig, config)
        return {
            **super().context(spec, config),
            "split": True,
            "pack_sequences": config.pack_sequences,
            "panel_columns_v": panel_widths(-(-spec.head_dim_v // 8) * 8),
        }

    def launch(self, spec: KernelSpec, config: TileConfig) -> Mapping[str, int]:
        """As the persistent forward's, and the bytes of one warpgroup's result of a piece of keys."""
        config = cast(Sm90SplitConfig, config)
        partial = {"partial_bytes": ROWS * (spec.head_dim_v + 2) * 4}
        return {**super().launch(spec, config), **partial, "pack_sequences": int(config.pack_sequences)}
