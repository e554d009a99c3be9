"""enable, disable, enabled: F.scaled_dot_product_attention on nested tensors comes here, and goes back."""

from __future__ import annotations

import sys
import threading
import warnings

import pytest
import torch
from torch.nested._internal import ops
from torch.nested._internal.sdpa import jagged_scaled_dot_product_attention as torchs
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import jagtile
from jagtile.runtime import fallback, patch


@pytest.fixture(autouse=True)
def fresh_route(monkeypatch):
    monkeypatch.setattr(patch, "_route", patch._Route())
    patch._route._newly_seen(patch.compiled_graphs())  # of other tests
    yield
    jagtile.disable()


def njt(**kind) -> torch.Tensor:
    values = torch.randn(7, 2, 8, **kind)
    return torch.nested.nested_tensor_from_jagged(values, torch.tensor([0, 3, 7])).transpose(1, 2)


def served_here(calls) -> bool:
    """Whether a causal call, which torch refuses on the CPU, reaches the kernels."""
    x = njt()
    before = len(calls.arguments)
    try:
        scaled_dot_product_attention(x, x, x, is_causal=True)
    except RuntimeError:
        return False
    return len(calls.arguments) == before + 1


def test_enable_routes_here_and_disable_back(oracle_kernels):
    assert not served_here(oracle_kernels)
    jagtile.enable()
    assert served_here(oracle_kernels)
    jagtile.disable()
    assert not served_here(oracle_kernels)


def test_enabling_twice_is_enabling_once(oracle_kernels):
    jagtile.enable()
    jagtile.enable()
    assert served_here(oracle_kernels)
    jagtile.disable()
    assert ops.jagged_scaled_dot_product_attention is torchs


def test_disabling_what_is_not_enabled_does_nothing():
    jagtile.disable()
    assert ops.jagged_scaled_dot_product_attention is torchs


def test_enabled_holds_inside_its_block_and_may_be_nested(oracle_kernels):
    with jagtile.enabled():
        with jagtile.enabled():
            assert served_here(oracle_kernels)
        assert served_here(oracle_kernels)
    assert not served_here(oracle_kernels)


def test_enabled_ends_with_an_error_too():
    with pytest.raises(KeyError), jagtile.enabled():
        raise KeyError
    assert ops.jagged_scaled_dot_product_attention is torchs


def test_a_block_leaves_enable_in_force(oracle_kernels):
    jagtile.enable()
    with jagtile.enabled():
        pass
    assert served_here(oracle_kernels)


def test_disable_inside_a_block_takes_effect_at_its_end(oracle_kernels):
    jagtile.enable()
    with jagtile.enabled():
        jagtile.disable()
        assert served_here(oracle_kernels)
    assert not served_here(oracle_kernels)


def test_blocks_of_several_threads_do_not_end_one_another(oracle_kernels):
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with jagtile.enabled():
            entered.set()
            leave.wait(30)

    thread = threading.Thread(target=other)
    with jagtile.enabled():
        thread.start()
        entered.wait(30)
    assert served_here(oracle_kernels)
    leave.set()
    thread.join(30)
    assert not served_here(oracle_kernels)


def test_anothers_replacement_is_kept(monkeypatch, oracle_kernels, no_dropout):
    def another(*args, **kwargs):
        return "another's"

    monkeypatch.setattr(ops, "jagged_scaled_dot_product_attention", another)
    x = njt()
    with jagtile.enabled(), pytest.warns(jagtile.JagtileWarning, match="dropout_p"):
        assert scaled_dot_product_attention(x, x, x, dropout_p=0.5) == "another's"
    assert ops.jagged_scaled_dot_product_attention is another


def test_arguments_arrive_as_given(oracle_kernels):
    x = njt()
    with jagtile.enabled():
        positional = scaled_dot_product_attention(x, x, x, None, 0.0, True, scale=0.3)
        named = scaled_dot_product_attention(query=x, key=x, value=x, is_causal=True, scale=0.3)
    expected = jagtile.sdpa(x, x, x, is_causal=True, scale=0.3)
    torch.testing.assert_close(positional._values, expected._values)
    torch.testing.assert_close(named._values, expected._values)


def test_what_is_not_served_goes_to_torch_and_is_said_once(oracle_kernels, no_dropout):
    x = njt()
    with jagtile.enabled():
        with pytest.warns(
            jagtile.JagtileWarning, match="torch's own implementation serves this call: dropout_p"
        ) as said:
            scaled_dot_product_attention(x, x, x, dropout_p=0.5)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            scaled_dot_product_attention(x, x, x, dropout_p=0.5)
    assert [warning.category for warning in said].count(jagtile.JagtileWarning) == 1  # torch warns too, once a process
    assert oracle_kernels.arguments == []


def test_a_device_without_kernels_keeps_torchs_own(oracle_kernels, monkeypatch):
    def no_device_id(device):
        raise jagtile.UnsupportedError("cuda:0 (compute capability 8.0) is not served")

    monkeypatch.setattr(fallback, "_NO_TARGET", {})
    monkeypatch.setattr(fallback, "device_id", no_device_id)
    x = njt()
    with jagtile.enabled(), pytest.warns(jagtile.JagtileWarning, match=r"torch's own .*compute capability 8\.0"):
        out = scaled_dot_product_attention(x, x, x)
    assert oracle_kernels.arguments == []
    torch.testing.assert_close(out._values, torchs(x, x, x)._values)


def test_who_allows_math_only_gets_torchs_own_without_a_word(oracle_kernels):
    x = njt()
    with jagtile.enabled(), warnings.catch_warnings():
        warnings.simplefilter("error", jagtile.JagtileWarning)
        with sdpa_kernel([SDPBackend.MATH]):
            out = scaled_dot_product_attention(x, x, x)
            with pytest.raises(RuntimeError, match="No viable backend"):  # torch's reference has no causal
                scaled_dot_product_attention(x, x, x, is_causal=True)
        assert oracle_kernels.arguments == []
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
            assert served_here(oracle_kernels)
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            assert served_here(oracle_kernels)
    torch.testing.assert_close(out._values, torchs(x, x, x)._values)


def test_bad_arguments_raise_here_as_in_torch(oracle_kernels):
    x = njt()
    with jagtile.enabled(), pytest.raises(ValueError, match="attn_mask"):
        scaled_dot_product_attention(x, x, x, attn_mask=torch.ones(3, 3))


def test_ragged_on_dimension_one_keeps_torchs_meaning(oracle_kernels):
    x = torch.nested.nested_tensor_from_jagged(torch.randn(7, 4, 8), torch.tensor([0, 3, 7]))
    with jagtile.enabled():
        out = scaled_dot_product_attention(x, x, x)
    torch.testing.assert_close(out._values, scaled_dot_product_attention(*[x._values] * 3))


def test_a_torch_without_the_attribute_is_told(monkeypatch):
    monkeypatch.delattr(ops, "jagged_scaled_dot_product_attention")
    with pytest.raises(jagtile.JagtileError, match=r"call jagtile\.sdpa directly"):
        jagtile.enable()


# --- threads and compilers


def test_many_threads_may_switch_at_once(oracle_kernels):
    start, wrong = threading.Barrier(8), []

    def work() -> None:
        start.wait(30)
        for _ in range(200):
            with jagtile.enabled():
                if ops.jagged_scaled_dot_product_attention is torchs:
                    wrong.append("not enabled inside a block")

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert wrong == []
    assert ops.jagged_scaled_dot_product_attention is torchs


@pytest.fixture
def dynamo():
    """A compiler that has compiled nothing, before and after."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", [{}, {"dtype": torch.float64}], ids=["a kernel", "the fallback"])
def test_compiled_code_comes_here_in_one_graph(oracle_kernels, dynamo, kind):
    x = njt(**kind)
    with torch.no_grad(), jagtile.enabled(), warnings.catch_warnings():
        warnings.simplefilter("ignore", jagtile.JagtileWarning)
        layer = torch.compile(
            lambda x: scaled_dot_product_attention(x, x, x, is_causal=True) + x, backend="aot_eager", fullgraph=True
        )
        out = layer(x)
    torch.testing.assert_close(out._values, (jagtile.sdpa(x, x, x, is_causal=True) + x)._values)
    assert bool(oracle_kernels.arguments) == (not kind)


def test_compiled_code_that_is_not_served_reaches_torchs_own(oracle_kernels, no_dropout, dynamo):
    x = njt()
    with torch.no_grad(), jagtile.enabled():
        out = torch.compile(lambda x: scaled_dot_product_attention(x, x, x, dropout_p=1e-9), backend="eager")(x)
    torch.testing.assert_close(out._values, torchs(x, x, x)._values)
    assert oracle_kernels.arguments == []


def test_enabling_after_torch_compile_names_what_keeps_the_old_path(oracle_kernels, dynamo):
    def my_layer(x):
        return scaled_dot_product_attention(x.sin(), x, x)

    x = njt()
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error", jagtile.JagtileWarning)
        with jagtile.enabled():  # a graph without nested tensors is no reason
            pass
    torch.compile(my_layer, backend="eager")(x)
    with pytest.warns(jagtile.JagtileWarning, match=r"my_layer.*torch\._dynamo\.reset"):
        jagtile.enable()


@pytest.fixture
def capturable(monkeypatch):
    """In place of torch's own attention, which only GPUs have in one graph."""
    monkeypatch.setattr(ops, "jagged_scaled_dot_product_attention", lambda query, key, value, *_, **__: query + value)


def test_a_nested_tensor_that_is_made_inside_of_the_graph_is_seen(oracle_kernels, dynamo, capturable):
    def from_values(values, offsets):
        x = torch.nested.nested_tensor_from_jagged(values, offsets, min_seqlen=3, max_seqlen=4).transpose(1, 2)
        return scaled_dot_product_attention(x, x, x).values()

    torch.compile(from_values, backend="aot_eager", fullgraph=True)(torch.randn(7, 2, 8), torch.tensor([0, 3, 7]))
    with pytest.warns(jagtile.JagtileWarning, match="from_values"):
        jagtile.enable()


def test_each_graph_of_a_function_is_told_of(oracle_kernels, dynamo, capturable):
    def my_layer(x):
        return scaled_dot_product_attention(x, x, x)

    layer = torch.compile(my_layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        with jagtile.enabled():
            layer(njt())
        layer(njt(dtype=torch.bfloat16))  # the same code, torch's attention
        with pytest.warns(jagtile.JagtileWarning, match="my_layer"), jagtile.enabled():
            pass
        torch._dynamo.reset()
        layer(njt())
        with pytest.warns(jagtile.JagtileWarning, match="my_layer"):
            jagtile.enable()


def test_graphs_made_inside_a_block_are_no_reason_to_warn_at_the_next(oracle_kernels, dynamo):
    layer = torch.compile(lambda x: scaled_dot_product_attention(x, x, x), backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error", jagtile.JagtileWarning)
        for _ in range(2):
            with torch.no_grad(), jagtile.enabled():
                layer(njt())


def test_a_torch_that_tells_nothing_of_its_graphs_is_no_error(oracle_kernels, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch._dynamo.convert_frame", None)
    assert patch.compiled_graphs() == []
    monkeypatch.undo()
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(3))
    assert patch.compiled_graphs()
    monkeypatch.setitem(sys.modules, "torch._dynamo.eval_frame", None)
    assert patch.compiled_graphs() == []
