"""Dropout: the mask is the documented one wherever a call is computed, comes from torch's generator and is fair."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from njt_cases import njt
from philox import kept_weights, philox
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

import jagtile
from jagtile.compat import flash_attn_varlen_func
from jagtile.generator.oracle import errors, reference, tolerance
from jagtile.generator.oracle_gradients import gradient_tolerance, reference_gradients
from jagtile.generator.toolchain import find_cxx
from jagtile.generator.workloads import Workload
from jagtile.runtime import dropout, fallback, layouts
from jagtile.runtime.dropout import Dropout, draw_state, dropout_of, keep_mask

try:
    find_cxx()
    NO_COMPILER = ""
except jagtile.CompilerNotFoundError as error:
    NO_COMPILER = str(error)

real_kernels = pytest.mark.skipif(bool(NO_COMPILER), reason=f"no C++ compiler: {NO_COMPILER}")
CPU = torch.device("cpu")
# GQA, a head_dim that every test shares (each dtype and mask is built once), lengths that are no multiples of eight.
CROSS = Workload("cross", (3, 0, 37, 20), (9, 4, 61, 5), 4, 2, 16, 24)


def state_of(seed: int) -> torch.Tensor:
    """What the first call after ``torch.manual_seed(seed)`` draws."""
    torch.manual_seed(seed)
    return draw_state(CPU)


def factors(p: float, state: torch.Tensor, heads: int, total_q: int, total_k: int) -> torch.Tensor:
    """By what the weights are multiplied, from the Philox that is written in NumPy."""
    found = dropout_of(p, state)
    mask = kept_weights(found.kept, *state.tolist(), heads, range(total_q), range(total_k))
    return torch.from_numpy(mask).double() * found.scale


# --- the mask


def test_philox_gives_the_known_answers():
    counter = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    key = (0xA4093822, 0x299F31D0)
    assert [int(word) for word in philox(counter, key, rounds=10)] == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]
    assert [int(word) for word in philox(counter, key)] == [0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A]
    ours = dropout.philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert [int(word) for word in ours] == [int(word) for word in philox(counter, key)]


@pytest.mark.parametrize("state", [(0, 0), (-1, -1), (0x123456789ABCDEF0, 7), (-(1 << 63), 1 << 40)])
@pytest.mark.parametrize(("first_key", "keys"), [(0, 16), (0, 5), (5, 30), (7, 1), (8, 0)])
def test_the_mask_in_torch_is_the_documented_one(state, first_key, keys):
    kept = 40000
    rows = range(3, 9)
    ours = keep_mask(Dropout(kept, torch.tensor(state)), torch.arange(3, 9), 5, first_key, keys)
    want = kept_weights(kept, *state, 5, rows, range(first_key, first_key + keys))
    assert np.array_equal(ours.numpy(), want)


def test_the_rate_is_kept_and_neighbours_are_independent():
    n = 192
    mask = keep_mask(Dropout(round(0.8 * 65536), state_of(3)), torch.arange(n), 6, 0, n).double()
    tokens = mask.numel()
    assert abs(float(mask.mean()) - 0.8) < 5 * (0.8 * 0.2 / tokens) ** 0.5
    centred = (mask - 0.8) / 0.4
    shifts = {"head": (1, 0, 0), "row": (0, 1, 0), "key": (0, 0, 1), "key, next word": (0, 0, 2), "group": (0, 0, 8)}
    for name, shift in shifts.items():
        correlation = float((centred * centred.roll(shift, (0, 1, 2))).mean())
        assert abs(correlation) < 5 / tokens**0.5, name
    # Sums over many weights vary as those of independent decisions do.
    assert abs(float(centred.sum(2).var()) / n - 1) < 0.2
    other = keep_mask(Dropout(round(0.8 * 65536), draw_state(CPU)), torch.arange(n), 6, 0, n).double()
    assert abs(float((centred * (other - 0.8) / 0.4).mean())) < 5 / tokens**0.5


def test_the_scale_makes_up_for_what_is_dropped():
    for p in (1e-6, 0.1, 0.5, 0.999):
        found = dropout_of(p, torch.zeros(2))
        assert found.kept / 65536 * found.scale == pytest.approx(1)
        assert abs(found.kept / 65536 - (1 - p)) <= 2**-17
    assert dropout_of(1.0, torch.zeros(2)).scale == 0


# --- results


@real_kernels
@pytest.mark.parametrize(
    ("dtype", "kind"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {"is_causal": True}),
        (torch.float16, {"is_causal": True, "causal_alignment": "bottom_right"}),
        (torch.float64, {"is_causal": True, "causal_alignment": "bottom_right"}),
    ],
)
@pytest.mark.parametrize("p", [0.3, 1.0])
def test_results_and_gradients_are_the_oracles_with_that_mask(dtype, kind, p):
    b = CROSS.make("cpu", dtype, seed=1)
    kept = factors(p, state_of(11), 4, CROSS.total_q, CROSS.total_k)
    operands = [x.requires_grad_() for x in b[:3]]
    torch.manual_seed(11)
    out, lse = jagtile.varlen_attention(*b, **kind, dropout_p=p, return_lse=True)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    seen = ~lse.isneginf()
    grads = torch.autograd.grad((out, lse.masked_fill(~seen, 0)), operands, (dout, dlse))
    plain = [x.detach() for x in b[:5]]
    want, want_lse = reference(*plain, **kind, kept=kept)
    bar, gradient_bar = (1e-13, 1e-13) if dtype == torch.float64 else (tolerance(dtype), gradient_tolerance(dtype))
    assert errors(out.detach(), want).rel <= bar
    torch.testing.assert_close(lse.detach().double(), want_lse, rtol=1e-5, atol=1e-5)
    if p == 1:
        assert not out.any()
    want_grads = reference_gradients(*plain, dout, dlse.masked_fill(~seen, 0), **kind, kept=kept)
    for grad, expected in zip(grads, want_grads, strict=True):
        assert errors(grad, expected).rel <= 2 * gradient_bar  # out is rounded too


@pytest.mark.filterwarnings("ignore::jagtile.JagtileWarning")
def test_plain_operations_without_a_look_at_the_offsets_drop_the_same(monkeypatch):
    b = CROSS.make("cpu", torch.float64, seed=2)
    results = []
    for masked in (False, True):
        if masked:
            monkeypatch.setattr(fallback, "_is_fake", lambda tensor: True)
            monkeypatch.setattr(fallback, "_BLOCK_BYTES", 20000)  # several blocks of rows
        torch.manual_seed(3)
        results.append(jagtile.varlen_attention(*b, dropout_p=0.4))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


@real_kernels
def test_what_is_dropped_does_not_depend_on_tiles_or_threads():
    """Queries of zeros weigh all keys alike, and one-hot values show each weight."""
    w = Workload("w", (70, 5), (150, 33), 2, 2, 16, 183)
    b = w.make("cpu", torch.float32)
    v = torch.eye(w.total_k).unsqueeze(1).expand(-1, 2, -1).contiguous()
    kept = factors(0.35, state_of(5), 2, w.total_q, w.total_k) > 0
    kept[:, :70, 150:] = kept[:, 70:, :150] = False
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            torch.manual_seed(5)
            out = jagtile.varlen_attention(torch.zeros_like(b.q), b.k, v, *b[3:5], dropout_p=0.35)
            assert torch.equal(out.transpose(0, 1) > 0, kept)
    finally:
        torch.set_num_threads(before)


@real_kernels
def test_nested_tensors_and_flash_attentions_function_drop_too():
    values, cu = torch.randn(12, 2, 16), torch.tensor([0, 5, 12])
    x = torch.nested.nested_tensor_from_jagged(values, cu).transpose(1, 2)

    def ours():
        return jagtile.sdpa(x, x, x, dropout_p=0.4).values().transpose(0, 1)

    def enabled():
        with jagtile.enabled():
            return scaled_dot_product_attention(x, x, x, dropout_p=0.4).values().transpose(0, 1)

    def flash():
        return flash_attn_varlen_func(values, values, values, cu, cu, 7, 7, dropout_p=0.4)

    torch.manual_seed(6)
    want = jagtile.varlen_attention(values, values, values, cu, cu, dropout_p=0.4)
    assert not torch.equal(want, jagtile.varlen_attention(values, values, values, cu, cu))
    for call in (ours, enabled, flash):
        torch.manual_seed(6)
        assert torch.equal(call(), want)


# --- the generator


@real_kernels
def test_masks_follow_torchs_generator():
    b = CROSS.make("cpu", torch.float32)
    torch.manual_seed(1)
    first, second = (jagtile.varlen_attention(*b, dropout_p=0.3) for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(jagtile.varlen_attention(*b, dropout_p=0.3), first)
    state = torch.get_rng_state()
    assert torch.equal(jagtile.varlen_attention(*b, dropout_p=0.3), second)
    torch.set_rng_state(state)
    assert torch.equal(jagtile.varlen_attention(*b, dropout_p=0.3), second)
    state = torch.get_rng_state()
    jagtile.varlen_attention(*b)
    with pytest.raises(ValueError, match="dropout_p"):
        jagtile.varlen_attention(*b, dropout_p=2)
    assert torch.equal(torch.get_rng_state(), state), "without dropout no random number is drawn"


@real_kernels
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_drops_the_same_again(reentrant):
    b = CROSS.make("cpu", torch.float32)
    q = b.q.requires_grad_()

    def layer(q):
        return jagtile.varlen_attention(q * 2, *b[1:], dropout_p=0.5).square()

    torch.manual_seed(2)
    (want,) = torch.autograd.grad(layer(q).sum(), q)
    torch.manual_seed(2)
    checkpoint(layer, q, use_reentrant=reentrant).sum().backward()
    assert torch.equal(q.grad, want)


@real_kernels
@pytest.mark.parametrize("nested", [False, True])
def test_a_graph_drops_as_eager_calls_do(nested):
    values, cu = torch.randn(12, 2, 16, requires_grad=True), torch.tensor([0, 5, 12])

    def packed_loss(values):
        return jagtile.varlen_attention(values, values, values, cu, cu, dropout_p=0.5).square().sum()

    def nested_loss(values):
        x = torch.nested.nested_tensor_from_jagged(values, cu).transpose(1, 2)
        return jagtile.sdpa(x, x, x, dropout_p=0.5).values().square().sum()

    loss = nested_loss if nested else packed_loss
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    found = []
    for function in (loss, compiled):
        torch.manual_seed(9)
        for _ in range(2):
            found.append(torch.autograd.grad(function(values), values)[0])
    assert not torch.equal(found[0], found[1])
    torch.testing.assert_close(found[2:], found[:2])


@real_kernels
def test_opcheck_finds_nothing():
    b = CROSS.make("cpu", torch.float32)
    kind = (None, None, True, False, 0.3)
    random = (0.4, torch.tensor([5, 6]))
    torch.library.opcheck(torch.ops.jagtile.forward.default, (*b[:5], *kind, True, *random))
    out, lse = torch.ops.jagtile.differentiable_forward.default(*b[:5], *kind, *random)
    given = (torch.randn_like(out), torch.randn_like(lse), *b[:5], out, lse, *kind, *random)
    torch.library.opcheck(torch.ops.jagtile.backward.default, given)
    for x in b[:3]:
        x.requires_grad_()
    torch.library.opcheck(torch.ops.jagtile.differentiable_forward.default, (*b[:5], *kind, *random))


class Layer(torch.nn.Module):
    def forward(self, q, k, v, cu_q, cu_k):
        return jagtile.varlen_attention(q, k, v, cu_q, cu_k, dropout_p=0.5)


@real_kernels
def test_an_exported_call_draws_anew():
    b = CROSS.make("cpu", torch.float32)
    program = torch.export.export(Layer(), tuple(b[:5])).module()
    torch.manual_seed(4)
    found = [program(*b[:5]) for _ in range(2)]
    torch.manual_seed(4)
    want = [Layer()(*b[:5]) for _ in range(2)]
    torch.testing.assert_close(found, want)
    assert not torch.equal(*found)


# --- arguments


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan"), float("inf")])
def test_a_rate_that_is_none_is_refused(p):
    b = CROSS.make("cpu", torch.float32)
    x = njt()
    for call in (lambda: jagtile.varlen_attention(*b, dropout_p=p), lambda: jagtile.sdpa(x, x, x, dropout_p=p)):
        with pytest.raises(ValueError, match="dropout_p must be from 0 to 1, got"):
            call()


def test_a_rate_that_is_no_number_is_refused():
    with pytest.raises(TypeError, match="dropout_p must be a float, got str"):
        jagtile.varlen_attention(*CROSS.make("cpu", torch.float32), dropout_p="0.1")


def test_operators_want_random_numbers():
    b = CROSS.make("cpu", torch.float32)
    with pytest.raises(ValueError, match=r"dropout_p is 0\.5 and dropout_state None"):
        torch.ops.jagtile.forward.default(*b[:5], None, None, False, False, 0.3, False, 0.5)


def test_a_target_without_dropout_refuses_it_and_torch_takes_it_while_enabled(plain_spaces, monkeypatch):
    """No space of these computes dropout, as on sm_90a."""
    dropout.why_no_dropout.cache_clear()
    monkeypatch.setattr(fallback, "_REASONS", {})
    monkeypatch.setattr(layouts, "_KNOWN", {})
    b, x = CROSS.make("cpu", torch.float32), njt()
    try:
        with pytest.raises(
            jagtile.UnsupportedError, match=r"dropout_p is 0\.5; served: 0 \(no kernel for fwd_fp32_d16"
        ):
            jagtile.varlen_attention(*b, dropout_p=0.5)
        with pytest.raises(jagtile.UnsupportedError, match=r"dropout_p is 0\.5; served: 0"):
            jagtile.sdpa(x, x, x, dropout_p=0.5)
        with jagtile.enabled(), pytest.warns(jagtile.JagtileWarning, match="dropout_p is 0.5; served: 0"):
            assert scaled_dot_product_attention(x, x, x, dropout_p=0.5).is_nested
        with pytest.warns(jagtile.JagtileWarning, match="float64"):
            jagtile.varlen_attention(*(t.double() for t in b[:3]), *b[3:], dropout_p=0.5)
    finally:
        dropout.why_no_dropout.cache_clear()


@real_kernels
def test_warmup_builds_the_kernels_with_dropout():
    names = jagtile.warmup(16, torch.float32, head_dim_v=24, device="cpu", training=True, dropout=True)
    assert sorted({name.split("/")[1] for name in names}) == [
        f"{direction}_fp32_d16_dv24{drop}" for direction in ("bwd", "fwd") for drop in ("", "_drop")
    ]


def test_dropout_is_a_keyword():
    parameter = inspect.signature(jagtile.varlen_attention).parameters["dropout_p"]
    assert (parameter.kind, parameter.default) == (parameter.KEYWORD_ONLY, 0.0)
