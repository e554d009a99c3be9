"""Whole transformers on ragged real text: jagtile, torch's nested tensors, varlen_attn and padding, trained and used.

    PYTHONPATH=.pkg python benchmarks/models.py [--size base] [--device cuda] [-o results.json]
    PYTHONPATH=.pkg python benchmarks/models.py --models encoder --modes compiled --tasks training -o results.json

An encoder of BERT's kind fills masked words in, a decoder of GPT's kind predicts next words, on functions and classes
of Python's standard library, eager and compiled. A model, a mode and a task are a part, whose forms are raced with each
other. What each computes is compared with float32 and a dense call for each sequence before anything is timed; times
are medians of interleaved passes over all batches. Each part is added to the file when it is done, so that parts can be
measured in several runs on one kind of device; one that is measured again replaces the older one. A part takes at most
about PATIENCE and BUDGET seconds. Exit code 1: jagtile was wrong or failed, or a part could not be measured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import torch
from model_forms import FORMS
from model_race import AGREEMENT, Limits, race
from model_report import ModelReport, OtherReportError, empty_report, read_report, write_report
from model_tables import print_part, print_summary
from model_text import SIZES
from model_worker import MODES, TASKS

from jagtile.generator.spec import DType
from jagtile.generator.worker import WorkerFailure

Name = TypeVar("Name", bound=str)


def chosen(text: str | None, known: Sequence[Name], what: str) -> list[Name]:
    """The names of an option, in the order that is known."""
    names = text.split(",") if text else list(known)
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"--{what}: no {', '.join(unknown)}; there are {', '.join(known)}")
    return [name for name in known if name in names]


def on_file(output: Path, here: ModelReport) -> ModelReport:
    """What an earlier run left there."""
    try:
        return read_report(output, here)
    except (OtherReportError, OSError) as error:
        raise SystemExit(f"--output: {error}") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=SIZES, help="default: base on a GPU, small on the CPU")
    parser.add_argument("--dtype", choices=AGREEMENT, help="default: bf16 on a GPU, fp32 on the CPU")
    parser.add_argument("--models", metavar="A,B", help="encoder, decoder")
    parser.add_argument("--modes", metavar="A,B", help=", ".join(MODES))
    parser.add_argument("--tasks", metavar="A,B", help=", ".join(TASKS))
    parser.add_argument("--forms", metavar="A,B,...", help=", ".join(FORMS))
    parser.add_argument("--budget", type=float, default=40.0, help="seconds of timing, a part; default 40")
    parser.add_argument(
        "--patience", type=float, default=100.0, help="seconds to start, compile and check, a part; default 100"
    )
    parser.add_argument("--rounds", type=int, default=15, help="most samples of each; default 15")
    parser.add_argument("-o", "--output", type=Path, help="also add the results to FILE, as JSON")
    options = parser.parse_args(arguments)
    if options.output is not None and not options.output.parent.is_dir():
        parser.error(f"--output {options.output}: there is no folder {options.output.parent}")
    device = torch.device(options.device)
    size = options.size or ("base" if device.type == "cuda" else "small")
    dtype: DType = options.dtype or ("bf16" if device.type == "cuda" else "fp32")
    models = {model.name: model for model in SIZES[size]}
    forms = chosen(options.forms, list(FORMS), "forms")
    parts = [
        (models[name], mode, task)
        for mode in chosen(options.modes, MODES, "modes")
        for name in chosen(options.models, list(models), "models")
        for task in chosen(options.tasks, TASKS, "tasks")
    ]
    limits = Limits(patience=options.patience, budget=options.budget, rounds=options.rounds)
    here = empty_report(device, size, dtype)
    report = here if options.output is None else on_file(options.output, here)
    bad: list[str] = []
    for number, (model, mode, task) in enumerate(parts, start=1):
        name = f"{model.name}, {mode}, {task}"
        print(f"{name} ({number} of {len(parts)}) ...", file=sys.stderr, flush=True)
        try:
            part = race(model, mode, task, forms, dtype, device, limits)
        except WorkerFailure as failure:
            print(f"{name}: {failure.reason}", file=sys.stderr, flush=True)
            bad.append(f"all of {name}")
            continue
        print_part(part, report)
        if options.output is None:
            report = report.with_part(part)
        else:
            report = on_file(options.output, here).with_part(part)  # another run may have added to it
            write_report(options.output, report)
        ours = [result for result in part.results if FORMS[result.form].jagtile]
        bad += [f"{result.form}, {name}" for result in ours if result.state in ("incorrect", "failed")]
    print_summary(report)
    if bad:
        print(f"wrong or failed: {'; '.join(bad)}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
