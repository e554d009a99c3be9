"""torch.compile sees one operator and takes the whole call into one graph."""

from __future__ import annotations

import pytest
import torch

import jagtile

pytestmark = pytest.mark.usefixtures("no_grad")


def test_a_call_in_grad_mode_compiles_where_no_operand_requires_grad(oracle_kernels):
    x = torch.nested.nested_tensor_from_jagged(torch.randn(7, 4, 8), torch.tensor([0, 3, 7])).transpose(1, 2)
    with torch.enable_grad():
        out = torch.compile(lambda x: jagtile.sdpa(x, x, x), backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(out._values, jagtile.sdpa(x, x, x)._values)


def test_varlen_attention_compiles_into_one_graph_and_follows_the_shapes(oracle_kernels):
    def layer(q, cu):
        out, lse = jagtile.varlen_attention(q * 2, q, q, cu, cu, is_causal=True, return_lse=True)
        return out + 1, lse

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for total in (10, 12):
        q, cu = torch.randn(total, 4, 8), torch.tensor([0, 4, total], dtype=torch.int32)
        torch.testing.assert_close(compiled(q, cu), layer(q, cu))


@pytest.mark.parametrize("cached", [{}, {"min_seqlen": 3, "max_seqlen": 4}], ids=["bare", "cached lengths"])
def test_sdpa_compiles_into_one_graph(oracle_kernels, cached):
    x = torch.nested.nested_tensor_from_jagged(torch.randn(7, 4, 8), torch.tensor([0, 3, 7]), **cached).transpose(1, 2)
    out = torch.compile(lambda x: jagtile.sdpa(x, x, x) + x, backend="aot_eager", fullgraph=True)(x)
    expected = jagtile.sdpa(x, x, x) + x
    torch.testing.assert_close(out._values, expected._values)
    assert out.offsets() is x.offsets()


def test_key_and_value_with_two_offsets_tensors_compile_too(oracle_kernels):
    query, key, value = (
        torch.nested.nested_tensor_from_jagged(torch.randn(7, 4, 8), torch.tensor([0, 3, 7])).transpose(1, 2)
        for _ in range(3)
    )
    out = torch.compile(jagtile.sdpa, backend="aot_eager", fullgraph=True)(query, key, value)
    torch.testing.assert_close(out._values, jagtile.sdpa(query, key, value)._values)


def test_autocast_holds_inside_a_graph(oracle_kernels):
    x = torch.nested.nested_tensor_from_jagged(torch.randn(7, 4, 8), torch.tensor([0, 3, 7])).transpose(1, 2)
    compiled = torch.compile(lambda x: jagtile.sdpa(x, x, x), backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert compiled(x).dtype == torch.bfloat16
    assert compiled(x).dtype == torch.float32


def test_training_compiles_where_every_size_is_a_symbol(oracle_kernels):
    def loss(q, cu):
        return jagtile.varlen_attention(q, q, q, cu, cu).square().sum()

    q, cu = torch.randn(10, 2, 16, requires_grad=True), torch.tensor([0, 4, 10])
    with torch.enable_grad():
        torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=True)(q, cu).backward()
        compiled, q.grad = q.grad, None
        loss(q, cu).backward()
    torch.testing.assert_close(compiled, q.grad)
