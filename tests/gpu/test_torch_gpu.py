"""torch's own ways to attention on a Hopper GPU, with jagtile behind them: its flash branches, and Inductor."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.nn import attention
from torch.nn.functional import scaled_dot_product_attention

import jagtile
from jagtile.generator.oracle import errors, tolerance

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HOPPER, reason="needs a CUDA GPU of compute capability 9.0"),
]
LENGTHS = ((5, 130, 64), (200, 3, 77, 1), (90, 91))


@pytest.fixture
def activated() -> Iterator[None]:
    if not hasattr(attention, "restore_flash_attention_impl"):
        pytest.skip("this torch does not give its operators back")
    attention.activate_flash_attention_impl("JAGTILE")
    with attention.sdpa_kernel(attention.SDPBackend.FLASH_ATTENTION):
        yield
    attention.restore_flash_attention_impl()


def leaves(*shape: int) -> list[torch.Tensor]:
    return [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert errors(actual.detach(), expected.detach()).rel <= 2 * tolerance(torch.bfloat16)


@pytest.mark.parametrize("is_causal", [False, True])
def test_dense_attention_and_its_gradients(activated: None, is_causal: bool) -> None:
    q, k, v = leaves(2, 4, 300, 64)
    dout = torch.randn_like(q)
    launched = launches(lambda: scaled_dot_product_attention(q, k, v, is_causal=is_causal))
    assert any("jagtile_fwd" in name for name in launched), launched
    out = scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    with attention.sdpa_kernel(attention.SDPBackend.MATH):
        expected = scaled_dot_product_attention(*exact, is_causal=is_causal)
    assert_near(out, expected)
    for actual, wanted in zip(
        torch.autograd.grad(out, (q, k, v), dout), torch.autograd.grad(expected, exact, dout.double()), strict=True
    ):
        assert_near(actual, wanted)


def test_nested_attention_that_is_not_enabled(activated: None) -> None:
    x = nested(LENGTHS[0])
    launched = launches(lambda: scaled_dot_product_attention(x, x, x))
    assert any("jagtile_fwd" in name for name in launched), launched
    torch.testing.assert_close(
        scaled_dot_product_attention(x, x, x)._values, jagtile.sdpa(x, x, x)._values, rtol=2e-2, atol=2e-2
    )


def nested(lengths: tuple[int, ...]) -> torch.Tensor:
    offsets = torch.tensor([0, *lengths], device="cuda").cumsum(0)
    values = torch.randn(sum(lengths), 4, 64, device="cuda", dtype=torch.bfloat16)
    return torch.nested.nested_tensor_from_jagged(
        values, offsets, min_seqlen=min(lengths), max_seqlen=max(lengths)
    ).transpose(1, 2)


def launches(call) -> list[str]:
    """The kernels that a call launches."""
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return [event.name for event in profile.events()]


@pytest.mark.parametrize("kind", ["packed", "nested"])
def test_inductor_trains_on_batches_of_any_lengths(kind: str) -> None:
    """In one graph, forward and backward."""

    def packed(q, k, v, offsets):
        return jagtile.varlen_attention(q * 2, k, v, offsets, offsets, is_causal=True)

    def nested(q, k, v, offsets):
        q, k, v = (torch.nested.nested_tensor_from_jagged(x, offsets).transpose(1, 2) for x in (q * 2, k, v))
        return scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).values()

    layer = packed if kind == "packed" else nested
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for lengths in LENGTHS:
        offsets = torch.tensor([0, *lengths], device="cuda").cumsum(0)
        operands = leaves(sum(lengths), 4, 64)
        dout = torch.randn_like(operands[0])
        with jagtile.enabled():
            out, expected = compiled(*operands, offsets), layer(*operands, offsets)
            gradients = (torch.autograd.grad(x, operands, dout) for x in (out, expected))
        torch.testing.assert_close(out, expected, rtol=1e-2, atol=1e-2)
        for actual, wanted in zip(*gradients, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=2e-2, atol=2e-2)
