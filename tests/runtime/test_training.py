"""Training: gradients through varlen_attention, sdpa and torch's function on nested tensors, against the oracle."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn.functional import scaled_dot_product_attention

import jagtile
from jagtile.generator.oracle import errors
from jagtile.generator.oracle_gradients import gradient_tolerance, reference_gradients
from jagtile.generator.spaces.cpu_forward import CpuForwardSpace
from jagtile.generator.toolchain import find_cxx
from jagtile.generator.workloads import JaggedBatch, Workload, random_workload
from jagtile.runtime.routes import forget
from jagtile.runtime.settings import settings
from jagtile.runtime.trainable import why_no_backward

try:
    find_cxx()
    NO_COMPILER = ""
except jagtile.CompilerNotFoundError as error:
    NO_COMPILER = str(error)

NESTED = Workload("nested", (3, 0, 4), (3, 0, 4), 2, 2, 8, 8)


def trained(batch: JaggedBatch, **kind) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """Gradients by autograd and by the oracle, of a random loss of out and lse."""
    operands = [x.clone().requires_grad_() for x in batch[:3]]
    out, lse = jagtile.varlen_attention(*operands, *batch[3:], return_lse=True, **kind)
    generator = torch.Generator().manual_seed(5)
    dout = torch.randn(out.shape, generator=generator).to(out.dtype)
    dlse = torch.randn(lse.shape, generator=generator)
    grads = torch.autograd.grad((out, lse), operands, (dout, dlse))
    return grads, reference_gradients(*batch[:5], dout, dlse, **kind)


@pytest.fixture(scope="module")
def real_kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Kernels are rendered, built and loaded, in a cache of this module's own."""
    if NO_COMPILER:
        pytest.skip(f"no C++ compiler: {NO_COMPILER}")
    forget()
    with settings.override(cache_dir=tmp_path_factory.mktemp("cache")):
        yield
    forget()


@pytest.mark.usefixtures("real_kernels")
@pytest.mark.parametrize("alignment", ["top_left", "bottom_right"])
@pytest.mark.parametrize(("dtype", "is_causal"), [(torch.float32, True), (torch.bfloat16, False)])
def test_built_kernels_train(dtype, is_causal, alignment):
    for seed in range(6):
        batch = random_workload(random.Random(seed), head_dim=24, head_dim_v=40, max_seqlen=150).make(
            "cpu", dtype, seed
        )
        grads, expected = trained(batch, is_causal=is_causal, causal_alignment=alignment)
        for grad, want in zip(grads, expected, strict=True):
            assert grad.dtype == dtype
            assert errors(grad, want).rel <= 1.5 * gradient_tolerance(dtype)  # out is rounded too


@pytest.mark.usefixtures("real_kernels")
def test_a_layer_on_nested_tensors_learns_as_dense_attention_does():
    torch.manual_seed(0)
    offsets = torch.tensor([0, 13, 13, 60, 61])
    projection = torch.nn.Linear(24, 3 * 2 * 8)
    values = torch.randn(61, 24)
    with jagtile.enabled():
        x = torch.nested.nested_tensor_from_jagged(values, offsets)
        heads = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in projection(x).chunk(3, -1))
        scaled_dot_product_attention(*heads, is_causal=True).values().square().sum().backward()
    found = [parameter.grad.clone() for parameter in projection.parameters()]
    projection.zero_grad()
    loss = torch.zeros(())
    for begin, end in pairwise(offsets.tolist()):
        heads = (part.unflatten(-1, (2, 8)).transpose(0, 1) for part in projection(values[begin:end]).chunk(3, -1))
        loss = loss + scaled_dot_product_attention(*heads, is_causal=True).square().sum()
    loss.backward()
    for grad, parameter in zip(found, projection.parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.fixture
def deterministic() -> Iterator[None]:
    """What torch does not do deterministically raises, and memory that it hands out is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("real_kernels", "deterministic")
def test_deterministic_training_gives_the_same_bits_again():
    offsets, values = torch.tensor([0, 13, 13, 60, 61, 200]), torch.randn(200, 24)

    def train() -> list[torch.Tensor]:
        torch.manual_seed(0)
        projection, back = torch.nn.Linear(24, 3 * 4 * 8), torch.nn.Linear(4 * 8, 24)
        optimizer = torch.optim.AdamW([*projection.parameters(), *back.parameters()], 1e-2)
        x = torch.nested.nested_tensor_from_jagged(values, offsets)
        for _ in range(4):
            heads = (part.unflatten(-1, (4, 8)).transpose(1, 2) for part in projection(x).chunk(3, -1))
            with jagtile.enabled():
                out = scaled_dot_product_attention(*heads, is_causal=True)
            (back(out.transpose(1, 2).flatten(-2)) - x).values().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return [*projection.parameters(), *back.parameters()]

    first = train()
    assert all(weight.isfinite().all() for weight in first)
    for _ in range(3):
        assert all(torch.equal(again, weight) for again, weight in zip(train(), first, strict=True))


@pytest.mark.usefixtures("real_kernels")
def test_warmup_for_training_spares_the_builds(caplog):
    forget()
    names = jagtile.warmup(24, torch.float32, head_dim_v=40, is_causal=True, device="cpu", training=True)
    assert [name.split("/")[1] for name in names] == ["fwd_fp32_d24_dv40_causal", "bwd_fp32_d24_dv40_causal"]
    with caplog.at_level(logging.WARNING, logger="jagtile"):
        trained(Workload("w", (3, 4), (2, 5), 2, 2, 24, 40).make("cpu", "fp32"), is_causal=True)
    assert caplog.records == []


def test_only_what_requires_grad_gets_one(oracle_kernels):
    q, k, v, *rest = Workload("w", (3, 0, 4), (2, 5, 1), 4, 2, 8, 6).make("cpu", "fp32")
    k.requires_grad_()
    out = jagtile.varlen_attention(q, k, v, *rest, is_causal=True, scale=0.3)
    out.sum().backward()  # an expanded gradient, all of whose strides are 0
    expected = reference_gradients(q, k.detach(), v, *rest[:2], torch.ones_like(out), is_causal=True, scale=0.3)
    torch.testing.assert_close(k.grad, expected.dk.float())
    assert q.grad is None
    assert oracle_kernels.backward_routes == [(torch.float32, 8, 6, True, -1, 0, False)]


def test_the_lse_alone_has_gradients(oracle_kernels):
    batch = Workload("w", (3, 0, 4), (2, 5, 1), 2, 2, 8, 8).make("cpu", "fp32")
    q, k, v = (x.requires_grad_() for x in batch[:3])
    _, lse = jagtile.varlen_attention(*batch, return_lse=True)
    lse[:, :3].sum().backward()
    dlse = torch.zeros_like(lse)
    dlse[:, :3] = 1
    nothing = torch.zeros(7, 2, 8)
    for x, want in zip((q, k, v), reference_gradients(*batch[:5], nothing, dlse), strict=True):
        torch.testing.assert_close(x.grad, want.float())


def test_a_batch_without_work_has_zeros(oracle_kernels):
    cu = torch.tensor([0])
    q, k = (torch.randn(n, 2, 8, requires_grad=True) for n in (3, 5))
    jagtile.varlen_attention(q, k, k, cu, cu).sum().backward()
    assert q.grad.shape == q.shape
    assert not q.grad.any()
    assert not k.grad.any()
    assert oracle_kernels.backward_routes == []


def njts(*, requires_grad: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Values (7, 2, 8) and their nested view (3, 2, j, 8)."""
    values = torch.randn(7, 2, 8, requires_grad=requires_grad)
    return values, torch.nested.nested_tensor_from_jagged(values, torch.tensor([0, 3, 3, 7])).transpose(1, 2)


@pytest.mark.parametrize("autocast", [False, True])
def test_nested_tensors_train(oracle_kernels, autocast):
    values, x = njts()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = jagtile.sdpa(x, x, x, is_causal=True)
    assert out.dtype == (torch.bfloat16 if autocast else torch.float32)
    assert out.offsets() is x.offsets()
    (out.float().values() ** 2).sum().backward()
    plain = values.detach().clone().requires_grad_()
    cu = torch.tensor([0, 3, 3, 7])
    (jagtile.varlen_attention(plain, plain, plain, cu, cu, is_causal=True) ** 2).sum().backward()
    torch.testing.assert_close(values.grad, plain.grad, **({"rtol": 0.05, "atol": 0.05} if autocast else {}))


def test_torchs_function_trains_here_when_enabled(oracle_kernels):
    values, x = njts()
    with jagtile.enabled():
        scaled_dot_product_attention(x, x, x, is_causal=True).values().sum().backward()
    assert values.grad.any()
    assert len(oracle_kernels.backward_routes) == 1


def test_a_graph_trains_as_eager_calls_do(oracle_kernels):
    batch = NESTED.make("cpu", "fp32")
    q, k, v = (x.requires_grad_() for x in batch[:3])

    def layer(q, k, v):
        return jagtile.varlen_attention(q * 2, k, v, *batch[3:], is_causal=True) + 1

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for found, want in zip(
        *(torch.autograd.grad(f(q, k, v).square().sum(), (q, k, v)) for f in (compiled, layer)), strict=True
    ):
        torch.testing.assert_close(found, want)


def test_a_graph_over_nested_tensors_trains(oracle_kernels):
    values, x = njts()
    torch.compile(lambda x: jagtile.sdpa(x, x, x) * 2, backend="aot_eager", fullgraph=True)(x).values().sum().backward()
    found, values.grad = values.grad, None
    (jagtile.sdpa(x, x, x) * 2).values().sum().backward()
    torch.testing.assert_close(found, values.grad)


def test_the_operators_keep_what_operators_promise(oracle_kernels):
    batch = Workload("w", (3, 0, 4), (2, 5, 1), 4, 2, 8, 6).make("cpu", "fp32")
    call = (*batch[:5], None, None, True, False, 0.3)
    out, lse = torch.ops.jagtile.differentiable_forward.default(*call)
    backward = (torch.randn_like(out), torch.randn_like(lse), *batch[:5], out, lse, None, None, True, False, 0.3)
    torch.library.opcheck(torch.ops.jagtile.backward.default, backward)
    for x in batch[:3]:
        x.requires_grad_()
    torch.library.opcheck(torch.ops.jagtile.differentiable_forward.default, call)


def test_second_derivatives_are_refused(oracle_kernels):
    q, k, v, *rest = NESTED.make("cpu", "fp32")
    q.requires_grad_()
    (grad,) = torch.autograd.grad(jagtile.varlen_attention(q, k, v, *rest).sum(), q, create_graph=True)
    with pytest.raises(jagtile.UnsupportedError, match="no second derivatives"):
        grad.sum().backward()


def test_forward_mode_derivatives_are_refused_and_not_taken_for_zero(oracle_kernels):
    q, k, v, *rest = NESTED.make("cpu", "fp32")
    with pytest.raises(jagtile.UnsupportedError, match="no forward-mode derivatives"):
        torch.func.jvp(lambda v: jagtile.varlen_attention(q, k, v, *rest), (v,), (v,))
    with forward_ad.dual_level():
        with pytest.raises(jagtile.UnsupportedError, match="no forward-mode derivatives"):
            jagtile.varlen_attention(forward_ad.make_dual(q, q), k, v, *rest)
        jagtile.varlen_attention(q, k, v, *rest)  # nothing to differentiate


def test_without_a_backward_kernel_plain_operations_serve_both_passes(oracle_kernels, no_backward):
    batch = NESTED.make("cpu", "fp32")
    batch.v.requires_grad_()
    with pytest.warns(jagtile.JagtileWarning, match="none in this test: slow operations"):
        jagtile.varlen_attention(*batch).sum().backward()
    assert batch.v.grad is not None
    values, x = njts()
    jagtile.sdpa(x, x, x).values().sum().backward()
    assert values.grad is not None
    assert oracle_kernels.arguments == []
    with pytest.raises(jagtile.UnsupportedError, match="none in this test: no kernel would run"):
        jagtile.explain(*batch)
    with torch.no_grad():
        jagtile.sdpa(x, x, x)
    assert len(oracle_kernels.arguments) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (72, 40), (192, 128), (256, 256)])
def test_what_has_a_forward_kernel_has_a_backward_kernel(dtype, dims):
    for device in ("cpu", "cuda"):
        assert why_no_backward.__wrapped__(dtype, *dims, torch.device(device)) is None


def test_on_a_gpu_head_dims_that_are_no_multiples_of_8_have_none():
    assert why_no_backward.__wrapped__(torch.bfloat16, 30, 30, torch.device("cpu")) is None
    reason = why_no_backward.__wrapped__(torch.bfloat16, 30, 30, torch.device("cuda"))
    assert "no kernel for bwd_bf16_d30 on target sm_90a" in reason
    assert "head_dim must be a multiple of 8" in reason


def test_the_reason_for_having_no_backward_kernel_names_the_spec(monkeypatch):
    monkeypatch.setattr("jagtile.generator.tile.spaces", lambda: (CpuForwardSpace(),))
    reason = why_no_backward.__wrapped__(torch.bfloat16, 64, 64, torch.device("cpu"))
    assert "bwd_bf16_d64" in reason
