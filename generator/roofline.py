"""How long a config should take, by arithmetic: the busiest unit of an SM in a step, times the steps of an SM.

It ranks candidates before anything is compiled, and a search begins with the best of them; roofline_check.py says how
well, against measured records. A step is one block of keys for one CTA's query rows. Rates are an SM's, in its clocks.
"""

from __future__ import annotations

import heapq
import statistics
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

from jagtile.generator.oracle import torch_dtype
from jagtile.generator.spaces import sm90_backward_wide as wide
from jagtile.generator.spaces.sm90 import panel_count
from jagtile.generator.spaces.sm90_backward import Sm90BackwardConfig, dq_split
from jagtile.generator.spaces.sm90_forward import Sm90ForwardConfig
from jagtile.generator.spaces.sm90_packed import BLOCK_M, Sm90PackedConfig
from jagtile.generator.spaces.sm90_packed_backward import TILE_ROWS, Sm90PackedBackwardConfig
from jagtile.generator.spaces.sm90_split import Sm90SplitConfig
from jagtile.generator.spec import KernelSpec
from jagtile.generator.tile import TileConfig, Variant
from jagtile.generator.workloads import Workload
from jagtile.runtime.device import Facts
from jagtile.runtime.head_packs import packed_heads

# Hopper. The clock is what an H200 sustains under its power limit with random data (cuBLAS: 788 TFLOP/s, bf16).
CLOCK_GHZ = 1.5
MMA_FLOPS = 4096  # dense 16-bit
EXPONENTIALS = 16
SMEM_BYTES = 128
L2_BYTES = 40  # from L2 to shared memory by TMA, all SMs at once
ISSUE_SLOTS = 4
# Instructions of softmax: for an element of S, for a column of O, and for a step, of a warp.
_ISSUE = (4.5 / 2, 1.0, 90.0)
_POLYNOMIAL_ISSUE = 6 / 2  # more than MUFU takes, for an element
_OVERLAP_LOSS = 1.1  # of the limiting unit: nothing overlaps without gaps
_STEP_LATENCY = 200.0  # of a step that has its SM to itself: two products and a softmax wait for each other
_TILE_CLOCKS = 1500.0  # to begin and end a tile; half of it hides behind another tile where Q has two buffers
_FILL_CLOCKS = 800.0  # until a tile's first K and V are there; mostly hidden likewise
_HIDDEN_FILL = 0.3
_LAUNCH_US = 5.0
# The backward's: a step's share of the sum of its waits; a step's latency if the next one has begun; instructions of a
# warp for a query and for a step; clocks to begin and end a tile by buffers of K and V; bytes a clock of additions from
# registers.
_BACKWARD_LOSS = 0.95
_BACKWARD_HIDDEN = 0.85
_BACKWARD_ISSUE = (2.5, 160.0)
_BACKWARD_TILE_CLOCKS = {1: 4000.0, 2: 2500.0, 3: 2200.0}
_REDUCTION_BYTES = 64
_SIMULATED = 4  # tiles a CTA in the mean, up to which who takes which tile is played through
# Where the split forward cuts keys (templates/cuda/include/split_work_list.cuh): tiles of few rows, a part of all;
# others that are dearer than so many of a CTA's shares of the work and so many keys.
_FEW_ROWS, _UNCUT_SHARES, _UNCUT_KEYS = 4, 2, 1024
# What row sums by products beside a whole panel of V leave of a tile's time, as measured (docs/performance-log.md,
# section 27): they save more than the units' counts tell.
_TENSOR_SUMS = 0.98
# Of wide heads: bytes a clock of additions from registers, which nothing hides, and clocks to hand over a panel of dQ.
_WIDE_REDUCTION_BYTES = 21
_WIDE_HANDOVER = 90.0
_UNTOLD = 1.01  # a knob that no unit tells of, away from its default: tried when the others' best are known
_PACKED_BACKWARD_ISSUE = 12.0  # instructions of the packed backward for an element of P and dS, by reading its loop
_KNEE = 4  # how sharply the roof bends: where arithmetic and memory take alike they hide each other only in part


@dataclass(frozen=True)
class Roofline:
    """A predicted time and the unit that it is bound by."""

    us: float
    bound: str


def roofline(variant: Variant, workload: Workload, device: Facts) -> Roofline | None:
    """The prediction for a workload on a device; None for a template that there is no model of."""
    if isinstance(variant.config, Sm90ForwardConfig):
        return _hopper_forward(variant, variant.config, workload, device)
    if isinstance(variant.config, Sm90PackedConfig):
        return _hopper_packed(variant, variant.config, workload, device)
    if isinstance(variant.config, Sm90BackwardConfig):
        return _hopper_backward(variant, variant.config, workload, device)
    if isinstance(variant.config, wide.Sm90BackwardWideConfig):
        return _hopper_backward_wide(variant, variant.config, workload, device)
    if isinstance(variant.config, Sm90PackedBackwardConfig):
        return _hopper_packed_backward(variant, variant.config, workload, device)
    return None


def regime_roofline(variant: Variant, workloads: Sequence[Workload], device: Facts) -> Roofline | None:
    """The geometric mean of ``roofline`` over a regime's workloads, and what the first of them is bound by."""
    guesses = [guess for each in workloads if (guess := roofline(variant, each, device)) is not None]
    return Roofline(statistics.geometric_mean(guess.us for guess in guesses), guesses[0].bound) if guesses else None


def predictor(device: Facts, spec: KernelSpec, workloads: Sequence[Workload]) -> Callable[[TileConfig], float | None]:
    """``regime_roofline`` of a spec's configs in microseconds, None without a model."""

    def predict(config: TileConfig) -> float | None:
        guess = regime_roofline(Variant(device.target, spec, config), workloads, device)
        return None if guess is None else guess.us

    return predict


def _hopper_forward(variant: Variant, config: Sm90ForwardConfig, workload: Workload, device: Facts) -> Roofline:
    spec = variant.spec
    split = isinstance(config, Sm90SplitConfig)
    together = packed_heads(workload.num_heads // workload.num_heads_kv) if split else 1
    tiles = _tiles(workload, 64 // together, config.warpgroups * config.cluster)
    count = sum(tiles.values()) // together
    ctas = min(config.ctas_per_sm, max(1, -(-count // device.units)))  # that have something to do
    units = _step_clocks(config, spec.head_dim, spec.head_dim_v)
    bound = max(units, key=units.__getitem__)
    busy = units[bound] * _OVERLAP_LOSS * ctas
    alone = (units["tensor"] + units["exp"]) / config.warpgroups + _STEP_LATENCY
    step = max(busy, alone)
    element = torch_dtype(spec.dtype).itemsize
    hides = config.q_stages > 1
    ends = _TILE_CLOCKS + element * config.block_m * (spec.head_dim + spec.head_dim_v) / L2_BYTES
    fill = _FILL_CLOCKS * (_HIDDEN_FILL if hides else 1.0) / (config.num_stages - 1)
    end = ends * (0.5 if hides else 1.0) + fill

    slots = device.units * ctas // config.cluster
    items = [(-(-keys // config.block_n) * step + end, few, n // together) for (keys, few), n in tiles.items()]
    share = sum(own * n for own, _, n in items) / slots
    longest = max((own for own, _, _ in items), default=0.0)
    uncut = _UNCUT_SHARES * share + _UNCUT_KEYS / config.block_n * step
    if split and (longest > uncut or any(few for _, few, _ in items)):
        clocks = share  # pieces of the keys share out the work
    elif count > _SIMULATED * slots or share < _memory_us(variant, workload, device) * CLOCK_GHZ * 1e3:
        clocks = share if split else max(share, longest)  # who waits for memory leaves it to the others
    else:
        clocks = _busiest([(own, n) for own, _, n in items], slots)
    if config.tensor_sums and spec.head_dim_v % 64 == 0:
        clocks *= _TENSOR_SUMS
    compute_us = clocks / CLOCK_GHZ / 1e3
    return _with_memory(compute_us, "latency" if alone > busy else bound, variant, workload, device)


def _busiest(items: Sequence[tuple[float, int]], slots: int) -> float:
    """Clocks of the CTA that ends last: (clocks, how many) of tiles that ``slots`` CTAs take, the dearest first."""
    ends = [0.0] * slots
    for own, n in sorted(items, reverse=True):
        for _ in range(n):
            heapq.heapreplace(ends, ends[0] + own)
    return max(ends)


def _hopper_packed(variant: Variant, config: Sm90PackedConfig, workload: Workload, device: Facts) -> Roofline:
    """Tiles of 64 packed rows and a head; each CTA has its run of them. A tile's steps wait for each other, while
    CTAs overlap each other.
    """
    spec, ctas = variant.spec, config.ctas_per_sm
    alike = Sm90ForwardConfig(BLOCK_M, config.block_n, config.num_stages, q_stages=1, ctas_per_sm=ctas)
    units = _step_clocks(alike, spec.head_dim, spec.head_dim_v)
    bound = max(units, key=units.__getitem__)
    busy = units[bound] * _OVERLAP_LOSS * ctas
    alone = units["tensor"] + units["exp"] + units["issue"] + _STEP_LATENCY
    hides = config.num_stages > 1
    tile = _TILE_CLOCKS * (0.5 if hides else 1.0) + _FILL_CLOCKS * (_HIDDEN_FILL if hides else 1.0)
    clocks, pairs = 0.0, 0
    for keys, tiles in packed_tiles(workload).items():
        clocks += tiles * (-(-keys // config.block_n) * max(busy, alone) + tile)
        pairs += tiles
    slots = device.units * ctas
    runs = -(-pairs // slots) * slots / max(pairs, 1)  # the longest run over the mean one
    compute_us = clocks / slots * runs / CLOCK_GHZ / 1e3
    return _with_memory(compute_us, "latency" if alone > busy else bound, variant, workload, device)


def _hopper_packed_backward(
    variant: Variant, config: Sm90PackedBackwardConfig, workload: Workload, device: Facts
) -> Roofline:
    """Tiles of 64 packed queries and a head, of 64 packed keys and a kv head; each CTA has its run of both."""
    dim, dim_v, ctas = variant.spec.head_dim, variant.spec.head_dim_v, config.ctas_per_sm
    elements = TILE_ROWS * config.block_n
    exp, issue = elements / EXPONENTIALS, elements * _PACKED_BACKWARD_ISSUE / 32 / ISSUE_SLOTS
    l2 = 2 * config.block_n * (dim + dim_v) / L2_BYTES

    def step(columns: int, products: int) -> float:
        """A product waits for the one before; CTAs overlap each other."""
        tensor = 2 * elements * columns / MMA_FLOPS
        busy = max(tensor, exp, issue, l2) * _OVERLAP_LOSS * ctas
        return max(busy, tensor + exp + issue + products * _STEP_LATENCY)

    hides = config.num_stages > 1
    tile = _TILE_CLOCKS * (0.5 if hides else 1.0) + _FILL_CLOCKS * (_HIDDEN_FILL if hides else 1.0)
    of_queries, of_keys = step(2 * dim + dim_v, 2), step(2 * (dim + dim_v), 3)
    group = workload.num_heads // workload.num_heads_kv
    slots = device.units * ctas

    def longest_run(tiles: Counter[int], each: float) -> float:
        clocks = sum(count * (-(-seen // config.block_n) * each + tile) for seen, count in tiles.items())
        return clocks / max(tiles.total(), 1) * -(-tiles.total() // slots)

    queries, keys = packed_tiles(workload), packed_key_tiles(workload)
    runs = longest_run(queries, of_queries), longest_run(keys, group * of_keys)
    side_by_side = queries.total() + keys.total() <= slots
    compute_us = (max(runs) if side_by_side else sum(runs)) / CLOCK_GHZ / 1e3
    rows = (workload.total_q * workload.num_heads + workload.total_k * workload.num_heads_kv) * (dim + dim_v)
    passes = 2 * rows + 2 * 2 * workload.total_q * workload.num_heads * dim_v  # gradients written, out and dout read
    found = _with_memory(compute_us, "latency", variant, workload, device)
    return Roofline(found.us + passes / (device.bandwidth_gbs or float("inf")) / 1e3, found.bound)


def _hopper_backward(variant: Variant, config: Sm90BackwardConfig, workload: Workload, device: Facts) -> Roofline:
    """Every warpgroup has a part of the keys, and all of their products."""
    spec, ctas = variant.spec, config.ctas_per_sm
    units = _backward_step_clocks(config, spec)
    hidden = config.overlap or config.late_dq or config.late_dk  # the last one's was a guess, and is too good
    alone = (units["tensor"] + units["exp"]) * (_BACKWARD_HIDDEN if hidden else 1)
    waits = {**{unit: clocks * ctas for unit, clocks in units.items()}, "latency": alone + 2 * _STEP_LATENCY}
    step = _together(waits)
    if config.dq == "red":
        step += config.block_m * spec.head_dim * 4 / _REDUCTION_BYTES
    step *= _UNTOLD ** ((config.claim_ahead > 0) + (config.row_buffers != 2) + (config.row_warps != 4))
    tile = _BACKWARD_TILE_CLOCKS[config.kv_stages]
    compute_us = _key_tiles_us(workload, config.block_m, config.block_n, step, tile, device.units * ctas)
    return _with_passes(compute_us, max(waits, key=waits.__getitem__), variant, workload, device)


def _hopper_backward_wide(
    variant: Variant, config: wide.Sm90BackwardWideConfig, workload: Workload, device: Facts
) -> Roofline:
    """One warpgroup makes dV, the other dK and dQ: the second's own work is the latency of a step."""
    spec = variant.spec
    waits = _wide_step_clocks(config, spec)
    step = _together(waits)
    if config.dq == "red":
        step += wide.BLOCK_M * spec.head_dim * 4 / _WIDE_REDUCTION_BYTES
    else:
        step += -(-spec.head_dim // wide.dq_buffers(spec, config).columns) * _WIDE_HANDOVER
    tile = _BACKWARD_TILE_CLOCKS[1]
    compute_us = _key_tiles_us(workload, wide.BLOCK_M, config.block_n, step, tile, device.units)
    return _with_passes(compute_us, max(waits, key=waits.__getitem__), variant, workload, device)


def _together(waits: Mapping[str, float]) -> float:
    """Clocks of a step of a backward: its waits hide each other but in part."""
    return float(sum(clocks**_KNEE for clocks in waits.values()) ** (1 / _KNEE)) * _BACKWARD_LOSS


def _key_tiles_us(workload: Workload, block_m: int, block_n: int, step: float, tile: float, slots: int) -> float:
    """Tiles of keys and a kv head, whose steps are blocks of queries and a head, shared out among ``slots``."""
    group = workload.num_heads // workload.num_heads_kv
    clocks = longest = 0.0
    for queries, tiles in _key_tiles(workload, block_n).items():
        own = -(-queries // block_m) * group * step + tile
        clocks += tiles * own
        longest = max(longest, own)
    return max(clocks / slots, longest) / CLOCK_GHZ / 1e3


def _with_passes(compute_us: float, bound: str, variant: Variant, workload: Workload, device: Facts) -> Roofline:
    """And the passes over rows: out and dout read, sums zeroed and read, dq written."""
    rows = workload.total_q * workload.num_heads
    passes = rows * (2 * 2 * variant.spec.head_dim_v + 10 * variant.spec.head_dim)
    passes_us = passes / (device.bandwidth_gbs or float("inf")) / 1e3
    found = _with_memory(compute_us, bound, variant, workload, device)
    return Roofline(found.us + passes_us, found.bound)


def _backward_step_clocks(config: Sm90BackwardConfig, spec: KernelSpec) -> Mapping[str, float]:
    """Clocks that each unit of the SM is busy with one step of one CTA."""
    dim, dim_v = spec.head_dim, spec.head_dim_v
    groups, queries, keys = config.warpgroups, config.block_m, config.block_n
    element, per_query, per_step = 2, *_BACKWARD_ISSUE
    polynomial = _spared(config.polynomial)
    per_query += polynomial * _POLYNOMIAL_ISSUE
    # K and V are A operands of S and dP; Q and dO are read for two products each, by every warpgroup.
    read = element * keys * (dim * ("k" not in config.held) + dim_v * ("v" not in config.held))
    read += element * groups * queries * 2 * (dim + dim_v)
    scores, values = element * keys * queries, element * keys * dim
    split = dq_split(spec, config)
    read += groups * scores + values if split == "columns" else scores + (groups if split == "rows" else 1) * values
    staged = 2 * 4 * queries * dim if config.dq == "bulk" else 0
    fill = element * queries * (dim + dim_v)
    return {
        "tensor": 2 * queries * keys * (3 * dim + 2 * dim_v) / MMA_FLOPS,
        "exp": queries * keys * (1 - polynomial) / EXPONENTIALS,
        "smem": (read + scores + staged + fill) / SMEM_BYTES,
        "issue": groups * (per_query * queries + per_step) * 4 / ISSUE_SLOTS,
        "l2": fill / L2_BYTES,
    }


def _wide_step_clocks(config: wide.Sm90BackwardWideConfig, spec: KernelSpec) -> Mapping[str, float]:
    """Clocks that each unit of the SM is busy with one step, and those of dK's warpgroup alone."""
    dim, dim_v, keys, queries, element = spec.head_dim, spec.head_dim_v, config.block_n, wide.BLOCK_M, 2
    panels, panels_v = panel_count(dim), panel_count(dim_v)  # dK and dV have whole panels of 64 rows
    scores, column = element * queries * keys, 2 * queries * keys / MMA_FLOPS  # a column of a product: its clocks
    own_dq = dim * (1 - config.dq_panels / panels)
    exp = queries * keys / EXPONENTIALS
    # S and dP: Q and dO, K and V. dV and dK: dO and Q, and P or dS for every panel. dQ: K, and dS unless in registers.
    read = element * (queries + keys) * (dim + dim_v)
    read += (panels + panels_v) * (element * 64 * queries + scores)
    read += element * keys * dim + (0 if wide.ds_in_registers(spec, config) else panels * scores)
    staged = 2 * 4 * queries * dim if config.dq == "bulk" else 0
    fill = element * queries * (dim + dim_v)
    return {
        "tensor": column * (2 * dim + dim_v + 64 * (panels + panels_v)),
        "exp": exp,
        "smem": (read + 2 * scores + staged + fill) / SMEM_BYTES,
        "l2": fill / L2_BYTES,
        "latency": column * (dim_v + own_dq + 64 * panels) + exp + 2 * _STEP_LATENCY,
    }


def _with_memory(compute_us: float, bound: str, variant: Variant, workload: Workload, device: Facts) -> Roofline:
    """The roof's two sides, and the launch."""
    memory_us = _memory_us(variant, workload, device)
    if memory_us > compute_us:
        bound = "memory"
    return Roofline((compute_us**_KNEE + memory_us**_KNEE) ** (1 / _KNEE) + _LAUNCH_US, bound)


def _memory_us(variant: Variant, workload: Workload, device: Facts) -> float:
    """Of each input and output once."""
    element = torch_dtype(variant.spec.dtype).itemsize
    rows = workload.total_q * workload.num_heads * variant.spec.head_dim_v
    return (workload.input_bytes(element) + element * rows) / (device.bandwidth_gbs or float("inf")) / 1e3


def _spared(polynomial: int) -> float:
    """The share of elements that is spared MUFU."""
    return 1 / polynomial if polynomial else 0.0


def _step_clocks(config: Sm90ForwardConfig, dim: int, dim_v: int) -> Mapping[str, float]:
    """Clocks that each unit of the SM is busy with one step of one CTA."""
    groups, rows, keys = config.warpgroups, config.block_m, config.block_n
    padded = -(-dim // 16) * 16  # wgmma's depth
    element_slots, column_slots, step_slots = _ISSUE
    polynomial = _spared(config.polynomial)
    element_slots += polynomial * _POLYNOMIAL_ISSUE
    read = groups * (128 * dim + 2 * keys * dim) + groups * 2 * keys * dim_v  # each warpgroup reads all of K and V
    fill = 2 * keys * (dim + dim_v)
    return {
        "tensor": 2 * rows * keys * (padded + dim_v) / MMA_FLOPS,
        "exp": rows * keys * (1 - polynomial) / EXPONENTIALS,
        "smem": (read + fill) / SMEM_BYTES,
        "issue": groups * (element_slots * keys + column_slots * dim_v / 2 + step_slots) * 4 / ISSUE_SLOTS,
        "l2": fill / L2_BYTES,
    }


@lru_cache(maxsize=64)
def _tiles(workload: Workload, rows: int, warpgroups: int) -> Counter[tuple[int, bool]]:
    """How many tiles of ``rows`` queries a warpgroup see how many keys, and are of few rows, over all heads."""
    block_m = rows * warpgroups
    found: Counter[tuple[int, bool]] = Counter()
    for len_q, len_k in zip(workload.seqlens_q, workload.seqlens_k, strict=True):
        diagonal = len_k - len_q if workload.causal_alignment == "bottom_right" else 0
        lead = -(-len_q // rows) * -rows % block_m if workload.is_causal else 0  # rows before the first tile's
        for first in range(-lead, len_q, block_m):
            seen = min(len_k, max(0, min(len_q, first + block_m) + diagonal)) if workload.is_causal else len_k
            found[seen, _FEW_ROWS * len_q <= block_m] += workload.num_heads
    return found


@lru_cache(maxsize=64)
def _key_tiles(workload: Workload, block_n: int) -> Counter[int]:
    """How many tiles of keys are seen by how many queries, over all kv heads."""
    found: Counter[int] = Counter()
    for len_q, len_k in zip(workload.seqlens_q, workload.seqlens_k, strict=True):
        diagonal = len_k - len_q if workload.causal_alignment == "bottom_right" else 0
        for first in range(0, len_k, block_n):
            unseen = max(0, first - diagonal) if workload.is_causal else 0
            found[max(0, len_q - unseen)] += workload.num_heads_kv
    return found


@lru_cache(maxsize=64)
def packed_tiles(workload: Workload) -> Counter[int]:
    """How many tiles of packed rows see how many keys, over all heads."""
    ends_q = list(accumulate(workload.seqlens_q))
    begins_k = list(accumulate(workload.seqlens_k, initial=0))
    found: Counter[int] = Counter()
    for first in range(0, workload.total_q, BLOCK_M):
        last = min(first + BLOCK_M, workload.total_q) - 1
        begin, end = bisect_right(ends_q, first), bisect_right(ends_q, last)
        seen = workload.seqlens_k[end]
        if workload.is_causal:
            len_q = workload.seqlens_q[end]
            diagonal = seen - len_q if workload.causal_alignment == "bottom_right" else 0
            seen = min(seen, max(0, last - (ends_q[end] - len_q) + 1 + diagonal))
        found[begins_k[end] + seen - begins_k[begin]] += workload.num_heads
    return found


@lru_cache(maxsize=64)
def packed_key_tiles(workload: Workload) -> Counter[int]:
    """How many tiles of packed keys are seen by how many queries, over all kv heads."""
    ends_k = list(accumulate(workload.seqlens_k))
    begins_q = list(accumulate(workload.seqlens_q, initial=0))
    found: Counter[int] = Counter()
    for first in range(0, workload.total_k, TILE_ROWS):
        last = min(first + TILE_ROWS, workload.total_k) - 1
        begin, end = bisect_right(ends_k, first), bisect_right(ends_k, last)
        blind = 0  # queries of the first key's sequence that come before those that see it
        if workload.is_causal:
            len_q, len_k = workload.seqlens_q[begin], workload.seqlens_k[begin]
            diagonal = len_k - len_q if workload.causal_alignment == "bottom_right" else 0
            blind = min(len_q, max(0, first - (ends_k[begin] - len_k) - diagonal))
        found[begins_q[end + 1] - begins_q[begin] - blind] += workload.num_heads_kv
    return found


def speed_of_light(spec: KernelSpec, flops: int, rows_q: int, rows_k: int, device: Facts) -> Roofline | None:
    """The least time that any kernel could take: what the busiest of tensor cores, exponentials and memory needs alone.

    ``flops``: of unmasked elements, in the spec's direction; ``rows_q`` and ``rows_k``: tokens times heads. Every
    tensor crosses the memory's bus once. None where the device's rates are not known: this is no Hopper GPU.
    """
    if device.compute_capability != "9.0" or spec.dtype == "fp32":
        return None
    dim, dim_v = spec.head_dim, spec.head_dim_v
    forward = spec.direction == "fwd"
    elements = flops / (2 * (dim + dim_v) if forward else 2 * (3 * dim + 2 * dim_v))
    tensors = (rows_q + rows_k) * (dim + dim_v) * (1 if forward else 2)  # a backward: each and its gradient
    clocks = {"tensor": flops / MMA_FLOPS, "exp": elements / EXPONENTIALS}
    us = {unit: each / device.units / CLOCK_GHZ / 1e3 for unit, each in clocks.items()}
    if device.bandwidth_gbs:
        us["memory"] = torch_dtype(spec.dtype).itemsize * tensors / device.bandwidth_gbs / 1e3
    bound = max(us, key=us.__getitem__)
    return Roofline(us[bound], bound)
