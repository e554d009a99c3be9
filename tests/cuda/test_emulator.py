"""The emulator itself: instructions whose results are known otherwise, and mistakes that it must report."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import pytest
import torch
from emulator.cuda_source import Translation
from emulator.driver import CUtensorMapDataType, EmulatorError, Machine, encode_map
from emulator.kernels import Snippet
from emulator.ptx import PtxError

BF16 = CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
F32 = CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_FLOAT32
SWIZZLES = {0: 16, 1: 32, 2: 64, 3: 128}  # a tensor map's mode -> bytes of a row
DESCRIPTOR_MODE = {3: 1, 2: 2, 1: 3}


@lru_cache(maxsize=1)
def snippets() -> Snippet:
    return Snippet((Path(__file__).parent / "emulator_snippets.cu").read_text())


def map_2d(tensor: torch.Tensor, box: tuple[int, int], swizzle: int) -> bytes:
    """Of a matrix; the box is (columns, rows)."""
    kind = F32 if tensor.dtype == torch.float32 else BF16
    rows, columns = tensor.shape
    stride = tensor.stride(0) * tensor.element_size()
    return encode_map(kind, 2, tensor.data_ptr(), (columns, rows), (stride,), box, swizzle)


@pytest.mark.parametrize("swizzle", SWIZZLES)
@pytest.mark.parametrize(("column", "row"), [(0, 0), (5, -3), (30, 60)])
def test_a_box_is_laid_out_swizzled_with_zeros_outside(swizzle: int, column: int, row: int) -> None:
    row_bytes = SWIZZLES[swizzle]
    columns, rows = row_bytes // 2, 24
    matrix = torch.randn(70, 72).to(torch.bfloat16)
    out = torch.zeros(rows * row_bytes, dtype=torch.uint8)
    box = map_2d(matrix[:, :40], (columns, rows), swizzle)
    snippets()("loaded_bytes", 1, 32, box, out, out.numel(), column, row, smem=out.numel())
    padded = torch.zeros(200, 300, dtype=torch.bfloat16)
    padded[100:170, 100:140] = matrix[:, :40]
    plain = padded[100 + row :, 100 + column :][:rows, :columns].contiguous().view(torch.uint8).flatten()
    address = torch.arange(out.numel())
    mask = {0: 0, 1: 1, 2: 3, 3: 7}[swizzle]
    assert torch.equal(out[address ^ ((address >> 7 & mask) << 4)], plain)


@pytest.mark.parametrize("add", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_box_is_stored_or_added_where_it_is_inside(dtype: torch.dtype, add: int) -> None:
    columns = 128 // torch.empty(0, dtype=dtype).element_size()
    source = torch.randn(16, columns).to(dtype)
    target = torch.ones(50, columns + 8, dtype=dtype)
    expected = target.clone()
    view, maps = target[5:35, :columns], []
    for tensor in (source, view):
        maps.append(map_2d(tensor, (columns, 16), 3))
    snippets()("box_to_box", 1, 32, *maps, 16 * 128, 8, 20, add, smem=16 * 128)
    inside = source[:10, : columns - 8]
    expected[25:35, 8:columns] = inside + 1 if add else inside
    assert torch.equal(target, expected)


@pytest.mark.parametrize("swizzle", DESCRIPTOR_MODE)
@pytest.mark.parametrize("transposed", range(4))
def test_products_of_tiles_in_every_swizzle_and_major(swizzle: int, transposed: int) -> None:
    a, b = (torch.randn(64, 64).to(torch.bfloat16) for _ in range(2))
    row_bytes = SWIZZLES[swizzle]
    maps = [map_2d(tensor, (row_bytes // 2, 64), swizzle) for tensor in (a, b)]
    out = torch.full((64, 64), float("nan"))
    snippets()("products", 1, 128, *maps, out, row_bytes, DESCRIPTOR_MODE[swizzle], transposed, smem=2 * 64 * 128)
    left = a.T if transposed & 2 else a
    right = b if transposed & 1 else b.T
    torch.testing.assert_close(out, -(left.float() @ right.float()), rtol=1e-5, atol=1e-4)


def fragments(matrices: torch.Tensor) -> torch.Tensor:
    """Four 8 x 8 matrices as what the lanes of a warp hold: lane l has row l / 4, columns 2 (l % 4) and the next."""
    return matrices.reshape(4, 8, 4, 2).reshape(4, 32, 2).contiguous()


@pytest.mark.parametrize("store", [0, 1])
@pytest.mark.parametrize("load", [0, 1])
def test_matrices_go_through_shared_memory_transposed_or_not(store: int, load: int) -> None:
    matrices = torch.arange(256, dtype=torch.int16).reshape(4, 8, 8)
    given, found = fragments(matrices), torch.zeros(4, 32, 2, dtype=torch.int16)
    snippets()("matrices", 1, 32, given, found, store, load)
    assert torch.equal(found, fragments(matrices.transpose(1, 2) if store != load else matrices))


@pytest.mark.parametrize("seed", range(3))
def test_additions_and_votes(seed: int) -> None:
    source, target, votes = torch.randn(256), torch.zeros(256), torch.zeros(1, dtype=torch.int32)
    snippets()("additions", 3, 64, source, target, votes, machine=Machine(seed=seed))
    clipped = source.reshape(64, 4).clone()
    clipped[::2] = 0
    clipped[1::2, 2:] = 0
    expected = source + clipped.roll(32, 0).flatten()
    expected[:64] += 1
    torch.testing.assert_close(target, 3 * expected)
    assert votes.item() == 3 * (1 + 10 + 100 * 32)


def test_lanes() -> None:
    out = torch.zeros(32, 3, dtype=torch.int32)
    snippets()("lanes", 1, 32, out)
    for lane, (value, permuted, majority) in enumerate(out.tolist()):
        above = lane - 3 if lane % 8 >= 3 else lane
        assert value == (lane ^ 5) + 100 * above + 10000 * min(12, 32 - lane // 12 * 12)
        assert permuted == 0x66442200 + lane
        a, b, c = lane, lane >> 1, lane >> 2
        assert majority == (a & b | b & c | a & c)


@pytest.mark.parametrize("seed", range(5))
def test_no_mistake_is_reported_where_there_is_none(seed: int) -> None:
    out = torch.zeros(7, 32)
    snippets()("mistakes", 1, 64, out, 7, 0, machine=Machine(seed=seed))
    assert torch.equal(out, torch.arange(7)[:, None] + torch.arange(32.0))


@pytest.mark.parametrize(
    ("mistake", "report"),
    [
        (1, "race on shared address .*: the (read|write) by warp [01] is not ordered|deadlock"),  # by who is ahead
        (2, "without fence.proxy.async"),
        (3, "write of 4 bytes of global memory at 0x[0-9a-f]+, which is in no tensor"),
        (4, "arrivals more than the mbarrier"),
        (5, "(?s)deadlock.*lanes 00000100, the phase of parity 0 of mbarrier .* waits for 1 of 1 arrivals"),
        (6, "lane 7 exits, but others of its warp wait|lanes 00000080 of the mask have exited"),
        (7, "shared addresses 0x"),
        (8, "a copy overwrites .* without fence.proxy.async"),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_mistakes_are_reported(mistake: int, report: str, seed: int) -> None:
    out = torch.zeros(7, 32)
    with pytest.raises(EmulatorError, match=report):
        snippets()("mistakes", 1, 64, out, 7, mistake, machine=Machine(seed=seed))


@pytest.mark.parametrize("bulk", [0, 1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_what_a_cta_hands_to_another_arrives(bulk: int, seed: int) -> None:
    between, flag, out = torch.zeros(32), torch.zeros(1, dtype=torch.int32), torch.zeros(32)
    snippets()("handed_on", 2, 32, between, flag, out, bulk, 0, machine=Machine(seed=seed))
    assert torch.equal(out, 2 * torch.arange(32.0))


@pytest.mark.parametrize(("bulk", "mistake"), [(0, 1), (1, 1), (1, 2), (0, 3), (1, 3)])
@pytest.mark.parametrize("seed", range(3))
def test_what_is_handed_on_without_order_is_a_race(bulk: int, mistake: int, seed: int) -> None:
    between, flag, out = torch.zeros(32), torch.zeros(1, dtype=torch.int32), torch.zeros(32)
    with pytest.raises(EmulatorError, match="race on global memory at 0x"):
        snippets()("handed_on", 2, 32, between, flag, out, bulk, mistake, machine=Machine(seed=seed))


def test_the_halves_of_a_word_may_be_two_ctas_own() -> None:
    out = torch.zeros(64, dtype=torch.int16)
    snippets()("neighbours", 2, 32, out, 0)
    assert out.tolist() == [1, 2] * 32
    with pytest.raises(EmulatorError, match="race on global memory at 0x"):
        snippets()("neighbours", 2, 32, out, 1)


@pytest.mark.parametrize("processors", [1, 4, 6])
@pytest.mark.parametrize("seed", range(3))
def test_ctas_of_a_cluster_read_each_others_shared_memory(processors: int, seed: int) -> None:
    out = torch.full((8, 64), float("nan"))
    snippets()("around", 8, 64, out, 0, machine=Machine(processors, seed))
    assert torch.equal(out.flatten(), torch.arange(8 * 64.0).view(2, 4, 64).roll(-1, 1).flatten())


@pytest.mark.parametrize(
    ("mistake", "report"),
    [
        (1, "race on shared address 0x.* of CTA .: the (read|write)"),
        (2, "the end of the CTA by .* is not ordered after the read by CTA|of CTA ., which has ended"),
        (3, "race on shared address 0x.* of CTA .: the (read|write)"),
        (4, "shared addresses 0x"),
    ],
)
@pytest.mark.parametrize("seed", range(4))
def test_races_in_a_cluster_are_reported(mistake: int, report: str, seed: int) -> None:
    with pytest.raises(EmulatorError, match=report):
        snippets()("around", 4, 64, torch.zeros(4, 64), mistake, machine=Machine(seed=seed))


@pytest.mark.parametrize("seed", range(4))
def test_a_cta_that_may_not_have_begun_is_not_to_be_read(seed: int) -> None:
    with pytest.raises(EmulatorError, match="which may not have begun yet"):
        snippets()("too_soon", 2, 32, torch.zeros(2, 32), machine=Machine(seed=seed))


def test_shared_addresses_have_the_rank_of_their_cta() -> None:
    out = torch.zeros(4, dtype=torch.int32)
    snippets()("addresses_in_a_pair", 2, 1, out, 0)
    own, other, *second = out.tolist()
    assert own < 1 << 18
    assert other == own + (1 << 24)
    assert second == [other, own]
    with pytest.raises(EmulatorError, match=r"shared address 0x.* is not in this CTA's shared memory"):
        snippets()("addresses_in_a_pair", 2, 1, out, 1)


@pytest.mark.parametrize("seed", range(6))
def test_a_pair_of_ctas_loads_halves_for_both(seed: int) -> None:
    rounds = 5
    rows = torch.arange(16 * rounds * 64, dtype=torch.int16).view(-1, 64)
    encoded = encode_map(BF16, 2, rows.data_ptr(), (64, 16 * rounds), (128,), (64, 8), 0)
    out = torch.zeros(2 * 1024 * rounds + rounds, dtype=torch.int16)
    snippets()("pair_of_loaders", 2, 96, encoded, out, rounds, 0, smem=2048, machine=Machine(seed=seed))
    assert torch.equal(out[:-rounds].view(rounds, 2, 16, 64)[:, 0], rows.view(rounds, 16, 64))
    assert torch.equal(out[:-rounds].view(rounds, 2, 16, 64)[:, 1], rows.view(rounds, 16, 64))
    assert out[-rounds:].tolist() == list(range(rounds))


@pytest.mark.parametrize(
    ("mistake", "report"),
    [
        (1, "race on shared address 0x.*: the write by a copy .* is not ordered after the (read|write)"),
        (2, "which has ended|the end of the CTA by .* is not ordered after the (arrival|write)|ends while"),
        (3, "which may not have begun yet"),
        (4, "deadlock|race on|more than the mbarrier"),
        (5, "race on shared address 0x.* of CTA 1|deadlock"),
    ],
)
@pytest.mark.parametrize("seed", range(4))
def test_mistakes_of_a_pair_of_loaders_are_reported(mistake: int, report: str, seed: int) -> None:
    rows = torch.zeros(80, 64, dtype=torch.int16)
    encoded = encode_map(BF16, 2, rows.data_ptr(), (64, 80), (128,), (64, 8), 0)
    out = torch.zeros(2 * 1024 * 5 + 5, dtype=torch.int16)
    with pytest.raises(EmulatorError, match=report):
        snippets()("pair_of_loaders", 2, 96, encoded, out, 5, mistake, smem=2048, machine=Machine(seed=seed))


def test_a_grid_is_of_whole_clusters() -> None:
    with pytest.raises(EmulatorError, match="6 CTAs in clusters of 4"):
        snippets()("around", 6, 64, torch.zeros(8, 64), 0)


@pytest.mark.parametrize(
    ("statement", "report"),
    [
        ('asm("frobnicate.b32 %0, %1;" : "=r"(x) : "r"(y));', "does not know: frobnicate.b32 %0, %1"),
        ('asm("add.u32 %0, %1, %2;" : "=r"(x) : "r"(y));', "there is no operand %2"),
        ('asm("add.u32 %0, %1, z;" : "=r"(x) : "r"(y));', "unknown operand 'z'"),
        (
            'asm("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1}, %2, %3, 1, 1, 1, 0, 0;" '
            ': "+f"(x), "+f"(y) : "l"(a), "l"(b));',
            "2 accumulators",
        ),
        ('asm("mbarrier.arrive.expect_tx.shared.b64 _, [%0];" :: "r"(x));', "without a byte count"),
    ],
)
def test_unknown_ptx_is_refused_by_name(statement: str, report: str) -> None:
    with pytest.raises(PtxError, match=report):
        Translation().translate(f"void f() {{ {statement} }}")


@pytest.mark.parametrize(
    ("change", "report"),
    [
        ({"address": 8}, "address"),
        ({"strides": (24,)}, "strides"),
        ({"box": (64, 257)}, "box"),
        ({"box": (128, 8)}, "256 bytes wide under swizzle 3"),
    ],
)
def test_maps_that_the_driver_refuses_are_refused(change: dict[str, object], report: str) -> None:
    arguments = {"address": 1024, "dims": (64, 8), "strides": (128,), "box": (64, 8), "swizzle": 3, **change}
    with pytest.raises(ValueError, match=report):
        encode_map(BF16, 2, **arguments)  # type: ignore[arg-type]
