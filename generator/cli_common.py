"""What the verbs share: parsing of specs, variants, devices and workloads; tables; JSON."""

from __future__ import annotations

import fnmatch
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

if TYPE_CHECKING:
    import torch

    from jagtile.generator.spec import KernelSpec
    from jagtile.generator.tile import Space, Variant
    from jagtile.generator.workloads import Workload

F = TypeVar("F", bound=Callable[..., object])

_LOG_WIDTH = 1000
_REASON = 160  # characters of a reason in a table


class GpuMissingError(Exception):
    """A GPU was asked for and there is none."""


class VerificationError(Exception):
    """A kernel gave a wrong result."""


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs instead of tables.")
device_option = click.option(
    "--device", default=None, metavar="DEVICE", help="cpu, cuda, cuda:1, ... [default: cuda where there is one]"
)


def print_json(value: object) -> None:
    """To stdout, indented. msgspec structs and dataclasses are fine."""
    import msgspec

    click.echo(json.dumps(msgspec.to_builtins(value), indent=2))


def print_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], right: Sequence[str] = ()
) -> None:
    """A table on stdout; ``right`` names the columns of numbers."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(text(cell)) for cell in row))
    # Not a terminal: as wide as the rows need, so that no cell of a log is folded.
    console = Console(width=None if sys.stdout.isatty() else _LOG_WIDTH, highlight=False)
    console.print(Text(title, style="bold"))
    console.print(table)


def text(value: object) -> str:
    """A table cell: nothing for None, a float without an exponent where it is large."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def shortened(reason: str) -> str:
    """A reason as one line of a table; --json has it whole."""
    line = " ".join(reason.split())
    return line if len(line) <= _REASON else f"{line[: _REASON - 4]} ..."


def parse_spec(name: str) -> KernelSpec:
    """The spec of a name. UsageError for what is none."""
    from jagtile.generator.spec import KernelSpec

    try:
        return KernelSpec.parse(name)
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def parse_variant(name: str) -> Variant:
    """The variant of a TARGET/SPEC/CONFIG name. UsageError for what is none."""
    from jagtile.generator.tile import Variant

    try:
        return Variant.parse(name)
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def target_for(spec: KernelSpec, target: str | None) -> str:
    """The given target, or the first that serves the spec, GPUs before the CPU. UsageError with all reasons."""
    from jagtile.generator.tile import spaces_of, targets

    if target is not None and target not in targets():
        raise click.UsageError(f"no target {target!r}; there are {', '.join(targets())}")
    candidates = [target] if target else sorted(targets(), key=lambda name: name == "cpu")
    for name in candidates:
        if spaces_of(name, spec):
            return name
    raise click.UsageError(f"{spec.name} is served by no template: {'; '.join(_refusals(candidates, spec))}")


def serving_spaces(target: str, spec: KernelSpec) -> tuple[Space, ...]:
    """The spaces of a target that serve the spec. UsageError with the reasons where none does."""
    from jagtile.generator.tile import spaces_of

    return spaces_of(target_for(spec, target), spec)


def _refusals(targets: Sequence[str], spec: KernelSpec) -> list[str]:
    from jagtile.generator.tile import refusal, spaces

    return [f"{s.target}/{s.algorithm}: {refusal(s, spec)}" for s in spaces() if s.target in targets]


def torch_device(name: str | None) -> torch.device:
    """The device of an option's text. GpuMissingError where a GPU is asked for in vain."""
    import torch

    has_gpu = torch.cuda.is_available()
    try:
        device = torch.device(name or ("cuda" if has_gpu else "cpu"))
    except RuntimeError:
        raise click.UsageError(f"--device {name!r} is none; it may be cpu, cuda, cuda:0, cuda:1, ...") from None
    if device.type == "cuda" and not has_gpu:
        why = "this torch is built without CUDA" if torch.version.cuda is None else "torch finds no usable GPU"
        raise GpuMissingError(f"--device {name}: {why}; `jagtile doctor` says more")
    if device.type != "cuda":
        return device
    if (device.index or 0) >= torch.cuda.device_count():
        raise GpuMissingError(f"--device {name}: there are {torch.cuda.device_count()} GPUs")
    return torch.device("cuda", device.index or 0)


def device_slug(device: str | None) -> str:
    """The slug of a device of this machine, or the slug that the option is."""
    from jagtile.runtime.device import device_id

    if device is None or device.partition(":")[0] in ("cpu", "cuda"):
        return device_id(torch_device(device)).slug
    return device


_UNITS = {"s": 1, "m": 60, "h": 3600}
_DURATION = re.compile(r"(?:\d+(?:\.\d+)?[smh])+")


def parse_budget(texts: Iterable[str]) -> tuple[int | None, float | None]:
    """(trials, seconds) of budgets like "40", "5m" or "40,90s"; None for a kind that is not named."""
    trials, seconds = None, None
    for part in (part.strip() for given in texts for part in given.split(",")):
        if part.isdecimal() and int(part) > 0:
            trials = int(part)
        elif _DURATION.fullmatch(part):
            seconds = sum(float(number) * _UNITS[unit] for number, unit in re.findall(r"([\d.]+)([smh])", part))
        else:
            raise click.BadParameter(
                f"{part!r} is neither a number of trials (40) nor a time (90s, 5m, 1h30m)", param_hint="--budget"
            )
    return trials, seconds


def workload_options(function: F) -> F:
    """Arguments and options that name workloads; ``pick_workloads`` takes them as keywords."""
    options: list[Callable[[Any], Any]] = [
        click.argument("workloads", nargs=-1, metavar="[WORKLOAD]..."),
        click.option(
            "--lengths", type=click.Path(exists=True, dir_okay=False), help="Read lengths from FILE, a sequence a line."
        ),
        click.option("--heads", type=click.IntRange(1), default=8, show_default=True, help="With --lengths."),
        click.option("--heads-kv", type=click.IntRange(1), help="With --lengths. [default: as --heads]"),
        click.option("--head-dim", type=click.IntRange(1, 256), default=64, show_default=True, help="With --lengths."),
        click.option("--head-dim-v", type=click.IntRange(1, 256), help="With --lengths. [default: as --head-dim]"),
        click.option("--causal", is_flag=True, help="With --lengths."),
        click.option(
            "--alignment",
            type=click.Choice(["top_left", "bottom_right"]),
            default="top_left",
            show_default=True,
            help="With --lengths: which queries and keys face each other where their numbers differ.",
        ),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def _given(*names: str) -> list[str]:
    """Those of the verb's options that are on the command line."""
    context = click.get_current_context()
    found = [name for name in names if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    return [f"--{name.replace('_', '-')}" for name in found]


def pick_workloads(
    workloads: Sequence[str],
    *,
    lengths: str | None,
    heads: int,
    heads_kv: int | None,
    head_dim: int,
    head_dim_v: int | None,
    causal: bool,
    alignment: str,
) -> list[Workload]:
    """The workloads that names, patterns (``u4k-*``) and a lengths file stand for.

    UsageError for an unknown one, and for options that would describe a file where none is given.
    """
    from jagtile.generator.workloads import from_lengths_file, named

    if lengths is None and (idle := _given("heads", "heads_kv", "head_dim", "head_dim_v", "causal", "alignment")):
        raise click.UsageError(f"{', '.join(idle)}: only with --lengths FILE; a named workload has its own")
    known = named()
    picked: dict[str, Workload] = {}
    for pattern in workloads:
        names = fnmatch.filter(known, pattern)
        if not names:
            raise click.UsageError(f"no workload {pattern!r}; there are {', '.join(known)}")
        picked.update((name, known[name]) for name in names)
    if lengths is not None:
        try:
            workload = from_lengths_file(
                lengths,
                num_heads=heads,
                num_heads_kv=heads_kv,
                head_dim=head_dim,
                head_dim_v=head_dim_v,
                is_causal=causal,
                causal_alignment="bottom_right" if alignment == "bottom_right" else "top_left",
            )
        except (ValueError, OSError) as error:
            raise click.UsageError(str(error)) from None
        picked[workload.name] = workload
    return list(picked.values())
