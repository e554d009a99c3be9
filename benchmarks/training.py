"""Forward and backward on the CPU, beside a Python loop of dense SDPA calls, in one interleaved run with a cold cache.

    PYTHONPATH=.pkg python benchmarks/training.py [WORKLOAD] [--causal] [--rounds 21]

The loop gets its sequences as leaves of their own: neither slicing nor putting gradients together is held against it.
Every contender's gradients are compared with the float64 oracle before anything is timed.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch.nn.functional import scaled_dot_product_attention

import jagtile
from jagtile.generator.bench_worker import ColdClock
from jagtile.generator.oracle import errors, torch_dtype
from jagtile.generator.oracle_gradients import Gradients, gradient_tolerance, reference_gradients
from jagtile.generator.peer import nested
from jagtile.generator.spec import DTYPES
from jagtile.generator.workloads import JaggedBatch, Workload, named

BAR = 4  # times our tolerance: who is further off computes something else


class Contender:
    """An attention, its leaves, and the gradient of its output."""

    def __init__(
        self,
        forward: Callable[[], Sequence[torch.Tensor]],
        leaves: Sequence[torch.Tensor],
        douts: Sequence[torch.Tensor],
        packed: Callable[[Sequence[torch.Tensor]], Gradients],
    ) -> None:
        self._forward, self._leaves, self._douts, self._packed = forward, leaves, douts, packed
        self._outs = forward()

    def both(self) -> Sequence[torch.Tensor]:
        """The gradients of a forward pass of its own."""
        return torch.autograd.grad(self._forward(), self._leaves, self._douts)

    def backward(self) -> None:
        """The backward pass again, of a forward pass before."""
        torch.autograd.grad(self._outs, self._leaves, self._douts, retain_graph=True)

    def error(self, expected: Gradients) -> float:
        """The worst relative error of a gradient."""
        return max(errors(grad, want).rel for grad, want in zip(self._packed(self.both()), expected, strict=True))


def contenders(workload: Workload, batch: JaggedBatch, dout: torch.Tensor) -> dict[str, Contender]:
    """By name."""
    causal = workload.is_causal
    q, k, v = (x.requires_grad_() for x in batch[:3])
    packed = Contender(
        lambda: [jagtile.varlen_attention(*batch, is_causal=causal)], (q, k, v), [dout], lambda grads: Gradients(*grads)
    )
    views = nested(workload, batch)
    njt = Contender(
        lambda: [jagtile.sdpa(*views, is_causal=causal, enable_gqa=True).transpose(1, 2).values()],
        (q, k, v),
        [dout],
        lambda grads: Gradients(*grads),
    )
    pieces = [
        [part.detach().transpose(0, 1)[None].requires_grad_() for part in x.split(list(lengths))]
        for x, lengths in ((q, workload.seqlens_q), (k, workload.seqlens_k), (v, workload.seqlens_k))
    ]
    gqa, count = workload.num_heads != workload.num_heads_kv, workload.batch
    loop = Contender(
        lambda: [
            scaled_dot_product_attention(*piece, is_causal=causal, enable_gqa=gqa)
            for piece in zip(*pieces, strict=True)
        ],
        [leaf for leaves in pieces for leaf in leaves],
        [part.transpose(0, 1)[None] for part in dout.split(list(workload.seqlens_q))],
        lambda grads: Gradients(
            *(torch.cat([g[0].transpose(0, 1) for g in grads[i * count : (i + 1) * count]]) for i in range(3))
        ),
    )
    return {"jagtile": packed, "jagtile-njt": njt, "torch-loop": loop}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("workload", nargs="?", default="cpu-d64")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--rounds", type=int, default=21)
    options = parser.parse_args()
    workload = replace(named()[options.workload], is_causal=options.causal)
    clock, rng = ColdClock(torch.device("cpu")), random.Random(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {workload.name}, causal {workload.is_causal}")
    print(f"{'':18}{'forward+backward ms':>20}{'ratio':>7}{'backward ms':>13}{'ratio':>7}{'error':>10}")
    for dtype in DTYPES:
        batch = workload.make("cpu", dtype)
        shape = (workload.total_q, workload.num_heads, workload.head_dim_v)
        dout = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(torch_dtype(dtype))
        expected = reference_gradients(*batch[:5], dout, is_causal=workload.is_causal)
        racing = contenders(workload, batch, dout)
        found = {name: contender.error(expected) for name, contender in racing.items()}
        for name, error in found.items():
            if error > BAR * gradient_tolerance(dtype):
                raise SystemExit(f"{name}, {dtype}: relative error {error:.3g}")
        samples: dict[tuple[str, str], list[float]] = {}
        order = [(name, what) for name in racing for what in ("both", "backward")]
        for _ in range(options.rounds):
            rng.shuffle(order)
            for name, what in order:
                sample = clock.sample(getattr(racing[name], what), 0.0)
                samples.setdefault((name, what), []).append(sample.ms)
        median = {key: statistics.median(values) for key, values in samples.items()}
        for name in racing:
            both, backward = median[name, "both"], median[name, "backward"]
            ratios = both / median["jagtile", "both"], backward / median["jagtile", "backward"]
            print(
                f"{dtype} {name:13}{both:20.2f}{ratios[0]:7.2f}{backward:13.2f}{ratios[1]:7.2f}{found[name]:10.1e}",
                flush=True,
            )


if __name__ == "__main__":
    main()
