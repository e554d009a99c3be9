"""Mistakes put into the generated forward, one at a time: the emulator must not let any of them pass."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from emulator import kernels
from emulator.driver import EmulatorError, emulated

from jagtile.generator.oracle import errors, reference, tolerance
from jagtile.generator.spaces.sm90_forward import Sm90ForwardConfig
from jagtile.generator.spec import KernelSpec
from jagtile.generator.tile import Variant
from jagtile.generator.workloads import Workload
from jagtile.runtime import cuda

SPEC = KernelSpec.parse("fwd_bf16_d64_causal")
VARIANT = Variant("sm_90a", SPEC, Sm90ForwardConfig(block_m=128, block_n=16, num_stages=2, q_stages=2, ctas_per_sm=1))
LENGTHS = (130, 0, 200, 5)
LENGTHS_K = (100, 70, 240, 64)
WRONG = None  # no report, but numbers that the oracle does not agree with

RELEASE_K = "if (leader) control.k.arrive_empty(k_at);"
WAIT_S = "wgmma_wait<0>();\n        pin_registers(scores);\n"
MISTAKES: dict[str, tuple[str, str, str | None]] = {
    "scores are read before their product's wait": (
        WAIT_S,
        "pin_registers(scores);\n",
        "written between wgmma and its wait|not ordered after the read by wgmma",
    ),
    "K is handed back before its product's wait": (
        f"{WAIT_S}        {RELEASE_K}",
        f"{RELEASE_K}\n{WAIT_S}",
        "write by a copy .* not ordered after the read by wgmma",
    ),
    "probabilities are overwritten while a product reads them": (
        "hold_until_computed(sum[0] + sum[1], smem_address(&control.never_written));",
        "pack_fragments<pack_bf16>(probabilities, scores);",
        WRONG,
    ),
    "no wgmma.fence": (
        "wgmma_descriptor(b, 16, 1024);\n  wgmma_fence();\n",
        "wgmma_descriptor(b, 16, 1024);\n",
        "since the last wgmma.fence",
    ),
    "a descriptor's step inside of a row is wrong": ("step % 4 * 32;", "step % 4 * 16;", WRONG),
    "V is not transposed": ("%36, 1, 1, 1, 1;", "%36, 1, 1, 1, 0;", "not ordered"),
    "a barrier expects half of the bytes": (
        "mbarrier_expect_bytes(full, kTilePanels * kKVPanelBytes);",
        "mbarrier_expect_bytes(full, kTilePanels * kKVPanelBytes / 2);",
        "deadlock",
    ),
    "a loader does not wait for an empty buffer": (
        "      ring.wait_empty(at);\n",
        "",
        "not ordered after the read by wgmma|arrivals more than",
    ),
    "a wait has the other parity": (
        "mbarrier_wait(smem_address(&empty[at.slot]), at.parity ^ 1)",
        "mbarrier_wait(smem_address(&empty[at.slot]), at.parity)",
        "deadlock",
    ),
    "barriers are not fenced for copies": ("    mbarrier_init_fence();\n", "", "without fence.mbarrier_init"),
    "nobody waits for barriers to be made": (
        "  }\n  __syncthreads();\n\n  if (warp",
        "  }\n\n  if (warp",
        "no initialised",
    ),
    "O is stored without a proxy fence": (
        "    fence_async_proxy();\n",
        "",
        "a tensor store .* without fence.proxy.async",
    ),
    "O is stored before all warps have staged it": (
        "fence_async_proxy();\n    named_barrier_sync(1 + warpgroup, 128);  // O is staged",
        "fence_async_proxy();  // O is staged",
        "read by a bulk store of warp .* not ordered after the write by warp",
    ),
    "Q is handed back while O leaves through it": (
        "      tma_store_wait_read();\n      mbarrier_arrive(stored_q);",
        "      mbarrier_arrive(stored_q);",
        "not ordered after the read by a bulk store",
    ),
    "O is staged without the swizzle": ("(columns % 8 ^ lane % 8) * 16,\n", "columns % 8 * 16,\n", WRONG),
    "loaders keep their registers": ("    shrink_registers<24>();\n", "", "deadlock.*setmaxnreg.inc"),
    "the work list is not rewound": ("      rewind_work_list(list);\n", "", WRONG),
}

# Of a kernel whose warps copy rows.
ROWS_VARIANT = replace(VARIANT, spec=KernelSpec.parse("fwd_bf16_d33_causal"))
FENCE = "  fence_async_proxy();\n  __syncwarp();\n}"
ROWS_MISTAKES: dict[str, tuple[str, str, str | None]] = {
    "rows are handed on without a proxy fence": (FENCE, "  __syncwarp();\n}", "wgmma .* without fence.proxy.async"),
    "rows are handed on before they have landed": (
        "  copy_async_wait();\n",
        "",
        "without fence.proxy.async|not ordered|^wrong$",
    ),
    "rows past the sequence's end are read": ("row < rows ? kPiece : 0", "kPiece", "which is in no tensor"),
    "rows are not clipped": ("min(max(bytes - at, 0), kPiece)", "kPiece", "which is in no tensor|^wrong$"),
    "the columns behind the last are whatever they were": ("  clear_tiles(shared, ", "  (void)(", WRONG),
    "rows that begin in the middle of a word stay there": ("  if (alignment & 2) {\n", "  if (false) {\n", WRONG),
    "a loader does not wait for an empty buffer": (
        "      ring.wait_empty(at);\n",
        "",
        "not ordered after the read by wgmma|arrivals more than",
    ),
    "warps go on before unread blocks are handed back": (
        "      named_barrier_sync(1 + warpgroup, 128);  // no warp",
        "      // no warp",
        "not ordered after the read by wgmma",
    ),
    "O's rows are not clipped": ("    if (8 * h >= rows) break;\n", "", "race on global|which is in no tensor|^wrong$"),
}

# Of pairs of CTAs that load keys for each other.
PAIR_VARIANT = replace(VARIANT, config=replace(VARIANT.config, cluster=2))
PAIR_MISTAKES: dict[str, tuple[str, str, str | None]] = {
    "K is loaded for both when one of them has handed it back": (
        "control.k.init(1, 2 * kWarpgroups);",
        "control.k.init(1, kWarpgroups);",
        "not ordered after|arrivals more than",
    ),
    "each loads for itself": ("kBothCtas = 0b11", "kBothCtas = 0b01", "deadlock|not ordered after|arrivals more than"),
    "both load the same half": ("cluster_rank() * kPairRows", "0", "not ordered after|^wrong$"),
    "a CTA may not have begun": (
        "  cluster_arrive();\n  cluster_wait();\n\n  if (warp < 4)",
        "  __syncthreads();\n\n  if (warp < 4)",
        "may not have begun",
    ),
    "a CTA may end before the last arrivals": (
        "  cluster_arrive();\n  cluster_wait();\n}",
        "}",
        "which has ended|the end of the CTA .* is not ordered after|deadlock",
    ),
    "queries are loaded for other rows than are worked on": ("        reversed = !reversed;\n", "", "^wrong$"),
    "both take the same rows": ("warpgroup ^ cluster_rank() ^", "warpgroup ^", "race on global|^wrong$"),
}

# Of such pairs where no tile has keys, for which they would wait for each other.
NO_KEYS = ((300,) * 6, (0,) * 6)
NO_KEYS_MISTAKES: dict[str, tuple[str, str, str]] = {
    "a claim is told before the last one was heard": (
        "    mbarrier_wait_cluster(smem_address(&heard[at.slot]), at.parity ^ 1);\n",
        "",
        "race on shared address|arrivals more than|deadlock",
    ),
    "a tile without keys does not call for the next": (
        "    if (left < kClaimAhead) nearly_loaded();\n",
        "",
        "deadlock",
    ),
}

# Of such pairs whose products sum up rows.
PAIR_SUMS_VARIANT = replace(PAIR_VARIANT, config=replace(PAIR_VARIANT.config, tensor_sums=True))
PAIR_SUMS_MISTAKES: dict[str, tuple[str, str, str | None]] = {
    "a CTA's number gets into the distance from V to the ones": (
        "v_operands = v_tiles & 0xFFFFFF;",
        "v_operands = v_tiles;",
        "wgmma B reads shared address",
    ),
}

# Of a kernel whose O leaves from registers.
DIRECT_VARIANT = replace(VARIANT, config=replace(VARIANT.config, epilogue="direct"))
DIRECT_MISTAKES: dict[str, tuple[str, str, str | None]] = {
    "O's rows are not clipped": (
        "if (exists) *reinterpret_cast<uint2*>",
        "*reinterpret_cast<uint2*>",
        "race on global|which is in no tensor|^wrong$",
    ),
}


def outcome(
    mistake: tuple[str, str] | None,
    seed: int,
    variant: Variant = VARIANT,
    lengths: tuple[tuple[int, ...], tuple[int, ...]] = (LENGTHS, LENGTHS_K),
) -> str | None:
    """What the emulator reports of two launches; None, if nothing; "wrong", if nothing but the numbers are."""
    change = kernels.substitution(*mistake) if mistake is not None else None
    artifact = kernels.artifact(variant, change)
    dim = variant.spec.head_dim
    w = Workload("some", *lengths, 2, 1, dim, dim, True, causal_alignment="bottom_right")
    b = w.make("cpu", "bf16", 3)
    expected, _ = reference(*b[:5], is_causal=True, causal_alignment="bottom_right", scale=0.1)
    try:
        with emulated(processors=2, seed=100 * seed):
            kernel = cuda.load(artifact, torch.device("cuda", 0))
            for _ in range(2):
                out = torch.full(expected.shape, float("nan"), dtype=torch.bfloat16)
                kernel.forward(*b[:5], out, None, 0.1, True)
    except EmulatorError as error:
        return str(error)
    return None if errors(out, expected).rel <= tolerance(torch.bfloat16) else "wrong"


@pytest.mark.parametrize(
    "variant",
    [VARIANT, ROWS_VARIANT, DIRECT_VARIANT, PAIR_VARIANT, PAIR_SUMS_VARIANT],
    ids=lambda variant: variant.name,
)
@pytest.mark.parametrize("seed", range(4))
def test_nothing_is_found_in_the_kernel_as_it_is(seed: int, variant: Variant) -> None:
    assert outcome(None, seed, variant) is None


@pytest.mark.parametrize("seed", range(2))
def test_nothing_is_found_where_pairs_have_no_keys(seed: int) -> None:
    assert outcome(None, seed, PAIR_VARIANT, NO_KEYS) is None


@pytest.mark.parametrize("mistake", MISTAKES)
def test_it_is_found(mistake: str) -> None:
    old, new, report = MISTAKES[mistake]
    found = outcome((old, new), seed=0)
    assert found is not None
    assert re.search(report or "^wrong$", found, re.DOTALL), found


@pytest.mark.parametrize("mistake", ROWS_MISTAKES)
def test_it_is_found_where_warps_copy_rows(mistake: str) -> None:
    old, new, report = ROWS_MISTAKES[mistake]
    found = outcome((old, new), 0, ROWS_VARIANT)
    assert found is not None
    assert re.search(report or "^wrong$", found, re.DOTALL), found


@pytest.mark.parametrize("mistake", DIRECT_MISTAKES)
def test_it_is_found_where_o_leaves_from_registers(mistake: str) -> None:
    old, new, report = DIRECT_MISTAKES[mistake]
    found = outcome((old, new), 0, DIRECT_VARIANT)
    assert found is not None
    assert re.search(report or "^wrong$", found, re.DOTALL), found


@pytest.mark.parametrize("mistake", PAIR_MISTAKES)
def test_it_is_found_where_pairs_load_for_each_other(mistake: str) -> None:
    old, new, report = PAIR_MISTAKES[mistake]
    found = outcome((old, new), 0, PAIR_VARIANT)
    assert found is not None
    assert re.search(report or "^wrong$", found, re.DOTALL), found


@pytest.mark.parametrize("mistake", NO_KEYS_MISTAKES)
def test_it_is_found_where_pairs_have_no_keys(mistake: str) -> None:
    old, new, report = NO_KEYS_MISTAKES[mistake]
    found = outcome((old, new), 0, PAIR_VARIANT, NO_KEYS)
    assert found is not None
    assert re.search(report, found, re.DOTALL), found


@pytest.mark.parametrize("mistake", PAIR_SUMS_MISTAKES)
def test_it_is_found_where_products_of_pairs_sum_up_rows(mistake: str) -> None:
    old, new, report = PAIR_SUMS_MISTAKES[mistake]
    found = outcome((old, new), 0, PAIR_SUMS_VARIANT)
    assert found is not None
    assert re.search(report or "^wrong$", found, re.DOTALL), found
