"""torch's own tools see our operators as its own: opcheck, FLOP counter, export, fork."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import jagtile
from jagtile.generator.workloads import Workload
from jagtile.runtime import flops

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("oracle_kernels", "no_grad")

CROSS = Workload("cross", (3, 0, 17, 9), (9, 4, 0, 5), 4, 2, 16, 24)
PAIRS = 3 * 9 + 17 * 0 + 9 * 5


def flops_of(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def njt(lengths=(3, 5), heads=2, dim=8) -> torch.Tensor:
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    return torch.nested.nested_tensor_from_jagged(torch.randn(sum(lengths), heads, dim), cu).transpose(1, 2)


# --- opcheck


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("max_seqlen", [None, 17])
def test_opcheck_finds_nothing(return_lse, max_seqlen):
    b = CROSS.make("cpu", torch.float32)
    torch.library.opcheck(
        torch.ops.jagtile.forward.default,
        (*b[:5], max_seqlen, max_seqlen, True, False, 0.3, return_lse),
    )


# --- FLOPs


def test_flops_are_counted_sequence_by_sequence():
    b = CROSS.make("cpu", torch.float32)
    expected = 2 * 4 * PAIRS * (16 + 24)
    assert flops_of(lambda: jagtile.varlen_attention(*b[:5])) == expected
    assert flops_of(lambda: jagtile.varlen_attention(*b[:5], is_causal=True)) == expected


def test_a_nested_call_counts_as_dense_calls_of_its_sequences():
    x = njt((3, 5))
    dense = [torch.randn(1, 2, n, 8) for n in (3, 5)]
    with sdpa_kernel([SDPBackend.MATH]):  # the CPU's fused operator has no formula in torch
        expected = sum(flops_of(lambda y=y: scaled_dot_product_attention(y, y, y)) for y in dense)
    assert expected > 0
    assert flops_of(lambda: jagtile.sdpa(x, x, x)) == expected
    with jagtile.enabled():
        assert flops_of(lambda: scaled_dot_product_attention(x, x, x)) == expected


def test_without_values_lengths_are_estimated():
    with FakeTensorMode():
        q, cu = torch.empty(12, 4, 16), torch.empty(4, dtype=torch.int32)
        assert flops_of(lambda: jagtile.varlen_attention(q, q, q, cu, cu)) == 2 * 4 * (12 * 12 // 3) * 32
        assert flops_of(lambda: jagtile.varlen_attention(q, q, q, cu, cu, 6, 6)) == 2 * 4 * (3 * 6 * 6) * 32


def test_a_backward_pass_is_five_products():
    b = CROSS.make("cpu", torch.float32)

    def step():
        with torch.enable_grad():
            jagtile.varlen_attention(b.q.requires_grad_(), *b[1:5]).sum().backward()

    assert flops_of(step) == 2 * 4 * PAIRS * (16 + 24) + 2 * 4 * PAIRS * (3 * 16 + 2 * 24)


def test_registering_twice_is_registering_once():
    flops.register()
    for operator in (torch.ops.jagtile.forward, torch.ops.jagtile.differentiable_forward, torch.ops.jagtile.backward):
        assert operator in flop_registry


# --- export


class Layer(torch.nn.Module):
    def forward(self, q, k, v, cu_q, cu_k):
        out, lse = jagtile.varlen_attention(q, k, v, cu_q, cu_k, is_causal=True, return_lse=True)
        return out * 2, lse


@pytest.mark.parametrize("strict", [False, True])
def test_a_packed_call_is_exported_and_follows_the_sizes(strict):
    b = CROSS.make("cpu", torch.float32)
    total_q, total_k, offsets = (torch.export.Dim(n, min=2, max=4096) for n in ("total_q", "total_k", "offsets"))
    dynamic = ({0: total_q}, {0: total_k}, {0: total_k}, {0: offsets}, {0: offsets})
    program = torch.export.export(Layer(), tuple(b[:5]), dynamic_shapes=dynamic, strict=strict)
    assert "jagtile.forward" in program.graph_module.code
    other = Workload("other", (7, 30), (6, 11), 4, 2, 16, 24).make("cpu", torch.float32, seed=3)
    for batch in (b, other):
        torch.testing.assert_close(program.module()(*batch[:5]), Layer()(*batch[:5]))


# --- fork

FORKS = """
import multiprocessing, warnings
import torch, jagtile
warnings.simplefilter("ignore", jagtile.JagtileWarning)
torch.set_num_threads(1)
x = torch.randn(7, 2, 4, dtype=torch.float64)  # served without a compiler
cu = torch.tensor([0, 3, 7])

def call(_):
    with jagtile.enabled():
        y = torch.nested.nested_tensor_from_jagged(x, cu).transpose(1, 2)
        nested = torch.nn.functional.scaled_dot_product_attention(y, y, y, is_causal=True)
    return jagtile.varlen_attention(x, x, x, cu, cu, is_causal=True), nested.values().transpose(0, 1).contiguous()

expected = call(0)[0]
with multiprocessing.get_context("fork").Pool(2) as pool:
    for pair in pool.map(call, range(4)):
        for found in pair:
            torch.testing.assert_close(found, expected)
print("forked")
"""


def test_workers_forked_after_the_import_and_a_call_work(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / ".pkg"), "JAGTILE_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", FORKS], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "forked", done.stderr
