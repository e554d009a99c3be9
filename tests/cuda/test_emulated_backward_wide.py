"""The generated Hopper backward of wide heads on the emulator: gradients against the float64 oracle, any schedule."""

from __future__ import annotations

from functools import cache, reduce

import gradient_checks
import pytest
import torch
from emulator import kernels
from emulator.backward_checks import assert_right, backward, loaded, poison_scratch
from emulator.driver import EmulatorError

from jagtile.generator.oracle import errors
from jagtile.generator.oracle_gradients import gradient_tolerance, reference_gradients
from jagtile.generator.spaces.sm90_backward_wide import Sm90BackwardWideConfig, Sm90BackwardWideSpace
from jagtile.generator.spec import KernelSpec
from jagtile.generator.tile import Knob, Variant, config_from_dict
from jagtile.generator.workloads import Workload
from jagtile.runtime.artifact import Artifact

# Every mechanism of the template once: (spec, what differs from its default config).
CASES: tuple[tuple[str, dict[str, Knob]], ...] = (
    ("bwd_bf16_d256", {}),
    ("bwd_bf16_d256_causal", {"dq_panels": 0, "dq": "bulk"}),  # one buffer, dS in shared memory
    ("bwd_bf16_d192", {}),  # a buffer each panel, dS in registers
    ("bwd_bf16_d192_causal", {"dq_panels": 0, "dq": "red"}),
    ("bwd_fp16_d192_dv128_causal", {}),  # two buffers
    ("bwd_bf16_d136_dv200_causal", {"block_n": 32, "q_stages": 3}),  # panels that are not full, pieces of 8 columns
    ("bwd_bf16_d136_dv200_causal", {"block_n": 32, "q_stages": 3, "dq_panels": 1, "dq": "red"}),
    ("bwd_fp16_d40_dv256", {}),  # one panel, narrower than 64 columns
    ("bwd_bf16_d192_causal", {"block_n": 96, "fused": True}),  # two buffers for three panels
    ("bwd_fp16_d192_dv128", {"block_n": 48, "q_stages": 3, "dout_stages": 2, "fused": True}),
    ("bwd_bf16_d136_dv200_causal", {"block_n": 32, "q_stages": 3, "fused": True}),
    ("bwd_bf16_d192", {"split_tail": True}),
    ("bwd_fp16_d136_dv200", {"block_n": 32, "q_stages": 3, "fused": True, "split_tail": True}),
)
SLICED = ("bwd_bf16_d192_causal", (("block_n", 48), ("fused", True)))
EDGES = (0, 1, 63, 64, 65, 0, 129)


def case_id(part: str | dict[str, Knob]) -> str:
    return part if isinstance(part, str) else "-".join(part) or "default"


@cache
def built(name: str, change: tuple[tuple[str, Knob], ...] = (), edit: tuple[str, str] | None = None) -> Artifact:
    spec = KernelSpec.parse(name)
    base = Sm90BackwardWideSpace().default(spec).to_dict()
    variant = Variant("sm_90a", spec, config_from_dict("sm_90a", {**base, **dict(change)}))
    return kernels.artifact(variant, kernels.substitution(*edit) if edit else None)


@pytest.mark.parametrize(("name", "change"), CASES, ids=case_id)
def test_gradients_match_the_oracle(name: str, change: dict[str, Knob]) -> None:
    spec = KernelSpec.parse(name)
    kind = (spec.head_dim, spec.head_dim_v, spec.causal)
    artifact = built(name, tuple(change.items()))
    assert_right(artifact, Workload("edges", EDGES, EDGES, 1, 1, *kind), launches=2)
    # Queries without keys, keys without queries, more of the ones than of the others; heads that share K and V.
    lengths = ((130, 0, 5, 64, 70), (100, 70, 140, 0, 81))
    assert_right(artifact, Workload("cross", *lengths, 2, 1, *kind))
    if spec.causal:
        assert_right(artifact, Workload("cross", *lengths, 2, 1, *kind, causal_alignment="bottom_right"))


TAILS: tuple[tuple[str, dict[str, Knob]], ...] = (
    ("bwd_bf16_d192", {"block_n": 48, "dout_stages": 2, "split_tail": True}),
    ("bwd_fp16_d136_dv200", {"block_n": 32, "q_stages": 3, "fused": True, "split_tail": True}),
)


@pytest.mark.parametrize(("name", "change"), TAILS, ids=case_id)
@pytest.mark.parametrize(
    ("processors", "queries", "keys", "heads"),
    [
        (8, (1100,), (110,), (1, 1)),
        (4, (700, 20, 0, 600), (90, 130, 30, 70), (2, 1)),
        (4, (40, 700, 550), (300, 500, 400), (2, 2)),  # more than ten tiles a CTA
    ],
)
def test_last_tiles_in_pieces(
    name: str,
    change: dict[str, Knob],
    processors: int,
    queries: tuple[int, ...],
    keys: tuple[int, ...],
    heads: tuple[int, int],
) -> None:
    assert_right_in_pieces(built(name, tuple(change.items())), processors, queries, keys, heads)


def assert_right_in_pieces(
    artifact: Artifact,
    processors: int,
    queries: tuple[int, ...],
    keys: tuple[int, ...],
    heads: tuple[int, int] = (1, 1),
) -> None:
    spec = KernelSpec.parse(artifact.meta.spec)
    w = Workload("tails", queries, keys, *heads, spec.head_dim, spec.head_dim_v)
    with loaded(artifact, processors) as kernel:
        gradient_checks.assert_right(kernel, w, launches=2)


TAIL_MISTAKES = {
    "dK's sums lie on dV's": ("/*kFirst=*/kOfDv>", "/*kFirst=*/0>"),
    "dK's last piece is dV's": ("add_piece<Tail, /*kPart=*/1,", "add_piece<Tail, /*kPart=*/0,"),
    "each piece stores its gradient": ("if (complete) store_gradient(dk", "store_gradient(dk"),
    "sums of pieces are used as they were": ("  zero_tail_sums<Tail, kTailTiles, kRowThreads>(p);\n", ""),
    "a piece waits for steps of the piece before": (
        "control.turns.added = control.turns.passed = TailPiece::of(item).blocks_before * p.gqa_ratio;",
        "control.turns.added = control.turns.passed = 0;",
    ),
}


@pytest.mark.parametrize("mistake", TAIL_MISTAKES.values(), ids=TAIL_MISTAKES)
def test_mistakes_with_pieces_are_found(mistake: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    poison_scratch(monkeypatch)
    name, change = TAILS[0]
    artifact = built(name, tuple(change.items()), mistake)
    with pytest.raises((EmulatorError, AssertionError)):
        assert_right_in_pieces(artifact, 8, (1100,), (110,))


FENCES = {
    "P": ("      control.dout.wait_full(at.dout_at());\n      fence_async_proxy();\n", "wgmma B reads"),
    "dS": ("// dS is there\n        fence_async_proxy();\n", "wgmma B reads"),
    "dQ": ("        fence_async_proxy();  // here, or math warps would wait for their stores\n", "a bulk store reads"),
    "dK and dV": ("  if (lane == 0) {\n    fence_async_proxy();\n", "a tensor store reads"),
}


@pytest.mark.parametrize("what", FENCES)
def test_a_missing_fence_is_found(what: str) -> None:
    text, report = FENCES[what]
    spec = KernelSpec.parse("bwd_bf16_d136_dv200_causal")
    variant = Variant("sm_90a", spec, Sm90BackwardWideConfig(32, 3, 1, 0, "bulk"))
    found = kernels.artifact(variant, kernels.substitution(text, text.replace("fence_async_proxy();", "")))
    with pytest.raises(EmulatorError, match=f"{report} .* without fence.proxy.async"):
        assert_right(found, Workload("some", (70,), (70,), 1, 1, 136, 200, True))


def test_delta_that_is_read_before_its_rows_are_prepared_is_found() -> None:
    spec = KernelSpec.parse("bwd_bf16_d136_dv200_causal")
    variant = Variant("sm_90a", spec, Sm90BackwardWideConfig(32, 2, 1, 0, "bulk", fused=True))
    found = kernels.artifact(variant, kernels.substitution("    control.prepared.wait_full(at.tile_at());\n", ""))
    with pytest.raises(EmulatorError, match="race on global"):
        assert_right(found, Workload("some", (70,), (70,), 1, 1, 136, 200, True))


@pytest.mark.parametrize("meet", [True, False])
def test_warps_of_math_that_come_late_to_tiles_without_steps(meet: bool) -> None:
    spec = KernelSpec.parse("bwd_fp16_d40_dv256")
    variant = Variant("sm_90a", spec, Sm90BackwardWideConfig(32, 2, 1, 0, "red"))
    late = {"k": "a warp that is late does not miss this K for the next one", "v": "likewise"}
    seen = [
        kernels.substitution(f"if (lane == 0) control.{of}.arrive_empty(at.kv_at());  // {why}", "")
        for of, why in late.items()
    ]
    seen += [kernels.substitution(f"control.{of}.init(1, 8);", f"control.{of}.init(1, 4);") for of in late]

    def unseen(source: str) -> str:
        return reduce(lambda text, edit: edit(text), seen, source)

    artifact = kernels.artifact(variant, None if meet else unseen)
    w = Workload("few queries", (20, *[0] * 99), (20, *[5] * 99), 1, 1, 40, 256, False)

    def launches() -> None:
        for _ in range(12):  # each under another schedule, some with a slow warp
            assert_right(artifact, w, with_dlse=False)

    if meet:
        launches()
    else:
        with pytest.raises(EmulatorError, match="deadlock"):
            launches()


@pytest.mark.parametrize("scale", [-0.1, 0.0])
def test_any_scale(scale: float) -> None:
    w = Workload("edges", EDGES, EDGES, 1, 1, 192, 128, True)
    assert_right(built("bwd_fp16_d192_dv128_causal"), w, scale=scale, with_dlse=False)


@pytest.mark.parametrize(("name", "change"), CASES[:5], ids=case_id)
def test_deterministic_gradients_are_bitwise_equal_under_any_schedule(name: str, change: dict[str, Knob]) -> None:
    spec, artifact = KernelSpec.parse(name), built(name, tuple(change.items()))
    w = Workload("several key blocks", (130, 70, 66), (200, 0, 230), 2, 1, spec.head_dim, spec.head_dim_v, spec.causal)
    b = w.make("cpu", spec.dtype, 9)
    dout = torch.randn((w.total_q, w.num_heads, w.head_dim_v), generator=torch.Generator().manual_seed(9)).to(b.q.dtype)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (backward(artifact, w, b, dout, processors=processors) for processors in (2, 5))
        assert_right(artifact, w)
    finally:
        torch.use_deterministic_algorithms(False)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def test_keys_past_the_end_weigh_nothing_where_all_scores_are_far_below_zero() -> None:
    """The score of a key past the end is 0, which against a log-sum-exp of -100 is a probability beyond float32."""
    name = "bwd_fp16_d192_dv128_causal"
    w = Workload("last blocks", (200, 5), (70, 30), 1, 1, 192, 128, True)
    b = w.make("cpu", "fp16", 4)
    b.q[..., 0], b.k[..., 0] = 16.0, -64.0
    dout = torch.randn((w.total_q, 1, 128), generator=torch.Generator().manual_seed(4)).half()
    found = backward(built(name), w, b, dout)
    expected = reference_gradients(*b[:5], dout, is_causal=True, scale=gradient_checks.SCALE)
    for grad, truth in zip(found, expected, strict=True):  # the column of the offset is all cancellation
        assert errors(grad[..., 1:], truth[..., 1:]).rel <= gradient_tolerance("fp16")


@pytest.mark.parametrize("in_order", [False, True])
def test_slices_of_rows_beside_tiles(in_order: bool) -> None:
    torch.use_deterministic_algorithms(in_order)
    try:
        artifact = built(*SLICED)
        for seed in range(3):  # each under another schedule
            w = Workload("slices", (300, 20, 130, 0), (200, 260, 70, 5), 3, 1, 192, 192, True)
            assert_right(artifact, w, seed, with_dlse=False, launches=2)
    finally:
        torch.use_deterministic_algorithms(False)
