"""Training in eager calls: one node of autograd for packed operands, and one for nested tensors."""

from __future__ import annotations

import pytest
import torch
from njt_cases import head_by_head, njt, offsets_of, qkv, with_holes, without_heads
from torch.nested._internal.nested_tensor import NestedTensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import jagtile
from jagtile.generator.workloads import Workload

pytestmark = pytest.mark.usefixtures("oracle_kernels")


def leaves(**shape) -> dict[str, torch.Tensor]:
    return {name: x.detach().requires_grad_() for name, x in qkv(**shape).items()}


def by_views(**call) -> list[torch.Tensor]:
    """The gradients' values of sum(out^2), through packed attention and torch's own views."""
    kind = {name: value for name, value in call.items() if name not in ("query", "key", "value")}
    nested = [call[name] for name in ("query", "key", "value")]
    packed = [x._values.detach().transpose(0, 1).requires_grad_() for x in nested]
    out = jagtile.varlen_attention(*packed, nested[0]._offsets, nested[1]._offsets, **kind)
    return [x.transpose(0, 1) for x in torch.autograd.grad(out.square().sum(), packed)]


def trained(**call) -> list[torch.Tensor]:
    nested = [call[name] for name in ("query", "key", "value")]
    enable = {"enable_gqa": True} if nested[0]._values.shape[0] != nested[1]._values.shape[0] else {}
    out = jagtile.sdpa(**call, **enable)
    assert type(out.grad_fn).__name__ == "NestedAttentionBackward"
    return list(torch.autograd.grad(out.values().square().sum(), nested))


@pytest.mark.parametrize(
    "shape",
    [{}, {"lengths_k": (6, 1)}, {"lengths": (3, 0, 4)}, {"heads": 4, "heads_kv": 2, "dim_v": 12}],
    ids=["plain", "cross", "a zero length", "GQA, head_dim_v"],
)
@pytest.mark.parametrize("kind", [{}, {"is_causal": True, "scale": 0.4}], ids=["full", "causal"])
def test_nested_leaves_get_nested_gradients_of_their_form(shape, kind):
    call = leaves(**shape)
    for found, wanted, name in zip(trained(**call, **kind), by_views(**call, **kind), call, strict=True):
        torch.testing.assert_close(found._values, wanted)
        leaf = call[name]
        assert type(found) is NestedTensor
        assert found.offsets() is leaf.offsets()
        assert (found.shape, found._ragged_idx, found.dtype) == (leaf.shape, leaf._ragged_idx, leaf.dtype)


def test_one_tensor_for_all_three_gets_the_sum():
    x = njt().requires_grad_()
    (found,) = torch.autograd.grad(jagtile.sdpa(x, x, x).values().square().sum(), x)
    call = dict.fromkeys(("query", "key", "value"), x)
    torch.testing.assert_close(found._values, sum(by_views(**call)))


def test_only_what_requires_grad_gets_one():
    call = qkv()
    call["key"].requires_grad_()
    jagtile.sdpa(**call).values().sum().backward()
    assert call["key"].grad is not None
    assert call["query"].grad is None
    assert call["value"].grad is None


def test_gradients_accumulate_and_flow_on_to_dense_leaves():
    values = torch.randn(7, 2, 8, requires_grad=True)
    x = torch.nested.nested_tensor_from_jagged(values, offsets_of((3, 4))).transpose(1, 2)
    for times in (1, 2):
        (jagtile.sdpa(x * 2, x, x) + x).values().sum().backward()
        if times == 1:
            once = values.grad.clone()
    torch.testing.assert_close(values.grad, 2 * once)


def test_other_storage_and_tensors_without_heads_are_one_node_too():
    for x in (head_by_head(), without_heads()):
        leaf = x.detach().requires_grad_()
        out = jagtile.sdpa(leaf, leaf, leaf)
        assert type(out.grad_fn).__name__ == "NestedAttentionBackward"
        (found,) = torch.autograd.grad(out.values().square().sum(), leaf)
        assert (found.shape, found._ragged_idx) == (leaf.shape, leaf._ragged_idx)
        packed = (leaf._values.transpose(0, 1) if leaf._ragged_idx == 2 else leaf._values.unsqueeze(1)).detach()
        packed.requires_grad_()
        wanted = jagtile.varlen_attention(packed, packed, packed, leaf._offsets, leaf._offsets).square().sum()
        (wanted,) = torch.autograd.grad(wanted, packed)
        torch.testing.assert_close(
            found._values.reshape(-1), (wanted.transpose(0, 1) if leaf._ragged_idx == 2 else wanted).reshape(-1)
        )


@pytest.mark.parametrize("nested", [False, True])
def test_the_backward_gets_the_very_offsets_of_the_forward(oracle_kernels, nested):
    """GPUs' launchers keep lists of work by the identity of the offsets."""
    cu = offsets_of((3, 4))
    values = torch.randn(7, 2, 8, requires_grad=True)
    if nested:
        x = torch.nested.nested_tensor_from_jagged(values, cu).transpose(1, 2)
        jagtile.sdpa(x, x, x).values().sum().backward()
    else:
        jagtile.varlen_attention(values, values, values, cu, cu).sum().backward()
    for arguments in (*oracle_kernels.arguments, *oracle_kernels.backward_arguments):
        assert arguments[3] is cu
        assert arguments[4] is cu
    assert len(oracle_kernels.backward_arguments) == 1


def test_autocast_gives_gradients_of_the_leaves_dtypes():
    call = leaves()
    with torch.autocast("cpu", torch.bfloat16):
        out = jagtile.sdpa(**call)
    assert out.dtype == torch.bfloat16
    out.backward(torch.ones_like(out))
    assert {x.grad.dtype for x in call.values()} == {torch.float32}
    for leaf, wanted in zip(call.values(), by_views_of_ones(**call), strict=True):
        torch.testing.assert_close(leaf.grad._values, wanted, rtol=0.05, atol=0.05)


def by_views_of_ones(**call) -> list[torch.Tensor]:
    packed = [x._values.detach().transpose(0, 1).requires_grad_() for x in call.values()]
    cu = call["query"]._offsets
    return [x.transpose(0, 1) for x in torch.autograd.grad(jagtile.varlen_attention(*packed, cu, cu).sum(), packed)]


def test_holes_take_torchs_views():
    values = with_holes().detach().requires_grad_()
    out = jagtile.sdpa(values, values, values)
    assert type(out.grad_fn).__name__ != "NestedAttentionBackward"
    out.values().sum().backward()
    assert values.grad is not None


@pytest.mark.parametrize("nested", [False, True])
def test_second_derivatives_are_refused_and_first_ones_with_a_graph_are_not(nested):
    if nested:
        x = njt().requires_grad_()
        loss = jagtile.sdpa(x, x, x).values().square().sum()
    else:
        x = torch.randn(7, 2, 8, requires_grad=True)
        loss = jagtile.varlen_attention(x, x, x, *[offsets_of((3, 4))] * 2).square().sum()
    (plain,) = torch.autograd.grad(loss, x, retain_graph=True)
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    values = grad.values() if nested else grad
    torch.testing.assert_close(values.detach(), plain.values() if nested else plain)
    assert grad.requires_grad
    with pytest.raises(jagtile.UnsupportedError, match="no second derivatives"):  # only what leads to x is run
        torch.autograd.grad(values.square().sum(), x, allow_unused=True, retain_graph=True)
    with pytest.raises(jagtile.UnsupportedError, match="no second derivatives"):
        values.square().sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_nested_activations_may_be_checkpointed(reentrant):
    values = torch.randn(7, 2, 8, requires_grad=True)
    offsets = offsets_of((3, 4))

    def layer(values):
        x = torch.nested.nested_tensor_from_jagged(values, offsets).transpose(1, 2)
        return jagtile.sdpa(x, x, x, is_causal=True, dropout_p=0.3).values()

    found = []
    for call in (layer, lambda values: checkpoint(layer, values, use_reentrant=reentrant)):
        torch.manual_seed(4)
        call(values).sum().backward()
        found.append(values.grad)
        values.grad = None
    torch.testing.assert_close(*found)


def test_packed_operands_that_were_changed_meanwhile_are_an_error():
    b = Workload("w", (3, 5), (3, 5), 2, 2, 8, 8).make("cpu", torch.float32)
    out = jagtile.varlen_attention(b.q.requires_grad_(), *b[1:])
    b.k.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("changed", ["query", "key", "value", "output"])
def test_nested_tensors_that_were_changed_meanwhile_are_an_error(changed):
    tensors = {name: x.detach().requires_grad_() * 1 for name, x in qkv((3, 4), (2, 5)).items()}
    tensors["output"] = jagtile.sdpa(**tensors)
    with torch.no_grad():
        tensors[changed].mul_(2)
    total = tensors["output"].values().sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_nested_operands_that_autocast_copied_may_change():
    tensors = {name: x.detach().requires_grad_() * 1 for name, x in qkv().items()}
    with torch.autocast("cpu", torch.bfloat16):
        total = jagtile.sdpa(**tensors).values().sum()
    with torch.no_grad():
        tensors["query"].mul_(2)
    total.backward()


def test_inference_tensors_are_torchs_to_refuse_but_not_normal_values_in_them():
    query = njt().detach().requires_grad_()
    values, offsets = query.detach()._values, query.offsets()
    with torch.inference_mode():
        normal = NestedTensor(values, offsets, _ragged_idx=2)
        inference = NestedTensor(values.clone(), offsets, _ragged_idx=2)
    jagtile.sdpa(query, normal, normal).values().sum().backward()
    assert query.grad is not None
    with pytest.raises(RuntimeError, match="cannot be saved for backward"):
        jagtile.sdpa(query, inference, inference)


def test_modes_see_operators():
    """A counter of FLOPs is a mode: it sees the forward's two products and the backward's five."""
    call = leaves(lengths=(3, 5))
    with FlopCounterMode(display=False) as counter:
        jagtile.sdpa(**call).values().sum().backward()
    assert counter.get_total_flops() == 7 * 2 * 2 * (9 + 25) * 8
    b = Workload("w", (3, 5), (3, 5), 2, 2, 8, 8).make("cpu", torch.float32)
    with FlopCounterMode(display=False) as counter:
        jagtile.varlen_attention(b.q.requires_grad_(), *b[1:]).sum().backward()
    assert counter.get_total_flops() == 7 * 2 * 2 * (9 + 25) * 8


def test_a_mode_that_comes_only_with_the_backward_sees_an_operator():
    call = leaves(lengths=(3, 5))
    out = jagtile.sdpa(**call).values().sum()
    with FlopCounterMode(display=False) as counter:
        out.backward()
    assert counter.get_total_flops() == 5 * 2 * 2 * (9 + 25) * 8


@pytest.mark.filterwarnings("ignore::jagtile.JagtileWarning")
def test_what_plain_operations_serve_is_theirs_to_differentiate():
    call = {name: x.double().detach().requires_grad_() for name, x in qkv().items()}
    with jagtile.enabled():
        scaled_dot_product_attention(**call, is_causal=True).values().sum().backward()
    assert all(x.grad.dtype == torch.float64 for x in call.values())
