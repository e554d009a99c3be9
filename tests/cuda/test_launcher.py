"""The forward launcher up to the driver, on tensors of the CPU: the block that it fills, the lists that it keeps."""

from __future__ import annotations

import copy
import gc
import io
import math
import struct
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from jagtile.runtime import UnsupportedError, head_packs
from jagtile.runtime.cuda import forward, list_builder, params, plans, tensor_map, work_list
from jagtile.runtime.layouts import Layout

HEADS, DIM, BLOCK_M, BLOCK_N, SLOTS = 4, 64, 128, 96, 132
PARTIAL_BYTES = 64 * (DIM + 2) * 4


class Driver:
    """Stands in for the CUDA driver and torch's CUDA: records launches with the block as it was."""

    def __init__(self) -> None:
        self.capturing = False
        self.stream = 0
        self.encoded = 0
        self.launches: list[tuple[str, int, dict[str, int]]] = []
        self.threads: list[int] = []  # of a CTA

    def encode(self, address: int, *layout: object) -> bytes:
        """A map that holds the address, then its heads, strides in bytes and rows and heads of the box."""
        self.encoded += 1
        _dtype, dim, heads, token_stride, head_stride, *box = layout
        return struct.pack("<7Q", address, dim, heads, token_stride, head_stride, *box).ljust(tensor_map.MAP_BYTES)

    def launch(self, name: str, grid: int, threads: int, block: bytearray) -> None:
        scalars = params.SCALARS.unpack_from(block, params.SCALARS_OFFSET)
        scalars += params.SPLIT_SCALARS.unpack_from(block, params.SPLIT_OFFSET)
        names = [*params.POINTERS, *params.INTEGERS, "scale_log2", *params.SPLIT_INTEGERS, *params.SPLIT_POINTERS]
        fields = dict(zip(names, scalars, strict=True))
        for index, which in enumerate(params.MAPS):
            fields[which] = struct.unpack_from("<7Q", block, index * tensor_map.MAP_BYTES)
        self.launches.append((name, grid, fields))
        self.threads.append(threads)

    @property
    def names(self) -> list[str]:
        return [name for name, *_ in self.launches]


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    fake = Driver()
    for name, answer in {
        "_cuda_getDevice": lambda: 0,
        "_cuda_getCurrentRawStream": lambda _: fake.stream,
        "_cuda_isCurrentStreamCapturing": lambda: fake.capturing,
    }.items():
        monkeypatch.setattr(torch._C, name, answer, raising=False)
    monkeypatch.setattr(tensor_map, "encode", fake.encode)
    monkeypatch.setattr(tensor_map, "address_comes_first", lambda: True)
    monkeypatch.setattr(work_list, "_ENTRIES", {})
    return fake


@pytest.fixture
def kernel(load) -> forward.CudaForwardKernel:
    return load()


@pytest.fixture
def split_kernel(load) -> forward.CudaForwardKernel:
    return load(partial_bytes=PARTIAL_BYTES)


@pytest.fixture
def load(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> Callable[..., forward.CudaForwardKernel]:
    """Loads a kernel of which more launch facts are given."""
    monkeypatch.setattr(torch.cuda, "device", lambda _: torch.no_grad())
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=SLOTS), raising=False
    )
    fake = SimpleNamespace(
        bind_primary_context=lambda _: None,
        load_module=lambda _: None,
        function=lambda _module, symbol, _smem=0: symbol,
        Launcher=lambda _: (
            lambda name, grid, threads, _smem, _stream, _arguments: driver.launch(
                name, grid, threads, loaded._block.data
            )
        ),
    )
    for module in (forward, list_builder):
        monkeypatch.setattr(module, "driver", fake)
    facts = {
        "block_m": BLOCK_M,
        "block_n": BLOCK_N,
        "num_threads": 384,
        "smem_bytes": 1,
        "ctas_per_sm": 1,
        "causal": 0,
    }
    loaded: forward.CudaForwardKernel

    def load(**more: int) -> forward.CudaForwardKernel:
        nonlocal loaded
        meta = SimpleNamespace(launch={**facts, **more}, spec="fwd_bf16_d64", symbol="attention")
        artifact = SimpleNamespace(meta=meta, path=SimpleNamespace(read_bytes=lambda: b""))
        loaded = forward.CudaForwardKernel(artifact, torch.device("cuda", 0))  # type: ignore[arg-type]
        return loaded

    return load


def tensors(total: int = 500, heads_kv: int = HEADS, heads: int = HEADS) -> tuple[torch.Tensor, ...]:
    shapes = [(total, heads, DIM), (total, heads_kv, DIM), (total, heads_kv, DIM), (total, heads, DIM)]
    return tuple(torch.zeros(shape, dtype=torch.bfloat16) for shape in shapes)


def offsets(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def launch(kernel: forward.CudaForwardKernel, cu_q: torch.Tensor, cu_k: torch.Tensor, qkvo=None) -> None:
    q, k, v, out = qkvo or tensors()
    kernel.forward(q, k, v, cu_q, cu_k, out, None, 0.125, False)


# --- the block


def test_a_kernel_with_an_entry_for_lse_is_launched_by_it_where_lse_is_asked_for(driver, load):
    cu = offsets(0, 100, 500)
    for entries, with_lse in ((0, "attention"), (1, "attention_lse")):
        kernel = load(lse_entry=entries)
        q, k, v, out = tensors()
        kernel.forward(q, k, v, cu, cu, out, None, 0.125, False)
        assert driver.names[-1] == "attention"
        kernel.forward(q, k, v, cu, cu, out, torch.empty(HEADS, 500), 0.125, False)
        assert driver.names[-1] == with_lse


def test_the_block_tells_where_the_tensors_are(driver, kernel):
    cu = offsets(0, 100, 500)
    for _ in range(2):  # the second time from remembered maps
        qkvo = tensors()
        launch(kernel, cu, cu, qkvo)
        name, grid, block = driver.launches[-1]
        assert (name, grid) == ("attention", (500 // BLOCK_M + 2) * HEADS)
        strides = (2 * HEADS * DIM, 2 * DIM)
        for tensor, which, rows in zip(qkvo, params.MAPS, (64, BLOCK_N, BLOCK_N, 64), strict=True):
            assert block[which] == (tensor.data_ptr(), DIM, HEADS, *strides, rows, 1)
        assert (block["batch"], block["total_q"], block["cu_seqlens_q"]) == (2, 500, cu.data_ptr())
    assert driver.encoded == len(params.MAPS)


def test_maps_are_encoded_anew_where_the_address_is_not_all_that_changes(driver, kernel, monkeypatch):
    monkeypatch.setattr(tensor_map, "address_comes_first", lambda: False)
    cu = offsets(0, 500)
    for _ in range(2):
        launch(kernel, cu, cu)
    assert driver.encoded == 2 * len(params.MAPS)


def test_as_many_layouts_are_remembered_as_fit(driver, kernel, monkeypatch):
    monkeypatch.setattr(tensor_map, "_MAX_LAYOUTS", 3)
    cu = offsets(0, 100)
    for total in range(100, 110):
        head_major = torch.zeros(HEADS, total, DIM, dtype=torch.bfloat16).transpose(0, 1)
        launch(kernel, cu, cu, (head_major,) * 4)
    assert len(kernel._tilings[HEADS, HEADS].maps) <= 3


def test_as_many_plans_are_remembered_as_fit(driver, kernel, monkeypatch):
    monkeypatch.setattr(plans, "_MAX_PLANS", 3)
    for total in range(100, 110):
        for _ in range(2):
            launch(kernel, offsets(0, total), offsets(0, total), tensors(total))
            assert driver.launches[-1][2]["total_q"] == total
    assert 0 < len(kernel._plans) <= 3
    assert driver.encoded == len(params.MAPS)  # of any number of tokens


def test_what_is_planned_goes_by_all_that_a_block_holds(driver, kernel):
    narrow, wide = offsets(0, 100, 500), offsets(0, 100, 500).long()
    qkvo = tensors()
    for scale, bottom_right, cu_q, cu_k in (
        (0.125, False, narrow, narrow),
        (0.25, False, narrow, narrow),
        (0.25, True, narrow, narrow),
        (0.25, True, wide, narrow),
        (0.25, True, narrow, wide),
        (0.25, True, offsets(0, 500), offsets(0, 500)),
    ):
        for _ in range(2):
            kernel.forward(*qkvo[:3], cu_q, cu_k, qkvo[3], None, scale, bottom_right)
            block = driver.launches[-1][2]
            assert block["scale_log2"] == pytest.approx(scale / math.log(2))
            assert block["wide_offsets"] == (cu_q is wide) + 2 * (cu_k is wide)
            assert (block["bottom_right"], block["batch"]) == (bottom_right, len(cu_q) - 1)


def test_a_known_layout_stands_for_all_that_it_tells_of_tensors(driver, kernel):
    layout = Layout((2, 500, HEADS, DIM, 500, HEADS, DIM))
    for _ in range(2):
        for scale, cu in ((0.125, offsets(0, 100, 500)), (0.25, offsets(0, 200, 500))):
            q, k, v, out = tensors()
            kernel.forward(q, k, v, cu, cu, out, None, scale, False, None, layout)
            block = driver.launches[-1][2]
            assert [block[which][0] for which in params.MAPS] == [x.data_ptr() for x in (q, k, v, out)]
            assert (block["cu_seqlens_q"], block["total_q"]) == (cu.data_ptr(), 500)
            assert block["scale_log2"] == pytest.approx(scale / math.log(2))
    assert len(kernel._plans) == 2
    head_major = torch.zeros(HEADS, 500, DIM, dtype=torch.bfloat16).transpose(0, 1)
    kernel.forward(head_major, k, v, cu, cu, out, None, -0.125, False, None, layout)  # -q lies elsewhere, as q does
    assert driver.launches[-1][2]["map_q"][3:5] == (2 * DIM, 2 * 500 * DIM)


@pytest.mark.parametrize("odd", range(4))
def test_what_tma_cannot_address_is_copied(driver, kernel, odd):
    qkvo = list(tensors())
    qkvo[odd] = torch.zeros(500 * HEADS * (DIM + 3) + 1, dtype=torch.bfloat16)[1:].view(500, HEADS, DIM + 3)[..., :DIM]
    launch(kernel, offsets(0, 500), offsets(0, 500), qkvo)
    block = driver.launches[-1][2]
    for index, (tensor, which) in enumerate(zip(qkvo, params.MAPS, strict=True)):
        assert block[which][0] % 16 == 0
        assert (block[which][0] == tensor.data_ptr()) == (index != odd)


@pytest.mark.parametrize("odd", range(4))
def test_an_odd_address_in_a_layout_that_is_remembered_is_copied(driver, kernel, odd):
    qkvo = list(tensors())
    launch(kernel, offsets(0, 500), offsets(0, 500), qkvo)
    qkvo[odd] = torch.zeros(500 * HEADS * DIM + 1, dtype=torch.bfloat16)[1:].view(500, HEADS, DIM)
    launch(kernel, offsets(0, 500), offsets(0, 500), qkvo)
    block = driver.launches[-1][2]
    for index, (tensor, which) in enumerate(zip(qkvo, params.MAPS, strict=True)):
        assert block[which][0] % 16 == 0
        assert (block[which][0] == tensor.data_ptr()) == (index != odd)


def test_tensors_without_maps_must_be_addressable_too(driver, kernel):
    q, k, _, _ = tensors()
    odd = torch.zeros(500 * HEADS * DIM + 1, dtype=torch.bfloat16)[1:].view(500, HEADS, DIM)
    maps = tensor_map.MapCache("bf16", (64,))
    for other, fits in ((odd, False), (k, True), (odd, False), (k, True)):
        found = maps.find((q.stride(), other.stride()), (q,), (other,))
        assert (found is not None) == fits
    assert driver.encoded == 1
    assert struct.unpack_from("<Q", found) == (q.data_ptr(),)


def test_one_head_of_keys_and_values_expanded_to_many_is_not_copied(driver, kernel):
    q, k, v, out = tensors(heads_kv=1)
    launch(kernel, offsets(0, 500), offsets(0, 500), (q, k.expand(-1, HEADS, -1), v.expand(-1, HEADS, -1), out))
    block = driver.launches[-1][2]
    assert (block["map_k"][0], block["map_v"][0]) == (k.data_ptr(), v.data_ptr())
    assert (block["heads"], block["gqa_ratio"]) == (HEADS, HEADS)


def test_no_keys_at_all_are_served(driver, kernel):
    q, _, _, out = tensors()
    none = torch.zeros(0, HEADS, DIM, dtype=torch.bfloat16)
    launch(kernel, offsets(0, 500), offsets(0, 0), (q, none, none, out))
    assert driver.names == ["jagtile_build_work_list", "attention"]


@pytest.mark.parametrize(("limit", "text"), [("MAX_TOKENS", "500 queries"), ("MAX_TILES", "20 tiles")])
def test_more_than_the_kernel_can_count_is_refused(driver, kernel, monkeypatch, limit, text):
    monkeypatch.setattr(work_list, limit, 10)
    with pytest.raises(UnsupportedError, match=text):
        launch(kernel, offsets(0, 100, 500), offsets(0, 100, 500))
    assert not driver.launches


def test_more_sequences_than_an_item_can_name_are_refused(driver, load, monkeypatch):
    monkeypatch.setattr(forward, "_MOST_PACKED", 1)
    launch(load(partial_bytes=PARTIAL_BYTES), offsets(0, 100, 500), offsets(0, 100, 500))
    with pytest.raises(UnsupportedError, match="a batch of 2 sequences; served by a kernel that packs them: 1"):
        launch(load(partial_bytes=PARTIAL_BYTES, pack_sequences=1), offsets(0, 100, 500), offsets(0, 100, 500))


def test_lists_with_packed_sequences_are_lists_of_their_own(driver, load):
    cu = offsets(0, 100, 500)
    for facts in ({}, {"pack_sequences": 1}, {}, {"pack_sequences": 1}):
        launch(load(partial_bytes=PARTIAL_BYTES, **facts), cu, cu)
    assert driver.names == [*("jagtile_build_split_work_list", "attention") * 2, "attention", "attention"]


# --- heads packed, keys split


@pytest.mark.parametrize(
    ("ratio", "together"), [(1, 1), (3, 3), (4, 4), (7, 7), (64, 64), (128, 64), (96, 48), (67, 1)]
)
def test_as_many_query_heads_of_a_kv_head_share_a_tile_as_fit(ratio, together):
    assert head_packs.packed_heads(ratio) == together


@pytest.mark.parametrize("heads", [8, 24, 32])
def test_a_packed_tile_has_tokens_of_all_heads_of_a_kv_head(driver, split_kernel, heads):
    qkvo = tensors(heads_kv=8, heads=heads)
    launch(split_kernel, offsets(0, 100, 500), offsets(0, 100, 500), qkvo)
    name, grid, block = driver.launches[-1]
    ratio = heads // 8
    tokens = 64 // ratio
    assert (block["heads"], block["gqa_ratio"], block["packed_heads"]) == (8, 1, ratio)
    assert block["block_m"] == BLOCK_M // 64 * tokens
    for which in ("map_q", "map_out"):
        assert block[which][2] == heads
        assert block[which][-2:] == (tokens, ratio)
    for which in ("map_k", "map_v"):
        assert block[which][-2:] == (BLOCK_N, 1)
    assert block["max_items"] == 500 // block["block_m"] + 2 + block["extra_items"]
    assert (name, grid) == ("attention", min(SLOTS, block["max_items"] * 8))


def test_there_is_room_for_what_is_left_of_pieces(driver, split_kernel, monkeypatch):
    sizes = []
    new_empty = torch.Tensor.new_empty

    def recorded(self, *shape, **kind):
        sizes.append(shape)
        return new_empty(self, *shape, **kind)

    monkeypatch.setattr(torch.Tensor, "new_empty", recorded)
    cu = offsets(0, 500)
    launch(split_kernel, cu, cu)
    block = driver.launches[-1][2]
    assert block["extra_items"] == 4 * SLOTS // HEADS
    assert block["results"] == 2 * block["extra_items"] * HEADS * (BLOCK_M // 64)
    assert sizes == [(block["results"] * PARTIAL_BYTES,)]
    assert block["partials"] != 0
    (entry,) = work_list._ENTRIES.values()
    assert entry.built.buffer.numel() == params.work_list_bytes(block["max_items"], extra_ints=block["results"])


def test_more_heads_than_there_is_work_for_are_not_split(driver, split_kernel):
    launch(split_kernel, offsets(0, 5), offsets(0, 5), tensors(5, heads_kv=600, heads=600))
    block = driver.launches[-1][2]
    assert (block["extra_items"], block["results"]) == (0, 0)


def test_lists_of_pieces_are_their_own_and_go_by_the_heads(driver, load):
    cu = offsets(0, 100, 500)
    launch(load(), cu, cu)
    split = load(partial_bytes=PARTIAL_BYTES)
    for heads in (4, 4, 8):
        launch(split, cu, cu, tensors(heads=heads))
    assert driver.names == [
        "jagtile_build_work_list",
        "attention",
        "jagtile_build_split_work_list",
        *["attention"] * 2,
        "jagtile_build_split_work_list",
        "attention",
    ]


# --- work lists


def builds(driver: Driver) -> int:
    return driver.names.count("jagtile_build_work_list")


def test_a_list_is_built_once_for_all_layers(driver, kernel):
    cu_q, cu_k = offsets(0, 100, 500), offsets(0, 200, 500)
    for _ in range(3):
        launch(kernel, cu_q, cu_k)
    assert driver.names == ["jagtile_build_work_list", *["attention"] * 3]


@pytest.mark.parametrize("facts", [{}, {"partial_bytes": PARTIAL_BYTES}])
def test_a_list_is_read_as_it_was_laid_out(driver, load, facts):
    kernel, cu = load(**facts), offsets(0, 100, 500)
    for total in (500, 2000, 500):  # tokens of no sequence at the end
        launch(kernel, cu, cu, tensors(total))
        block = driver.launches[-1][2]
        (built,) = (e.built for e in work_list._ENTRIES.values() if e.built.address == block["work_list"])
        assert block["max_items"] == built.max_items


@pytest.mark.parametrize(
    ("sequences", "more_blocks", "threads"),
    [(40, 10, 128), (300, 0, 256), (1024, 1024, 512), (1024, 1025, 256), (1025, 0, 256), (1100, 8000, 1024)],
)
def test_a_cluster_builds_what_is_too_long_for_one_cta(driver, load, sequences, more_blocks, threads):
    cu = offsets(*range(0, 10 * sequences + 1, 10))
    launch(load(), cu, cu, tensors(more_blocks * BLOCK_M + 1))
    name, grid, block = driver.launches[0]
    assert block["max_items"] == sequences + more_blocks
    alone = sequences <= 1024 and more_blocks <= 1024
    assert (name, grid) == (("jagtile_build_work_list", 1) if alone else ("jagtile_build_work_list_cluster", 8))
    assert driver.threads[0] == threads


def test_room_for_pieces_does_not_make_a_list_long(driver, split_kernel):
    launch(split_kernel, offsets(*range(1001)), offsets(*range(1001)), tensors(1000 * BLOCK_M))
    name, _, block = driver.launches[0]
    assert block["max_items"] > list_builder.MOST_ALONE
    assert name == "jagtile_build_split_work_list"


def test_a_list_is_built_anew_for_changed_offsets_and_for_another_stream(driver, kernel):
    cu_q, cu_k = offsets(0, 100, 500), offsets(0, 200, 500)
    launch(kernel, cu_q, cu_k)
    cu_q[1] = 101
    launch(kernel, cu_q, cu_k)
    cu_k[1] = 201
    launch(kernel, cu_q, cu_k)
    driver.stream = 1
    launch(kernel, cu_q, cu_k)
    assert builds(driver) == 4


def test_lists_of_inference_tensors_are_not_kept(driver, kernel):
    with torch.inference_mode():
        cu = offsets(0, 100, 500)
    launch(kernel, cu, cu)
    launch(kernel, cu, cu)
    assert builds(driver) == 2


def test_every_captured_launch_builds_its_own_list(driver, kernel):
    cu = offsets(0, 100, 500)
    launch(kernel, cu, cu)
    driver.capturing = True
    launch(kernel, cu, cu)
    launch(kernel, cu, cu)
    assert builds(driver) == 3
    with work_list.reuse_while_capturing():
        launch(kernel, cu, cu)
    assert builds(driver) == 3


def test_a_list_that_a_capture_has_not_run_is_not_kept(driver, kernel):
    cu = offsets(0, 100, 500)
    driver.capturing = True
    with work_list.reuse_while_capturing():
        launch(kernel, cu, cu)
    driver.capturing = False
    launch(kernel, cu, cu)
    assert builds(driver) == 2


def test_a_list_goes_with_either_of_its_offsets(driver, kernel):
    cu_q = offsets(0, 100, 500)
    for _ in range(3):  # constant queries over growing keys, as in decoding
        launch(kernel, cu_q, offsets(0, 200, 500))
    gc.collect()
    assert not work_list._ENTRIES
    cu_k = offsets(0, 200, 500)
    launch(kernel, cu_q, cu_k)
    assert len(work_list._ENTRIES) == 1
    del cu_q
    gc.collect()
    assert not work_list._ENTRIES


def test_offsets_can_be_saved_and_copied_after_a_launch(driver, kernel):
    cu = offsets(0, 100, 500)
    launch(kernel, cu, cu)
    file = io.BytesIO()
    torch.save(cu, file)
    file.seek(0)
    for other in (torch.load(file), copy.deepcopy(cu)):
        assert torch.equal(other, cu)
        before = builds(driver)
        launch(kernel, other, other)
        assert builds(driver) == before + 1


@pytest.mark.parametrize(("multiprocessors", "pairs"), [(132, 66), (7, 3), (2, 1)])
def test_a_grid_of_pairs_is_even_and_its_tiles_have_the_rows_of_both(driver, load, monkeypatch, multiprocessors, pairs):
    facts = SimpleNamespace(multi_processor_count=multiprocessors)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: facts, raising=False)
    kernel = load(cluster=2, causal=1)
    for tokens, tiles in ((1, 4), (20_000, (20_000 // (2 * BLOCK_M) + 1) * HEADS)):
        x, offsets = torch.zeros(tokens, HEADS, DIM, dtype=torch.bfloat16), torch.tensor([0, tokens])
        kernel.forward(x, x, x, offsets, offsets, torch.empty_like(x), None, 0.125, False)
        _, grid, block = driver.launches[-1]
        assert grid == 2 * min(pairs, tiles)
        assert (block["block_m"], block["causal_rows"]) == (2 * BLOCK_M, 64)
