"""ptxas's reports, as nvcc 13.0.88 printed them: what is read, what disqualifies a kernel."""

from __future__ import annotations

import pytest

from jagtile.generator import ptxas

# sm_90a/fwd_bf16_d128/persistent_m192_n96_s2_q1_o1_p0_e0_c1, which the space's arithmetic rejects
FORWARD = "jagtile_fwd_bf16_d128_persistent_m192_n96_s2_q1_o1_p0_e0_c1"
SERIALISED = f"""\
ptxas info    : (C7512) Potential Performance Loss: wgmma.mma_async instructions are serialized due to insufficient \
register resources for the function '{FORWARD}'
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{FORWARD}' for 'sm_90a'
ptxas info    : Function properties for {FORWARD}
    32 bytes stack frame, 48 bytes spill stores, 48 bytes spill loads
ptxas info    : Used 128 registers, used 16 barriers, 32 bytes cumulative stack size
ptxas info    : Compile time = 271.299 ms
ptxas info    : Compiling entry function 'jagtile_build_work_list' for 'sm_90a'
ptxas info    : Function properties for jagtile_build_work_list
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 30 registers, used 1 barriers, 3072 bytes smem
ptxas info    : Compile time = 17.219 ms
"""

# Three kernels of one file; `second` calls the function that is listed after it, and so does the template `third`
SPILLING = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z5thirdILi3EEvPf' for 'sm_90a'
ptxas info    : Function properties for _Z5thirdILi3EEvPf
    256 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 34 registers, used 0 barriers, 256 bytes cumulative stack size
ptxas info    : Compile time = 15.582 ms
ptxas info    : Function properties for _Z6helperfi
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Compiling entry function 'second' for 'sm_90a'
ptxas info    : Function properties for second
    768 bytes stack frame, 436 bytes spill stores, 448 bytes spill loads
ptxas info    : Used 64 registers, used 0 barriers, 768 bytes cumulative stack size
ptxas info    : Compile time = 34.749 ms
ptxas info    : Function properties for _Z6helperfi
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Compiling entry function 'first' for 'sm_90a'
ptxas info    : Function properties for first
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers, used 1 barriers, 128 bytes smem
ptxas info    : Compile time = 1.393 ms
"""

# Small kernels written to provoke one advisory each
ADVISORIES = {
    "no_bounds": "(C7508) Potential Performance Loss: 'setmaxnreg' ignored; unable to determine register count at "
    "entry.",
    "between": "(C7511) Potential Performance Loss: wgmma.mma_async instructions are serialized due to insufficient "
    "register resources for the wgmma pipeline in the function 'between'",
    "nofence": "(C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized due to non wgmma "
    "instructions defining accumulator registers of a wgmma between start and end of the pipeline stage in the "
    "function 'nofence'",
    "early": "(C7517) warpgroup.wait is injected in around line 142 by compiler to allow use of registers defined by "
    "GMMA in function 'early'",
    "crossing": "(C7519) warpgroup.arrive is injected in around line 94 by compiler to allow use of registers in GMMA "
    "in function 'crossing'",
}


def clean(name: str) -> str:
    return (
        f"ptxas info    : Compiling entry function '{name}' for 'sm_90a'\n"
        f"ptxas info    : Function properties for {name}\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 30 registers, used 0 barriers\n"
    )


def test_the_report_is_that_of_the_variants_own_kernel():
    report = ptxas.parse(SERIALISED, FORWARD, 1.5)
    assert (report.registers, report.spill_bytes, report.stack_bytes, report.static_smem_bytes) == (128, 96, 32, 0)
    assert report.seconds == 1.5
    helper = ptxas.parse(SERIALISED, "jagtile_build_work_list", 0.0)
    assert (helper.registers, helper.spill_bytes, helper.static_smem_bytes, helper.warnings) == (30, 0, 3072, ())


def test_a_kernel_that_serialises_wgmma_is_rejected_with_ptxas_words_even_if_it_spills_too():
    state, reason = ptxas.rejection(ptxas.parse(SERIALISED, FORWARD, 0.0))
    assert state == "rejected"
    assert "C7512" in reason
    assert "serialized due to insufficient register resources" in reason


def test_functions_listed_after_a_kernel_do_not_hide_its_spills():
    report = ptxas.parse(SPILLING, "second", 0.0)
    assert (report.spill_bytes, report.stack_bytes, report.registers) == (884, 768, 64)
    assert ptxas.rejection(report) == ("spill", "884 bytes of registers spilled with 64 a thread")


def test_spills_of_a_called_function_count_as_the_kernels():
    helper = "properties for _Z6helperfi\n    0 bytes stack frame, "
    called = SPILLING.replace(f"{helper}0 bytes spill stores", f"{helper}4 bytes spill stores")
    assert ptxas.parse(called, "_Z5thirdILi3EEvPf", 0.0).spill_bytes == 4
    assert ptxas.parse(called, "first", 0.0).spill_bytes == 0


def test_a_clean_kernel_beside_one_that_spills_is_accepted():
    report = ptxas.parse(SPILLING, "first", 0.0)
    assert (report.registers, report.static_smem_bytes) == (10, 128)
    assert ptxas.rejection(report) is None


@pytest.mark.parametrize("name", ["mine", "mine_lse"])
def test_what_is_wrong_with_any_entry_of_a_kernel_is_held_against_it(name):
    both = "".join(clean(entry) for entry in ("mine", "mine_lse", "minery"))
    assert ptxas.rejection(ptxas.parse(both, "mine", 0.0)) is None
    frame = f"properties for {name}\n    {{0}} bytes stack frame, {{0}} bytes"
    spilling = both.replace(frame.format(0), frame.format(8))
    report = ptxas.parse(spilling.replace("Used 30", "Used 40", 1), "mine", 0.0)
    assert (report.spill_bytes, report.stack_bytes, report.registers) == (8, 8, 40)
    advisory = ADVISORIES["nofence"].replace("nofence", name)
    assert ptxas.parse(f"ptxas info    : {advisory}\n{both}", "mine", 0.0).warnings == (advisory,)
    assert ptxas.parse(f"ptxas info    : {advisory}\n{both}", "minery", 0.0).warnings == ()


@pytest.mark.parametrize("name", ADVISORIES)
def test_every_advisory_rejects_with_its_text(name):
    report = ptxas.parse(f"ptxas info    : {ADVISORIES[name]}\n{clean(name)}", name, 0.0)
    assert report.warnings == (ADVISORIES[name],)
    assert ptxas.rejection(report) == ("rejected", f"ptxas: {ADVISORIES[name]}")


def test_an_advisory_on_another_kernel_of_the_file_is_not_held_against_this_one():
    output = f"ptxas info    : {ADVISORIES['nofence']}\n{clean('nofence')}{clean('mine')}"
    assert ptxas.rejection(ptxas.parse(output, "mine", 0.0)) is None
    assert ptxas.rejection(ptxas.parse(output, "nofence", 0.0)) is not None


def test_an_advisory_that_names_no_kernel_counts_for_all():
    output = f"ptxas info    : {ADVISORIES['no_bounds']}\n{clean('first')}{clean('second')}"
    assert [ptxas.rejection(ptxas.parse(output, name, 0.0)) is None for name in ("first", "second")] == [False, False]


def test_an_advisory_said_twice_is_reported_once():
    output = f"ptxas info    : {ADVISORIES['between']}\n" * 2 + clean("between")
    assert len(ptxas.parse(output, "between", 0.0).warnings) == 1
