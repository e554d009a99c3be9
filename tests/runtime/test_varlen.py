"""What varlen_attention does around its kernels: outputs, rows of no sequence, degenerate batches, operators."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import jagtile
from jagtile.generator.oracle import errors, reference, tolerance
from jagtile.generator.workloads import random_workload
from jagtile.runtime.problem import LOOK_UPS


def batch(seed: int = 0, dtype: torch.dtype = torch.float32, head_dim: int = 8, head_dim_v: int = 8):
    workload = random_workload(random.Random(seed), head_dim=head_dim, head_dim_v=head_dim_v, max_seqlen=40)
    return workload.make("cpu", dtype)


def offsets(*values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("alignment", ["top_left", "bottom_right"])
def test_it_returns_out_and_lse(oracle_kernels, seed, dtype, alignment):
    b = batch(seed, dtype, head_dim_v=12)
    kind = {"is_causal": True, "causal_alignment": alignment, "scale": 0.3}
    out, lse = jagtile.varlen_attention(*b, **kind, return_lse=True)
    expected, expected_lse = reference(*b[:5], **kind)
    assert (out.dtype, out.shape, out.is_contiguous()) == (dtype, expected.shape, True)
    assert (lse.dtype, lse.shape) == (torch.float32, expected_lse.shape)
    assert errors(out, expected).rel <= tolerance(dtype)
    torch.testing.assert_close(lse, expected_lse.float(), rtol=1e-5, atol=1e-5)


def test_without_return_lse_it_returns_a_tensor_and_asks_the_kernel_for_none(oracle_kernels):
    assert isinstance(jagtile.varlen_attention(*batch()), torch.Tensor)
    assert oracle_kernels.arguments[0][6] is None


def test_the_default_scale_is_one_over_the_root_of_head_dim(oracle_kernels):
    jagtile.varlen_attention(*batch(head_dim=64))
    assert oracle_kernels.arguments[0][7] == 0.125


def test_views_of_a_packed_projection_reach_the_kernel_uncopied(oracle_kernels):
    qkv = torch.randn(10, 3, 2, 8)
    q, k, v = qkv.unbind(1)
    cu = offsets(0, 4, 10)
    out = jagtile.varlen_attention(q, k, v, cu, cu)
    assert [t.data_ptr() for t in oracle_kernels.arguments[0][:3]] == [t.data_ptr() for t in (q, k, v)]
    assert errors(out, reference(q, k, v, cu, cu)[0]).rel < 1e-6


def test_offsets_may_be_int64(oracle_kernels):
    b = batch()
    wide = jagtile.varlen_attention(b.q, b.k, b.v, b.cu_seqlens_q.long(), b.cu_seqlens_k)
    torch.testing.assert_close(wide, jagtile.varlen_attention(*b))


def test_rows_of_no_sequence_give_zero_and_minus_infinity(oracle_kernels):
    x = torch.randn(9, 2, 8)
    out, lse = jagtile.varlen_attention(x, x, x, offsets(0, 4, 6), offsets(0, 4, 9), return_lse=True)
    assert torch.isfinite(out[:6]).all()
    assert not out[6:].any()
    assert (lse[:, 6:] == float("-inf")).all()


@pytest.mark.parametrize(
    ("total_q", "total_k", "cu_q", "cu_k"),
    [
        (0, 0, (0,), (0,)),
        (3, 5, (0,), (0,)),
        (0, 5, (0, 0), (0, 5)),
        (3, 0, (0, 1, 3), (0, 0, 0)),
    ],
    ids=["no sequence", "no sequence but rows", "no queries", "no keys"],
)
def test_a_batch_without_work_needs_no_kernel(oracle_kernels, total_q, total_k, cu_q, cu_k):
    q, k = torch.randn(total_q, 2, 8), torch.randn(total_k, 2, 8)
    out, lse = jagtile.varlen_attention(q, k, k, offsets(*cu_q), offsets(*cu_k), return_lse=True)
    assert out.shape == (total_q, 2, 8)
    assert not out.any()
    assert (lse == float("-inf")).all()
    assert oracle_kernels.routes == []


def test_inputs_that_require_grad_are_served_where_no_grad_is_recorded(oracle_kernels):
    q, k, v, *rest = batch()
    q.requires_grad_()
    with torch.no_grad():
        assert not jagtile.varlen_attention(q, k, v, *rest).requires_grad
    with torch.inference_mode():
        assert jagtile.varlen_attention(q, k, v, *rest).is_inference()


def test_a_parameter_is_a_tensor(oracle_kernels):
    q, *rest = batch()
    frozen = torch.nn.Parameter(q, requires_grad=False)
    torch.testing.assert_close(jagtile.varlen_attention(frozen, *rest), jagtile.varlen_attention(q, *rest))


def test_max_seqlen_is_only_a_hint_for_the_regime(oracle_kernels):
    b = batch()
    plain = jagtile.varlen_attention(*b[:5])
    wrong = jagtile.varlen_attention(*b[:5], 1, 1_000_000)
    torch.testing.assert_close(plain, wrong)
    assert [LOOK_UPS[route[5]] for route in oracle_kernels.routes][1] != ("short",)


class OpLog(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_one_operator(oracle_kernels):
    b = batch()
    with OpLog() as log:
        out, lse = jagtile.varlen_attention(*b, return_lse=True)
    assert log.seen.count("jagtile.forward.default") == 1
    torch.testing.assert_close((out, lse), jagtile.varlen_attention(*b, return_lse=True))


@pytest.mark.parametrize("return_lse", [False, True])
def test_fake_tensors_give_fake_results_of_the_right_shape(return_lse):
    with FakeTensorMode():
        q, k = torch.empty(7, 4, 8, dtype=torch.bfloat16), torch.empty(9, 2, 8, dtype=torch.bfloat16)
        v = torch.empty(9, 2, 16, dtype=torch.bfloat16)
        cu = torch.empty(4, dtype=torch.int32)
        found = jagtile.varlen_attention(q, k, v, cu, cu, return_lse=return_lse)
    out, lse = found if return_lse else (found, None)
    assert (out.shape, out.dtype) == ((7, 4, 16), torch.bfloat16)
    if lse is not None:
        assert (lse.shape, lse.dtype) == ((4, 7), torch.float32)


def test_meta_tensors_give_meta_results():
    x, cu = torch.empty(7, 4, 8, device="meta"), torch.empty(4, dtype=torch.int32, device="meta")
    assert jagtile.varlen_attention(x, x, x, cu, cu).device.type == "meta"


def test_vmap_has_a_clear_end(oracle_kernels):
    x, cu = torch.randn(2, 5, 2, 8), offsets(0, 5)
    with pytest.raises(RuntimeError, match="jagtile::forward"):
        torch.vmap(lambda t: jagtile.varlen_attention(t, t, t, cu, cu))(x)


def test_the_operator_keeps_its_promises(oracle_kernels):
    q, k, v, cu_q, cu_k, *_ = batch()
    for return_lse in (False, True):
        torch.library.opcheck(
            torch.ops.jagtile.forward.default,
            (q, k, v, cu_q, cu_k, None, None, False, False, 0.3, return_lse),
            test_utils=("test_schema", "test_faketensor"),
        )


def test_a_kernel_that_the_compiler_refuses_gives_way_to_the_default(plain_spaces, monkeypatch):
    from jagtile.generator.spec import KernelSpec
    from jagtile.generator.tile import Variant
    from jagtile.runtime import routes
    from jagtile.runtime.dispatch import Decision
    from jagtile.runtime.errors import RejectedVariantError

    spec = KernelSpec("fwd", "fp32", 8, 8, False)
    chosen = routes.default_variant(spec, "cpu")
    chosen = Variant("cpu", spec, type(chosen.config)(128))

    def kernel_for(variant, device):
        if variant == chosen:
            raise RejectedVariantError("it spills")
        return SimpleNamespace(meta=SimpleNamespace(symbol=variant.symbol))

    monkeypatch.setattr(routes, "ROUTES", {})
    monkeypatch.setattr(routes, "decide", lambda *_: Decision(chosen, ("short",), "user", ()))
    monkeypatch.setattr(routes.kernel_table(), "kernel_for", kernel_for)
    with pytest.warns(jagtile.JagtileWarning, match="plain_b128 .user choices. can't be used, plain_b64.*it spills"):
        kernel = routes.resolve((torch.float32, 8, 8, False, -1, 0, False))
    assert kernel.meta.symbol.endswith("plain_b64")
    assert list(routes.ROUTES.values()) == [kernel]
