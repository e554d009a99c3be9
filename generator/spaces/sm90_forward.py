"""Tile configs of templates/cuda/sm90/forward.cu.j2: the persistent, warp-specialised Hopper forward.

Head dims that are multiples of 8 are copied by TMA. Others have rows that TMA cannot address: there the loading warps
copy rows themselves (templates/cuda/include/rows.cuh), and O leaves from registers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, cast

from jagtile.generator.spaces.sm90 import (
    CONTROL_BYTES,
    ELEMENT,
    REGISTERS,
    dtype_rejection,
    launch_registers,
    panel_count,
    smem_room,
    tma_rejection,
)
from jagtile.generator.spec import KernelSpec
from jagtile.generator.tile import Knob, TileConfig

# Probabilities are scaled by 2^-headroom. In bf16 they may grow 2^17-fold, to 2, before a block is computed again. fp16
# has no exponents to spare: unscaled, what is 2^-14 of the row's maximum is still normal, and growth ends at 2^14.
HEADROOM = {"bf16": 16, "fp16": 0}
OUTGROWN = {"bf16": 1, "fp16": 14}  # log2 of it, as softmax.cuh tells by the bits
# Registers for S, P and O that ptxas 13.0 schedules without serialising wgmma (C7512): nine head dims, causal and not,
# compiled around each limit. At (1, 1) nothing was refused; at (3, 1) D_v 192 spills 8 bytes, which the build rejects.
FRAGMENT_LIMIT = {(1, 1): 224, (1, 2): 176, (1, 3): 104, (1, 4): 68, (2, 1): 212, (3, 1): 132, (4, 1): 84}
# The same where whole warps copy rows, which takes more registers than one lane that issues TMA: 17 pairs of head dims
# compiled up to each limit. At (2, 1) with 188, D_v above 248 and 80 keys, 36 bytes spill.
ROW_REGISTERS = {(1, 1): (56, 256), (1, 2): (56, 200), (1, 3): (56, 104), (2, 1): (56, 224), (3, 1): (56, 152)}
ROW_FRAGMENT_LIMIT = {(1, 1): 224, (1, 2): 160, (1, 3): 72, (2, 1): 184, (3, 1): 124}
# The same where products sum up rows, whose sums take 4 accumulators: seven pairs of head dims compiled at the limits.
# Some of the algorithm split spill there with either kind of sums (D 192 with D_v 64, 44 B): the build rejects them.
SUMS_FRAGMENT_LIMIT = {**FRAGMENT_LIMIT, (2, 1): 208, (3, 1): 128, (4, 1): 80}
# And where FMA computes exponentials: 224 kernels of four specs compiled at the limits above. What spills is beyond
# these, but for four math warpgroups of the algorithm split, which spill (8 B) without, too, and are not tuned.
POLYNOMIAL_FRAGMENT_LIMIT = {**SUMS_FRAGMENT_LIMIT, (1, 1): 200, (1, 2): 152, (1, 3): 92, (2, 1): 192}
# With few registers at launch ptxas refuses (C7602) an instruction of more accumulators, whatever setmaxnreg adds.
INSTRUCTION_LIMIT = {(1, 1): 128, (1, 2): 96, (1, 3): 48, (1, 4): 32, (2, 1): 128, (3, 1): 96, (4, 1): 64}
# How a tile ends. staged: O leaves through the Q buffer, by TMA. direct: from registers, and the Q buffer is handed
# back before the last product.
EPILOGUES = ("staged", "direct")
# The widest V beside which a product has columns of ones: of wider ones the sums are a small part of the work.
TENSOR_SUMS_COLUMNS = 64
# Head dims up to which a block's exponentials take as long as its products (16 of them a clock and SM, or 4096 FLOP):
# beyond, MUFU waits for the tensor cores as it is.
POLYNOMIAL_COLUMNS = 64
# Where it was worth it: at D 64 it lost 3 to 4 % (1 in 8 pairs) and 9 % (1 in 4), at D 32 the latter gained nothing.
_TUNED_POLYNOMIAL_COLUMNS = 32
_POLYNOMIALS = (0, 8, 4)
_ONES_BYTES = 16 * 128  # one step of a product deep


@dataclass(frozen=True, order=True)
class Sm90ForwardConfig(TileConfig):
    """Knobs of the persistent Hopper forward."""

    algorithm: ClassVar[str] = "persistent"
    block_m: int = field(metadata={"short": "m"})  # query rows a CTA: 64 a math warpgroup
    block_n: int = field(metadata={"short": "n"})  # keys a step
    num_stages: int = field(metadata={"short": "s"})  # K and V buffers each
    q_stages: int = field(
        metadata={"short": "q"}
    )  # Q buffers a warpgroup: from 2 on its epilogue overlaps the next tile
    ctas_per_sm: int = field(metadata={"short": "c"})
    epilogue: str = field(default="staged", metadata={"short": "e"})  # one of EPILOGUES
    tensor_sums: bool = field(default=False, metadata={"short": "t"})  # rows summed up by products, if no lse is wanted
    alternate: bool = field(default=False, metadata={"short": "a"})  # warpgroups take rows in turn from both ends
    cluster: int = field(default=1, metadata={"short": "x"})  # 2: pairs of CTAs share tiles and the loads of keys
    polynomial: int = field(default=0, metadata={"short": "p"})  # exponentials of each p-th pair by FMA; 0: none

    @property
    def warpgroups(self) -> int:
        """Math warpgroups."""
        return self.block_m // 64


# The best for small head dims first; the last is legal for every head dim.
_DEFAULT_TILES = tuple(
    Sm90ForwardConfig(block_m, block_n, num_stages, q_stages, 1, epilogue)
    for block_m, block_n, num_stages, q_stages, epilogue in (
        (192, 128, 3, 2, "staged"),
        (192, 112, 2, 2, "staged"),
        (192, 64, 4, 2, "staged"),
        (192, 64, 2, 2, "staged"),
        (128, 96, 2, 1, "direct"),
        (128, 64, 2, 1, "staged"),
    )
)


@dataclass(frozen=True)
class SmemLayout:
    """Bytes of each region of shared memory, in order."""

    q_bytes: int
    k_bytes: int
    v_bytes: int
    control_bytes: int
    ones_bytes: int = 0  # between V and the control block

    @property
    def total(self) -> int:
        """Bytes a CTA asks for."""
        return self.q_bytes + self.k_bytes + self.v_bytes + self.ones_bytes + self.control_bytes


def by_rows(spec: KernelSpec) -> bool:
    """Whether warps copy rows, in place of TMA: a property of the head dims, no choice."""
    return tma_rejection(spec) is not None


def out_columns(spec: KernelSpec) -> int:
    """Columns of O's accumulators: products are multiples of 8 wide."""
    return -(-spec.head_dim_v // 8) * 8


def q_panels(spec: KernelSpec) -> int:
    """Panels of a Q buffer, through which O leaves where TMA stores it."""
    panels = panel_count(spec.head_dim)
    return panels if by_rows(spec) else max(panels, panel_count(spec.head_dim_v))


def q_buffers(spec: KernelSpec, config: Sm90ForwardConfig) -> int:
    """Buffers of 64 rows of Q. With one for each of several warpgroups, one more where there is room: they take turns,
    so that the next tile's Q is there when the first of them is done.
    """
    buffers = config.q_stages * config.warpgroups
    if config.q_stages > 1 or config.warpgroups == 1:
        return buffers
    spare = smem_layout(spec, config, buffers + 1).total <= smem_room(config.ctas_per_sm)
    return buffers + spare


def smem_layout(spec: KernelSpec, config: Sm90ForwardConfig, buffers: int | None = None) -> SmemLayout:
    """The regions' sizes: panels of 64 columns (128 bytes). ``buffers`` of Q; None: as many as the kernel has."""
    buffers = q_buffers(spec, config) if buffers is None else buffers
    return SmemLayout(
        q_bytes=buffers * 64 * q_panels(spec) * 128,
        k_bytes=config.num_stages * config.block_n * panel_count(spec.head_dim) * 128,
        v_bytes=config.num_stages * config.block_n * panel_count(spec.head_dim_v) * 128,
        control_bytes=CONTROL_BYTES,
        ones_bytes=_ONES_BYTES if config.tensor_sums else 0,
    )


def sums_apart(spec: KernelSpec, config: Sm90ForwardConfig) -> bool:
    """Whether ones are multiplied by instructions of their own: other columns may only follow a whole panel of V, and
    only where the instruction has not too many accumulators then.
    """
    together = (out_columns(spec) + 8) // 2
    return spec.head_dim_v % 64 != 0 or together > INSTRUCTION_LIMIT[config.warpgroups, config.ctas_per_sm]


def product_columns(spec: KernelSpec, config: Sm90ForwardConfig) -> int:
    """Of the instruction that multiplies V."""
    return out_columns(spec) + (8 if config.tensor_sums and not sums_apart(spec, config) else 0)


def register_split(spec: KernelSpec) -> Mapping[tuple[int, int], tuple[int, int]]:
    """Producer and consumer registers a thread, by math warpgroups and CTAs an SM."""
    return ROW_REGISTERS if by_rows(spec) else REGISTERS


def fragment_registers(spec: KernelSpec, config: Sm90ForwardConfig) -> int:
    """Registers a thread for S, P (packed) and O."""
    return config.block_n // 2 + config.block_n // 4 + out_columns(spec) // 2


def _tensor_sums_rejection(spec: KernelSpec) -> str | None:
    """The reason why no product sums up a spec's rows."""
    if by_rows(spec):
        return "rows that TMA cannot address are summed up in registers"
    if spec.head_dim_v > TENSOR_SUMS_COLUMNS:
        return f"head_dim_v {spec.head_dim_v} > {TENSOR_SUMS_COLUMNS}"
    return None


def _polynomial_rejection(spec: KernelSpec) -> str | None:
    """The reason why MUFU computes all of a spec's exponentials."""
    widest = max(spec.head_dim, spec.head_dim_v)
    if widest > POLYNOMIAL_COLUMNS:
        return f"a head dim of {widest} > {POLYNOMIAL_COLUMNS}: products take longer than exponentials"
    return None


class Sm90ForwardSpace:
    """Legal configs of the persistent Hopper forward."""

    target = "sm_90a"
    algorithm = Sm90ForwardConfig.algorithm
    template = "cuda/sm90/forward.cu.j2"
    config_type: type[TileConfig] = Sm90ForwardConfig

    def serves(self, spec: KernelSpec) -> str | None:
        """bf16 and fp16, any head dims."""
        return dtype_rejection(spec)

    def knobs(self, spec: KernelSpec) -> Mapping[str, tuple[Knob, ...]]:
        """The grid; most of it is cut by shared memory and registers."""
        return {
            "block_m": (128, 192, 64, 256),
            "block_n": (128, 112, 96, 80, 64, 48, 32, 144, 160, 176, 192, 208, 224, 240, 256),
            "num_stages": (2, 3, 4),
            "q_stages": (1, 2, 3),
            "ctas_per_sm": (1, 2, 3, 4),
            "epilogue": EPILOGUES,
            "tensor_sums": (False, True) if _tensor_sums_rejection(spec) is None else (False,),
            "alternate": (False, True) if spec.causal else (False,),
            "cluster": (1,) if by_rows(spec) else (1, 2),
            "polynomial": (0, 8) if max(spec.head_dim, spec.head_dim_v) <= _TUNED_POLYNOMIAL_COLUMNS else (0,),
        }

    def rejection(self, spec: KernelSpec, config: TileConfig) -> str | None:
        """Shared memory, accumulator registers and instruction shapes."""
        config = cast(Sm90ForwardConfig, config)
        groups = (config.warpgroups, config.ctas_per_sm)
        if config.block_m not in (64, 128, 192, 256):
            return f"block_m is 64 a math warpgroup, 1 to 4 of them: 64, 128, 192 or 256, got {config.block_m}"
        if config.block_n % 16 or not 16 <= config.block_n <= 256:
            return f"block_n must be a multiple of 16 from 16 to 256, as wgmma's shapes are, got {config.block_n}"
        if groups not in register_split(spec):
            return f"{config.ctas_per_sm} CTAs an SM with block_m {config.block_m} need more than 64K registers"
        if config.num_stages < 2 or config.q_stages not in (1, 2, 3):
            return f"num_stages must be at least 2 and q_stages 1 to 3, got {config.num_stages} and {config.q_stages}"
        if config.q_stages > 2 and (config.warpgroups > 1 or by_rows(spec)):
            return "q_stages 3: one math warpgroup (block_m 64), and rows that TMA can address"
        if config.epilogue not in EPILOGUES:
            return f"epilogue must be one of {', '.join(EPILOGUES)}, got {config.epilogue!r}"
        if config.epilogue != "staged" and by_rows(spec):
            return f"epilogue {config.epilogue}: rows that TMA cannot address leave from registers as it is"
        if config.tensor_sums and (reason := _tensor_sums_rejection(spec)):
            return f"tensor_sums: {reason}"
        if config.alternate and not spec.causal:
            return "alternate: all rows of a tile see as many keys, but with a causal mask"
        if config.alternate and config.warpgroups == 1:
            return "alternate: one math warpgroup takes all rows of a tile"
        if config.cluster not in (1, 2):
            return f"cluster must be 1 or 2 CTAs, got {config.cluster}"
        if config.cluster > 1 and by_rows(spec):
            return "cluster: rows that TMA cannot address are copied by the CTA that needs them"
        if config.cluster > 1 and config.warpgroups == 1:
            return "cluster: pairs are of CTAs with several math warpgroups"
        if config.polynomial not in _POLYNOMIALS:
            return f"polynomial must be one of {', '.join(map(str, _POLYNOMIALS))}, got {config.polynomial}"
        if config.polynomial and (reason := _polynomial_rejection(spec)):
            return f"polynomial: {reason}"
        if config.polynomial > config.block_n // 4:
            return f"polynomial: a thread has {config.block_n // 4} pairs of a block's scores < {config.polynomial}"
        smem = smem_layout(spec, config).total
        room = smem_room(config.ctas_per_sm)
        if smem > room:
            return f"shared memory {smem} B > {room} B a CTA with {config.ctas_per_sm} an SM"
        widest = max(config.block_n, product_columns(spec, config)) // 2
        if widest > INSTRUCTION_LIMIT[groups]:
            return (
                f"a product of {2 * widest} columns takes {widest} accumulators a thread > {INSTRUCTION_LIMIT[groups]}"
            )
        registers = fragment_registers(spec, config)
        limits = SUMS_FRAGMENT_LIMIT if config.tensor_sums else FRAGMENT_LIMIT
        limit = (ROW_FRAGMENT_LIMIT if by_rows(spec) else limits)[groups]
        if config.polynomial:
            limit = min(limit, POLYNOMIAL_FRAGMENT_LIMIT[groups])
        if registers > limit:
            return f"S, P and O take {registers} registers a thread > {limit} with {config.warpgroups} math warpgroups"
        return None

    def default(self, spec: KernelSpec) -> TileConfig:
        """The first legal one of a few tiles that did well in measurements (docs/performance-log.md)."""
        for config in _DEFAULT_TILES:
            if self.rejection(spec, config) is None:
                return config
        raise AssertionError(f"no default tile for {spec.name}")

    def context(self, spec: KernelSpec, config: TileConfig) -> Mapping[str, object]:
        """Panels, steps, registers and the shared-memory map."""
        config = cast(Sm90ForwardConfig, config)
        producer, consumer = register_split(spec)[config.warpgroups, config.ctas_per_sm]
        panels, panels_v = panel_count(spec.head_dim), panel_count(spec.head_dim_v)
        return {
            "warpgroups": config.warpgroups,
            "num_threads": 128 * (config.warpgroups + 1),
            "panels": panels,
            "panels_v": panels_v,
            "q_panels": q_panels(spec),
            "q_buffers": q_buffers(spec, config),
            "tile_slots": max(2, config.q_stages),
            "steps_qk": -(-spec.head_dim // 16),
            "out_columns": out_columns(spec),
            "headroom": HEADROOM[spec.dtype],
            "outgrown": OUTGROWN[spec.dtype],
            "element": ELEMENT[spec.dtype],
            "pack": f"pack_{spec.dtype}",
            "producer_registers": producer,
            "consumer_registers": consumer,
            "smem": smem_layout(spec, config),
            "split": False,
            "pack_sequences": False,
            "pair": config.cluster > 1,
            "by_rows": by_rows(spec),
            "sums_apart": sums_apart(spec, config),
        }

    def launch(self, spec: KernelSpec, config: TileConfig) -> Mapping[str, int]:
        """What runtime/cuda needs to encode tensor maps and launch."""
        config = cast(Sm90ForwardConfig, config)
        return {
            "block_m": config.block_m,
            "block_n": config.block_n,
            "num_threads": 128 * (config.warpgroups + 1),
            "smem_bytes": smem_layout(spec, config).total,
            "ctas_per_sm": config.ctas_per_sm,
            "causal": int(spec.causal),
            "by_rows": int(by_rows(spec)),
            "out_rows": int(config.epilogue != "staged"),
            "lse_entry": int(config.tensor_sums),
            "cluster": config.cluster,
        }

    def compile_flags(self, spec: KernelSpec, config: TileConfig) -> tuple[str, ...]:
        """None beyond the target's."""
        return ()

    def predicted_registers(self, spec: KernelSpec, config: TileConfig) -> int:
        """What ptxas reports: the launch allocation, 64K registers over the CTAs' threads, in steps of 8."""
        config = cast(Sm90ForwardConfig, config)
        return launch_registers(128 * (config.warpgroups + 1), config.ctas_per_sm)
