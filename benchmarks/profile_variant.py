"""Where the warps of a Hopper variant spend their time: ncu's counters, and samples of the hot loop by opcode.

    PYTHONPATH=.pkg python benchmarks/profile_variant.py u4k-d64=m192_n128_s2_q2_c1 bwd:u4k-d64= -o FOLDER

Each argument is WORKLOAD=CONFIG (``persistent_`` may be left out), with ``bwd:`` in front for a backward; no CONFIG is
the default. Needs ncu, and the right to read counters. FOLDER gets ncu's details as text and its source page as CSV;
the summary is printed. ``--summarise FILE.csv`` prints it again.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from jagtile.generator.spec import Direction, KernelSpec
from jagtile.generator.tile import Variant
from jagtile.runtime.dispatch import default_variant

_SECTIONS = (
    "SpeedOfLight",
    "WarpStateStats",
    "SchedulerStats",
    "ComputeWorkloadAnalysis",
    "MemoryWorkloadAnalysis",
    "MemoryWorkloadAnalysis_Tables",
    "SourceCounters",
)
_METRICS = (
    "sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_active",
    "smsp__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active",
    "sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_active",
    "sm__inst_executed_pipe_fma.avg.pct_of_peak_sustained_active",
    "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum.pct_of_peak_sustained_active",
)
_HOT = 0.95  # of the most often executed wgmma's count: the loop's own instructions
_BACKWARD = "bwd:"
_LAUNCHES = 2  # the second one's numbers are printed


def main() -> None:
    """Profile and summarise, or either half."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="*", metavar="WORKLOAD=CONFIG")
    parser.add_argument("-o", "--output", type=Path, default=Path())
    parser.add_argument("--summarise", type=Path, metavar="FILE.csv")
    parser.add_argument("--launch", action="store_true", help=argparse.SUPPRESS)  # the part that ncu watches
    options = parser.parse_args()
    if options.launch:
        _launch(options.jobs)
    elif options.summarise:
        print("\n\n".join(summaries(options.summarise.read_text())))
    else:
        print("\n\n".join(summaries(_profile(options.jobs, options.output).read_text())))


def _launch(jobs: list[str]) -> None:
    import torch

    from jagtile.generator.build import build_one
    from jagtile.generator.passes import pass_of
    from jagtile.generator.workloads import named
    from jagtile.runtime import cuda

    device = torch.device("cuda", torch.cuda.current_device())
    for job in jobs:
        name, _, config = job.removeprefix(_BACKWARD).partition("=")
        direction: Direction = "bwd" if job.startswith(_BACKWARD) else "fwd"
        w = named()[name]
        variant = _variant(replace(w.spec("bf16"), direction=direction), config)
        kernel = cuda.load(build_one(variant), device)
        one = pass_of(direction)
        given = one.make_set(w, "bf16", device, seed=1)
        for _ in range(_LAUNCHES):
            one.launch(kernel, w, given)
        torch.cuda.synchronize()


def _variant(spec: KernelSpec, config: str) -> Variant:
    from variants import with_algorithm

    if not config:
        return default_variant(spec, "sm_90a")
    return Variant.parse(f"sm_90a/{spec.name}/{config if spec.direction == 'bwd' else with_algorithm(config)}")


def _profile(jobs: list[str], folder: Path) -> Path:
    """Run ncu; the CSV of its source page. The kernels are built first, so that ncu does not watch that."""
    launch = [sys.executable, __file__, "--launch", *jobs]
    subprocess.run(launch, check=True)
    folder.mkdir(parents=True, exist_ok=True)
    report, details, source = folder / "report.ncu-rep", folder / "details.txt", folder / "source.csv"
    sections = [argument for name in _SECTIONS for argument in ("--section", name)]
    options = ["--clock-control", "none", "-k", "regex:jagtile_(fwd|bwd)", "--metrics", ",".join(_METRICS)]
    subprocess.run(["ncu", *options, *sections, "-f", "-o", report, *launch], check=True, stdout=subprocess.DEVNULL)
    for path, page in ((details, ["details"]), (source, ["source", "--csv"])):
        with path.open("w") as file:
            subprocess.run(["ncu", "--import", report, "--page", *page], check=True, stdout=file)
    report.unlink()
    return source


def summaries(text: str) -> Iterator[str]:
    """A table for each kernel of ncu's source page: the share of every opcode and stall reason in the hot loop."""
    launches = text.split('"Kernel Name",')[1:]
    for launch in launches[_LAUNCHES - 1 :: _LAUNCHES]:
        name, _, table = launch.partition("\n")
        yield _summary(name.strip().strip('",'), list(csv.DictReader(table.splitlines())))


def _summary(name: str, rows: list[dict[str, str]]) -> str:
    stalls = [key for key in rows[0] if key.startswith("stall_") and "Not Issued" not in key]
    executed = [int(row["Instructions Executed"]) for row in rows]
    loop = _HOT * max((n for n, row in zip(executed, rows, strict=True) if "HGMMA" in row["Source"]), default=0)
    opcodes: dict[str, Counter[str]] = defaultdict(Counter)
    instructions: Counter[str] = Counter()
    for count, row in zip(executed, rows, strict=True):
        if count < max(loop, 1):
            continue
        words = row["Source"].split()
        opcode = next(word for word in words if not word.startswith("@")).split(".")[0]
        instructions[opcode] += 1
        opcodes[opcode].update({stall.removeprefix("stall_"): int(row[stall]) for stall in stalls})
    total = sum(int(row["# Samples"]) for row in rows)
    hot = sum(counts.total() for counts in opcodes.values())
    lines = [
        name,
        f"samples in the hot loop: {hot / max(total, 1):.0%} of {total}",
        "opcode      count  share  reasons",
    ]
    for opcode, counts in sorted(opcodes.items(), key=lambda pair: -pair[1].total()):
        share = counts.total() / max(hot, 1)
        reasons = ", ".join(f"{stall} {n / max(hot, 1):.1%}" for stall, n in counts.most_common(3) if n)
        lines.append(f"{opcode:10} {instructions[opcode]:6} {share:6.1%}  {reasons}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
