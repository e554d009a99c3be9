"""Whole transformers on ragged real text: jagtile, torch's nested tensors, varlen_attn and padding, trained and used.

    PYTHONPATH=.pkg python benchmarks/models.py [--size base] [--device cuda] [--budget 200] [-o results.json]

An encoder of BERT's kind fills masked words in, a decoder of GPT's kind predicts next words, on functions and classes
of Python's standard library, eager and compiled. What each computes is compared with float32 and a dense call for each
sequence before anything is timed; times are medians of interleaved passes over all batches. Exit code 1: jagtile was
wrong or failed.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import msgspec
import torch
from model_forms import FORMS
from model_race import AGREEMENT, OURS, ModelResult, race
from model_text import SIZES, Model, text_batches
from model_worker import TASKS, Way

import jagtile
from jagtile.generator.cli_common import print_table, shortened
from jagtile.generator.measure import Trials
from jagtile.generator.spec import DType
from jagtile.generator.worker import WorkerFailure
from jagtile.tuning_db.schema import DeviceFacts
from jagtile.tuning_db.store import replace_file

Name = TypeVar("Name", bound=str)
MODES = {"eager": False, "compiled": True}


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What was run."""

    model: Model
    sequences: int
    tokens: int
    padded_tokens: int
    shortest: int
    longest: int


class ModelReport(msgspec.Struct, frozen=True, kw_only=True):
    """A run of this benchmark."""

    device: DeviceFacts
    driver: str
    torch: str
    jagtile: str
    date: str  # UTC, ISO 8601
    size: str
    dtype: DType
    models: tuple[ModelFacts, ...] = ()
    results: tuple[ModelResult, ...] = ()


def facts_of(model: Model) -> ModelFacts:
    """Of the batches that are run."""
    texts = text_batches(model)
    lengths = [len(sequence) for text in texts for sequence in text.sequences]
    return ModelFacts(
        model=model,
        sequences=len(lengths),
        tokens=sum(lengths),
        padded_tokens=sum(text.padded_tokens for text in texts),
        shortest=min(lengths),
        longest=max(lengths),
    )


def print_model(facts: ModelFacts, results: Sequence[ModelResult], report: ModelReport) -> None:
    model = facts.model
    title = (
        f"{model.name}, {report.size}: {model.layers} layers, {model.heads} heads of {model.head_dim}, "
        f"{model.vocabulary} words, {report.dtype}; {facts.sequences} sequences of {facts.shortest} to "
        f"{facts.longest} in {model.batches} batches, {facts.tokens} tokens, {facts.padded_tokens} with padding\n"
        f"{report.device.label}, torch {report.torch}"
    )
    numbers = ("tokens/s", "ms", "IQR", "n", f"time/{OURS}", "peak MiB", "error")
    rows = [
        (
            result.task,
            result.form,
            result.mode,
            result.tokens_per_s,
            result.ms,
            result.iqr_ms,
            result.samples or "",
            "" if result.ratio is None else f"{result.ratio:.2f}x",
            None if result.peak_mib is None else round(result.peak_mib),
            "" if result.error is None else f"{result.error:.1e}",
            shortened(result.note if result.state == "ok" else f"{result.state}: {result.reason}"),
        )
        for result in results
    ]
    print_table(title, ("task", "form", "mode", *numbers, ""), rows, right=numbers)


def chosen(text: str | None, known: Sequence[Name], what: str) -> list[Name]:
    """The names of an option, in the order that is known."""
    names = text.split(",") if text else list(known)
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"--{what}: no {', '.join(unknown)}; there are {', '.join(known)}")
    return [name for name in known if name in names]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=SIZES, help="default: base on a GPU, small on the CPU")
    parser.add_argument("--dtype", choices=AGREEMENT, help="default: bf16 on a GPU, fp32 on the CPU")
    parser.add_argument("--models", metavar="A,B", help="encoder, decoder")
    parser.add_argument("--forms", metavar="A,B,...", help=", ".join(FORMS))
    parser.add_argument("--modes", metavar="A,B", help=", ".join(MODES))
    parser.add_argument("--tasks", metavar="A,B", help=", ".join(TASKS))
    parser.add_argument("--budget", type=float, default=200.0, help="seconds for all, about; default 200")
    parser.add_argument("--rounds", type=int, default=15, help="most samples of each; default 15")
    parser.add_argument("-o", "--output", type=Path, help="also write the results to FILE as JSON")
    options = parser.parse_args(arguments)
    if options.output is not None and not options.output.parent.is_dir():
        parser.error(f"--output {options.output}: there is no folder {options.output.parent}")
    device = torch.device(options.device)
    size = options.size or ("base" if device.type == "cuda" else "small")
    dtype: DType = options.dtype or ("bf16" if device.type == "cuda" else "fp32")
    models = {model.name: model for model in SIZES[size]}
    names = chosen(options.models, list(models), "models")
    ways = [
        Way(form, MODES[mode], task)
        for task in chosen(options.tasks, TASKS, "tasks")
        for form in chosen(options.forms, list(FORMS), "forms")
        for mode in chosen(options.modes, list(MODES), "modes")
    ]
    known = Trials(str(device)).facts(lambda note: None)
    report = ModelReport(
        device=known.device,
        driver=known.driver,
        torch=known.torch,
        jagtile=jagtile.__version__,
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        size=size,
        dtype=dtype,
    )
    for name in names:
        print(f"{name} ...", file=sys.stderr, flush=True)
        facts = facts_of(models[name])
        share = options.budget / len(names)
        try:
            results = race(models[name], ways, dtype, device, seconds=share, rounds=options.rounds)
        except WorkerFailure as failure:
            raise SystemExit(f"{name}: {failure.reason}") from None
        report = msgspec.structs.replace(report, models=(*report.models, facts), results=(*report.results, *results))
        if options.output is not None:  # after each model: an interrupted run has what was measured
            replace_file(options.output, msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
        print_model(facts, results, report)
    ours = [result for result in report.results if FORMS[result.form].jagtile]
    bad = [f"{r.form}, {r.mode}, {r.model}, {r.task}" for r in ours if r.state in ("incorrect", "failed")]
    if bad:
        print(f"jagtile was wrong or failed: {'; '.join(bad)}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
