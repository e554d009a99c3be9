"""Tile configs of templates/cpu/forward.cpp.j2: the register-blocked forward for any CPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, cast

from jagtile.generator.spec import KernelSpec
from jagtile.generator.tile import Knob, TileConfig
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
ELEMENT = {"fp32": "Fp32", "bf16": "Bf16", "fp16": "Fp16"}


@dataclass(frozen=True, order=True)
class CpuForwardConfig(TileConfig):
    """Knobs of the CPU forward."""

    algorithm: ClassVar[str] = "tiled"
    isa: str = field(metadata={"short": ""})  # instruction set, see runtime/isa.py
    block_m: int = field(metadata={"short": "m"})  # query rows a work item: they share one copy of K and V
    block_n: int = field(metadata={"short": "n"})  # keys a step
    vectors: int = field(metadata={"short": "v"})  # of query rows in a tile
    rows: int = field(metadata={"short": "r"})  # most rows of a product in registers, ``vectors`` registers each

    @property
    def lanes(self) -> int:
        """Query rows a vector."""
        return INSTRUCTION_SETS[self.isa].vector_bytes // 4


@dataclass(frozen=True)
class Scratch:
    """What a thread keeps, in scalars, rows and bytes."""

    pairs: bool  # operands are pairs of bf16
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
    pairs = spec.dtype == "bf16" and config.isa == "avx512bf16"
    depth = _ceil(spec.head_dim, 2) if pairs else spec.head_dim
    groups_v = _ceil(spec.head_dim_v, config.rows)
    rows_v = _ceil(spec.head_dim_v, groups_v)
    out_rows = max(groups_v * rows_v, _round_up(spec.head_dim_v, config.lanes))
    score_rows = _round_up(config.block_n, config.rows)
    v_rows = config.block_n // 2 if pairs else config.block_n
    pitch_k, pitch_v = _round_up(depth, config.lanes), out_rows
    return Scratch(
        pairs=pairs,
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
        score_bytes=score_rows * config.vectors * config.lanes * 4,
    )


def _ceil(value: int, by: int) -> int:
    return -(-value // by)


def _round_up(value: int, to: int) -> int:
    return _ceil(value, to) * to


class CpuForwardSpace:
    """Legal configs of the CPU forward."""

    target = "cpu"
    algorithm = CpuForwardConfig.algorithm
    template = "cpu/forward.cpp.j2"
    config_type: type[TileConfig] = CpuForwardConfig

    def serves(self, spec: KernelSpec) -> str | None:
        """Every spec."""
        return None

    def knobs(self, spec: KernelSpec) -> Mapping[str, tuple[Knob, ...]]:
        """The grid. AVX2 is worth a try on CPUs that lower their clock for wider vectors."""
        host = host_isa()
        return {
            "isa": (host, "avx2") if host.startswith("avx512") else (host,),
            "block_m": (256, 128, 384, 192, 64),
            "block_n": (128, 256, 96, 64),
            "vectors": (2, 3, 4, 1),
            "rows": (13, 8, 6, 14, 4, 16),
        }

    def rejection(self, spec: KernelSpec, config: TileConfig) -> str | None:
        """Instruction set, registers, and what must stay in L1 and L2."""
        config = cast(CpuForwardConfig, config)
        if config.isa not in INSTRUCTION_SETS:
            return f"isa must be one of {', '.join(INSTRUCTION_SETS)}, got {config.isa!r}"
        if not supports(host_isa(), config.isa):
            return f"this machine ({host_isa()}) does not run {config.isa}"
        if min(config.vectors, config.rows) < 1:
            return f"vectors and rows must be at least 1, got {config.vectors} and {config.rows}"
        tile = config.vectors * config.lanes
        if config.block_m < tile or config.block_m % tile:
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
        scratch = scratch_of(spec, config)
        score_bytes = config.block_n * tile * 4
        if score_bytes > SCORE_BYTES:
            return f"a tile of scores takes {score_bytes} B > {SCORE_BYTES} B of L1"
        if scratch.total > SCRATCH_BYTES:
            return f"scratch takes {scratch.total} B a thread > {SCRATCH_BYTES} B of L2"
        return None

    def default(self, spec: KernelSpec) -> TileConfig:
        """The host's best instruction set, registers nearly full, the largest blocks that L2 holds."""
        isa = host_isa()
        vectors, rows = (2, 13) if INSTRUCTION_SETS[isa].registers == 32 else (2, 6)
        for block_m in (256, 128):
            config = CpuForwardConfig(isa, block_m, 128, vectors, rows)
            if self.rejection(spec, config) is None:
                return config
        raise AssertionError(f"no default tile for {spec.name}")

    def context(self, spec: KernelSpec, config: TileConfig) -> Mapping[str, object]:
        """Shapes of the scratch, the operands' type and the polynomial's degree."""
        config = cast(CpuForwardConfig, config)
        scratch = scratch_of(spec, config)
        return {
            "pairs": scratch.pairs,
            "scratch": scratch,
            "element": ELEMENT[spec.dtype],
            "lanes": config.lanes,
            "tile_rows": config.vectors * config.lanes,
            "block_vectors": config.block_m // config.lanes,
            "chunk": "2 * kLanes" if scratch.pairs else "kLanes",
            "sign_bits": "0x80008000" if scratch.pairs else "0x80000000",
            "degree": 5 if spec.dtype == "fp32" else 4,
            **{
                name: getattr(scratch, name)
                for name in ("depth", "pitch_k", "pitch_v", "groups_v", "rows_v", "out_rows", "score_rows", "v_rows")
            },
        }

    def launch(self, spec: KernelSpec, config: TileConfig) -> Mapping[str, int]:
        """Nothing: the launcher passes what the parameter block holds."""
        return {}

    def compile_flags(self, spec: KernelSpec, config: TileConfig) -> tuple[str, ...]:
        """The instruction set's own, and fused multiply-adds wherever it has them."""
        return ("-ffp-contract=fast", *INSTRUCTION_SETS[cast(CpuForwardConfig, config).isa].flags)

    def predicted_registers(self, spec: KernelSpec, config: TileConfig) -> int:
        """The target has no such limit a thread."""
        return 0
