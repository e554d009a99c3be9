"""What ptxas says of a kernel: registers, spills, shared memory, and the advisories that disqualify it."""

from __future__ import annotations

import re
from typing import Literal

from jagtile.runtime.artifact import CompileReport

_ENTRY = re.compile(r"Compiling entry function '(?P<name>\w+)'")
_FUNCTION = re.compile(r"Function properties for (?P<name>\w+)")
_STACK = re.compile(
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
)
_USED = re.compile(r"Used (?P<registers>\d+) registers")
_SMEM = re.compile(r"(?P<bytes>\d+) bytes smem")
_ADVISORY = re.compile(r"\(C7[56]\d\d\).*")


def parse(output: str, symbol: str, seconds: float) -> CompileReport:
    """The report on ``symbol`` in the output of ``nvcc --resource-usage``; other kernels of the file are left out.

    Kernels named ``symbol``_... are entries of the same: spills are added up, of registers and memory the most counts.
    Spills of the functions that the kernel calls count as its own: ptxas lists them after the kernel.
    """
    registers = stack = spills = smem = 0
    entry = function = ""
    for line in output.splitlines():
        if match := _ENTRY.search(line):
            entry = match["name"]
        elif match := _FUNCTION.search(line):
            function = match["name"]
        elif not _is_entry_of(symbol, entry):
            continue
        elif match := _STACK.search(line):
            spills += int(match["stores"]) + int(match["loads"])
            stack = max(stack, int(match["stack"])) if function == entry else stack
        elif match := _USED.search(line):
            registers = max(registers, int(match["registers"]))
            found = _SMEM.search(line)
            smem = max(smem, int(found["bytes"]) if found else 0)
    return CompileReport(
        seconds=seconds,
        registers=registers,
        spill_bytes=spills,
        stack_bytes=stack,
        static_smem_bytes=smem,
        warnings=_advisories(output, symbol),
    )


def _advisories(output: str, symbol: str) -> tuple[str, ...]:
    """Each advisory once, in order, but those that name another kernel of the file."""
    entries = (match["name"] for match in _ENTRY.finditer(output))
    others = {name for name in entries if not _is_entry_of(symbol, name)}
    said = dict.fromkeys(match[0] for match in _ADVISORY.finditer(output))
    return tuple(text for text in said if not any(f"'{other}'" in text for other in others))


def _is_entry_of(symbol: str, name: str) -> bool:
    return name == symbol or name.startswith(f"{symbol}_")


def rejection(report: CompileReport) -> tuple[Literal["rejected", "spill"], str] | None:
    """(state, reason) where a compiled kernel must not be used: spills, or wgmma that ptxas serialised."""
    if report.warnings:
        return "rejected", f"ptxas: {report.warnings[0]}"
    if report.spill_bytes:
        return "spill", f"{report.spill_bytes} bytes of registers spilled with {report.registers} a thread"
    return None
