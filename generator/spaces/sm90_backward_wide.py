"""Tile configs of templates/cuda/sm90/backward_wide.cu.j2: the persistent Hopper backward of head dims above 128."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import ClassVar, NamedTuple, cast

from jagtile.generator.spaces.sm90 import (
    CONTROL_BYTES,
    ELEMENT,
    SMEM_BYTES,
    launch_registers,
    panel_count,
    panel_widths,
    tma_rejection,
)
from jagtile.generator.spaces.sm90_backward import MAX_HEAD_DIM, TAIL_TILES, row_buffer_bytes
from jagtile.generator.spec import Direction, KernelSpec
from jagtile.generator.tile import Knob, TileConfig

BLOCK_M = 64  # queries a step: the rows of one warpgroup's products
WARPGROUPS = 2  # math warpgroups: one makes dV, the other dK and dQ
UNIT_ROWS = 16  # of rows beside the tiles that are copied at a time, of which there is one buffer
# Registers a thread after reallocation: 504 over the three warpgroups. With 24 the loaders spill.
LOADER_REGISTERS = 40
MATH_REGISTERS = 464
MAX_REGISTERS = 256
# Registers a thread beside its accumulators with which ptxas 13.0 neither serialises wgmma (C7512) nor spills, of the
# cases that the grid has: 200 accumulators fit 232 registers, 224 fit 256, 224 don't fit 232.
SPARE_REGISTERS = 32
# Of dK's warpgroup, once with packed dS, and once where a place in a ring is a count modulo 3, or where dS is packed
# and dQ goes from registers or has a group of 8 columns.
MORE_SPARE_REGISTERS = 8


@dataclass(frozen=True, order=True)
class Sm90BackwardWideConfig(TileConfig):
    """Knobs of the Hopper backward of wide heads."""

    algorithm: ClassVar[str] = "wide"
    block_n: int = field(metadata={"short": "n"})  # keys a CTA
    q_stages: int = field(metadata={"short": "q"})  # Q buffers
    dout_stages: int = field(metadata={"short": "o"})  # dO buffers
    dq_panels: int = field(metadata={"short": "d"})  # panels of dQ that dV's warpgroup makes; the rest are dK's
    dq: str = field(metadata={"short": "a"})  # how dQ is added up: "bulk" through shared memory, "red" from registers
    fused: bool = field(default=False, metadata={"short": "f"})  # passes over rows beside the tiles, not as kernels
    split_tail: bool = field(default=False, metadata={"short": "y"})  # last tiles in pieces


@dataclass(frozen=True)
class SmemLayout:
    """Bytes of each region of shared memory, in order; P and dS are alike."""

    k_bytes: int
    v_bytes: int
    q_bytes: int
    dout_bytes: int
    p_bytes: int
    dq_bytes: int
    rows_bytes: int
    control_bytes: int

    @property
    def dq_begin(self) -> int:
        """Where dQ begins."""
        return self.k_bytes + self.v_bytes + self.q_bytes + self.dout_bytes + 2 * self.p_bytes

    @property
    def rows_begin(self) -> int:
        """Where rows of passes over them begin."""
        return self.dq_begin + self.dq_bytes

    @property
    def control_begin(self) -> int:
        """Where tiles and barriers begin."""
        return self.rows_begin + self.rows_bytes

    @property
    def total(self) -> int:
        """Bytes a CTA asks for."""
        return self.control_begin + self.control_bytes


class DqBuffers(NamedTuple):
    """Where dQ waits for its addition: so many panels of so many columns, float32."""

    columns: int
    stages: int

    @property
    def panel_bytes(self) -> int:
        """Of one buffer."""
        return BLOCK_M * self.columns * 4


def dq_buffers(spec: KernelSpec, config: Sm90BackwardWideConfig) -> DqBuffers:
    """Panels of 64 columns if two of them fit, else two or more of 32, but no more than a step has."""
    wide, narrow = (DqBuffers(min(columns, spec.head_dim), 0) for columns in (64, 32))
    if config.dq == "red":
        return wide
    room = SMEM_BYTES - smem_layout(spec, replace(config, dq="red")).total
    buffers = wide if room >= 2 * wide.panel_bytes else narrow
    fit, panels = room // buffers.panel_bytes, -(-spec.head_dim // buffers.columns)
    return buffers._replace(stages=max(2, min(fit, panels)))


def dq_rounds(spec: KernelSpec, buffers: DqBuffers) -> int:
    """How many times a step goes round its buffers; 0 where that is no whole number, or there are none."""
    panels = -(-spec.head_dim // buffers.columns)
    return panels // buffers.stages if buffers.stages and panels % buffers.stages == 0 else 0


def smem_layout(spec: KernelSpec, config: Sm90BackwardWideConfig) -> SmemLayout:
    """The regions' sizes: panels of 64 columns (128 bytes), and dQ's buffers in what is left."""
    k_panels, v_panels = panel_count(spec.head_dim), panel_count(spec.head_dim_v)
    buffers = dq_buffers(spec, config)
    return SmemLayout(
        k_bytes=config.block_n * k_panels * 128,
        v_bytes=config.block_n * v_panels * 128,
        q_bytes=config.q_stages * BLOCK_M * k_panels * 128,
        dout_bytes=config.dout_stages * BLOCK_M * v_panels * 128,
        p_bytes=BLOCK_M * panel_count(config.block_n) * 128,
        dq_bytes=buffers.stages * buffers.panel_bytes,
        rows_bytes=row_buffer_bytes(spec, UNIT_ROWS) if config.fused else 0,
        control_bytes=CONTROL_BYTES,
    )


class PerWarpgroup(NamedTuple):
    """A number for each math warpgroup."""

    dv: int
    dk: int


def accumulators(spec: KernelSpec, config: Sm90BackwardWideConfig, *, with_ds: bool | None = None) -> PerWarpgroup:
    """Registers a thread for accumulators, and what some cases need beside them: dV or dK, and the larger of S or dP
    and of a panel of dQ, with packed dS where that is in registers.
    """
    block, dq = config.block_n // 2, min(64, spec.head_dim) // 2
    with_ds = ds_in_registers(spec, config) if with_ds is None else with_ds
    more = _counts_modulo_3(spec, config) or (with_ds and (config.dq == "red" or spec.head_dim % 16 != 0))
    return PerWarpgroup(
        dv=panel_count(spec.head_dim_v) * block + max(block, dq if config.dq_panels else 0),
        dk=panel_count(spec.head_dim) * block
        + max(block, dq + (block // 2 + MORE_SPARE_REGISTERS if with_ds else 0))
        + (MORE_SPARE_REGISTERS if more else 0),
    )


def _counts_modulo_3(spec: KernelSpec, config: Sm90BackwardWideConfig) -> bool:
    """Whether a ring's place is more than some bits of a count."""
    buffers = dq_buffers(spec, config)
    return 3 in (config.q_stages, config.dout_stages) or (buffers.stages == 3 and not dq_rounds(spec, buffers))


def ds_in_registers(spec: KernelSpec, config: Sm90BackwardWideConfig) -> bool:
    """Whether dK's warpgroup, where it makes all of dQ, has room for dS as A fragments."""
    return not config.dq_panels and math_registers(accumulators(spec, config, with_ds=True)) is not None


def math_registers(needed: PerWarpgroup) -> PerWarpgroup | None:
    """Registers a thread of each math warpgroup, as even as can be; None where no split has enough."""
    for uneven in range(0, MATH_REGISTERS // 2, 8):
        less, more = MATH_REGISTERS // 2 - uneven, MATH_REGISTERS // 2 + uneven
        if more > MAX_REGISTERS:
            return None
        for split in (PerWarpgroup(less, more), PerWarpgroup(more, less)):
            if needed.dv + SPARE_REGISTERS <= split.dv and needed.dk + SPARE_REGISTERS <= split.dk:
                return split
    return None


def _dq_adders(config: Sm90BackwardWideConfig) -> int:
    """Warpgroups, or the warp, that add to a block's dQ."""
    return 2 if config.dq_panels else 1


def _dq_with_dk(spec: KernelSpec, config: Sm90BackwardWideConfig) -> list[tuple[int, list[int]]]:
    """The panels of dQ that dK's warpgroup makes, each with the panels of dK that are multiplied while it is added."""
    there_are = panel_count(spec.head_dim)
    rest = there_are - config.dq_panels
    ends = [-(-there_are * (place + 1) // rest) for place in range(rest)]
    return [
        (config.dq_panels + place, list(range(begin, end)))
        for place, (begin, end) in enumerate(zip([0, *ends], ends, strict=False))
    ]


def _sums_panels(spec: KernelSpec, columns: int) -> list[list[tuple[int, int]]]:
    """For each product of dQ, 64 columns, its panels of sums and where a thread's accumulators of each begin."""
    return [
        [(column // columns, (column - begin) // 2) for column in range(begin, min(begin + 64, spec.head_dim), columns)]
        for begin in range(0, spec.head_dim, 64)
    ]


def _even(spec: KernelSpec) -> int:
    """Half of the panels of dQ; where there is no half, the larger part goes to the narrower gradient."""
    there_are = panel_count(spec.head_dim)
    return (there_are + (panel_count(spec.head_dim_v) < there_are)) // 2


class Sm90BackwardWideSpace:
    """Legal configs of the Hopper backward of wide heads."""

    target = "sm_90a"
    direction: ClassVar[Direction] = "bwd"
    algorithm = Sm90BackwardWideConfig.algorithm
    template = "cuda/sm90/backward_wide.cu.j2"
    config_type: type[TileConfig] = Sm90BackwardWideConfig

    def serves(self, spec: KernelSpec) -> str | None:
        """bf16 and fp16, head dims that are multiples of 8, one of them above what the other backward serves."""
        if max(spec.head_dim, spec.head_dim_v) <= MAX_HEAD_DIM:
            return (
                f"head_dim or head_dim_v must be above {MAX_HEAD_DIM} in this backward, got {spec.head_dim} and "
                f"{spec.head_dim_v}"
            )
        return tma_rejection(spec)

    def knobs(self, spec: KernelSpec) -> Mapping[str, tuple[Knob, ...]]:
        """The grid; most of it is cut by shared memory and registers."""
        return {
            "block_n": (112, 96, 80, 64, 48, 32),
            "q_stages": (2, 3),
            "dout_stages": (2, 1, 3),
            "dq_panels": tuple(sorted(range(panel_count(spec.head_dim)), key=lambda count: abs(count - _even(spec)))),
            "dq": ("bulk", "red"),
            "fused": (True, False),
            "split_tail": (False,) if spec.causal else (True, False),
        }

    def rejection(self, spec: KernelSpec, config: TileConfig) -> str | None:
        """Instruction shapes, shared memory and accumulators."""
        config = cast(Sm90BackwardWideConfig, config)
        if config.block_n % 16 or not 16 <= config.block_n <= 256:
            return f"block_n must be a multiple of 16 from 16 to 256, as wgmma's shapes are, got {config.block_n}"
        if config.q_stages < 2 or config.dout_stages < 1:
            return (
                "q_stages must be at least 2, since one warpgroup is ahead of the other, and dout_stages at least 1, "
                f"got {config.q_stages} and {config.dout_stages}"
            )
        if not 0 <= config.dq_panels < panel_count(spec.head_dim):
            return f"dq_panels must leave one of {panel_count(spec.head_dim)} to dK's warpgroup, got {config.dq_panels}"
        if config.dq not in ("bulk", "red"):
            return f"dq must be bulk or red, got {config.dq}"
        if config.dq == "bulk" and config.dq_panels:
            return f"with dq bulk dK's warpgroup hands all of dQ over: dq_panels must be 0, got {config.dq_panels}"
        if config.fused and config.dq != "bulk":
            return "fused: the warp that adds dQ by bulk copies tells of complete tiles: dq must be bulk"
        if config.split_tail and config.dq != "bulk":
            return "split_tail: the warp that adds dQ by bulk copies knows of pieces: dq must be bulk"
        if config.split_tail and spec.causal:
            return "split_tail: with a causal mask the last tiles are short"
        smem = smem_layout(spec, config).total
        if smem > SMEM_BYTES:
            return f"shared memory {smem} B > {SMEM_BYTES} B"
        needed = accumulators(spec, config)
        if math_registers(needed) is None:
            return (
                f"dV and S take {needed.dv} registers a thread, dK and dP {needed.dk}: with {SPARE_REGISTERS} more "
                f"each they need more than {MAX_REGISTERS}, or more than {MATH_REGISTERS} together"
            )
        two_panels = (spec.head_dim, panel_count(spec.head_dim_v)) == (192, 2)
        if config.fused and two_panels and (config.block_n, config.dout_stages) == (96, 2):
            return "fused: with head_dim 192, two panels of V, 96 keys and two buffers of dO dK's warpgroup spills"
        if needed.dk + SPARE_REGISTERS == MAX_REGISTERS and config.dq == "bulk" and spec.head_dim % 64 == 8:
            return f"dK's warpgroup, with {needed.dk} accumulators a thread, spills where it hands over 8 columns of dQ"
        if needed.dk + SPARE_REGISTERS == MAX_REGISTERS and 0 < config.dq_panels < panel_count(spec.head_dim) - 1:
            return (
                f"dK's warpgroup, with {needed.dk} accumulators a thread, spills where it hands over dS and makes more "
                f"than one panel of dQ: dq_panels must be 0 or {panel_count(spec.head_dim) - 1}, got {config.dq_panels}"
            )
        return None

    def default(self, spec: KernelSpec) -> TileConfig:
        """The most keys that fit, bulk additions where they fit with these, wide buffers of dQ rather than a second one
        of dO (docs/hopper-backward.md).
        """
        for block_n, dq in product((112, 96, 80), ("bulk", "red")):
            panels = 0 if dq == "bulk" else _even(spec)
            configs = (Sm90BackwardWideConfig(block_n, 2, dout_stages, panels, dq) for dout_stages in (2, 1))
            if legal := [config for config in configs if self.rejection(spec, config) is None]:
                return max(legal, key=lambda config: dq_buffers(spec, config).columns)
        raise AssertionError(f"no default tile for {spec.name}")

    def context(self, spec: KernelSpec, config: TileConfig) -> Mapping[str, object]:
        """Panels, steps, registers and the shared-memory map."""
        config = cast(Sm90BackwardWideConfig, config)
        dq_columns = panel_widths(spec.head_dim)
        buffers = dq_buffers(spec, config)
        registers = math_registers(accumulators(spec, config)) or PerWarpgroup(MATH_REGISTERS // 2, MATH_REGISTERS // 2)
        return {
            "block_m": BLOCK_M,
            "num_threads": 128 * (WARPGROUPS + 1),
            "panels": panel_count(spec.head_dim),
            "panels_v": panel_count(spec.head_dim_v),
            "key_panels": panel_count(config.block_n),
            "steps_qk": -(-spec.head_dim // 16),
            "steps_v": -(-spec.head_dim_v // 16),
            "dq_columns": dq_columns,
            "dq_widths": sorted(set(dq_columns), reverse=True),
            "dq_with_dk": _dq_with_dk(spec, config),
            "dq_adders": _dq_adders(config),
            "dq_buffers": buffers,
            "sums_panels": _sums_panels(spec, buffers.columns),
            "dq_rounds": dq_rounds(spec, buffers),
            "ds_in_registers": ds_in_registers(spec, config),
            "element": ELEMENT[spec.dtype],
            "pack": f"pack_{spec.dtype}",
            "loader_registers": LOADER_REGISTERS,
            "dv_registers": registers.dv,
            "dk_registers": registers.dk,
            "unit_rows": UNIT_ROWS,
            "tail_tiles": TAIL_TILES,
            "smem": smem_layout(spec, config),
        }

    def launch(self, spec: KernelSpec, config: TileConfig) -> Mapping[str, int]:
        """What runtime/cuda needs to encode tensor maps, to allocate and to launch."""
        config = cast(Sm90BackwardWideConfig, config)
        return {
            "block_m": BLOCK_M,
            "block_n": config.block_n,
            "store_rows": config.block_n,
            "num_threads": 128 * (WARPGROUPS + 1),
            "smem_bytes": smem_layout(spec, config).total,
            "ctas_per_sm": 1,
            "causal": int(spec.causal),
            "dq_adders": _dq_adders(config),
            "first_stores": int(config.dq == "bulk"),  # of a sequence's tiles, so that sums need no zeros
            "fused": int(config.fused),
            "unit_rows": UNIT_ROWS,
            "tail_tiles": TAIL_TILES if config.split_tail else 0,
            "tail_columns": 64 * (panel_count(spec.head_dim) + panel_count(spec.head_dim_v)),
            "dependent": 1,  # its kernels wait for those before them themselves
        }

    def compile_flags(self, spec: KernelSpec, config: TileConfig) -> tuple[str, ...]:
        """None beyond the target's."""
        return ()

    def predicted_registers(self, spec: KernelSpec, config: TileConfig) -> int:
        """What ptxas reports: the launch allocation."""
        return launch_registers(128 * (WARPGROUPS + 1), 1)
