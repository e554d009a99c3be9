"""The model benchmark: every form computes the same, is timed in turns, and fails alone."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import models
import numpy as np
import pytest
import torch
from model_forms import FORMS
from model_race import ModelResult, Way, race, relative_error
from model_text import SIZES, Model, text_batches
from model_worker import TASKS

import jagtile
from jagtile.generator.worker import WorkerFailure

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
ENCODER, DECODER = SIZES["tiny"]
EAGER = [Way(name, False, task) for task in TASKS for name in FORMS]


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


def run(model: Model, ways=EAGER, make_worker=InProcess, **options) -> dict[tuple[str, str], ModelResult]:
    options = {"seconds": 600.0, "rounds": 1} | options
    results = race(model, ways, "fp32", CPU, make_worker=make_worker, **options)
    return {(result.form, result.task): result for result in results}


@pytest.mark.parametrize("model", [ENCODER, DECODER], ids=lambda model: model.name)
def test_every_form_computes_the_same_and_is_timed(model):
    found = run(model, rounds=2)
    assert list(found) == [(form, task) for task in TASKS for form in FORMS]
    expected = {"torch-varlen": "refused"} | ({"torch-njt": "refused"} if model.is_causal else {})
    tokens = sum(text.tokens for text in text_batches(model))
    for (form, task), result in found.items():
        assert result.state == expected.get(form, "ok"), result.reason
        if result.state == "ok":
            assert result.samples == 2
            assert result.tokens_per_s == pytest.approx(1e3 * tokens / result.ms)
            assert result.ratio == pytest.approx(result.ms / found["jagtile-njt", task].ms)
            assert result.error < 1e-5
            assert result.note == ""
        else:
            assert result.reason
            assert result.ms is None


def test_compiled_forms_are_one_graph_and_compute_the_same(monkeypatch):
    compile_with_inductor = torch.compile  # which takes a minute
    monkeypatch.setattr(torch, "compile", partial(compile_with_inductor, backend="eager"))
    names = ["jagtile-njt", "jagtile-varlen", "padded"]
    found = run(replace(DECODER, layers=1), [Way(name, True, "inference") for name in names])
    for result in found.values():
        assert (result.state, result.mode, result.note) == ("ok", "compiled", ""), result.reason
        assert result.error < 1e-5
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
    found = run(ENCODER, make_worker=Troubled)
    for task in TASKS:
        assert found["torch-njt", task].state == "failed"
        assert found["torch-njt", task].reason == "OutOfMemoryError: tried to allocate 80 GiB"
        assert found["jagtile-varlen", task].state == "failed"
        assert "SIGSEGV" in found["jagtile-varlen", task].reason
        assert found["jagtile-njt", task].state == found["torch-loop", task].state == "ok"
    wrong = found["padded", "training"]
    assert (wrong.state, wrong.ms) == ("incorrect", None)
    assert wrong.error == pytest.approx(0.01, rel=1e-3)
    assert found["padded", "inference"].state == "ok"


def test_without_its_reference_nothing_is_run():
    class Lost(InProcess):
        def call(self, method: str, *arguments: object, timeout: float) -> object:
            raise WorkerFailure("timeout", "no answer within 1 s", "start")

    with pytest.raises(WorkerFailure, match=r"nothing to compare training with: .*timeout: no answer"):
        run(ENCODER, make_worker=Lost)


def test_what_jagtile_does_not_serve_is_a_refusal(monkeypatch):
    def refuse(*given):
        raise jagtile.UnsupportedError("no backward pass")

    monkeypatch.setattr(FORMS["jagtile-varlen"], "features", refuse)
    result = run(ENCODER, [Way("jagtile-varlen", False, "training")])["jagtile-varlen", "training"]
    assert (result.state, result.reason) == ("refused", "no backward pass")


def test_the_time_being_up_ends_the_rounds():
    found = run(ENCODER, [Way("padded", False, "training")], seconds=0.0, rounds=1000)
    assert found["padded", "training"].samples == 1


def test_a_note_tells_of_a_backward_that_is_torchs(monkeypatch):
    monkeypatch.setattr("model_worker.BACKWARD_ROUTES", {})
    monkeypatch.setattr("model_worker.why_no_backward", lambda *case: "no kernel for bwd_bf16_d64 on GPUs")
    found = run(ENCODER, [Way("jagtile-njt", False, task) for task in TASKS])
    assert found["jagtile-njt", "training"].note == "torch's own attention: no kernel for bwd_bf16_d64 on GPUs"
    assert found["jagtile-njt", "inference"].note == ""


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


def test_the_script_writes_what_it_measured_and_prints_it(tmp_path):
    options = "--size tiny --device cpu --models decoder --forms jagtile-njt --modes eager --tasks inference --rounds 1"
    run = subprocess.run(
        [sys.executable, ROOT / "benchmarks/models.py", *options.split(), "-o", tmp_path / "results.json"],
        env=os.environ | {"PYTHONPATH": str(ROOT / ".pkg")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "decoder, tiny: 2 layers, 2 heads of 16" in run.stdout
    (result,) = json.loads((tmp_path / "results.json").read_text())["results"]
    assert (result["form"], result["mode"], result["state"]) == ("jagtile-njt", "eager", "ok")


def test_an_unknown_form_is_refused():
    with pytest.raises(SystemExit, match=r"--forms: no flash; there are jagtile-njt, .*"):
        models.main(["--forms", "flash"])
