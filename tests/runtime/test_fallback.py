"""What no kernel covers: plain operations, equal to the oracle, differentiable, said once."""

from __future__ import annotations

import random
import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

import jagtile
from jagtile.generator.oracle import errors, reference
from jagtile.generator.workloads import Workload, random_workload
from jagtile.runtime import fallback, layouts, trainable

CROSS = Workload("cross", (3, 0, 17, 9), (9, 4, 0, 5), 4, 2, 16, 24)
KINDS = [
    {"is_causal": False},
    {"is_causal": True},
    {"is_causal": True, "causal_alignment": "bottom_right"},
]


@pytest.fixture(autouse=True)
def fresh_reasons(monkeypatch):
    """Every test hears the warnings anew; those that are not about them do not see them."""
    monkeypatch.setattr(fallback, "_REASONS", {})
    monkeypatch.setattr(layouts, "_KNOWN", {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", jagtile.JagtileWarning)
        yield


@pytest.fixture(params=["by sequence", "masked"])
def way(request, monkeypatch):
    """Both ways to compute; the second in blocks of a few rows."""
    if request.param == "masked":
        monkeypatch.setattr(fallback, "_is_fake", lambda tensor: True)
        monkeypatch.setattr(fallback, "_BLOCK_BYTES", 8 * 4 * 30 * 5)


def packed(workload: Workload, dtype: torch.dtype = torch.float64):
    return workload.make("cpu", dtype, seed=1)[:5]


def offsets(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def njts(dtype: torch.dtype = torch.float64, dim: int = 8, **kind) -> list[torch.Tensor]:
    cu = torch.tensor([0, 3, 3, 7])
    make = torch.nested.nested_tensor_from_jagged
    return [make(torch.randn(7, 2, dim, dtype=dtype, **kind), cu).transpose(1, 2) for _ in range(3)]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_it_equals_the_oracle(way, kind):
    for w in (CROSS, *(random_workload(random.Random(s), head_dim=8, head_dim_v=12, max_seqlen=30) for s in range(4))):
        b = packed(w)
        out, lse = jagtile.varlen_attention(*b, **kind, scale=0.3, return_lse=True)
        expected, expected_lse = reference(*b, **kind, scale=0.3)
        assert out.dtype == lse.dtype == torch.float64
        assert out.is_contiguous()
        assert errors(out, expected).rel < 1e-14
        torch.testing.assert_close(lse, expected_lse)


@pytest.mark.parametrize(("dtype", "bar"), [(torch.float32, 1e-6), (torch.bfloat16, 2.8e-3), (torch.float16, 3.5e-4)])
def test_head_dims_beyond_all_kernels_are_served(way, dtype, bar):
    b = packed(Workload("wide", (5, 12), (5, 12), 2, 1, 264, 300), dtype)
    out, lse = jagtile.varlen_attention(*b, is_causal=True, return_lse=True)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    assert errors(out, reference(*b, is_causal=True)[0]).rel <= bar


def test_rows_of_no_sequence_give_zero_and_minus_infinity(way):
    x = torch.randn(9, 2, 8, dtype=torch.float64)
    out, lse = jagtile.varlen_attention(x, x, x, offsets(0, 4, 6), offsets(0, 4, 9), return_lse=True)
    assert not out[6:].any()
    assert (lse[:, 6:] == float("-inf")).all()
    assert torch.isfinite(lse[:, :6]).all()


@pytest.mark.parametrize(
    ("total_q", "total_k", "cu_q", "cu_k"),
    [(0, 0, (0,), (0,)), (3, 5, (0,), (0,)), (0, 5, (0, 0), (0, 5)), (3, 0, (0, 1, 3), (0, 0, 0))],
    ids=["no sequence", "no sequence but rows", "no queries", "no keys"],
)
def test_a_batch_without_work_is_zero(way, total_q, total_k, cu_q, cu_k):
    q, k = (torch.randn(n, 2, 8, dtype=torch.float64, requires_grad=True) for n in (total_q, total_k))
    out, lse = jagtile.varlen_attention(q, k, k, offsets(*cu_q), offsets(*cu_k), return_lse=True)
    assert out.shape == (total_q, 2, 8)
    assert not out.any()
    assert (lse == float("-inf")).all()
    out.sum().backward()
    assert not q.grad.any()


def test_what_is_not_finite_stays_in_its_sequence(way):
    q, k, v = torch.randn(3, 7, 2, 8, dtype=torch.float64)
    cu = offsets(0, 3, 5)  # the last two rows belong to none
    clean = jagtile.varlen_attention(q, k, v, cu, cu)
    for x, row, value in ((k, 1, float("nan")), (v, 2, float("inf")), (q, 0, float("nan")), (v, 6, float("nan"))):
        x[row, 0, 1] = value
    for x in (q, k, v):
        x.requires_grad_()
    out = jagtile.varlen_attention(q, k, v, cu, cu)
    assert not torch.isfinite(out[:3, 0]).all(-1).any()
    assert torch.equal(out[:3, 1], clean[:3, 1])
    assert torch.equal(out[3:], clean[3:])
    out[3:5].sum().backward()
    assert all(torch.isfinite(x.grad[3:5]).all() for x in (q, k, v))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_autograd_goes_through_it_twice(way, kind):
    q, k, v, cu_q, cu_k = packed(Workload("tiny", (2, 0, 3), (3, 2, 1), 2, 1, 3, 2))

    def call(q, k, v):
        return jagtile.varlen_attention(q, k, v, cu_q, cu_k, **kind)

    inputs = tuple(x.clone().requires_grad_() for x in (q, k, v))
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_lse_has_gradients_beside_those_of_out(way, kind):
    """With GQA, cross lengths, empty sequences and rows that see no key, whose lse is -inf."""
    *operands, cu_q, cu_k = packed(Workload("tiny", (2, 0, 4, 2), (3, 2, 1, 0), 2, 1, 3, 2))
    finite = jagtile.varlen_attention(*operands, cu_q, cu_k, return_lse=True, **kind)[1].isfinite()
    assert not finite.all()

    def call(q, k, v):
        out, lse = jagtile.varlen_attention(q, k, v, cu_q, cu_k, return_lse=True, **kind)
        return out, lse[finite]

    assert torch.autograd.gradcheck(call, tuple(x.clone().requires_grad_() for x in operands))


def test_functorch_goes_through_it(way):
    x, cu = torch.randn(2, 5, 2, 3, dtype=torch.float64), offsets(0, 2, 5)
    call = lambda x: jagtile.varlen_attention(x, x, x, cu, cu)  # noqa: E731
    torch.testing.assert_close(torch.vmap(call)(x), torch.stack([call(x[0]), call(x[1])]))
    grads = torch.func.grad(lambda x: call(x).square().sum())(x[0])
    leaf = x[0].clone().requires_grad_()
    call(leaf).square().sum().backward()
    torch.testing.assert_close(grads, leaf.grad)


# --- nested tensors


@pytest.mark.parametrize("is_causal", [False, True])
def test_sdpa_takes_float64_and_empty_sequences(way, is_causal):
    query, key, value = njts()
    out = jagtile.sdpa(query, key, value, is_causal=is_causal)
    assert out.offsets() is query.offsets()
    assert out._values.stride() == (8, 16, 1)
    expected = reference(
        *(x._values.transpose(0, 1) for x in (query, key, value)), *[query.offsets()] * 2, is_causal=is_causal
    )
    torch.testing.assert_close(out._values.transpose(0, 1), expected[0])


def test_torchs_function_takes_them_too_while_enabled(way):
    query, key, value = njts(torch.bfloat16, 264)
    with torch.no_grad(), jagtile.enabled():
        out = scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(out._values, jagtile.sdpa(query, key, value, is_causal=True)._values)


def test_gradients_reach_the_values_of_nested_tensors(way):
    leaves = [torch.randn(5, 1, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    cu = torch.tensor([0, 2, 5])

    def call(*values):
        nested = (torch.nested.nested_tensor_from_jagged(x, cu).transpose(1, 2) for x in values)
        return jagtile.sdpa(*nested, is_causal=True).values()

    assert torch.autograd.gradcheck(call, leaves)


def test_a_nested_leaf_gets_a_nested_gradient(way):
    x = njts()[0].detach().requires_grad_()
    jagtile.sdpa(x, x, x).values().sum().backward()
    assert x.grad.is_nested
    assert x.grad.offsets() is x.offsets()


# --- no host synchronisation, compilers, modes


class Log(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_masked_way_reads_no_value_on_the_host(kind):
    b = packed(CROSS)
    with Log() as log:
        jagtile.varlen_attention(*b, **kind)
    assert "aten.bmm.default" in log.seen
    assert not [name for name in log.seen if "local_scalar" in name or "nonzero" in name or "masked_select" in name]


def test_scores_are_bounded_in_size(monkeypatch):
    b = packed(Workload("long", (64, 64), (64, 64), 2, 2, 8, 8))
    monkeypatch.setattr(fallback, "_BLOCK_BYTES", 8 * 2 * 128 * 16)
    with Log() as log:
        jagtile.varlen_attention(*b)
    assert log.seen.count("aten.bmm.default") == 2 * 128 // 16


def test_fake_tensors_give_fake_results():
    with FakeTensorMode():
        q, v = torch.empty(7, 4, 8, dtype=torch.float64), torch.empty(9, 2, 16, dtype=torch.float64)
        cu = torch.empty(4, dtype=torch.int32)
        out, lse = jagtile.varlen_attention(q, torch.empty(9, 2, 8, dtype=torch.float64), v, cu, cu, return_lse=True)
    assert (out.shape, lse.shape) == ((7, 4, 16), (4, 7))


def test_it_compiles_into_one_graph_and_follows_the_lengths():
    def layer(q, cu):
        return jagtile.varlen_attention(q, q, q, cu, cu, is_causal=True) + 1

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for total in (10, 12):
        q, cu = torch.randn(total, 4, 8, dtype=torch.float64), offsets(0, 4, total)
        torch.testing.assert_close(compiled(q, cu), layer(q, cu))


def test_autocast_does_not_lower_its_precision(way):
    b = packed(Workload("wide", (5, 12), (5, 12), 2, 1, 264, 264), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = jagtile.varlen_attention(*b)
    assert errors(out, reference(*b)[0]).rel < 1e-6


# --- what is said


def test_each_reason_is_said_once():
    b = packed(CROSS)
    with pytest.warns(jagtile.JagtileWarning, match="no kernel computes in torch.float64: slow") as said:
        jagtile.varlen_attention(*b)
    assert said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jagtile.varlen_attention(*b)
        jagtile.varlen_attention(*b, is_causal=True)  # another case, for the same reason
    with pytest.warns(jagtile.JagtileWarning, match="no kernel takes a head_dim above 256, such as 300"):
        jagtile.varlen_attention(*packed(Workload("wide", (5,), (5,), 1, 1, 300, 8), torch.float32))


@pytest.fixture
def h200(monkeypatch):
    """The CPU says that it is an H200."""
    known = jagtile.runtime.device.DeviceId("sm90-132sm", "sm_90a", "NVIDIA H200", 132, 4917, "9.0")
    for place in ("jagtile.runtime.fallback.device_id", "jagtile.runtime.device.device_id"):
        monkeypatch.setattr(place, lambda device: known)
    trainable.why_no_backward.cache_clear()
    yield
    trainable.why_no_backward.cache_clear()


def test_what_has_no_kernel_either_way_is_trained(h200):
    x = torch.randn(5, 2, 8, requires_grad=True)
    jagtile.varlen_attention(x, x, x, offsets(0, 5), offsets(0, 5)).sum().backward()
    assert x.grad is not None


def test_what_has_a_forward_kernel_only_is_trained(h200):
    x = torch.randn(5, 2, 20, dtype=torch.bfloat16, requires_grad=True)
    call = (x, x, x, offsets(0, 5), offsets(0, 5))
    why = "no kernel for bwd_bf16_d20 on target sm_90a: .*head_dim must be a multiple of 8"
    with pytest.warns(jagtile.JagtileWarning, match=f"{why}.*slow operations of torch serve this call"):
        jagtile.varlen_attention(*call).sum().backward()
    assert x.grad is not None
    with pytest.raises(jagtile.UnsupportedError, match=f"{why}.*no kernel would run"):
        jagtile.explain(*call)
    with torch.no_grad():
        assert fallback.no_kernel(x, x, False, trained=trainable.requires_grad(x, x, x)) is None


def test_what_a_target_refuses_is_the_reason(h200):
    x = torch.randn(5, 2, 8)
    with pytest.warns(jagtile.JagtileWarning, match="no kernel for fwd_fp32_d8 on target sm_90a: .*dtype must be bf16"):
        jagtile.varlen_attention(x, x, x, offsets(0, 5), offsets(0, 5))


def test_what_a_kernel_serves_is_no_case_for_it(oracle_kernels):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jagtile.varlen_attention(*packed(CROSS, torch.bfloat16))
    assert len(oracle_kernels.arguments) == 1
