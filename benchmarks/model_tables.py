"""The model benchmark's tables: a part in full, and all parts of a report."""

from __future__ import annotations

from model_forms import FORMS
from model_race import OURS, ModelResult, Part
from model_report import ModelReport

from jagtile.generator.cli_common import print_table, shortened


def print_part(part: Part, report: ModelReport) -> None:
    model, text = part.model, part.text
    title = (
        f"{part.name}, {report.size}: {model.layers} layers, {model.heads} heads of {model.head_dim}, "
        f"{model.vocabulary} words, {report.dtype}; {text.sequences} sequences of {text.shortest} to {text.longest} in "
        f"{model.batches} batches, {text.tokens} tokens, {text.padded_tokens} with padding\n"
        f"{_where(report)}; took {part.seconds:.1f} s: {part.start_s:.1f} to start and compile, {part.check_s:.1f} to "
        f"check, {part.timing_s:.1f} to time"
    )
    numbers = ("tokens/s", "ms", "IQR", "n", f"time/{OURS}", "peak MiB", "error", "start s", "compile s")
    rows = [
        (
            result.form,
            result.tokens_per_s,
            result.ms,
            result.iqr_ms,
            result.samples or "",
            "" if result.ratio is None else f"{result.ratio:.2f}x",
            None if result.peak_mib is None else round(result.peak_mib),
            "" if result.error is None else f"{result.error:.1e}",
            _seconds(result.start_s),
            _seconds(result.compile_s),
            shortened(result.note if result.state == "ok" else f"{result.state}: {result.reason}"),
        )
        for result in part.results
    ]
    print_table(title, ("form", *numbers, ""), rows, right=numbers)


def print_summary(report: ModelReport) -> None:
    """A line a part: milliseconds of each form, and in brackets that over jagtile's of the same part."""
    forms = [form for form in FORMS if any(form in part.forms for part in report.parts)]
    rows = []
    for part in report.parts:
        cells = {result.form: _cell(result) for result in part.results}
        rows.append((part.name, *(cells.get(form, "") for form in forms), f"{part.seconds:.0f}", part.date))
    title = f"{report.size}, {report.dtype}, {_where(report)}: ms (time/{OURS})"
    print_table(title, ("part", *forms, "took s", "measured"), rows, right=(*forms, "took s"))


def _where(report: ModelReport) -> str:
    return f"{report.device.label}, torch {report.torch}"


def _cell(result: ModelResult) -> str:
    if result.ms is None:
        return result.state
    return f"{result.ms:.4g}" if result.ratio is None else f"{result.ms:.4g} ({result.ratio:.2f}x)"


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
