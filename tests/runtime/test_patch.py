"""enable, disable, enabled: F.scaled_dot_product_attention on nested tensors comes here, and goes back."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
from torch.nested._internal import ops
from torch.nested._internal.sdpa import jagged_scaled_dot_product_attention as torchs
from torch.nn.functional import scaled_dot_product_attention

import jagtile
from jagtile.runtime import patch


@pytest.fixture(autouse=True)
def fresh_route(monkeypatch):
    monkeypatch.setattr(patch, "_route", patch._Route())
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


def test_anothers_replacement_is_kept(monkeypatch, oracle_kernels):
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


def test_what_is_not_served_goes_to_torch_and_is_said_once(oracle_kernels):
    x = njt(dtype=torch.float64)
    with jagtile.enabled():
        with pytest.warns(jagtile.JagtileWarning, match="torch's own implementation serves this call: .*float64"):
            out = scaled_dot_product_attention(x, x, x)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            scaled_dot_product_attention(x, x, x)
    torch.testing.assert_close(out._values, torchs(x, x, x)._values)
    assert oracle_kernels.arguments == []


def test_training_goes_to_torch(oracle_kernels):
    values = torch.randn(7, 2, 8, requires_grad=True)
    x = torch.nested.nested_tensor_from_jagged(values, torch.tensor([0, 3, 7])).transpose(1, 2)
    with jagtile.enabled(), pytest.warns(jagtile.JagtileWarning, match="requires grad"):
        scaled_dot_product_attention(x, x, x).values().sum().backward()
    assert values.grad is not None


def test_bad_arguments_raise_here_as_in_torch(oracle_kernels):
    x = njt()
    with jagtile.enabled(), pytest.raises(ValueError, match="attn_mask"):
        scaled_dot_product_attention(x, x, x, attn_mask=torch.ones(3, 3))


def test_holes_are_refused_since_torch_would_compute_garbage_on_cuda(oracle_kernels):
    x = torch.nested.narrow(torch.ones(2, 5, 2, 8), 1, torch.tensor([0, 1]), torch.tensor([3, 1]), torch.jagged)
    x = x.transpose(1, 2)
    with jagtile.enabled(), pytest.raises(jagtile.JagtileError, match="holes"):
        scaled_dot_product_attention(x, x, x)


def test_ragged_on_dimension_one_keeps_torchs_meaning(oracle_kernels):
    x = torch.nested.nested_tensor_from_jagged(torch.randn(7, 4, 8), torch.tensor([0, 3, 7]))
    with jagtile.enabled():
        out = scaled_dot_product_attention(x, x, x)
    torch.testing.assert_close(out._values, scaled_dot_product_attention(*[x._values] * 3))


def test_a_torch_without_the_attribute_is_told(monkeypatch):
    monkeypatch.delattr(ops, "jagged_scaled_dot_product_attention")
    with pytest.raises(jagtile.JagtileError, match=r"call jagtile\.sdpa directly"):
        jagtile.enable()
