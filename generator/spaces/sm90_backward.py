"""Tile configs of templates/cuda/sm90/backward.cu.j2: the persistent Hopper backward that keeps blocks of keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, cast

from jagtile.generator.spaces.sm90 import (
    CONTROL_BYTES,
    ELEMENT,
    REGISTERS,
    launch_registers,
    panel_count,
    smem_room,
    tma_rejection,
)
from jagtile.generator.spec import Direction, KernelSpec
from jagtile.generator.tile import Knob, Rule, TileConfig

MAX_HEAD_DIM = 128  # dK and dV of a block of keys are accumulators
# Registers for accumulators and fragments that ptxas 13.0 schedules without serialising wgmma (C7512) or spilling, by
# (math warpgroups, CTAs an SM): fifteen pairs of head dims compiled at and around these limits.
FRAGMENT_LIMIT = {(1, 1): 208, (1, 2): 160, (2, 1): 208, (3, 1): 128}
# The same for steps of up to 80 queries without ``early_dv`` and without a warpgroup with rows, where more is counted
# beside the fragments than they need (650 tiles compiled): plain, with ``late_dq``, with ``overlap``.
LATE_DV_LIMIT = {(1, 2): (176, 176, 200), (2, 1): (208, 218, 232), (3, 1): (138, 138, 152)}
# Beside a warpgroup that works on rows (row_tasks.cuh), which has as many as the one that feeds: (producer, consumer).
FUSED_REGISTERS = {(1, 1): (56, 256), (1, 2): (24, 192), (2, 1): (24, 232), (3, 1): (24, 144)}
MOST_AHEAD = 8  # steps
UNIT_ROWS = 32  # of rows beside the tiles that are copied at a time
TAIL_TILES = 32  # that may be in pieces (tail_pieces.cuh)
POLYNOMIALS = (0, 8, 4, 2)
POLYNOMIAL_COLUMNS = 64  # of the wider head dim: above, products take much longer than exponentials
Split = Literal["rows", "columns", "transposed", "alternate"]


@dataclass(frozen=True, order=True)
class Sm90BackwardConfig(TileConfig):
    """Knobs of the persistent Hopper backward."""

    algorithm: ClassVar[str] = "keyblocks"
    block_m: int = field(metadata={"short": "m"})  # queries a step
    block_n: int = field(metadata={"short": "n"})  # keys a CTA: 64 a math warpgroup
    num_stages: int = field(metadata={"short": "s"})  # Q and dO buffers each
    ctas_per_sm: int = field(metadata={"short": "c"})
    dq: str = field(metadata={"short": "d"})  # how dQ is added up: "bulk" through shared memory, "red" from registers
    overlap: bool = field(metadata={"short": "o"})  # dK is multiplied on while the next step begins
    kv_stages: int = field(metadata={"short": "k"})  # K and V buffers each: the next tiles' arrive meanwhile
    held: str = field(metadata={"short": "h"})  # what of K and V registers hold, as A operands: "none", "v" or "kv"
    late_dq: bool = field(metadata={"short": "l"})  # dQ of a step is multiplied in the next one
    early_dv: bool = field(metadata={"short": "e"})  # dV is multiplied before dP is there: P is packed before dS
    fused: bool = field(default=False, metadata={"short": "f"})  # passes over rows beside the tiles, not as kernels
    claim_ahead: int = field(default=0, metadata={"short": "a"})  # steps before a tile's last loads
    row_buffers: int = field(default=2, metadata={"short": "r"})  # of rows beside the tiles
    polynomial: int = field(default=0, metadata={"short": "p"})  # exponentials of each p-th pair by FMA; 0: none
    late_dk: bool = field(default=False, metadata={"short": "t"})  # dK of a step is multiplied in the next one
    row_warps: int = field(default=4, metadata={"short": "w"})  # for rows beside the tiles: a warpgroup's, or 1
    skip_unseen: bool = field(default=False, metadata={"short": "u"})  # no products of keys that none of a step sees
    split_tail: bool = field(default=False, metadata={"short": "y"})  # last tiles in pieces (tail_pieces.cuh)
    in_turn: bool = field(default=False, metadata={"short": "i"})  # two warpgroups multiply dV, dQ and dK in turn

    @property
    def warpgroups(self) -> int:
        """Math warpgroups."""
        return self.block_n // 64

    @property
    def own_row_warpgroup(self) -> bool:
        """Whether rows beside the tiles are worked on by a warpgroup of their own."""
        return self.fused and self.row_warps > 1


# P and dS packed together; steps of 128 queries where registers have room, else a late dQ; passes over rows beside the
# tiles. The last fits all head dims.
_DEFAULT_TILES = tuple(
    Sm90BackwardConfig(block_m, 128, 2, 1, "bulk", overlap, kv_stages, held, late_dq, early_dv=False, fused=fused)
    for block_m, overlap, kv_stages, held, late_dq, fused in (
        (128, False, 2, "kv", True, False),
        (128, False, 1, "none", True, True),
        (64, False, 1, "v", True, True),
        (64, False, 1, "none", True, True),
    )
)


@dataclass(frozen=True)
class SmemLayout:
    """Bytes of each region of shared memory, in order."""

    k_bytes: int
    v_bytes: int
    q_bytes: int
    dout_bytes: int
    ds_bytes: int
    dq_bytes: int
    rows_bytes: int
    stats_bytes: int
    control_bytes: int

    @property
    def dq_begin(self) -> int:
        """Where dQ begins."""
        return self.k_bytes + self.v_bytes + self.q_bytes + self.dout_bytes + self.ds_bytes

    @property
    def rows_begin(self) -> int:
        """Where rows of passes over them begin."""
        return self.dq_begin + self.dq_bytes

    @property
    def stats_begin(self) -> int:
        """Where lse and delta begin."""
        return self.rows_begin + self.rows_bytes

    @property
    def control_begin(self) -> int:
        """Where tiles and barriers begin."""
        return self.stats_begin + self.stats_bytes

    @property
    def total(self) -> int:
        """Bytes a CTA asks for."""
        return self.control_begin + self.control_bytes


def smem_layout(spec: KernelSpec, config: Sm90BackwardConfig) -> SmemLayout:
    """The regions' sizes: panels of 64 columns (128 bytes); two buffers of dS^T."""
    k_panels, v_panels = panel_count(spec.head_dim), panel_count(spec.head_dim_v)
    return SmemLayout(
        k_bytes=config.kv_stages * config.block_n * k_panels * 128,
        v_bytes=config.kv_stages * config.block_n * v_panels * 128,
        q_bytes=(config.num_stages + config.late_dk) * config.block_m * k_panels * 128,
        dout_bytes=config.num_stages * config.block_m * v_panels * 128,
        ds_bytes=_ds_bytes(spec, config),
        dq_bytes=_dq_bytes(spec, config),
        rows_bytes=config.row_buffers * row_buffer_bytes(spec, UNIT_ROWS) if config.fused else 0,
        stats_bytes=config.num_stages * 2 * config.block_m * 4,
        control_bytes=CONTROL_BYTES + (128 if config.kv_stages > 2 and config.row_buffers > 2 else 0),
    )


def ds_buffers(spec: KernelSpec, config: Sm90BackwardConfig) -> int:
    """Buffers of dS."""
    return 1 if dq_split(spec, config) == "transposed" else 2


def _ds_bytes(spec: KernelSpec, config: Sm90BackwardConfig) -> int:
    if dq_split(spec, config) == "transposed":
        return config.block_m * panel_count(config.block_n) * 128
    return 2 * config.block_n * panel_count(config.block_m) * 128


def _dq_bytes(spec: KernelSpec, config: Sm90BackwardConfig) -> int:
    """Buffers of dQ, those of two warpgroups that have columns each as large as the first. With one buffer of dS, as
    much as dK and dV take to leave through both.
    """
    if config.dq != "bulk":
        return 0
    split = dq_split(spec, config)
    if split in ("columns", "transposed"):
        parts = 2 * config.block_m * 64 * 4
        if split == "columns":
            return parts
        leaving = (panel_count(spec.head_dim) + panel_count(spec.head_dim_v)) * config.block_n * 128
        return max(parts, leaving - _ds_bytes(spec, config))
    return dq_stages(spec, config) * config.block_m * spec.head_dim * 4


def dq_split(spec: KernelSpec, config: Sm90BackwardConfig) -> Split:
    """How the warpgroups share dQ of a block of queries: 64 rows each, 64 columns each, as rows of a product or of its
    transpose, or by turns.
    """
    if config.block_m == 64 * config.warpgroups:
        return "rows"
    if config.warpgroups == 2 and spec.head_dim > 64:
        return "columns" if config.block_m == 64 else "transposed"
    return "alternate"


def dq_stages(spec: KernelSpec, config: Sm90BackwardConfig) -> int:
    """Buffers of dQ: warpgroups that take turns, and may be a step apart, have one each; beside rows, whose copies take
    shared memory too, two go round: who multiplies block b's dQ knows that b - 2 and all before it are staged.
    """
    if not config.late_dq or dq_split(spec, config) != "alternate":
        return 1
    return min(config.warpgroups, 2) if config.fused else config.warpgroups


def dq_columns(spec: KernelSpec, config: Sm90BackwardConfig) -> int:
    """Columns of the dQ, or of its transpose, that a warpgroup multiplies at a time, 64 rows of it."""
    if dq_split(spec, config) == "transposed":
        return config.block_m
    return 64 if dq_split(spec, config) == "columns" else spec.head_dim


def early_lse(spec: KernelSpec, config: Sm90BackwardConfig) -> bool:
    """Whether registers have room for lse before S is there."""
    limit = FRAGMENT_LIMIT[config.warpgroups, config.ctas_per_sm]
    return not config.late_dq and fragment_registers(spec, config) + config.block_m // 4 <= limit


def stats_in_registers(spec: KernelSpec, config: Sm90BackwardConfig) -> bool:
    """Whether registers have room for what several columns have of lse and delta, as compiling shows."""
    late_p = not config.early_dv and config.kv_stages > 1 and not config.late_dk
    return config.late_dq or late_p or early_lse(spec, config)


def stats_type(spec: KernelSpec, config: Sm90BackwardConfig) -> str:
    """How a thread reads lse and delta (gradients.cuh, stats_by_fours.cuh)."""
    if stats_in_registers(spec, config):
        return "StatsInRegisters<kBlockM>"
    return "StatsByFours<kBlockM>" if config.late_dk else "StatsInMemory"


def held_registers(spec: KernelSpec, config: Sm90BackwardConfig) -> int:
    """Registers a thread for a warpgroup's rows of K and V, four for each 16 columns."""
    k, v = "k" in config.held, "v" in config.held
    return 4 * (k * -(-spec.head_dim // 16) + v * -(-spec.head_dim_v // 16))


def fragment_registers(spec: KernelSpec, config: Sm90BackwardConfig) -> int:
    """Registers a thread for accumulators and A fragments, where the most of them are alive: beside dK, dV and what is
    held of K and V, S and dP, or dQ with P and dS packed.

    ``early_dv`` has P packed beside S and dP, ``late_dq`` then dQ too, and ``overlap`` the packed dS of the step
    before. Near the limit two more count, as compiling shows, for the places of K and V, or of dK and dV on their way,
    where these are the same in every tile.

    Without it, dQ of the step before is multiplied when S and dP are gone, and dP when the dS of the step before is.
    What counts beside them, with and without ``overlap``, is what compiling shows; so is what is added for
    ``skip_unseen``, for ``polynomial``, and for a warpgroup with rows, beside which math warps have 8 registers less,
    of three warpgroups 16, with two CTAs an SM 24.
    """
    kept = spec.head_dim // 2 + spec.head_dim_v // 2 + held_registers(spec, config)
    if config.polynomial and config.block_m == 128:
        kept += 20 if config.polynomial == 2 else 16 if config.late_dq or config.overlap else 0
    kept += 6 * config.skip_unseen
    if config.own_row_warpgroup and config.warpgroups == 3:
        kept += 16 if config.kv_stages == 1 else 12
        if config.late_dq and not config.early_dv:
            kept += 16
    scores, packed, dq = config.block_m // 2, config.block_m // 4, dq_columns(spec, config) // 2
    if not config.early_dv:
        beside = 10 if not config.overlap else 40 if config.block_m == 64 else 16
        if dq_split(spec, config) == "transposed":
            beside = 40 if config.overlap else 0
        if config.own_row_warpgroup:
            beside += _beside_rows(spec, config)
        if config.held == "kv" and config.late_dq and not config.fused and config.warpgroups == 2:
            beside += 2  # where dK and dV leave
        return kept + max(2 * scores, dq + 2 * packed) + beside
    with_p = 2 * scores + packed
    most = with_p + dq if config.late_dq else max(with_p, dq + 2 * packed)
    lasting = config.late_dq or config.held == "kv" or frees_kv(spec, config)
    if config.own_row_warpgroup or (config.kv_stages == 1 and lasting):
        most += 2
    if config.fused and config.held != "none":
        most += 8
    return kept + most + (packed if config.overlap else 0)


def _fragment_limit(config: Sm90BackwardConfig) -> int:
    groups = (config.warpgroups, config.ctas_per_sm)
    if groups not in LATE_DV_LIMIT or config.early_dv or config.own_row_warpgroup or config.block_m > 80:
        return FRAGMENT_LIMIT[groups]
    return LATE_DV_LIMIT[groups][2 if config.overlap else 1 if config.late_dq else 0]


def _beside_rows(spec: KernelSpec, config: Sm90BackwardConfig) -> int:
    """What counts more without ``early_dv`` for a warpgroup with rows, as compiling shows."""
    held = config.held != "none"
    if dq_split(spec, config) == "transposed":
        return 8 + 8 * held
    if config.block_m == 128:
        return 24 if held and config.overlap else 8 if held else 0
    if not held or not config.late_dq:
        return 8 if held else 0
    wider = spec.head_dim_v > spec.head_dim
    return 4 + 4 * wider + 4 * (wider and spec.head_dim == 64)


def _transposed_blocks(spec: KernelSpec) -> tuple[int, ...]:
    """More queries than 64, of which dQ is multiplied transposed: what shared memory has room for."""
    return (80,) if spec.head_dim > 64 else ()


def num_threads(config: Sm90BackwardConfig) -> int:
    """Of a CTA: the math warpgroups, one that feeds them and, where there is one, that which works on rows."""
    return 128 * (config.warpgroups + 1 + config.own_row_warpgroup)


def setmaxnreg(config: Sm90BackwardConfig) -> tuple[int, int]:
    """Registers a thread of the warpgroups that feed or work on rows, and of those that multiply."""
    registers = FUSED_REGISTERS if config.own_row_warpgroup else REGISTERS
    return registers[config.warpgroups, config.ctas_per_sm]


def _loader_has_room(config: Sm90BackwardConfig) -> bool:
    """Whether 24 registers are enough for the warp that loads to copy lse and delta too, as compiling shows."""
    return config.block_m <= 80 and config.kv_stages == 1 and not config.late_dk


def row_buffer_bytes(spec: KernelSpec, rows: int) -> int:
    """What some rows of passes beside the tiles take (row_units.cuh): panels of O and dO, or dQ's sums."""
    return rows * max(2 * panel_count(spec.head_dim_v) * 128, spec.head_dim * 4)


def frees_kv(spec: KernelSpec, config: Sm90BackwardConfig) -> bool:
    """Whether dK and dV leave through the buffers of dS^T and dQ, so that the next tile's K and V don't wait.

    Two buffers of dS^T have room for the two panels that dK has at most; dV may need more than a warpgroup's dQ part.
    """
    if config.dq != "bulk" or config.kv_stages > 1 or dq_split(spec, config) == "alternate":
        return False
    if dq_split(spec, config) == "transposed":
        return True
    return panel_count(spec.head_dim_v) * 64 * 128 <= 64 * dq_columns(spec, config) * 4


def dq_adders(config: Sm90BackwardConfig) -> int:
    """How many add to a block's dQ, each to a part of it or in turn."""
    return 1 if config.dq == "bulk" else config.warpgroups


_LATE_DK = (
    "late_dk: every warpgroup must have a part of each dQ (block_m 64 a warpgroup, or head_dim above 64 with two of "
    "them), without overlap, late_dq and early_dv"
)


def _sums_rejection(dq: str, fused: bool) -> str | None:
    if dq not in ("bulk", "red"):
        return f"dq must be bulk or red, got {dq}"
    if fused and dq != "bulk":
        return "fused: the warp that adds dQ by bulk copies tells of complete tiles: dq must be bulk"
    return None


def _rows_rejection(fused: bool, claim_ahead: int, row_buffers: int, row_warps: int) -> str | None:
    if not 0 <= claim_ahead <= MOST_AHEAD:
        return f"claim_ahead must be 0 to {MOST_AHEAD}, got {claim_ahead}"
    if row_buffers not in (1, 2, 4) or (row_buffers != 2 and not fused):
        return f"row_buffers must be 2, or where fused 1 or 4, got {row_buffers}"
    if row_warps not in (4, 1) or (row_warps == 1 and not fused):
        return f"row_warps must be 4, or where fused 1, got {row_warps}"
    return None


def _tail_rejection(fused: bool, split_tail: bool) -> str | None:
    if split_tail and not fused:
        return "split_tail: up to head_dim 128 it comes with rows beside the tiles: fused must be on"
    return None


def _late_dk_rejection(overlap: bool, late_dq: bool, early_dv: bool, late_dk: bool) -> str | None:
    return _LATE_DK if late_dk and (overlap or late_dq or early_dv) else None


def _skip_rejection(block_n: int, late_dq: bool, skip_unseen: bool) -> str | None:
    if skip_unseen and (block_n == 64 or not late_dq):
        return (
            "skip_unseen: of several math warpgroups one goes on without the others' products, and does not meet them "
            "in each step: late_dq must be on"
        )
    return None


def _in_turn_rejection(block_n: int, overlap: bool, late_dq: bool, early_dv: bool, in_turn: bool) -> str | None:
    if in_turn and (block_n != 128 or overlap or not late_dq or early_dv):
        return (
            "in_turn: two math warpgroups (block_n 128) that don't meet in each step, with products issued together: "
            "late_dq must be on, overlap and early_dv off"
        )
    return None


# Of knobs alone; what depends on the spec is in ``rules`` and ``rejection``.
_RULES = (
    Rule(("dq", "fused"), _sums_rejection),
    Rule(("fused", "claim_ahead", "row_buffers", "row_warps"), _rows_rejection),
    Rule(("overlap", "late_dq", "early_dv", "late_dk"), _late_dk_rejection),
    Rule(("block_n", "late_dq", "skip_unseen"), _skip_rejection),
    Rule(("fused", "split_tail"), _tail_rejection),
    Rule(("block_n", "overlap", "late_dq", "early_dv", "in_turn"), _in_turn_rejection),
)


class Sm90BackwardSpace:
    """Legal configs of the persistent Hopper backward."""

    target = "sm_90a"
    direction: ClassVar[Direction] = "bwd"
    algorithm = Sm90BackwardConfig.algorithm
    template = "cuda/sm90/backward.cu.j2"
    config_type: type[TileConfig] = Sm90BackwardConfig

    def serves(self, spec: KernelSpec) -> str | None:
        """bf16 and fp16, head dims that are multiples of 8 up to 128."""
        for name, value in (("head_dim", spec.head_dim), ("head_dim_v", spec.head_dim_v)):
            if value > MAX_HEAD_DIM:
                return f"{name} must be at most {MAX_HEAD_DIM} in this backward, got {value}"
        return tma_rejection(spec)

    def knobs(self, spec: KernelSpec) -> Mapping[str, tuple[Knob, ...]]:
        """The grid; most of it is cut by registers."""
        return {
            "block_m": (64, 128, *_transposed_blocks(spec)),
            "block_n": (128, 64, 192),
            "num_stages": (3, 2, 4),
            "ctas_per_sm": (1, 2),
            "dq": ("bulk", "red"),
            "overlap": (True, False),
            "kv_stages": (2, 1, 3),
            "held": ("kv", "v", "none"),
            "late_dq": (True, False),
            "early_dv": (False, True),
            "fused": (True, False),
            "claim_ahead": (0, 2, 5),
            "row_buffers": (2, 4, 1),
            "row_warps": (4, 1),
            "late_dk": (False, True),
            "skip_unseen": (False, True),
            "in_turn": (False, True),
            "split_tail": (False,) if spec.causal else (False, True),
            "polynomial": (0, 4) if max(spec.head_dim, spec.head_dim_v) <= POLYNOMIAL_COLUMNS else (0,),
        }

    def rules(self, spec: KernelSpec) -> tuple[Rule, ...]:
        """What a few knobs forbid by themselves: most of the grid."""

        def tile(block_m: int, block_n: int, ctas_per_sm: int) -> str | None:
            if block_n not in (64, 128, 192):
                return f"block_n is 64 a math warpgroup, 1 to 3 of them: 64, 128 or 192, got {block_n}"
            if block_m not in (64, block_n, *(_transposed_blocks(spec) if block_n == 128 else ())):
                return (
                    f"block_m must be 64, the rows of one product of dQ, as many as block_n, or 80 with two warpgroups "
                    f"and a head_dim above 64, got {block_m}"
                )
            if (block_n // 64, ctas_per_sm) not in FRAGMENT_LIMIT:
                return f"{ctas_per_sm} CTAs an SM with block_n {block_n} need more than 64K registers"
            return None

        return (Rule(("block_m", "block_n", "ctas_per_sm"), tile), *_RULES)

    def rejection(self, spec: KernelSpec, config: TileConfig) -> str | None:
        """The rules, shared memory and accumulator registers."""
        config = cast(Sm90BackwardConfig, config)
        if reason := next(filter(None, (rule.broken_by(config) for rule in self.rules(spec))), None):
            return reason
        others = _transposed_blocks(spec) if config.block_n == 128 else ()
        two_ds = config.late_dq or config.early_dv or config.kv_stages > 1
        if config.block_m in others and (two_ds or config.dq != "bulk"):
            return "block_m 80: one buffer of dS: dq must be bulk, kv_stages 1, without late_dq and early_dv"
        if config.split_tail and spec.causal:
            return "split_tail: with a causal mask the last tiles are short"
        if config.num_stages < 2:
            return f"num_stages must be at least 2, got {config.num_stages}"
        if config.row_warps == 1 and config.warpgroups == 2 and not _loader_has_room(config):
            return (
                "row_warps 1: with two math warpgroups the warp that loads has 24 registers: block_m must be at most "
                "80, kv_stages 1, without late_dk"
            )
        if config.kv_stages not in (1, 2, 3):
            return f"kv_stages must be 1, 2 or 3, got {config.kv_stages}"
        if config.held not in ("none", "v", "kv"):
            return f"held must be none, v or kv, got {config.held}"
        if config.late_dk and dq_split(spec, config) in ("transposed", "alternate"):
            return _LATE_DK
        if config.late_dk and config.block_m == 128 and config.kv_stages > 1:
            return "late_dk: with block_m 128 and several kv_stages the warps that feed spill"
        if config.polynomial not in POLYNOMIALS:
            return f"polynomial must be one of {', '.join(map(str, POLYNOMIALS))}, got {config.polynomial}"
        if config.polynomial and (widest := max(spec.head_dim, spec.head_dim_v)) > POLYNOMIAL_COLUMNS:
            return f"polynomial: a head dim of {widest} > {POLYNOMIAL_COLUMNS}: products take longer than exponentials"
        smem, room = smem_layout(spec, config).total, smem_room(config.ctas_per_sm)
        if smem > room:
            return f"shared memory {smem} B > {room} B a CTA with {config.ctas_per_sm} an SM"
        if config.row_buffers == 1 and smem + row_buffer_bytes(spec, UNIT_ROWS) <= room:
            return "row_buffers: one is for where shared memory has no room for two"
        registers, limit = fragment_registers(spec, config), _fragment_limit(config)
        if registers > limit:
            return (
                f"accumulators and fragments take {registers} registers a thread > {limit} with {config.warpgroups} "
                f"math warpgroups"
            )
        return None

    def default(self, spec: KernelSpec) -> TileConfig:
        """The first legal one of a few tiles that did well in measurements (docs/performance-log.md)."""
        for config in _DEFAULT_TILES:
            if self.rejection(spec, config) is None:
                return config
        raise AssertionError(f"no default tile for {spec.name}")

    def context(self, spec: KernelSpec, config: TileConfig) -> Mapping[str, object]:
        """Panels, steps, registers and the shared-memory map."""
        config = cast(Sm90BackwardConfig, config)
        producer, consumer = setmaxnreg(config)
        split, columns = dq_split(spec, config), dq_columns(spec, config)
        return {
            "warpgroups": config.warpgroups,
            "num_threads": num_threads(config),
            "feeding_warps": 4 * (1 + config.own_row_warpgroup),
            "own_row_warpgroup": config.own_row_warpgroup,
            "unit_rows": UNIT_ROWS,
            "panels": panel_count(spec.head_dim),
            "panels_v": panel_count(spec.head_dim_v),
            "query_panels": panel_count(config.block_m),
            "steps_qk": -(-spec.head_dim // 16),
            "steps_v": -(-spec.head_dim_v // 16),
            "k_tiles": "k_tiles" if config.kv_stages > 1 else "k_tile",
            "v_tiles": "v_tiles" if config.kv_stages > 1 else "v_tile",
            "kv_slot": "kv_at.slot" if config.kv_stages > 1 else "0",
            "dq_split": split,
            "dq_columns": columns,
            "early_lse": early_lse(spec, config),
            "stats_type": stats_type(spec, config),
            "dq_stages": dq_stages(spec, config),
            "dq_parts": 1 if split == "alternate" else config.warpgroups,
            "dq_part_bytes": 64 * columns * 4,
            "ds_buffers": ds_buffers(spec, config),
            "dq_adders": dq_adders(config),
            "element": ELEMENT[spec.dtype],
            "pack": f"pack_{spec.dtype}",
            "producer_registers": producer,
            "consumer_registers": consumer,
            "frees_kv": frees_kv(spec, config),
            "tail_tiles": TAIL_TILES,
            "smem": smem_layout(spec, config),
        }

    def launch(self, spec: KernelSpec, config: TileConfig) -> Mapping[str, int]:
        """What runtime/cuda needs to encode tensor maps, to allocate and to launch."""
        config = cast(Sm90BackwardConfig, config)
        return {
            "block_m": config.block_m,
            "block_n": config.block_n,
            "store_rows": 64,
            "num_threads": num_threads(config),
            "smem_bytes": smem_layout(spec, config).total,
            "ctas_per_sm": config.ctas_per_sm,
            "causal": int(spec.causal),
            "dq_adders": dq_adders(config),
            "first_stores": int(config.dq == "bulk"),  # of a sequence's tiles, so that sums need no zeros
            "fused": int(config.fused),
            "unit_rows": UNIT_ROWS,
            "tail_tiles": TAIL_TILES if config.split_tail else 0,
            "tail_columns": spec.head_dim + spec.head_dim_v,  # of dK and dV, that are added up
            "dependent": 1,  # its kernels wait for those before them themselves
        }

    def compile_flags(self, spec: KernelSpec, config: TileConfig) -> tuple[str, ...]:
        """None beyond the target's."""
        return ()

    def predicted_registers(self, spec: KernelSpec, config: TileConfig) -> int:
        """The launch allocation."""
        config = cast(Sm90BackwardConfig, config)
        return launch_registers(num_threads(config), config.ctas_per_sm)
