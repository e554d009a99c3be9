"""torch.compile sees one operator and takes the whole call into one graph."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import scaled_dot_product_attention

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


BATCHES = [(3, 4), (5, 1, 9), (2, 2, 2, 7), (8,) * 5, (1, 30, 4), (9,)]


def of_packed(values, cu, longest):
    q, k, v = values.unflatten(1, (3, 2, 8)).unbind(1)
    return jagtile.varlen_attention(q, k, v, cu, cu, longest, longest, is_causal=True).flatten(1)


def of_nested(x):
    q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in x.chunk(3, -1))
    return scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)


@pytest.mark.parametrize(
    ("kind", "lengths", "grad"),
    [
        ("packed", "known", True),
        ("packed", "unknown", False),
        ("nested", "unknown", True),
        ("nested", "known", True),
        ("nested", "known", False),
    ],
)
def test_batches_of_other_sizes_and_lengths_are_not_compiled_anew(oracle_kernels, kind, lengths, grad):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    function = of_packed if kind == "packed" else of_nested
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    with torch.set_grad_enabled(grad), jagtile.enabled():
        for seqlens in BATCHES:
            values = torch.randn(sum(seqlens), 48, requires_grad=grad)
            cu = torch.tensor([0, *seqlens]).cumsum(0)
            if kind == "packed":
                call = (values, cu, max(seqlens) if lengths == "known" else None)
            else:
                known = {"min_seqlen": min(seqlens), "max_seqlen": max(seqlens)} if lengths == "known" else {}
                call = (torch.nested.nested_tensor_from_jagged(values, cu, **known),)
            outs = [out.values() if out.is_nested else out for out in (compiled(*call), function(*call))]
            torch.testing.assert_close(*outs)
            if grad:
                grads = [torch.autograd.grad(out.square().sum(), values)[0] for out in outs]
                torch.testing.assert_close(*grads)
    # With sizes as they are, then with those as symbols that were seen to change; torch before 2.13 takes a step more.
    assert counter.frame_count <= (3 if torch.__version__ >= (2, 13) else 4)
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["packed", "nested"])
def test_inductor_trains(oracle_kernels, kind):
    """The default backend, its own code around the operators; sizes are symbols, nested tensors begin inside."""

    def packed(q, k, v, cu):
        return jagtile.varlen_attention(q * 2, k, v, cu, cu, is_causal=True) + 1

    def nested(q, k, v, cu):
        q, k, v = (torch.nested.nested_tensor_from_jagged(x, cu).transpose(1, 2) for x in (q * 2, k, v))
        return scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).values() + 1

    layer = packed if kind == "packed" else nested
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    with torch.enable_grad(), jagtile.enabled():
        for total in (10, 12):
            cu = torch.tensor([0, 4, total], dtype=torch.int64)
            operands = [torch.randn(total, 4, 8, requires_grad=True) for _ in range(3)]
            out, expected = compiled(*operands, cu), layer(*operands, cu)
            torch.testing.assert_close(out, expected)
            torch.testing.assert_close(*(torch.autograd.grad(x.square().sum(), operands) for x in (out, expected)))
