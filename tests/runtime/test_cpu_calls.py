"""The public API end to end on the CPU: kernels rendered, built, loaded and launched."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import jagtile
from jagtile.generator.oracle import errors, reference, tolerance
from jagtile.generator.toolchain import find_cxx
from jagtile.generator.workloads import random_workload
from jagtile.runtime.routes import forget
from jagtile.runtime.settings import settings

try:
    find_cxx()
    NO_COMPILER = ""
except jagtile.CompilerNotFoundError as error:
    NO_COMPILER = str(error)

pytestmark = [
    pytest.mark.skipif(bool(NO_COMPILER), reason=f"no C++ compiler: {NO_COMPILER}"),
    pytest.mark.usefixtures("no_grad"),
]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of this module's own; nothing loaded before is seen, nothing loaded here is left."""
    forget()
    with settings.override(cache_dir=tmp_path_factory.mktemp("cache")):
        yield
    forget()


@pytest.mark.parametrize("alignment", ["top_left", "bottom_right"])
@pytest.mark.parametrize(("dtype", "is_causal"), [(torch.float32, True), (torch.bfloat16, False)])
def test_varlen_attention_agrees_with_the_oracle(dtype, is_causal, alignment):
    kind = {"is_causal": is_causal, "causal_alignment": alignment}
    for seed in range(6):
        b = random_workload(random.Random(seed), head_dim=24, head_dim_v=40, max_seqlen=150).make("cpu", dtype, seed)
        out, lse = jagtile.varlen_attention(*b, **kind, return_lse=True)
        expected, expected_lse = reference(*b[:5], **kind)
        assert errors(out, expected).rel <= tolerance(dtype)
        torch.testing.assert_close(lse, expected_lse.float(), rtol=1e-4, atol=1e-3)


def test_rows_of_no_sequence_give_zero_and_minus_infinity():
    x = torch.randn(90, 2, 24)
    cu = torch.tensor([0, 40, 60])
    out, lse = jagtile.varlen_attention(x, x, x[..., :8], cu, cu, return_lse=True)
    assert out[:60].any(-1).all()
    assert not out[60:].any()
    assert (lse[:, 60:] == float("-inf")).all()


def njts(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """query (B, 4, j, 24) and key, value (B, 2, j, 24) from one packed projection."""
    packed = torch.nested.nested_tensor_from_jagged(
        torch.randn(200, 8 * 24, dtype=dtype), torch.tensor([0, 130, 133, 200])
    )
    query, key, value = packed.split([4 * 24, 2 * 24, 2 * 24], dim=-1)
    return tuple(x.unflatten(-1, (-1, 24)).transpose(1, 2) for x in (query, key, value))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchs_function_on_nested_tensors_equals_dense_attention_of_each_sequence(dtype):
    query, key, value = njts(dtype)
    with jagtile.enabled():
        out = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    for begin, end in pairwise(query.offsets().tolist()):
        parts = (x._values[None, :, begin:end].double() for x in (query, key, value))
        expected = scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True)[0]
        assert errors(out._values[:, begin:end], expected).rel <= 2 * tolerance(dtype)


def test_the_first_call_builds_and_says_so_and_warmup_spares_it(caplog):
    forget()
    x, cu = torch.randn(10, 2, 32), torch.tensor([0, 4, 10])
    assert jagtile.explain(x, x, x, cu, cu).artifact == "would build"
    with caplog.at_level(logging.WARNING, logger="jagtile"):
        jagtile.varlen_attention(x, x, x, cu, cu)
        assert len(caplog.records) == 1
        assert "building cpu/fwd_fp32_d32/" in caplog.records[0].message
        assert jagtile.explain(x, x, x, cu, cu).artifact == "memory"
        forget()
        assert jagtile.explain(x, x, x, cu, cu).artifact.startswith("cache: ")
        caplog.clear()
        names = jagtile.warmup(32, torch.float32, device="cpu")
        assert all(name.startswith("cpu/fwd_fp32_d32/") for name in names)
        # No regime of a CPU, nor of a backward: batches of few tiles are medium or long there.
        assert jagtile.warmup(32, torch.float32, device="cpu", regimes=["few"]) == jagtile.warmup(
            32, torch.float32, device="cpu", regimes=["medium", "long"]
        )
        jagtile.varlen_attention(x, x, x, cu, cu)
        assert caplog.records == []


def test_without_jit_an_empty_cache_is_an_error_with_the_ways_out(tmp_path):
    forget()
    x, cu = torch.randn(10, 2, 32), torch.tensor([0, 4, 10])
    with settings.override(cache_dir=tmp_path / "empty", jit=False):
        with pytest.raises(jagtile.NoKernelError, match="JAGTILE_JIT=1"):
            jagtile.varlen_attention(x, x, x, cu, cu)
        with pytest.raises(jagtile.NoKernelError, match="JAGTILE_JIT=1"):
            jagtile.warmup(32, torch.float32, device="cpu")
