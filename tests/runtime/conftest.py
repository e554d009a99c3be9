"""Helpers of the run time's tests: a kernel that is the oracle, and a tile space that needs no template."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from jagtile.generator.oracle import reference
from jagtile.generator.oracle_gradients import reference_gradients
from jagtile.generator.spec import KernelSpec
from jagtile.generator.tile import Knob, TileConfig
from jagtile.runtime import dropout, fallback, layouts, ops, trainable
from jagtile.runtime.routes import Route

sys.path.insert(0, str(Path(__file__).parent))  # njt_cases.py


class OracleKernel:
    """A ForwardKernel and a BackwardKernel made of the oracle. As a real one, the forward leaves rows of no sequence
    alone: they are poisoned.
    """

    def __init__(self, causal: bool) -> None:
        self.causal = causal

    def meaning(self, q, k, scale, bottom_right, drops=None) -> dict[str, object]:
        meaning = {"is_causal": self.causal, "scale": scale}
        if drops is not None:
            mask = dropout.keep_mask(drops, torch.arange(q.shape[0]), q.shape[1], 0, k.shape[0])
            meaning["kept"] = mask.double() * drops.scale
        return {**meaning, "causal_alignment": "bottom_right" if bottom_right else "top_left"}

    def forward(self, q, k, v, cu_seqlens_q, cu_seqlens_k, out, lse, *rest) -> None:
        *options, _layout = rest
        expected, expected_lse = reference(q, k, v, cu_seqlens_q, cu_seqlens_k, **self.meaning(q, k, *options))
        covered = int(cu_seqlens_q[-1])
        out.fill_(float("nan"))
        out[:covered] = expected[:covered].to(out.dtype)
        if lse is not None:
            lse.fill_(float("nan"))
            lse[:, :covered] = expected_lse[:, :covered].float()

    def backward(self, q, k, v, cu_seqlens_q, cu_seqlens_k, out, lse, dout, dlse, *rest) -> None:
        *grads_and_options, _layout = rest
        grads, options = grads_and_options[:3], grads_and_options[3:]
        meaning = self.meaning(q, k, *options)
        expected = reference_gradients(q, k, v, cu_seqlens_q, cu_seqlens_k, dout, dlse, **meaning)
        for grad, want in zip(grads, expected, strict=True):
            grad.copy_(want)


@dataclass
class Calls:
    """What reached the kernels."""

    routes: list[Route] = field(default_factory=list)
    arguments: list[tuple[object, ...]] = field(default_factory=list)
    backward_routes: list[Route] = field(default_factory=list)
    backward_arguments: list[tuple[object, ...]] = field(default_factory=list)


@pytest.fixture
def oracle_kernels(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Every call runs the oracle instead of a compiled kernel; returns what reached it."""
    calls = Calls()

    def resolve(route: Route) -> OracleKernel:
        kernel = OracleKernel(causal=route[3])
        compute = kernel.forward

        def forward(*arguments: object) -> None:
            calls.arguments.append(arguments)
            compute(*arguments)

        kernel.forward = forward  # type: ignore[method-assign]
        calls.routes.append(route)
        return kernel

    def resolve_backward(route: Route) -> OracleKernel:
        kernel = OracleKernel(causal=route[3])
        compute = kernel.backward

        def backward(*arguments: object) -> None:
            calls.backward_arguments.append(arguments)
            compute(*arguments)

        kernel.backward = backward  # type: ignore[method-assign]
        calls.backward_routes.append(route)
        return kernel

    monkeypatch.setattr(ops, "ROUTES", {})
    monkeypatch.setattr(ops, "resolve", resolve)
    monkeypatch.setattr(ops, "BACKWARD_ROUTES", {})
    monkeypatch.setattr(ops, "resolve_backward", resolve_backward)
    return calls


@pytest.fixture
def no_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """There are no backward kernels."""
    monkeypatch.setattr(trainable, "why_no_backward", lambda *case: "none in this test")
    monkeypatch.setattr(fallback, "_REASONS", {})
    monkeypatch.setattr(layouts, "_KNOWN", {})


@pytest.fixture
def no_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    """There are no kernels with dropout."""
    monkeypatch.setattr(dropout, "why_no_dropout", lambda *case: "none in this test")


@dataclass(frozen=True, order=True)
class PlainConfig(TileConfig):
    algorithm = "plain"
    block: int = field(metadata={"short": "b"})


@dataclass(frozen=True)
class PlainSpace:
    """A space of one knob; blocks above 128 are illegal, and so is float32 except on the CPU."""

    target: str
    algorithm: str = "plain"
    template: str = "none.j2"
    config_type: type[TileConfig] = PlainConfig

    def serves(self, spec: KernelSpec) -> str | None:
        return "it computes in bf16 and fp16" if spec.dtype == "fp32" and self.target != "cpu" else None

    def knobs(self, spec: KernelSpec) -> Mapping[str, tuple[Knob, ...]]:
        return {"block": (64, 128, 256)}

    def rejection(self, spec: KernelSpec, config: PlainConfig) -> str | None:
        return f"block {config.block} > 128" if config.block > 128 else None

    def default(self, spec: KernelSpec) -> PlainConfig:
        return PlainConfig(64)


@pytest.fixture
def plain_spaces(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], dict[str, Knob]]:
    """Only ``PlainSpace`` exists, for the CPU and sm_90a. Returns a function: block -> recorded config."""
    monkeypatch.setattr("jagtile.generator.spaces.ALL", (PlainSpace("cpu"), PlainSpace("sm_90a")))
    return lambda block: PlainConfig(block).to_dict()


@pytest.fixture
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield
