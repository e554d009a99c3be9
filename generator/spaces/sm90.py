"""What the Hopper spaces share."""

from __future__ import annotations

from jagtile.generator.spec import KernelSpec

SMEM_BYTES = 227 * 1024  # what one CTA may have
SMEM_BYTES_PER_SM = 228 * 1024  # of which each resident CTA takes 1 KB more than it asks for
CONTROL_BYTES = 1024  # tile slots and barriers
ELEMENT = {"bf16": "bf16", "fp16": "f16"}
# (producer, consumer) registers a thread after reallocation, by (math warpgroups, CTAs an SM): setmaxnreg takes
# multiples of 8, and the sum over warpgroups must not exceed what the launch allocates.
REGISTERS = {
    (1, 1): (56, 256),
    (1, 2): (40, 216),
    (1, 3): (24, 136),
    (1, 4): (24, 104),
    (2, 1): (24, 240),
    (3, 1): (32, 160),
    (4, 1): (24, 112),
}

# Kernels of one math warpgroup and a warp that loads, without reallocation: registers a thread, by CTAs an SM. They are
# dealt out to whole groups of four warps, and a CTA has five warps.
FIVE_WARPS = 128 + 32
FIVE_WARP_REGISTERS = {1: 255, 2: 168, 3: 128, 4: 96}
PANEL = 64  # columns: 128 bytes, as wide as the swizzle


def panel_count(columns: int) -> int:
    """Panels of so many columns."""
    return -(-columns // PANEL)


def panel_widths(columns: int) -> list[int]:
    """Columns of each of these panels; the last may be narrower."""
    return [min(PANEL, columns - first) for first in range(0, columns, PANEL)]


def smem_room(ctas_per_sm: int) -> int:
    """Bytes of shared memory that a CTA may ask for."""
    return SMEM_BYTES if ctas_per_sm == 1 else SMEM_BYTES_PER_SM // ctas_per_sm - 1024


def launch_registers(threads: int, ctas_per_sm: int) -> int:
    """What ptxas reports: the launch allocation, 64K registers over the CTAs' threads, in steps of 8."""
    return min(255, 65536 // (threads * ctas_per_sm) // 8 * 8)


def dtype_rejection(spec: KernelSpec) -> str | None:
    """The reason why tensor cores can't serve the spec."""
    return None if spec.dtype in ELEMENT else f"dtype must be bf16 or fp16 on sm_90a, got {spec.dtype}"


def tma_rejection(spec: KernelSpec) -> str | None:
    """The reason why tensor cores and TMA can't serve the spec."""
    if reason := dtype_rejection(spec):
        return reason
    for name, value in (("head_dim", spec.head_dim), ("head_dim_v", spec.head_dim_v)):
        if value % 8:
            return f"{name} must be a multiple of 8 (its tiles are copied by TMA, in steps of 16 bytes), got {value}"
    return None
