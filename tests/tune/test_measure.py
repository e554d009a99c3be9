"""The worker's side: right kernels pass the check, each kind of wrong one does not, timing is interleaved."""

from __future__ import annotations

import itertools

import msgspec
import pytest
import torch
from fakes import artifact

from jagtile.generator import measure
from jagtile.generator.measure import Plan, Trials
from jagtile.generator.oracle import reference
from jagtile.generator.spec import KernelSpec
from jagtile.generator.tile import Variant
from jagtile.generator.timing import HostTimer
from jagtile.generator.workloads import Workload, named

SPEC = KernelSpec.parse("fwd_bf16_d32_causal")
SMALL = Workload("small", (40, 7), (40, 7), 2, 1, 32, 32, True)


class ByOracle:
    """A right kernel, made of the oracle."""

    def __init__(self) -> None:
        self.calls = 0

    def forward(self, q, k, v, cu_q, cu_k, out, lse, scale, bottom_right) -> None:
        self.calls += 1
        alignment = "bottom_right" if bottom_right else "top_left"
        result, result_lse = reference(
            q, k, v, cu_q, cu_k, is_causal=SPEC.causal, causal_alignment=alignment, scale=scale
        )
        self.store(out, result, cu_q)
        if lse is not None:
            lse.copy_(result_lse)

    def store(self, out, result, cu_q) -> None:
        out.copy_(result)


class ForgetsARow(ByOracle):
    def store(self, out, result, cu_q) -> None:
        out[:-1] = result[:-1].to(out.dtype)


class WritesBeyondTheEnd(ByOracle):
    def store(self, out, result, cu_q) -> None:
        out.copy_(result)
        out.as_strided((1,), (1,), out.storage_offset() + out.numel()).zero_()


class WritesBeforeTheBegin(ByOracle):
    def store(self, out, result, cu_q) -> None:
        out.copy_(result)
        out.as_strided((1,), (1,), out.storage_offset() - 1).zero_()


class IsWrongInOneRow(ByOracle):
    def store(self, out, result, cu_q) -> None:
        result[-1, 0] *= 1.05
        out.copy_(result)


class IsABitInexact(ByOracle):
    def store(self, out, result, cu_q) -> None:
        out.copy_(result * 1.004)


class ReadsBeyondTheEnd(ByOracle):
    def forward(self, q, k, v, cu_q, cu_k, out, lse, scale, bottom_right) -> None:
        beyond = k.as_strided((k.shape[0] + 1, *k.shape[1:]), k.stride(), k.storage_offset())
        super().forward(q, k, v, cu_q, cu_k, out, lse, scale, bottom_right)
        out += 0 * beyond.sum()


class IgnoresTheAlignment(ByOracle):
    def forward(self, q, k, v, cu_q, cu_k, out, lse, scale, bottom_right) -> None:
        super().forward(q, k, v, cu_q, cu_k, out, lse, scale, False)


class GivesTheLseInBase2(ByOracle):
    def forward(self, q, k, v, cu_q, cu_k, out, lse, scale, bottom_right) -> None:
        super().forward(q, k, v, cu_q, cu_k, out, lse, scale, bottom_right)
        if lse is not None:
            lse /= 0.6931471805599453


def made(name: str = "k"):
    """An artifact whose key is ``name``."""

    class Config:
        def to_dict(self):
            return {}

        name = "c"

    fake = artifact(Variant("cpu", SPEC, Config()))
    return msgspec.structs.replace(fake, meta=msgspec.structs.replace(fake.meta, key=name))


def note(text: str) -> None:
    pass


def check(kernel, monkeypatch, workload=SMALL):
    monkeypatch.setattr(measure, "load", lambda artifact, device: kernel)
    return Trials("cpu").check(made(), workload, note)


def test_a_right_kernel_passes_with_its_error(monkeypatch):
    verdict = check(ByOracle(), monkeypatch)
    assert verdict.reason == ""
    assert 0 < verdict.rel < 2.8e-3
    assert verdict.max_abs > 0


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (ForgetsARow, "relative error inf"),
        (ReadsBeyondTheEnd, "relative error inf"),
        (WritesBeyondTheEnd, "rows outside the output were written"),
        (WritesBeforeTheBegin, "rows outside the output were written"),
        (IsWrongInOneRow, "relative error"),
        (IsABitInexact, "relative error"),
        (IgnoresTheAlignment, "cross: relative error"),
        (GivesTheLseInBase2, "lse off"),
    ],
)
def test_a_wrong_kernel_is_found_out(kernel, reason, monkeypatch):
    assert reason in check(kernel(), monkeypatch).reason


def test_one_wrong_row_among_many_is_found_by_its_own_error(monkeypatch):
    monkeypatch.setattr(measure, "checks", lambda spec: ())
    large = Workload("large", (600, 600), (600, 600), 2, 1, 32, 32, True)
    assert "of a row" in check(IsWrongInOneRow(), monkeypatch, large).reason


def test_all_candidates_run_in_each_round_and_slow_ones_are_dropped(monkeypatch):
    kernels = {"fast": ByOracle(), "slow": ByOracle()}
    trials = Trials("cpu")
    monkeypatch.setattr(measure, "load", lambda artifact, device: kernels[artifact.meta.key])
    clock = {"fast": 10.0, "slow": 20.0, "also fast": 10.1}
    order = []

    class FakeTimer:
        cache_bytes = 1

        def sampler(self, launch, sets, sample_ms, *, apart=False):
            label = labels.pop(0)
            launch(0)

            def sample():
                order.append(label)
                return clock[label]

            return sample

    labels = ["fast", "slow", "also fast"]
    trials._timer = FakeTimer()
    noted = []
    candidates = [("fast", made("fast")), ("slow", made("slow")), ("also fast", made("fast"))]
    samples = trials.time(candidates, SMALL, Plan(rounds=6, sample_ms=1), noted.append)
    assert {label: len(own) for label, own in samples.items()} == {"fast": 6, "slow": 3, "also fast": 6}
    assert all(set(order[i : i + 3]) == set(clock) for i in (0, 3, 6))
    assert len({tuple(order[i : i + 3]) for i in (0, 3, 6)}) > 1
    assert noted[4:] == order


def test_launches_that_meet_the_power_limit_are_timed_apart(monkeypatch):
    asked = []

    class FakeTimer:
        cache_bytes = 1

        def sampler(self, launch, sets, sample_ms, *, apart=False):
            asked.append(apart)
            return lambda: 1.0

    monkeypatch.setattr(measure, "load", lambda artifact, device: ByOracle())
    trials = Trials("cpu")
    trials._timer = FakeTimer()
    trials._sets = lambda *which: [None]
    for workload in (SMALL, named()["u4k-d128"]):
        trials.time([("it", made("it"))], workload, Plan(rounds=1, sample_ms=1), note)
    assert asked == [False, True]


def test_where_samples_are_spread_widely_there_are_as_many_rounds_again_once(monkeypatch):
    times = {"steady": [10.0], "shaky": [10.0, 12.0], "slow and shaky": [20.0, 30.0]}
    monkeypatch.setattr(measure, "load", lambda artifact, device: ByOracle())

    def rounds(*labels):
        order = list(labels)

        class FakeTimer:
            cache_bytes = 1

            def sampler(self, launch, sets, sample_ms, *, apart=False):
                cycle = itertools.cycle(times[order.pop(0)])
                return lambda: next(cycle)

        trials = Trials("cpu")
        trials._timer = FakeTimer()
        samples = trials.time([(label, made(label)) for label in labels], SMALL, Plan(rounds=4, sample_ms=1), note)
        return {label: len(own) for label, own in samples.items()}

    assert rounds("steady", "steady") == {"steady": 4}
    assert rounds("steady", "shaky") == {"steady": 8, "shaky": 8}
    assert rounds("steady", "slow and shaky") == {"steady": 4, "slow and shaky": 3}  # who was dropped does not matter


def test_inputs_rotate_until_they_exceed_the_cache():
    trials = Trials("cpu")
    trials._timer = type("T", (), {"cache_bytes": 10 * SMALL.input_bytes(2)})()
    sets = trials._make_sets("fwd", SMALL, "bf16")
    assert 10 <= len(sets) <= 25
    assert len({batch.cu_seqlens_q.data_ptr() for batch, _ in sets}) == len(sets)
    assert not torch.equal(sets[0][0].q, sets[1][0].q)


def test_a_sample_is_made_of_enough_launches_over_all_sets():
    launched = []
    sample = HostTimer().sampler(launched.append, sets=5, sample_ms=0.05)
    launched.clear()
    assert sample() > 0
    assert len(launched) % 5 == 0
    assert launched == list(range(len(launched)))


def test_the_worker_tells_what_it_runs_on():
    facts = Trials("cpu").facts(note)
    assert facts.device.target == "cpu"
    assert facts.device.slug.startswith("cpu-")
    assert type(facts.torch) is str
