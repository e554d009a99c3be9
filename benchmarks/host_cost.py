"""Host time of calls: 8 sequences, 243 tokens, 8 heads, D 64, bf16, with and without gradients.

    PYTHONPATH=.pkg python benchmarks/host_cost.py [cpu|cuda] [--profile]

Prints medians of 1000 calls in microseconds. "Dispatch" is with kernels that do nothing. "Floor" is what torch takes
for the same graph: a node whose output and gradients are there beforehand takes the place of attention. On a GPU, where
a launch does not wait for the kernel, there are also "launch", real calls; "one thread", these and the floor with
autograd's backward in the caller's thread instead of the device's; "no driver", all that real calls do but the driver's
cuLaunchKernel; and "torch", its own. With --profile the dearest functions of each call follow, by cProfile, which sees
one thread: of real calls on a GPU, of dispatch on the CPU.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate, product
from typing import Any, cast

import torch
from torch.nested._internal.nested_tensor import NestedTensor
from torch.nn.functional import scaled_dot_product_attention

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # an older torch, whose rows then show the error
    varlen_attn = None

import jagtile
from jagtile.runtime import ops, routes
from jagtile.runtime.checks import check_tensors
from jagtile.runtime.layouts import checked
from jagtile.runtime.njt_form import form_of
from jagtile.runtime.problem import LOOK_UPS

CALLS = 1000
BATCH = 200  # calls between two waits for the device, which holds so many launches
LENGTHS = (1, 70, 30, 12, 50, 8, 40, 32)
HEADS, HEAD_DIM = 8, 64
PROFILED = 25  # functions of a call

Call = Callable[[], object]


class NoKernel:
    """A kernel of either direction that leaves its outputs as they are."""

    def forward(self, *arguments: object) -> None:
        pass

    def backward(self, *arguments: object) -> None:
        pass


@contextmanager
def no_kernels(dtype: torch.dtype, device_index: int) -> Iterator[None]:
    """Every call launches nothing."""
    kernel, tables = NoKernel(), (routes.ROUTES, routes.BACKWARD_ROUTES)
    before = [dict(table) for table in tables]
    for table, causal, look_up in product(tables, (False, True), range(len(LOOK_UPS))):
        table[dtype, HEAD_DIM, HEAD_DIM, causal, device_index, look_up, False] = kernel
    try:
        yield
    finally:
        for table, kept in zip(tables, before, strict=True):
            table.clear()
            table.update(kept)


@contextmanager
def no_driver_launches() -> Iterator[None]:
    """Loaded kernels do all but call the driver. To be used where real calls have built the lists of work."""
    launchers = [kernel._launch for table in (routes.ROUTES, routes.BACKWARD_ROUTES) for kernel in table.values()]
    before = [launcher._launch for launcher in launchers]
    for launcher in launchers:
        launcher._launch = lambda *arguments, done=(launcher._success,): done
    try:
        yield
    finally:
        for launcher, kept in zip(launchers, before, strict=True):
            launcher._launch = kept


def median_us(call: Call, device: str) -> float:
    times = []
    for round_ in range(CALLS // BATCH + 1):  # the first warms up
        for _ in range(BATCH):
            start = time.perf_counter_ns()
            call()
            times.append(time.perf_counter_ns() - start)
        if device == "cuda":
            torch.cuda.synchronize()
        if round_ == 0:
            times.clear()
    return statistics.median(times) / 1000


class NoAttention(torch.autograd.Function):
    """A node that computes nothing."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, output: Call, grads: list[torch.Tensor]
    ) -> object:
        ctx.set_materialize_grads(False)
        ctx.grads = grads
        return output()

    @staticmethod
    def backward(ctx: Any, *dout: object) -> tuple[object, ...]:
        return (*ctx.grads, None, None)


no_attention: Any = super(torch.autograd.Function, NoAttention).apply  # as runtime/autograd.py does


class Case:
    """The tensors of all calls."""

    def __init__(self, device: str) -> None:
        total = sum(LENGTHS)
        self.q, self.k, self.v, self.dout = torch.randn(4, total, HEADS, HEAD_DIM, device=device, dtype=torch.bfloat16)
        self.cu = torch.tensor([0, *accumulate(LENGTHS)], dtype=torch.int32, device=device)
        offsets = self.cu.long()
        self.nested = [self._nested(x, offsets) for x in (self.q, self.k, self.v)]
        self.leaves = [x.clone().requires_grad_() for x in (self.q, self.k, self.v)]
        self.nested_leaves = [x.detach().requires_grad_() for x in self.nested]
        self.nested_dout = self._nested(self.dout, offsets)
        self.form = form_of(cast(NestedTensor, self.nested[0]))

    @staticmethod
    def _nested(values: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return torch.nested.nested_tensor_from_jagged(values, offsets, min_seqlen=1, max_seqlen=70).transpose(1, 2)

    def packed(self) -> object:
        return jagtile.varlen_attention(self.q, self.k, self.v, self.cu, self.cu)

    def packed_training(self) -> object:
        out = jagtile.varlen_attention(*self.leaves, self.cu, self.cu)
        return torch.autograd.grad(out, self.leaves, self.dout)

    def packed_floor(self) -> object:
        out = no_attention(*self.leaves, self.dout.detach, (self.q, self.k, self.v))
        return torch.autograd.grad(out, self.leaves, self.dout)

    def nested_floor(self) -> object:
        """Through jagtile's way to put a nested tensor together, which is none of torch's."""
        out = no_attention(*self.nested_leaves, lambda: self.form.nest(self.dout), self.nested)
        return torch.autograd.grad(out, self.nested_leaves, self.nested_dout)

    def torchs_varlen(self) -> object:
        return varlen_attn(self.q, self.k, self.v, self.cu, self.cu, max(LENGTHS), max(LENGTHS))

    def torchs_varlen_training(self) -> object:
        out = varlen_attn(*self.leaves, self.cu, self.cu, max(LENGTHS), max(LENGTHS))
        return torch.autograd.grad(out, self.leaves, self.dout)

    def through_torch(self) -> object:
        return scaled_dot_product_attention(*self.nested)

    def through_torch_training(self) -> object:
        out = scaled_dot_product_attention(*self.nested_leaves)
        return torch.autograd.grad(out, self.nested_leaves, self.nested_dout)


def show(title: str, rows: dict[str, tuple[bool, Call]], device: str) -> None:
    """Time calls, with grad or without."""
    for name, (grad, function) in rows.items():
        with torch.set_grad_enabled(grad):
            try:
                found = f"{median_us(function, device):8.1f}"
            except (RuntimeError, TypeError) as error:  # torch's CPU kernels serve no such call; a target may lack one
                found = f"       - ({type(error).__name__})"
        print(f"{title:11}{name:38}{found}", flush=True)


def show_profiles(calls: dict[str, tuple[bool, Call]], device: str) -> None:
    """The functions that take most of each call, themselves."""
    for name, (grad, function) in calls.items():
        print(f"\n{name}, {CALLS} calls in one thread")
        profile = cProfile.Profile()
        with torch.set_grad_enabled(grad), torch.autograd.set_multithreading_enabled(False):
            for round_ in range(CALLS // BATCH + 1):
                for _ in range(BATCH):
                    if round_ == 0:
                        function()
                    else:
                        profile.runcall(function)
                if device == "cuda":
                    torch.cuda.synchronize()
        pstats.Stats(profile).sort_stats("tottime").print_stats(PROFILED)


def main(device: str, profile: bool) -> None:
    torch.set_num_threads(1)  # torch's own operations on the CPU must not wait for other threads
    case = Case(device)
    tensors = (case.q, case.k, case.v, case.cu, case.cu)
    call = (*tensors, None, None, False, False, 0.125, False, 0.0, None)
    layout = checked(check_tensors, *tensors)
    parts: dict[str, tuple[bool, Call]] = {
        "  checks of tensors, remembered": (False, lambda: checked(check_tensors, *tensors)),
        "  allocate, route, launch nothing": (False, lambda: ops.forward(*call, layout)),
        "  the same through the torch operator": (False, lambda: torch.ops.jagtile.forward.default(*call)),
        "  sdpa on nested tensors": (False, lambda: jagtile.sdpa(*case.nested)),
    }
    calls: dict[str, tuple[bool, Call]] = {
        "packed forward": (False, case.packed),
        "packed forward and backward": (True, case.packed_training),
        "nested forward": (False, case.through_torch),
        "nested forward and backward": (True, case.through_torch_training),
    }
    trained = {name: row for name, row in calls.items() if row[0]}
    floors: dict[str, tuple[bool, Call]] = {
        "packed forward and backward": (True, case.packed_floor),
        "nested forward and backward": (True, case.nested_floor),
    }
    torchs = {
        "packed forward": (False, case.torchs_varlen),
        "packed forward and backward": (True, case.torchs_varlen_training),
    }

    print(f"torch {torch.__version__}, {device}, median of {CALLS} calls, us")
    with jagtile.enabled():
        with no_kernels(case.q.dtype, case.q.get_device()):
            show("dispatch", calls | parts, device)
            show("floor", floors, device)
            if profile and device == "cpu":
                show_profiles(calls, device)
        if device == "cuda":
            show("launch", calls, device)
            with torch.autograd.set_multithreading_enabled(False):
                show("one thread", trained, device)
                show("its floor", floors, device)
            with no_driver_launches():
                show("no driver", calls, device)
            if profile:
                show_profiles(calls, device)
    if device == "cuda":
        show("torch", {**calls, **torchs}, device)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("device", nargs="?", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--profile", action="store_true")
    main(**vars(parser.parse_args()))
