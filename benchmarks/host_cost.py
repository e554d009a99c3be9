"""Host time of calls: 8 sequences, 243 tokens, 8 heads, D 64, bf16, with and without gradients.

    PYTHONPATH=.pkg python benchmarks/host_cost.py [cpu|cuda] [--profile]

Prints medians of 1000 calls in microseconds. "Dispatch" is with kernels that do nothing. "Floor" is what torch takes
for the same graph: a node whose output and gradients are there beforehand takes the place of attention. "Launchers", on
the CPU, are calls through a GPU's launchers up to the driver, and a stand-in for that does nothing; "native" the same
calls, served by the compiled host (docs/native-host.md). On a GPU, where a launch does not wait for the kernel,
"native" are real calls as they are by default, "launch" those without the compiled host; "one thread" both, and the
floor, with autograd's backward in the caller's thread instead of the device's; "no driver" both without the driver's
cuLaunchKernel; "torch" its own. With --profile the dearest functions of each call follow, by cProfile, which sees one
thread: of real calls on a GPU, of dispatch on the CPU.
"""

from __future__ import annotations

import argparse
import cProfile
import ctypes
import pstats
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import accumulate, product
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import torch
from torch.nested._internal.nested_tensor import NestedTensor
from torch.nn.functional import scaled_dot_product_attention

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # an older torch, whose rows then show the error
    varlen_attn = None

import jagtile
from jagtile.generator import host
from jagtile.generator.spec import Direction, KernelSpec
from jagtile.runtime import native, ops, routes
from jagtile.runtime.artifact import Artifact
from jagtile.runtime.checks import check_tensors
from jagtile.runtime.cuda import driver, load, tensor_map
from jagtile.runtime.dispatch import default_variant
from jagtile.runtime.layouts import checked
from jagtile.runtime.njt_form import form_of
from jagtile.runtime.problem import LOOK_UPS
from jagtile.runtime.settings import settings

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
def served_by(forward: Any, backward: Any, device_index: int) -> Iterator[None]:
    """Every call is served by one of two kernels."""
    tables = (routes.ROUTES, routes.BACKWARD_ROUTES)
    before = [dict(table) for table in tables]
    native.forget()
    for (table, kernel), look_up in product(zip(tables, (forward, backward), strict=True), range(len(LOOK_UPS))):
        cast(Any, table)[torch.bfloat16, HEAD_DIM, HEAD_DIM, False, device_index, look_up, False] = kernel
    try:
        yield
    finally:
        for table, kept in zip(tables, before, strict=True):
            table.clear()
            table.update(kept)
        native.forget()


@contextmanager
def launchers_alone() -> Iterator[None]:
    """Every call on the CPU goes through launchers of a GPU, to a driver that does nothing."""
    results = SimpleNamespace(CUDA_SUCCESS=0, CUDA_ERROR_INVALID_CONTEXT=201)
    bindings = SimpleNamespace(
        CUresult=results,
        CUlaunchAttributeID=SimpleNamespace(CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION=6),
        **dict.fromkeys(("CUlaunchAttribute", "CUlaunchAttributeValue", "CUlaunchConfig"), SimpleNamespace),
        **dict.fromkeys(("cuLaunchKernel", "cuLaunchKernelEx"), lambda *arguments: (results.CUDA_SUCCESS,)),
    )
    properties = SimpleNamespace(multi_processor_count=132)
    cuda = {
        "_cuda_getDevice": lambda: 0,
        "_cuda_getCurrentRawStream": lambda device: 0,
        "_cuda_isCurrentStreamCapturing": lambda: False,
    }
    with (
        mock.patch.multiple(torch._C, create=True, **cuda),
        mock.patch.multiple(torch.cuda, device=lambda _: nullcontext(), get_device_properties=lambda _: properties),
        mock.patch.multiple(driver, bindings=lambda: bindings, call=lambda *_: 0, function=lambda *_: 0),
        mock.patch.object(driver, "launches_dependents", return_value=True),
        mock.patch.multiple(
            tensor_map, encode=lambda *_: bytes(tensor_map.MAP_BYTES), address_comes_first=lambda: True
        ),
        served_by(launcher("fwd"), launcher("bwd"), -1),
    ):
        yield


@contextmanager
def native_host_alone(device: str) -> Iterator[None]:
    """Calls that go through a GPU's launchers are served by the compiled host, to a driver that does nothing."""
    # It does nothing with its arguments, and says 0: success.
    nothing = ctypes.cast(ctypes.CDLL(None).pthread_condattr_destroy, ctypes.c_void_p).value
    assert nothing is not None
    native.connect(host.built(), nothing, nothing, nothing, device)
    try:
        yield
    finally:
        native.disconnect()
        if device == "cuda":
            native._have()


def python_alone() -> Any:
    """Calls are not served by the compiled host."""
    return mock.patch.multiple(native, serve=None, serve_nested=None)


def launcher(direction: Direction) -> Any:
    """A GPU's, of the default kernel, which is not built."""
    spec = KernelSpec(direction, "bf16", HEAD_DIM, HEAD_DIM, causal=False)
    variant = default_variant(spec, "sm_90a")
    launch, config = variant.space.launch(spec, variant.config), variant.config.to_dict()
    meta = SimpleNamespace(launch=launch, config=config, spec=spec.name, symbol="")
    artifact = SimpleNamespace(meta=meta, path=SimpleNamespace(read_bytes=bytes))
    return load(cast(Artifact, artifact), torch.device("cuda", 0))


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

    def operators(self) -> object:
        """As a compiled graph of a training step calls them."""
        batch, options = (self.q, self.k, self.v, self.cu, self.cu), (None, None, False, False, 0.125)
        out, lse = torch.ops.jagtile.differentiable_forward.default(*batch, *options)
        return torch.ops.jagtile.backward.default(self.dout, None, *batch, out, lse, *options)

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
        "operators, forward and backward": (False, case.operators),
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
    with jagtile.enabled(), settings.override(native_host="wait" if device == "cuda" else "off"):
        with served_by(NoKernel(), NoKernel(), case.q.get_device()):
            show("dispatch", calls | parts, device)
            show("floor", floors, device)
            if profile and device == "cpu":
                show_profiles(calls, device)
        if device == "cpu":
            with launchers_alone():
                show("launchers", calls, device)
                with native_host_alone(device):
                    show("native", calls, device)
        if device == "cuda":
            show("native", calls, device)
            with python_alone():
                show("launch", calls, device)
            with torch.autograd.set_multithreading_enabled(False):
                show("one thread", trained, device)
                with python_alone():
                    show("  Python", trained, device)
                show("its floor", floors, device)
            with native_host_alone(device):
                show("no driver", calls, device)
            with python_alone(), no_driver_launches():
                show("  Python", calls, device)
            if profile:
                show_profiles(calls, device)
    if device == "cuda":
        show("torch", {**{name: row for name, row in calls.items() if "nested" in name}, **torchs}, device)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("device", nargs="?", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--profile", action="store_true")
    main(**vars(parser.parse_args()))
