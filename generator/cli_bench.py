"""``jagtile bench``: ours against every importable peer, on named workloads or on lengths from a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from jagtile.generator.cli_common import (
    VerificationError,
    device_option,
    json_option,
    pick_workloads,
    print_json,
    print_table,
    shortened,
    torch_device,
    workload_options,
)

if TYPE_CHECKING:
    from jagtile.generator.bench_types import BenchReport, WorkloadResult


@click.command()
@workload_options
@device_option
@click.option("--dtype", type=click.Choice(["fp32", "bf16", "fp16"]), help="[default: bf16 on a GPU, fp32 on the CPU]")
@click.option("--peers", metavar="A,B,...", help="Only these. [default: all]")
@click.option("--skip", metavar="A,B,...", help="Not these; e.g. flex, which compiles anew for every workload.")
@click.option(
    "--seconds",
    type=click.FloatRange(0, min_open=True),
    default=1.0,
    show_default=True,
    help="Of calls, per peer and workload.",
)
@click.option("--max-samples", type=click.IntRange(1), default=50, show_default=True, help="Per peer and workload.")
@click.option(
    "--timeout",
    type=click.FloatRange(1),
    default=240.0,
    show_default=True,
    help="Seconds until a silent peer is given up.",
)
@click.option(
    "--idle-device",
    is_flag=True,
    help="Start every call on an idle GPU, so that the host's time counts too. [default: the device's time alone]",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the order of turns.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="Also write the results to FILE as JSON."
)
@click.option("--list", "listing", is_flag=True, help="List the named workloads.")
@json_option
def bench(
    workloads: tuple[str, ...],
    device: str | None,
    dtype: str | None,
    peers: str | None,
    skip: str | None,
    seconds: float,
    max_samples: int,
    timeout: float,
    idle_device: bool,
    seed: int,
    output: Path | None,
    listing: bool,
    as_json: bool,
    **described: Any,
) -> None:
    """Time jagtile against the peers that are installed, interleaved, with a cold cache, each checked first.

    WORKLOADs are names or patterns; without any, those made for the device are run.

    \b
    jagtile bench u4k-d128 'u1k-*'
    jagtile bench --lengths lengths.txt --heads 16 --head-dim 64 --causal
    """
    from jagtile.generator.bench import bench as run
    from jagtile.generator.bench_types import Plan
    from jagtile.generator.peers import PEERS
    from jagtile.generator.spec import DTYPES
    from jagtile.generator.worker import WorkerFailure
    from jagtile.generator.workloads import named

    if listing:
        _list(as_json)
        return
    where = torch_device(device)
    picked, skipped = (peers.split(",") if peers else list(PEERS)), (skip.split(",") if skip else [])
    unknown = [name for name in (*picked, *skipped) if name not in PEERS]
    if unknown:
        raise click.UsageError(f"no peer {', '.join(unknown)}; there are {', '.join(PEERS)}")
    if not workloads and described["lengths"] is None:
        workloads = tuple(name for name in named() if name.startswith("cpu-") == (where.type == "cpu"))
    chosen = pick_workloads(workloads, **described)
    name = dtype or ("fp32" if where.type == "cpu" else "bf16")

    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.touch()  # better told now than when all is measured

    def on_result(report: BenchReport) -> None:
        if output is not None:  # after each workload: an interrupted run has what was measured
            output.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
        if not as_json:
            _print_workload(report.workloads[-1])

    try:
        report = run(
            chosen,
            where,
            next(known for known in DTYPES if known == name),
            [name for name in picked if name not in skipped],
            plan=Plan(
                seconds=seconds,
                max_samples=max_samples,
                min_samples=min(5, max_samples),
                idle_device=idle_device,
            ),
            seed=seed,
            timeout=timeout,
            on_peer=_tell,
            on_result=on_result,
        )
    except WorkerFailure as failure:
        raise click.ClickException(f"{where} can't be used: {failure.reason}") from None
    if as_json:
        print_json(report)
    else:
        _print_ratios(report)
    if wrong := report.ours("incorrect"):
        raise VerificationError(f"jagtile was wrong on {', '.join(wrong)}")
    if failed := report.ours("failed"):
        raise click.ClickException(f"jagtile failed on {', '.join(failed)}")


def _tell(workload: str, peer: str) -> None:
    click.echo(f"{workload}: {peer} was lost, going on without it" if peer else f"{workload} ...", err=True)


def _print_workload(result: WorkloadResult) -> None:
    rows = [
        (
            peer.peer,
            peer.ms,
            peer.iqr_ms,
            peer.tflops,
            _times(peer.ratio),
            None if peer.host_us is None else round(peer.host_us),
            "" if peer.error_rel is None else f"{peer.error_rel:.2e}",
            peer.samples or "",
            "" if peer.state == "ok" else shortened(f"{peer.state}: {peer.reason}"),
        )
        for peer in result.peers
    ]
    alignment = f" ({result.causal_alignment})" if result.causal_alignment else ""
    title = (
        f"{result.workload}: {result.spec}{alignment}, {result.sequences} sequences, {result.total_q} queries, "
        f"{result.total_k} keys, {result.num_heads}/{result.num_heads_kv} heads"
    )
    if result.variant:
        title += f"\n{result.variant} (from: {result.source}); {100 * result.checked_share:.3g}% of the output checked"
    numbers = ("ms", "IQR", "TFLOP/s", "time/ours", "host us", "error", "n")
    print_table(title, ("peer", *numbers, "why not"), rows, right=numbers)


def _print_ratios(report: BenchReport) -> None:
    """One row a workload: our time, and each peer's over it."""
    names = dict.fromkeys(p.peer for result in report.workloads for p in result.peers if p.ms)
    others = [name for name in names if name != "jagtile"]
    rows = []
    for result in report.workloads:
        ours = result.of("jagtile")
        found = [result.of(name) for name in others]
        speed = (ours.ms, ours.tflops) if ours else (None, None)
        rows.append((result.workload, *speed, *(_times(peer.ratio) if peer else "" for peer in found)))
    numbers = ("jagtile ms", "TFLOP/s", *others)
    title = (
        f"Time of each peer over jagtile's, {report.device.label} ({report.device.slug})"
        f"{f', driver {report.driver}' if report.driver else ''}, torch {report.torch}, {report.date}"
    )
    print_table(title, ("workload", *numbers), rows, right=numbers)


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"


def _list(as_json: bool) -> None:
    from jagtile.generator.workloads import named

    if as_json:
        print_json(list(named().values()))
        return
    rows = [
        (
            w.name,
            w.batch,
            w.total_q,
            w.total_k,
            f"{w.num_heads}/{w.num_heads_kv}",
            w.head_dim if w.head_dim == w.head_dim_v else f"{w.head_dim}/{w.head_dim_v}",
            w.causal_alignment if w.is_causal else "",
            f"{w.flops / 1e12:.3f}",
        )
        for w in named().values()
    ]
    columns = ("workload", "sequences", "queries", "keys", "heads", "D", "causal", "TFLOP")
    print_table("Named workloads", columns, rows, right=columns[1:])
