"""The summary of ncu's source page: what is in the hot loop, and which launches are summarised."""

from __future__ import annotations

import importlib.util
from pathlib import Path

HEADER = '"Source","# Samples","Instructions Executed","stall_wait","stall_mio","stall_wait (Not Issued)"'
PATH = Path(__file__).parents[2] / "benchmarks" / "profile_variant.py"


def page(kernel: str, samples: int) -> str:
    return f'''"Kernel Name","{kernel}",
{HEADER}
"      LDC R1, c[0x0]","50","10","50","0","9"
"      HGMMA.64x64x16.F32.BF16 R8, gdesc[UR4], R8","{samples}","1000","{samples}","0","9"
"@!P1  MUFU.EX2 R24, R24","30","1000","10","20","9"
"      MUFU.EX2 R25, R25","10","990","10","0","9"
'''


def test_the_second_launch_of_each_kernel_is_summarised_by_opcode() -> None:
    spec = importlib.util.spec_from_file_location("profile_variant", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = page("one", 7) + page("one", 60) + page("two", 8) + page("two", 10)
    first, second = module.summaries(text)
    assert first.splitlines()[:2] == ["one", "samples in the hot loop: 67% of 150"]
    assert [line.split() for line in first.splitlines()[3:]] == [
        ["HGMMA", "1", "60.0%", "wait", "60.0%"],
        ["MUFU", "2", "40.0%", "wait", "20.0%,", "mio", "20.0%"],
    ]
    assert second.splitlines()[0] == "two"
