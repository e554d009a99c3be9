"""The worker's side for backward kernels: right ones pass the check, each kind of wrong one does not."""

from __future__ import annotations

import msgspec
import pytest
from fakes import artifact

from jagtile.generator import measure
from jagtile.generator.measure import Plan, Trials, Verdict
from jagtile.generator.oracle_gradients import reference_gradients
from jagtile.generator.spec import KernelSpec
from jagtile.generator.tile import Variant
from jagtile.generator.workloads import Workload

SPEC = KernelSpec.parse("bwd_bf16_d32_causal")
SMALL = Workload("small", (40, 7), (40, 7), 2, 1, 32, 32, True)


class ByOracle:
    """A right kernel, made of the oracle."""

    def backward(self, q, k, v, cu_q, cu_k, out, lse, dout, dlse, dq, dk, dv, scale, bottom_right) -> None:
        alignment = "bottom_right" if bottom_right else "top_left"
        meaning = {"is_causal": SPEC.causal, "causal_alignment": alignment, "scale": scale}
        expected = reference_gradients(q, k, v, cu_q, cu_k, dout, self.by_lse(dlse), **meaning)
        for grad, want in zip((dq, dk, dv), expected, strict=True):
            self.store(grad, want)

    def by_lse(self, dlse):
        return dlse

    def store(self, grad, want) -> None:
        grad.copy_(want)


class ForgetsARow(ByOracle):
    def store(self, grad, want) -> None:
        grad[1:] = want[1:].to(grad.dtype)


class WritesBeyondTheEnd(ByOracle):
    def store(self, grad, want) -> None:
        grad.copy_(want)
        grad.as_strided((1,), (1,), grad.storage_offset() + grad.numel()).zero_()


class IsABitInexact(ByOracle):
    def store(self, grad, want) -> None:
        grad.copy_(want * 1.006)


class IsWrongInOneRow(ByOracle):
    def store(self, grad, want) -> None:
        want[-1, 0] *= 1.1
        grad.copy_(want)


class IgnoresTheLse(ByOracle):
    def by_lse(self, dlse):
        return None


class AddsToWhatIsThere(ByOracle):
    def store(self, grad, want) -> None:
        grad += want


class IgnoresTheAlignment(ByOracle):
    def backward(self, *arguments) -> None:
        super().backward(*arguments[:-1], False)


def made():
    class Config:
        name = "c"

        def to_dict(self):
            return {}

    fake = artifact(Variant("cpu", SPEC, Config()))
    return msgspec.structs.replace(fake, meta=msgspec.structs.replace(fake.meta, key="k"))


def check(kernel, monkeypatch, workload=SMALL) -> Verdict:
    monkeypatch.setattr(measure, "load", lambda artifact, device: kernel)
    return Trials("cpu").check(made(), workload, lambda text: None)


def test_a_right_kernel_passes_with_its_error(monkeypatch):
    verdict = check(ByOracle(), monkeypatch)
    assert verdict.reason == ""
    assert 0 < verdict.rel < 2.8e-3
    assert verdict.max_abs > 0


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (ForgetsARow, "relative error of dq inf"),
        (WritesBeyondTheEnd, "rows outside dq were written"),
        (IsABitInexact, "relative error of dv"),
        (IgnoresTheLse, "relative error of dk"),
        (AddsToWhatIsThere, "relative error of dv inf"),
        (IgnoresTheAlignment, "cross: relative error of dq"),
    ],
)
def test_a_wrong_kernel_is_found_out(kernel, reason, monkeypatch):
    assert reason in check(kernel(), monkeypatch).reason


def test_one_wrong_row_among_many_is_found_by_its_own_error(monkeypatch):
    monkeypatch.setattr(measure, "checks", lambda spec: ())
    large = Workload("large", (600, 600), (600, 600), 2, 1, 32, 32, True)
    assert "of a row of dq" in check(IsWrongInOneRow(), monkeypatch, large).reason


def test_it_is_timed_on_inputs_of_its_own(monkeypatch):
    seen = []

    class Timed(ByOracle):
        def backward(self, *arguments) -> None:
            seen.append(arguments)

    monkeypatch.setattr(measure, "load", lambda artifact, device: Timed())
    samples = Trials("cpu").time([("one", made())], SMALL, Plan(rounds=2, sample_ms=0.01), lambda text: None)
    assert len(samples["one"]) in (2, 4)  # widely spread ones are taken again, once
    q, *_, dq, _, _, scale, bottom_right = seen[0]
    assert dq.shape == q.shape
    assert (scale, bottom_right) == (32**-0.5, False)
    assert len({call[0].data_ptr() for call in seen}) > 1
