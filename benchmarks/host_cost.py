"""Host time of a call up to the launch: the kernels are replaced by one that does nothing.

    PYTHONPATH=.pkg python benchmarks/host_cost.py [cpu|cuda]

Prints the median of 1000 calls in microseconds. What a real launch adds is in the launcher's own benchmark.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch.nn.functional import scaled_dot_product_attention

import jagtile
from jagtile.runtime import checks, ops, routes
from jagtile.runtime.problem import REGIMES

CALLS = 1000


class NoKernel:
    """A ForwardKernel that leaves its output as it is."""

    def forward(self, *arguments: object) -> None:
        pass


def median_us(call: Callable[[], object]) -> float:
    for _ in range(CALLS // 5):
        call()
    times = []
    for _ in range(CALLS):
        start = time.perf_counter_ns()
        call()
        times.append(time.perf_counter_ns() - start)
    return statistics.median(times) / 1000


def main(device: str) -> None:
    batch, length, heads, head_dim = 32, 300, 8, 64
    q, k, v = torch.randn(3, batch * length, heads, head_dim, device=device, dtype=torch.bfloat16)
    cu = torch.arange(0, batch * length + 1, length, dtype=torch.int32, device=device)
    for regime in range(len(REGIMES)):
        routes.ROUTES[q.dtype, head_dim, head_dim, False, q.get_device(), regime, False] = NoKernel()
    nested = torch.nested.nested_tensor_from_jagged(q, cu.long()).transpose(1, 2)
    operator = torch.ops.jagtile.forward.default
    call = (q, k, v, cu, cu, None, None, False, False, 0.125, False)

    def through_torch() -> float:
        with jagtile.enabled():
            return median_us(lambda: scaled_dot_product_attention(nested, nested, nested))

    with torch.no_grad():
        rows = {
            "varlen_attention": median_us(lambda: jagtile.varlen_attention(q, k, v, cu, cu)),
            "  its argument checks": median_us(lambda: checks.check_batch(q, k, v, cu, cu, None, None)),
            "  allocate, route, launch nothing": median_us(lambda: ops.forward(*call)),
            "  the same through the torch operator": median_us(lambda: operator(*call)),
            "sdpa on nested tensors": median_us(lambda: jagtile.sdpa(nested, nested, nested)),
            "F.scaled_dot_product_attention, enabled": through_torch(),
        }
    print(f"torch {torch.__version__}, {device}, median of {CALLS} calls, us")
    for name, value in rows.items():
        print(f"{name:42}{value:7.1f}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "cpu")
