"""What the tuner does to a kernel of each direction: the inputs, the comparison with the oracle, one launch."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol, cast

import torch

from jagtile.generator.guard import guarded, guards_intact, poisoned
from jagtile.generator.oracle import SHORT_ROW, errors, reference, tolerance, torch_dtype
from jagtile.generator.oracle_gradients import Gradients, gradient_tolerance, reference_gradients
from jagtile.generator.spec import Direction, DType, KernelSpec
from jagtile.generator.workloads import JaggedBatch, Workload
from jagtile.runtime.kernel import BackwardKernel, ForwardKernel, Kernel

_ROW_BAR = 5  # times the tolerance: the worst row's bar; torch's own CPU kernels stay below 2 (D 16 to 128)
_GRADIENT_ROW_BAR = 10  # likewise: with two or three keys dS cancels; right kernels reach 6.5 (a GPU, D 256)
_SCATTER = 2.0  # an error of n numbers scatters by 1 / sqrt(2 n): right kernels reach 1.02 times the bar in 128
_LSE_BAR: dict[DType, float] = {"fp32": 2e-5, "bf16": 2e-3, "fp16": 2e-3}  # max abs


class Comparison(NamedTuple):
    """A result beside the oracle's. ``wrong`` is what is wrong, "" for nothing."""

    wrong: str
    rel: float
    max_abs: float


class Pass(Protocol):
    """A case is what the oracle is asked for, a set what is timed: whatever the pass needs of inputs and outputs."""

    def case(self, workload: Workload, dtype: DType, device: torch.device, guard: bool) -> Any:
        """Inputs, with NaN around them if ``guard``, and what the oracle makes of them."""
        ...

    def compare(self, kernel: Kernel, spec: KernelSpec, workload: Workload, case: Any) -> Comparison:
        """Run a kernel on a case, its outputs poisoned."""
        ...

    def set_bytes(self, workload: Workload, element: int) -> int:
        """Of the tensors of a set, for elements of so many bytes."""
        ...

    def make_set(self, workload: Workload, dtype: DType, device: torch.device, seed: int) -> Any:
        """Inputs and outputs."""
        ...

    def launch(self, kernel: Kernel, workload: Workload, given: Any) -> None:
        """One launch on a set."""
        ...


def pass_of(direction: Direction) -> Pass:
    """The pass of a spec's direction."""
    return _PASSES[direction]


class _ForwardCase(NamedTuple):
    batch: JaggedBatch
    out: torch.Tensor
    lse: torch.Tensor


class ForwardPass:
    """out and lse. Launches with lse and without are compared; timed are those without, as inference makes them."""

    def case(self, workload: Workload, dtype: DType, device: torch.device, guard: bool) -> _ForwardCase:
        batch = workload.make(device, dtype)
        out, lse = reference(*batch[:5], is_causal=workload.is_causal, causal_alignment=workload.causal_alignment)
        return _ForwardCase(_guarded_batch(batch) if guard else batch, out, lse)

    def compare(self, kernel: Kernel, spec: KernelSpec, workload: Workload, case: _ForwardCase) -> Comparison:
        bar = tolerance(spec.dtype, spec.head_dim_v) * (1 + _SCATTER / math.sqrt(max(case.out.numel(), 1)))
        rels, maxima = [], []
        lse = torch.full_like(case.lse, math.nan, dtype=torch.float32)
        for asked_for in (None, lse):  # either may have machine code of its own
            out = poisoned(case.out, case.batch.q.dtype)
            self._run(kernel, workload, case.batch, out, asked_for)
            found = errors(out, case.out)
            rels.append(found.rel)
            maxima.append(found.max_abs)
            wrong = []
            if not found.rel <= bar:
                wrong.append(f"relative error {found.rel:.3g} above {bar:.3g}")
            elif spec.head_dim_v >= SHORT_ROW and not found.row_rel <= _ROW_BAR * bar:
                wrong.append(f"relative error of a row {found.row_rel:.3g} above {_ROW_BAR * bar:.3g}")
            if asked_for is not None and not (off := errors(lse, case.lse).max_abs) <= _LSE_BAR[spec.dtype]:
                wrong.append(f"lse off by {off:.3g}")
            if not guards_intact(out):
                wrong.append("rows outside the output were written")
            if wrong:
                break
        return Comparison(", ".join(wrong), max(rels), max(maxima))

    def set_bytes(self, workload: Workload, element: int) -> int:
        return workload.input_bytes(element) + _output_bytes(workload, element)

    def make_set(
        self, workload: Workload, dtype: DType, device: torch.device, seed: int
    ) -> tuple[JaggedBatch, torch.Tensor]:
        batch = workload.make(device, dtype, seed)
        return batch, batch.q.new_empty((workload.total_q, workload.num_heads, workload.head_dim_v))

    def launch(self, kernel: Kernel, workload: Workload, given: tuple[JaggedBatch, torch.Tensor]) -> None:
        self._run(kernel, workload, *given, None)

    def _run(
        self, kernel: Kernel, workload: Workload, batch: JaggedBatch, out: torch.Tensor, lse: torch.Tensor | None
    ) -> None:
        cast(ForwardKernel, kernel).forward(*batch[:5], out, lse, *_meaning(workload))


class _BackwardInputs(NamedTuple):
    batch: JaggedBatch
    out: torch.Tensor
    lse: torch.Tensor
    dout: torch.Tensor
    dlse: torch.Tensor | None


class BackwardPass:
    """dq, dk and dv, from what the oracle's forward gives. An error is the worst of the three."""

    def case(
        self, workload: Workload, dtype: DType, device: torch.device, guard: bool
    ) -> tuple[_BackwardInputs, Gradients]:
        batch = workload.make(device, dtype)
        kind = {"is_causal": workload.is_causal, "causal_alignment": workload.causal_alignment}
        out, lse = reference(*batch[:5], **kind)  # type: ignore[arg-type]
        generator = torch.Generator(device=device).manual_seed(1)
        dout = torch.randn(out.shape, generator=generator, device=device, dtype=torch_dtype(dtype))
        # As large as dP: where there is one key, dS is dlse alone, which out's rounding would drown.
        dlse = torch.randn(lse.shape, generator=generator, device=device) * workload.head_dim_v**0.5
        gradients = reference_gradients(*batch[:5], dout, dlse, **kind)  # type: ignore[arg-type]
        out = out.to(dout.dtype)
        if guard:
            batch, out, dout = _guarded_batch(batch), guarded(out), guarded(dout)
        return _BackwardInputs(batch, out, lse.float(), dout, dlse), gradients

    def compare(
        self, kernel: Kernel, spec: KernelSpec, workload: Workload, case: tuple[_BackwardInputs, Gradients]
    ) -> Comparison:
        given, wanted = case
        grads = Gradients(*(poisoned(grad, given.out.dtype) for grad in wanted))
        self._run(kernel, workload, given, grads)
        bar = gradient_tolerance(spec.dtype)
        wrong, rels, maxima = [], [0.0], [0.0]
        for name, grad, want in zip(Gradients._fields, grads, wanted, strict=True):
            found = errors(grad, want)
            rels.append(found.rel)
            maxima.append(found.max_abs)
            if not found.rel <= bar:
                wrong.append(f"relative error of {name} {found.rel:.3g} above {bar:.3g}")
            elif want.shape[2] >= SHORT_ROW and not (worst := _worst_row(grad, want)) <= _GRADIENT_ROW_BAR * bar:
                wrong.append(f"relative error of a row of {name} {worst:.3g} above {_GRADIENT_ROW_BAR * bar:.3g}")
            if not guards_intact(grad):
                wrong.append(f"rows outside {name} were written")
        return Comparison(", ".join(wrong), max(rels), max(maxima))

    def set_bytes(self, workload: Workload, element: int) -> int:
        return 2 * (workload.input_bytes(element) + _output_bytes(workload, element))

    def make_set(
        self, workload: Workload, dtype: DType, device: torch.device, seed: int
    ) -> tuple[_BackwardInputs, Gradients]:
        batch = workload.make(device, dtype, seed)
        out = torch.randn(
            (workload.total_q, workload.num_heads, workload.head_dim_v), device=device, dtype=batch.q.dtype
        )
        keys = workload.total_k / max(1, workload.batch)
        lse = torch.full((workload.num_heads, workload.total_q), math.log(keys + 1) + 0.5, device=device)
        grads = Gradients(*(torch.empty_like(x) for x in batch[:3]))
        return _BackwardInputs(batch, out, lse, out.flip(0), None), grads

    def launch(self, kernel: Kernel, workload: Workload, given: tuple[_BackwardInputs, Gradients]) -> None:
        self._run(kernel, workload, *given)

    def _run(self, kernel: Kernel, workload: Workload, given: _BackwardInputs, grads: Gradients) -> None:
        backward = cast(BackwardKernel, kernel).backward
        backward(*given.batch[:5], *given[1:], *grads, *_meaning(workload))


def _worst_row(grad: torch.Tensor, want: torch.Tensor) -> float:
    """Of the rows' errors by their sizes; what is smaller than the mean counts as that, for gradients may cancel."""
    size = want.norm(dim=2)
    ratios = (grad.double() - want).norm(dim=2) / size.clamp(min=float(size.square().mean().sqrt()))
    return float(ratios.max()) if ratios.numel() else 0.0


def _guarded_batch(batch: JaggedBatch) -> JaggedBatch:
    return batch._replace(q=guarded(batch.q), k=guarded(batch.k), v=guarded(batch.v))


def _output_bytes(workload: Workload, element: int) -> int:
    return element * workload.total_q * workload.num_heads * workload.head_dim_v


def _meaning(workload: Workload) -> tuple[float, bool]:
    """scale and bottom_right."""
    return workload.head_dim**-0.5, workload.causal_alignment == "bottom_right"


_PASSES: dict[Direction, Pass] = {"fwd": ForwardPass(), "bwd": BackwardPass()}
