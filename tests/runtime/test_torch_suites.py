"""What PyTorch's own suites check of SDPA on nested tensors and of varlen_attn, with jagtile in its place.

A test is named for the one of test_nestedtensor.py or test_varlen_attention.py whose claim it repeats; those that run
only on CUDA there run here on the CPU, where jagtile serves them.
"""

from __future__ import annotations

import inspect
from itertools import pairwise

import pytest
import torch
from torch.nested import nested_tensor_from_jagged as from_jagged
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import jagtile
from jagtile.generator.oracle import tolerance
from jagtile.generator.toolchain import find_cxx
from jagtile.generator.workloads import Workload
from jagtile.runtime import flash_impl

try:
    find_cxx()
    NO_COMPILER = ""
except jagtile.CompilerNotFoundError as error:
    NO_COMPILER = str(error)

real_kernels = pytest.mark.skipif(bool(NO_COMPILER), reason=f"no C++ compiler: {NO_COMPILER}")
dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
HEADS, DIM = 8, 16


@pytest.fixture(autouse=True)
def enabled():
    """All of this module runs with jagtile enabled, and leaves no compiled code behind."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    with jagtile.enabled():
        yield
    torch._dynamo.reset()


def heads_of(x: torch.Tensor, heads: int) -> torch.Tensor:
    """(..., n, heads * D) as (..., heads, n, D), for a nested tensor and for a dense one."""
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)


def close(found: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype, roundings: float = 4) -> None:
    """Within a few roundings of the dtype of what float64 gives."""
    assert found.shape == exact.shape
    assert float((found.detach().double() - exact).norm()) <= roundings * tolerance(dtype) * float(
        exact.norm().clamp_min(1e-30)
    )


class Projections(torch.nn.Module):
    """Three projections and attention, on sequences (n, E) or a nested tensor (B, j, E)."""

    def __init__(self, dtype: torch.dtype, heads: int = HEADS, dim: int = DIM) -> None:
        super().__init__()
        self.heads = heads
        self.parts = torch.nn.ModuleList(torch.nn.Linear(heads * dim, heads * dim, dtype=dtype) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = (heads_of(part(x), self.heads) for part in self.parts)
        return scaled_dot_product_attention(query, key, value)


# --- test_sdpa


@real_kernels
@dtypes
@pytest.mark.parametrize(
    "backends", [None, [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH], [SDPBackend.MATH]], ids=str
)
@pytest.mark.parametrize("lengths", [(11, 13), (1,)], ids=str)
def test_sdpa(dtype, backends, lengths):
    """As dense attention of each sequence: the output, and the gradients of input and of all projections."""
    layer = Projections(dtype)
    values = torch.randn(sum(lengths), HEADS * DIM, dtype=dtype, requires_grad=True)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    x = from_jagged(values, offsets)
    context = sdpa_kernel(backends) if backends else torch.enable_grad()
    with context:
        out = layer(x)
    assert out.shape == (len(lengths), HEADS, x.shape[1], DIM)
    weight = torch.randn(sum(lengths), HEADS, DIM)
    (out.values().transpose(0, 1) * weight).sum().backward()
    exact = Projections(torch.float64)
    exact.load_state_dict({name: p.double() for name, p in layer.state_dict().items()})
    leaf = values.detach().double().requires_grad_()
    wanted = torch.cat([exact(part).transpose(0, 1) for part in leaf.split(list(lengths))])
    (wanted * weight).sum().backward()
    # The projections' own roundings in 16 bits come on top.
    close(out.values().transpose(0, 1), wanted, dtype, roundings=8)
    close(values.grad, leaf.grad, dtype, roundings=20)
    # With one key, query and key have gradients of 0 but for roundings: measured by the value's.
    size = max(float(p.grad.norm()) for p in exact.parameters())
    for parameter, other in zip(layer.parameters(), exact.parameters(), strict=True):
        assert float((parameter.grad.double() - other.grad).norm()) <= 20 * tolerance(dtype) * size


# --- test_sdpa_compile, test_sdpa_backwards


@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=str)
def test_sdpa_compile(dtype, oracle_kernels):
    q, k, v = (heads_of(from_jagged(torch.randn(24, 2 * 128, dtype=dtype), offsets), 2) for offsets in [OFFSETS] * 3)
    compiled = torch.compile(scaled_dot_product_attention, backend="aot_eager", fullgraph=True)
    found, wanted = compiled(q, k, v), scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(found.values(), wanted.values())
    assert len(oracle_kernels.arguments) == 2


OFFSETS = torch.tensor([0, 11, 24])


@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=str)
def test_sdpa_backwards(dtype, oracle_kernels):
    """A graph break and a view replayed after it, D 256, q = k = v: attention is nearly the identity."""
    values = torch.randn(24, 1, 256, dtype=dtype, requires_grad=True)

    def attend(values, offsets):
        x = from_jagged(values, offsets).transpose(1, 2)
        torch._dynamo.graph_break()
        return scaled_dot_product_attention(x, x, x).transpose(1, 2)

    out = torch.compile(attend, backend="aot_eager")(values, OFFSETS)
    out.values().sum().backward()
    wanted = values.grad
    torch.testing.assert_close(wanted, torch.ones_like(wanted), rtol=0.05, atol=0.05)
    assert len(oracle_kernels.backward_routes) == 1


# --- test_sdpa_with_constant_sequence_length


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_sdpa_with_constant_sequence_length(dtype, oracle_kernels):
    """(B, j, X, D), ragged on dimension 1: dense attention over X."""
    operands = [torch.randn(24, HEADS, 5, DIM, dtype=dtype).transpose(1, 2).requires_grad_() for _ in range(3)]
    nested = [from_jagged(x, OFFSETS) for x in operands]
    out = scaled_dot_product_attention(*nested)
    dense = scaled_dot_product_attention(*operands)
    torch.testing.assert_close(out.values(), dense)
    found, wanted = (torch.autograd.grad(x.sum(), operands) for x in (out.values(), dense))
    torch.testing.assert_close(found, wanted)
    assert oracle_kernels.arguments == []


# --- test_sdpa_with_packed_in_proj


@dtypes
def test_sdpa_with_packed_in_proj(dtype, oracle_kernels):
    """Chunks of one projection, which are not contiguous."""
    packed = torch.randn(24, 3 * 2 * 8, dtype=dtype)

    def attend(x):
        return scaled_dot_product_attention(*(heads_of(part, 2) for part in x.chunk(3, -1)))

    out = attend(from_jagged(packed, OFFSETS)).values().transpose(0, 1)
    wanted = torch.cat([attend(part.double()).transpose(0, 1) for part in packed.split([11, 13])])
    close(out, wanted, dtype)
    assert oracle_kernels.arguments[0][0].untyped_storage().data_ptr() == packed.untyped_storage().data_ptr()


# --- test_sdpa_autocast


@pytest.mark.parametrize("compiled", [False, True])
def test_sdpa_autocast(compiled, oracle_kernels):
    """q and v in float32, k in float16, int32 offsets, under autocast to float16."""
    offsets = OFFSETS.int()
    kinds = (torch.float32, torch.float16, torch.float32)
    leaves = [torch.randn(24, HEADS, DIM, dtype=dtype, requires_grad=True) for dtype in kinds]

    def attend(q, k, v):
        return scaled_dot_product_attention(*(from_jagged(x, offsets).transpose(1, 2) for x in (q, k, v)))

    call = torch.compile(attend, backend="aot_eager", fullgraph=True) if compiled else attend
    with torch.autocast("cpu", torch.float16):
        out = call(*leaves)
    assert out.dtype == torch.float16
    out.values().float().sum().backward()
    exact = [x.detach().half().double().requires_grad_() for x in leaves]
    parts = zip(*(x.split([11, 13]) for x in exact), strict=True)
    wanted = torch.cat(
        [scaled_dot_product_attention(*(x.transpose(0, 1) for x in part)).transpose(0, 1) for part in parts]
    )
    wanted.sum().backward()
    close(out.values().transpose(0, 1), wanted, torch.float16)
    for leaf, other in zip(leaves, exact, strict=True):
        assert leaf.grad.dtype == leaf.dtype
        assert float((leaf.grad.double() - other.grad).norm()) <= 0.01 * float(exact[2].grad.norm())


# --- test_sdpa_flop_counter


def test_sdpa_flop_counter(oracle_kernels):
    """Forward and backward count what torch counts for dense attention of the sequences."""

    def step():
        x = from_jagged(torch.randn(24, HEADS, DIM, requires_grad=True), OFFSETS).transpose(1, 2)
        scaled_dot_product_attention(x, x, x).values().sum().backward()

    shapes = [(1, HEADS, n, DIM) for n in (11, 13)]
    wanted = sum(sdpa_flop_count(s, s, s) + sdpa_backward_flop_count(s, s, s, s) for s in shapes)
    with FlopCounterMode(display=False) as counter:
        step()
    assert counter.get_total_flops() == wanted > 0


# --- test_dummy_mha_with_nt


def nested(values: torch.Tensor, offsets: torch.Tensor, max_seqlen: int | None = None) -> torch.Tensor:
    """A leaf of symbolic traces, which torch's constructor refuses to be part of."""
    return from_jagged(values, offsets, min_seqlen=max_seqlen and 1, max_seqlen=max_seqlen)


torch.fx.wrap("nested")


class CrossAttention(torch.nn.Module):
    """Dense queries (B, n, E) on nested keys and values, whose cached lengths are false and differ."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (torch.nn.Linear(32, 32) for _ in range(3))

    def forward(self, query: torch.Tensor, values: torch.Tensor, offsets: torch.Tensor, steps: torch.Tensor):
        key, value = nested(self.k(values), offsets, 10), nested(self.v(values), offsets, 20)
        query = nested(self.q(query).flatten(0, 1), steps)
        out = scaled_dot_product_attention(*(x.unflatten(-1, (4, 8)).transpose(1, 2) for x in (query, key, value)))
        return out.transpose(1, 2).flatten(-2), key, value


@pytest.mark.parametrize("traced", [False, True], ids=["module", "symbolic trace"])
def test_dummy_mha_with_nt(traced, oracle_kernels):
    layer = CrossAttention()
    lengths = (27, 3, 9)
    offsets, steps = torch.tensor([0, *lengths]).cumsum(0), torch.arange(4) * 5
    query, values = torch.randn(3, 5, 32, requires_grad=True), torch.randn(39, 32)
    call = (query, values, offsets, steps)
    module = torch.fx.symbolic_trace(layer) if traced else layer
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
        eager, key, value = module(*call)
        graph, graph_key, graph_value = torch.compile(module, backend="aot_eager")(*call)
    torch.testing.assert_close(graph.values(), eager.values())
    for kept, longest in ((key, 10), (value, 20), (graph_key, 10), (graph_value, 20)):
        assert kept._max_seqlen == longest
    grads = [torch.autograd.grad(x.values().square().sum(), query)[0] for x in (eager, graph)]
    torch.testing.assert_close(*grads)
    parts = zip(layer.q(query), layer.k(values).split(lengths), layer.v(values).split(lengths), strict=True)
    dense = [scaled_dot_product_attention(*(heads_of(x, 4) for x in part)) for part in parts]
    wanted = torch.cat([x.transpose(0, 1).flatten(1) for x in dense])
    torch.testing.assert_close(eager.values(), wanted)


# --- test_compile_preserves_metadata_cache


@pytest.mark.parametrize("cached", [{}, {"min_seqlen": 11, "max_seqlen": 13}], ids=["bare", "cached"])
def test_compile_preserves_metadata_cache(cached, oracle_kernels):
    x = from_jagged(torch.randn(24, HEADS, DIM), OFFSETS, **cached).transpose(1, 2)
    out = torch.compile(lambda x: scaled_dot_product_attention(x, x, x), backend="aot_eager", fullgraph=True)(x)
    assert (out._maybe_min_seqlen, out._maybe_max_seqlen) == (cached.get("min_seqlen"), cached.get("max_seqlen"))
    assert out.offsets() is x.offsets()


# --- test_varlen_attention.py

LENGTHS = (7, 1, 30, 12)


def packed(lengths=LENGTHS, dtype=torch.float32):
    return Workload("w", lengths, lengths, 4, 4, DIM, DIM).make("cpu", dtype, seed=3)


def test_custom_op_registration():
    for name in ("forward", "differentiable_forward", "backward"):
        assert hasattr(torch.ops.jagtile, name)
        for key in ("CPU", "CUDA"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"jagtile::{name}", key)


def test_custom_op_compliance(oracle_kernels):
    b = packed((3, 4))
    call = (*b, True, False, 0.3)
    torch.library.opcheck(torch.ops.jagtile.forward, (*call, True))
    torch.library.opcheck(torch.ops.jagtile.differentiable_forward, tuple(
        x.requires_grad_() if index < 3 else x for index, x in enumerate(call)
    ))  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [None, 0.1])
@pytest.mark.parametrize("window", [(-1, -1), (-1, 0)], ids=str)
def test_varlen_vs_sdpa(dtype, scale, window, oracle_kernels):
    """torch's varlen_attn with our kernels behind it, and our own function, against dense attention."""
    varlen = pytest.importorskip("torch.nn.attention.varlen", reason="this torch has no varlen_attn")
    b = packed(dtype=dtype)
    kind = {"is_causal": window == (-1, 0), "scale": scale}
    parts = zip(*(x.double().split(LENGTHS) for x in b[:3]), strict=True)
    wanted = torch.cat(
        [scaled_dot_product_attention(*(x.transpose(0, 1) for x in part), **kind).transpose(0, 1) for part in parts]
    )
    close(jagtile.varlen_attention(*b, **kind), wanted, dtype)
    if "window_size" not in inspect.signature(varlen.varlen_attn).parameters:
        pytest.skip("this torch's varlen_attn has no windows")
    handle = flash_impl.override("CPU")
    try:
        with torch.no_grad():
            close(varlen.varlen_attn(*b, scale=scale, window_size=window), wanted, dtype)
    finally:
        handle.remove()


@real_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("order", [(3, 2, 1, 0), (1, 3, 0, 2), (2,)], ids=str)
def test_batch_invariance(dtype, is_causal, order):
    """A sequence has the same bits, output and gradients, whatever its neighbours."""
    b = packed(dtype=dtype)
    dout = torch.randn_like(b.q)

    def trained(q, k, v, cu, dout):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = jagtile.varlen_attention(*leaves, cu, cu, is_causal=is_causal)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

    together = trained(*b[:4], dout)
    spans = [range(begin, end) for begin, end in pairwise(b.cu_seqlens_q.tolist())]
    rows = torch.tensor([row for index in order for row in spans[index]])
    cu = torch.tensor([0, *(len(spans[index]) for index in order)]).cumsum(0)
    found = trained(*(x[rows] for x in b[:3]), cu, dout[rows])
    for ours, wanted in zip(found, together, strict=True):
        assert torch.equal(ours, wanted[rows])
