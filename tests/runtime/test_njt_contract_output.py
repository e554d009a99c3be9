"""The contract of SDPA on nested tensors, its output: type, raggedness, storage, dtype, gradients, modes, row by row.

As far as torch computes a call on the CPU, every row compares with what torch gives.
"""

from __future__ import annotations

import pytest
import torch
from njt_cases import assert_close, attention, njt, offsets_of, one_for_all, qkv, with_holes, without_heads
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nested._internal.nested_tensor import NestedTensor
from torch.nested._internal.sdpa import jagged_scaled_dot_product_attention as torchs
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

import jagtile

pytestmark = [
    pytest.mark.usefixtures("oracle_kernels"),
    pytest.mark.filterwarnings("ignore::jagtile.JagtileWarning"),
]

CALLS = {
    "plain": lambda: qkv(),
    "cross attention": lambda: qkv((3, 4), (6, 1)),
    "head_dim_v": lambda: qkv(dim_v=12),
    "cached lengths": lambda: one_for_all(njt(min_seqlen=3, max_seqlen=4)),
}


def cached(nested: torch.Tensor) -> tuple[int | None, int | None]:
    return nested._maybe_min_seqlen, nested._maybe_max_seqlen


FACTS = {
    "it is a nested tensor": lambda out, query: type(out),
    "its shape, query's nested int included": lambda out, query: out.shape,
    "its offsets are query's": lambda out, query: (out.offsets() is query.offsets(), out.lengths()),
    "it is ragged on dimension 2": lambda out, query: out._ragged_idx,
    "strides of its values: token by token": lambda out, query: out._values.stride(),
    "it is not contiguous, but for its transpose": lambda out, query: (
        out.is_contiguous(),
        out.transpose(1, 2).is_contiguous(),
    ),
    "heads merge without a copy": lambda out, query: (
        out.transpose(1, 2).flatten(-2)._values.data_ptr() == out._values.data_ptr(),
        out.transpose(1, 2).flatten(-2).shape,
    ),
    "its cached lengths": lambda out, query: cached(out),
    "its dtype": lambda out, query: out.dtype,
    "a residual may be added": lambda out, query: (out + query).shape if out.shape[-1] == query.shape[-1] else None,
    "it needs no grad": lambda out, query: out.requires_grad,
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("row", FACTS)
def test_the_output_is_as_torchs(row, call):
    arguments = CALLS[call]()
    ours, expected = jagtile.sdpa(**arguments), torchs(**arguments)
    fact = FACTS[row]
    assert fact(ours, arguments["query"]) == fact(expected, arguments["query"])


def test_lengths_are_carried_through():
    query = with_holes()
    assert jagtile.sdpa(query, query, query).lengths() is query.lengths()


def test_three_dimensions_give_three():
    x = without_heads()
    out = jagtile.sdpa(x, x, x, is_causal=True)
    assert (out.shape, out._ragged_idx, out._values.stride()) == (x.shape, 1, (8, 1))
    assert out.is_contiguous()
    assert (out + x).shape == x.shape


def test_rows_without_keys_give_zero():
    out = jagtile.sdpa(**qkv((3, 2), (0, 4)))
    assert not out._values[:, :3].any()
    assert out._values[:, 3:].any(-1).all()


# --- autocast

AUTOCAST = {
    "float32": (torch.float32,) * 3,
    "float16": (torch.float16,) * 3,
    "mixed": (torch.float32, torch.float16, torch.bfloat16),
    "float64 stays": (torch.float64,) * 3,
}


@pytest.mark.parametrize("row", AUTOCAST)
def test_autocast_casts_as_torch_does(row):
    arguments = {name: njt(dtype=dtype) for name, dtype in zip(("query", "key", "value"), AUTOCAST[row], strict=True)}
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        ours, expected = jagtile.sdpa(**arguments), torchs(**arguments)
    assert ours.dtype == expected.dtype


def test_autocast_makes_no_pair_of_float64_and_float32_legal():
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="key has dtype"):
        jagtile.sdpa(**{**qkv(), "key": njt(dtype=torch.float64)})


# --- gradients: where plain operations serve, on every device

GRADIENTS = {
    "plain": {},
    "cross attention": {"lengths_k": (6, 1)},
    "a zero-length sequence": {"lengths": (3, 0, 4)},
    "head_dim_v": {"dim_v": 12},
}


@pytest.mark.parametrize("row", GRADIENTS)
def test_nested_leaves_get_the_gradients_that_torch_gives(row):
    found = []
    torch.manual_seed(0)
    arguments = qkv(**GRADIENTS[row], dtype=torch.float64)
    for attend in (jagtile.sdpa, torchs):
        leaves = {name: x.detach().requires_grad_() for name, x in arguments.items()}
        out = attend(**leaves)
        dout = torch.nested.nested_tensor_from_jagged(torch.ones_like(out.values().transpose(0, 1)), out.offsets())
        out.backward(dout.transpose(1, 2))
        found.append((leaves, out))
    (ours, our_out), (torchs_leaves, _) = found
    assert our_out.requires_grad
    for name, leaf in ours.items():
        grad = leaf.grad
        torch.testing.assert_close(grad._values, torchs_leaves[name].grad._values)
        assert grad.offsets() is leaf.offsets()
        assert (grad._ragged_idx, grad.shape) == (leaf._ragged_idx, leaf.shape)


def test_dense_leaves_get_dense_gradients():
    leaf = torch.randn(7, 2, 8, dtype=torch.float64, requires_grad=True)
    x = torch.nested.nested_tensor_from_jagged(leaf, offsets_of((3, 4))).transpose(1, 2)
    jagtile.sdpa(x, x, x, is_causal=True).values().square().sum().backward()
    assert leaf.grad.shape == leaf.shape
    assert not leaf.grad.is_nested


def test_activations_may_be_checkpointed():
    leaf = torch.randn(7, 2, 8, dtype=torch.float64, requires_grad=True)
    x = torch.nested.nested_tensor_from_jagged(leaf, offsets_of((3, 4))).transpose(1, 2)
    checkpoint(lambda x: jagtile.sdpa(x, x, x), x, use_reentrant=False).values().sum().backward()
    kept, leaf.grad = leaf.grad, None
    jagtile.sdpa(x, x, x).values().sum().backward()
    torch.testing.assert_close(kept, leaf.grad)


# --- modes


@pytest.mark.parametrize("made", ["inside", "outside"])
def test_inference_mode(made):
    arguments = qkv()
    with torch.inference_mode():
        arguments = qkv() if made == "inside" else arguments
        assert_close(jagtile.sdpa(**arguments, is_causal=True), attention(**arguments, is_causal=True))


def test_meta_tensors_give_meta_results():
    x = njt().to("meta")
    out = jagtile.sdpa(x, x, x)
    assert (out.device.type, out.shape) == ("meta", x.shape)


@pytest.mark.parametrize("cached", [{}, {"min_seqlen": 3, "max_seqlen": 4}], ids=["bare", "cached lengths"])
def test_training_compiles_into_one_graph(cached):
    leaf = torch.randn(7, 2, 8, dtype=torch.float64, requires_grad=True)

    def loss(values, offsets):
        x = torch.nested.nested_tensor_from_jagged(values, offsets, **cached).transpose(1, 2)
        return scaled_dot_product_attention(x, x, x, is_causal=True).values().square().sum()

    torch._dynamo.reset()
    with jagtile.enabled():
        torch.compile(loss, backend="aot_eager", fullgraph=True)(leaf, offsets_of((3, 4))).backward()
        kept, leaf.grad = leaf.grad, None
        loss(leaf, offsets_of((3, 4))).backward()
    torch.testing.assert_close(kept, leaf.grad)
    torch._dynamo.reset()


def test_sdpa_kernel_with_math_alone_is_torchs_own(oracle_kernels):
    arguments = qkv()
    with torch.nn.attention.sdpa_kernel([torch.nn.attention.SDPBackend.MATH]), jagtile.enabled():
        scaled_dot_product_attention(**arguments)
    assert oracle_kernels.arguments == []


# --- what nested tensors themselves can't do, whoever attends


def from_values(values: torch.Tensor) -> torch.Tensor:
    return torch.nested.nested_tensor_from_jagged(values, offsets_of((1, 2))).transpose(1, 2)


def second_derivative(attend) -> None:
    leaf = torch.randn(3, 1, 2, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(attend(*[from_values(leaf)] * 3).values().square().sum(), leaf, create_graph=True)
    first.sum().backward()


def forward_mode(attend) -> None:
    values = torch.randn(3, 1, 2, dtype=torch.float64)
    torch.func.jvp(lambda x: attend(*[from_values(x)] * 3).values(), (values,), (values,))


def vectorised(attend) -> None:
    torch.vmap(lambda x: attend(*[from_values(x)] * 3).values())(torch.randn(2, 3, 1, 2))


def faked_by_hand(attend) -> None:
    with FakeTensorMode():
        x = NestedTensor(torch.empty(2, 7, 8), torch.empty(3, dtype=torch.int64), _ragged_idx=2)
        attend(x, x, x)


def exported(attend) -> None:
    class Layer(torch.nn.Module):
        def forward(self, x):
            return attend(x, x, x)

    torch.export.export(Layer(), (njt(),))


LIMITS = {
    "double backward": (second_derivative, NotImplementedError),
    "forward-mode derivatives": (forward_mode, NotImplementedError),
    "vmap": (vectorised, RuntimeError),
    "FakeTensorMode by hand": (faked_by_hand, AssertionError),
    "export": (exported, AttributeError if torch.__version__ >= (2, 13) else RuntimeError),
}


@pytest.mark.parametrize("attend", [jagtile.sdpa, torchs], ids=["ours", "torch's"])
@pytest.mark.parametrize("row", LIMITS)
def test_nested_tensors_can_not_do_it(row, attend):
    attempt, error = LIMITS[row]
    with pytest.raises(error):
        attempt(attend)
