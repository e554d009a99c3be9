"""The model benchmark: every form computes the same, is timed in turns, and fails alone."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import models
import msgspec
import numpy as np
import pytest
import torch
from model_forms import FORMS
from model_race import Limits, ModelResult, Part, race, relative_error
from model_report import ModelReport, OtherReportError, empty_report, read_report, write_report
from model_tables import print_part, print_summary
from model_text import SIZES, Model, facts_of, text_batches
from model_worker import TASKS, Way

import jagtile
from jagtile.generator.worker import WorkerFailure

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
ENCODER, DECODER = SIZES["tiny"]
LIMITS = Limits(patience=600.0, budget=600.0, rounds=1)


class InProcess:
    """A worker without a process. jagtile serves during the calls of the forms that want it."""

    _one_at_a_time = threading.Lock()  # torch's generator and what jagtile enables are the process's

    def __init__(self, factory, way: Way, *arguments: object) -> None:
        self.way, self._held = way, factory(way, *arguments)

    def call(self, method: str, *arguments: object, timeout: float) -> object:
        serving = jagtile.enabled() if FORMS[self.way.form].jagtile else contextlib.nullcontext()
        with self._one_at_a_time, serving:
            return getattr(self._held, method)(*arguments, lambda note: None)

    def __enter__(self) -> InProcess:
        return self

    def __exit__(self, *error: object) -> None:
        pass


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """What a worker sets for its process is undone."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    monkeypatch.setattr(jagtile, "enable", lambda: None)


def run(
    model: Model, task, forms=tuple(FORMS), mode="eager", make_worker=InProcess, limits=LIMITS
) -> dict[str, ModelResult]:
    part = race(model, mode, task, forms, "fp32", CPU, limits, make_worker=make_worker)
    assert part.start_s + part.check_s + part.timing_s <= part.seconds
    return {result.form: result for result in part.results}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("model", [ENCODER, DECODER], ids=lambda model: model.name)
def test_every_form_computes_the_same_and_is_timed(model, task):
    found = run(model, task, limits=msgspec.structs.replace(LIMITS, rounds=2))
    assert list(found) == list(FORMS)
    expected = {"torch-varlen": "refused"} | ({"torch-njt": "refused"} if model.is_causal else {})
    tokens = sum(text.tokens for text in text_batches(model))
    for form, result in found.items():
        assert result.state == expected.get(form, "ok"), result.reason
        if result.state == "ok":
            assert result.samples == 2
            assert result.tokens_per_s == pytest.approx(1e3 * tokens / result.ms)
            assert result.ratio == pytest.approx(result.ms / found["jagtile-njt"].ms)
            assert result.error < 1e-5
            assert result.note == ""
            assert result.start_s > 0
            assert result.compile_s is None
        else:
            assert result.reason
            assert result.ms is None


def test_compiled_forms_are_one_graph_and_compute_the_same(monkeypatch):
    compile_with_inductor = torch.compile  # which takes a minute
    monkeypatch.setattr(torch, "compile", partial(compile_with_inductor, backend="eager"))
    names = ["jagtile-njt", "jagtile-varlen", "padded"]
    torch._dynamo.utils.counters.clear()  # of what other tests compiled in this process
    found = run(replace(DECODER, layers=1), "inference", names, "compiled")
    for result in found.values():
        assert (result.state, result.note) == ("ok", ""), result.reason
        assert result.error < 1e-5
        assert result.compile_s > 0
    torch._dynamo.reset()


def test_who_fails_is_wrong_or_dies_costs_only_itself(monkeypatch):
    def out_of_memory(*given):
        raise torch.OutOfMemoryError("tried to allocate 80 GiB")

    class Troubled(InProcess):
        """Padding's gradients are wrong, and the worker of jagtile-varlen dies when it is timed."""

        def call(self, method: str, *arguments: object, timeout: float) -> object:
            if (self.way.form, method) == ("jagtile-varlen", "turn"):
                raise WorkerFailure("crash", "the worker was killed by SIGSEGV", "time")
            answer = super().call(method, *arguments, timeout=timeout)
            if (self.way.form, self.way.task, method) == ("padded", "training", "check"):
                return replace(answer, found=answer.found * np.float32([1, 1.01, 1])[:, None, None])
            return answer

    monkeypatch.setattr(FORMS["torch-njt"], "features", out_of_memory)
    for task in TASKS:
        found = run(ENCODER, task, make_worker=Troubled)
        assert found["torch-njt"].state == "failed"
        assert found["torch-njt"].reason == "OutOfMemoryError: tried to allocate 80 GiB"
        assert found["jagtile-varlen"].state == "failed"
        assert "SIGSEGV" in found["jagtile-varlen"].reason
        assert found["jagtile-njt"].state == found["torch-loop"].state == "ok"
        padded = found["padded"]
        if task == "training":
            assert (padded.state, padded.ms) == ("incorrect", None)
            assert padded.error == pytest.approx(0.01, rel=1e-3)
        else:
            assert padded.state == "ok"


def test_without_its_reference_nothing_is_run():
    class Lost(InProcess):
        def call(self, method: str, *arguments: object, timeout: float) -> object:
            raise WorkerFailure("timeout", "no answer within 1 s", "start")

    with pytest.raises(WorkerFailure, match=r"nothing to compare training with: .*timeout: no answer"):
        run(ENCODER, "training", make_worker=Lost)


def test_what_jagtile_does_not_serve_is_a_refusal(monkeypatch):
    def refuse(*given):
        raise jagtile.UnsupportedError("no backward pass")

    monkeypatch.setattr(FORMS["jagtile-varlen"], "features", refuse)
    result = run(ENCODER, "training", ["jagtile-varlen"])["jagtile-varlen"]
    assert (result.state, result.reason) == ("refused", "no backward pass")


def test_the_time_being_up_ends_the_rounds():
    limits = Limits(patience=600.0, budget=0.0, rounds=1000)
    assert run(ENCODER, "training", ["padded"], limits=limits)["padded"].samples == 1


def test_starting_and_checking_take_nothing_of_the_budget():
    class Slow(InProcess):
        def call(self, method: str, *arguments: object, timeout: float) -> object:
            if method in ("start", "check"):
                time.sleep(0.3)
            else:
                assert timeout > 599
            return super().call(method, *arguments, timeout=timeout)

    part = race(ENCODER, "eager", "inference", ["padded"], "fp32", CPU, LIMITS, make_worker=Slow)
    assert part.results[0].samples == 1
    assert part.results[0].start_s >= 0.3
    assert part.check_s >= 0.6


def test_patience_is_for_starting_and_then_for_checks():
    asked = []

    class Asked(InProcess):
        def call(self, method: str, *arguments: object, timeout: float) -> object:
            asked.append((method, timeout))
            return super().call(method, *arguments, timeout=timeout)

    limits = Limits(patience=100.0, budget=60.0, rounds=1)
    race(ENCODER, "eager", "inference", ["padded"], "fp32", CPU, limits, make_worker=Asked)
    assert [method for method, _ in asked] == ["start", "start", "check", "check", "turn"]
    assert [timeout for method, timeout in asked if method == "start"] == [80.0, 80.0]
    assert all(20 < timeout <= 100 for method, timeout in asked if method == "check")
    assert 59 < asked[-1][1] <= 60


def test_a_note_tells_of_a_backward_that_is_torchs(monkeypatch):
    monkeypatch.setattr("model_worker.BACKWARD_ROUTES", {})
    monkeypatch.setattr("model_worker.why_no_backward", lambda *case: "no kernel for bwd_bf16_d64 on GPUs")
    notes = [run(ENCODER, task, ["jagtile-njt"])["jagtile-njt"].note for task in TASKS]
    assert notes == ["torch's own attention: no kernel for bwd_bf16_d64 on GPUs", ""]


def test_the_encoder_fills_in_and_the_decoder_goes_on():
    for text in text_batches(ENCODER):
        assert (np.concatenate(text.sequences)[text.rows] == ENCODER.vocabulary - 1).all()
        assert (text.targets < ENCODER.vocabulary - 1).all()
        assert len(text.rows) == len(text.targets) == int(0.15 * text.tokens)
    for text in text_batches(DECODER):
        ends = np.cumsum([len(tokens) for tokens in text.sequences])
        within = np.setdiff1d(np.arange(text.tokens - 1), ends - 1)
        assert (text.targets[within] == np.concatenate(text.sequences)[within + 1]).all()
        assert text.padded_tokens == len(ends) * max(map(len, text.sequences))


def test_the_first_sequences_of_a_batch_are_a_batch():
    for model in (ENCODER, DECODER):
        for text in text_batches(model):
            part = text.first(1)
            assert len(part.sequences) == 1
            assert len(part.rows) == len(part.targets) > 0
            assert part.rows.max() < part.tokens


def test_relative_error():
    expected = np.array([[[3.0, 4.0]], [[3.0, 9.0]]])
    found = np.array([[[3.0, 4.0]], [[3.0, 4.0]]])
    assert relative_error(found, expected) == pytest.approx(5 / 90**0.5)
    assert relative_error(found[:1], expected) == float("inf")
    assert not relative_error(found * float("nan"), expected) <= 1


def part_of(model: Model = ENCODER, mode="eager", task="training", ms: float = 10.0, **others: str) -> Part:
    """As if it had been measured: jagtile on nested tensors, padding with half its speed, and what others became of."""
    results = (
        ModelResult(form="jagtile-njt", state="ok", ms=ms, samples=3, ratio=1.0, compile_s=7.0, peak_mib=99.0),
        ModelResult(form="padded", state="ok", ms=2 * ms, samples=3, ratio=2.0),
        *(ModelResult(form=form.replace("_", "-"), state=state) for form, state in others.items()),
    )
    return Part(
        model=model,
        mode=mode,
        task=task,
        text=facts_of(text_batches(model)),
        limits=LIMITS,
        date="2026-01-01T00:00:00+00:00",
        start_s=60.0,
        check_s=8.0,
        timing_s=25.5,
        seconds=95.0,
        results=results,
    )


@pytest.fixture(scope="module")
def here() -> ModelReport:
    return empty_report(CPU, "tiny", "fp32")


def test_parts_of_several_runs_come_together_in_order(here, tmp_path):
    path = tmp_path / "results.json"
    for part in (part_of(DECODER), part_of(mode="compiled"), part_of(task="inference"), part_of()):
        write_report(path, read_report(path, here).with_part(part))
    names = [part.name for part in read_report(path, here).parts]
    assert names == [
        "encoder, eager, training",
        "encoder, eager, inference",
        "encoder, compiled, training",
        "decoder, eager, training",
    ]


def test_a_part_replaces_those_whose_forms_it_raced_again(here):
    report = here.with_part(part_of(ms=1.0)).with_part(part_of(DECODER, ms=2.0))
    report = report.with_part(part_of(ms=3.0, torch_njt="failed"))
    assert [part.results[0].ms for part in report.parts] == [3.0, 2.0]
    report = report.with_part(part_of(ms=4.0))  # without torch-njt: what is known of that stays
    assert [part.results[0].ms for part in report.parts] == [3.0, 4.0, 2.0]
    report = report.with_part(part_of(ms=5.0, torch_njt="ok"))
    assert [part.results[0].ms for part in report.parts] == [5.0, 2.0]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"sources": "0" * 64}, "sources 0000"),
        ({"torch": "2.9.0"}, "torch 2.9.0, here 2."),
        ({"size": "base", "dtype": "bf16"}, "size base, here tiny; dtype bf16, here fp32"),
        ({"device": {"label": "NVIDIA H100"}}, "device's label NVIDIA H100, here "),
    ],
)
def test_what_was_measured_otherwise_is_refused_and_stays(here, tmp_path, change, told):
    path = tmp_path / "results.json"
    if device := change.get("device"):
        change = {"device": msgspec.structs.replace(here.device, **device)}
    write_report(path, msgspec.structs.replace(here, **change).with_part(part_of()))
    before = path.read_bytes()
    with pytest.raises(OtherReportError, match=f"measured otherwise: {told}"):
        read_report(path, here)
    options = "--size tiny --device cpu --models decoder --forms padded --modes eager --tasks inference"
    with pytest.raises(SystemExit, match="name another file"):
        models.main([*options.split(), "-o", str(path)])
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", ["", "{}", '{"results": []}', "\xff"])
def test_another_file_is_refused(here, tmp_path, content):
    (tmp_path / "other.json").write_text(content, "latin-1")
    with pytest.raises(OtherReportError, match="holds no report of this benchmark"):
        read_report(tmp_path / "other.json", here)


def test_a_part_whose_reference_fails_leaves_the_others(monkeypatch, tmp_path, capsys):
    def lost(model, mode, task, *given):
        if task == "training":
            raise WorkerFailure("crash", "there is nothing to compare training with", "")
        return part_of(model, mode, task)

    monkeypatch.setattr(models, "race", lost)
    path = tmp_path / "results.json"
    assert models.main(["--size", "tiny", "--device", "cpu", "--models", "encoder", "-o", str(path)]) == 1
    told = capsys.readouterr()
    assert "wrong or failed: all of encoder, eager, training; all of encoder, compiled, training" in told.err
    assert path.read_text().count('"task": "inference"') == 2


def test_tables_tell_ratios_compilation_and_how_long_it_took(here, capsys):
    report = here.with_part(part_of(torch_njt="failed")).with_part(part_of(DECODER, ms=30.0))
    print_part(report.parts[0], report)
    told = capsys.readouterr().out
    assert "took 95.0 s: 60.0 to start and compile, 8.0 to check, 25.5 to time" in told
    print_summary(report)
    told = capsys.readouterr().out.splitlines()
    first, second = (next(line.split() for line in told if name in line) for name in ("encoder,", "decoder,"))
    assert first[3:9] == ["10", "(1.00x)", "failed", "20", "(2.00x)", "95"]
    assert second[3:8] == ["30", "(1.00x)", "60", "(2.00x)", "95"]


def test_the_script_adds_what_it_measured_to_a_file_and_prints_it(here, tmp_path):
    path = tmp_path / "results.json"
    write_report(path, here.with_part(part_of()))
    options = "--size tiny --device cpu --models decoder --forms jagtile-njt --modes eager --tasks inference --rounds 1"
    run = subprocess.run(
        [sys.executable, ROOT / "benchmarks/models.py", *options.split(), "-o", path],
        env=os.environ | {"PYTHONPATH": str(ROOT / ".pkg")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "decoder, eager, inference, tiny: 2 layers, 2 heads of 16" in run.stdout
    encoder, decoder = read_report(path, here).parts
    assert encoder == part_of()
    assert decoder.name == "decoder, eager, inference"
    assert [(result.form, result.state) for result in decoder.results] == [("jagtile-njt", "ok")]


def test_an_unknown_form_is_refused():
    with pytest.raises(SystemExit, match=r"--forms: no flash; there are jagtile-njt, .*"):
        models.main(["--forms", "flash"])
