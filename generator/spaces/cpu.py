"""What the CPU's spaces share: instruction sets, the knobs of register-blocked tiles, and what every tile must obey."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, cast

from jagtile.generator.spec import Direction, KernelSpec
from jagtile.generator.tile import TileConfig
from jagtile.runtime.isa import host_isa, supports

SCORE_BYTES = 32 * 1024  # the smallest L1 in use: each product streams the tile of scores once a register block
SCRATCH_BYTES = 1024 * 1024  # half of what a core's L2 has where L2 is 2 MiB, all of it where it is 1 MiB


class InstructionSet(NamedTuple):
    """What a tile must know of an instruction set."""

    vector_bytes: int
    registers: int
    flags: tuple[str, ...]


_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512")
INSTRUCTION_SETS = {
    "avx512bf16": InstructionSet(64, 32, (*_AVX512, "-mavx512bf16")),
    "avx512": InstructionSet(64, 32, _AVX512),
    "avx2": InstructionSet(32, 16, _AVX2),
    "neon": InstructionSet(16, 32, ()),
    "generic": InstructionSet(16, 16, ()),
}
_ELEMENT = {"fp32": "Fp32", "bf16": "Bf16", "fp16": "Fp16"}


@dataclass(frozen=True, order=True)
class CpuTileConfig(TileConfig):
    """Knobs of the CPU's templates."""

    isa: str = field(metadata={"short": ""})  # instruction set, see runtime/isa.py
    block_m: int = field(metadata={"short": "m"})  # most query rows that are worked on together
    block_n: int = field(metadata={"short": "n"})  # keys a step
    vectors: int = field(metadata={"short": "v"})  # of query rows in a tile
    rows: int = field(metadata={"short": "r"})  # most rows of a product in registers, ``vectors`` registers each

    @property
    def lanes(self) -> int:
        """Query rows a vector."""
        return INSTRUCTION_SETS[self.isa].vector_bytes // 4

    @property
    def tile_rows(self) -> int:
        """Query rows a tile."""
        return self.vectors * self.lanes

    def multiplies_pairs(self, spec: KernelSpec) -> bool:
        """Whether the products' operands are pairs of bf16 rather than fp32 numbers."""
        return spec.dtype == "bf16" and self.isa == "avx512bf16"


class CpuSpace:
    """The part of a space that does not depend on the template."""

    target = "cpu"
    direction: ClassVar[Direction]
    dropout: ClassVar[bool] = True

    def serves(self, spec: KernelSpec) -> str | None:
        """Every spec."""
        return None

    def isas(self) -> tuple[str, ...]:
        """Those worth a try here: AVX2 too on CPUs that lower their clock for wider vectors."""
        host = host_isa()
        return (host, "avx2") if host.startswith("avx512") else (host,)

    def tile_rejection(self, config: CpuTileConfig) -> str | None:
        """Instruction set, whole tiles, registers, and the tile of scores that must stay in L1."""
        if config.isa not in INSTRUCTION_SETS:
            return f"isa must be one of {', '.join(INSTRUCTION_SETS)}, got {config.isa!r}"
        if not supports(host_isa(), config.isa):
            return f"this machine ({host_isa()}) does not run {config.isa}"
        if min(config.vectors, config.rows) < 1:
            return f"vectors and rows must be at least 1, got {config.vectors} and {config.rows}"
        if config.block_m < config.tile_rows or config.block_m % config.tile_rows:
            return (
                f"block_m must be a multiple of a tile's {config.vectors} x {config.lanes} rows, got {config.block_m}"
            )
        if config.block_n < 2 or config.block_n % 2:
            return f"block_n must be even (keys are multiplied in pairs) and at least 2, got {config.block_n}"
        registers = config.rows * config.vectors + config.vectors + 1
        if registers > INSTRUCTION_SETS[config.isa].registers:
            return (
                f"{config.rows} x {config.vectors} sums, {config.vectors} operands and a scalar take {registers} "
                f"registers > {INSTRUCTION_SETS[config.isa].registers} of {config.isa}"
            )
        score_bytes = config.block_n * config.tile_rows * 4
        if score_bytes > SCORE_BYTES:
            return f"a tile of scores takes {score_bytes} B > {SCORE_BYTES} B of L1"
        return None

    def tile_context(self, spec: KernelSpec, config: CpuTileConfig) -> dict[str, object]:
        """The operands' type and the polynomial's degree."""
        return {
            "pairs": config.multiplies_pairs(spec),
            "element": _ELEMENT[spec.dtype],
            "lanes": config.lanes,
            "tile_rows": config.tile_rows,
            "block_vectors": config.block_m // config.lanes,
            "degree": 5 if spec.dtype == "fp32" else 4,
        }

    def launch(self, spec: KernelSpec, config: TileConfig) -> Mapping[str, int]:
        """Nothing: the launcher passes what the parameter block holds."""
        return {}

    def compile_flags(self, spec: KernelSpec, config: TileConfig) -> tuple[str, ...]:
        """The instruction set's own, and fused multiply-adds wherever it has them."""
        return ("-ffp-contract=fast", *INSTRUCTION_SETS[cast(CpuTileConfig, config).isa].flags)

    def predicted_registers(self, spec: KernelSpec, config: TileConfig) -> int:
        """The target has no such limit a thread."""
        return 0


def scratch_rejection(total: int) -> str | None:
    """Why a thread's scratch is too large, None where L2 holds it."""
    return f"scratch takes {total} B a thread > {SCRATCH_BYTES} B of L2" if total > SCRATCH_BYTES else None


def ceil_div(value: int, by: int) -> int:
    """The quotient, rounded up."""
    return -(-value // by)


def round_up(value: int, to: int) -> int:
    """To a multiple."""
    return ceil_div(value, to) * to
