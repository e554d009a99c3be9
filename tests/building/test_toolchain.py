"""Compilers are found in a stated order, known by their version and never by their path; errors say what was tried."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from cuda import pathfinder

from jagtile.generator import toolchain
from jagtile.generator.spec import KernelSpec
from jagtile.generator.targets import TARGETS
from jagtile.generator.tile import refusal, spaces
from jagtile.generator.toolchain import find_cxx, find_ninja, find_nvcc
from jagtile.runtime.errors import CompilerNotFoundError

NVCC_SAYS = """nvcc: NVIDIA (R) Cuda compiler driver
Cuda compilation tools, release 13.0, V13.0.{patch}
Build cuda_13.0.r13.0/compiler.3642{patch}_0"""


def program(path: Path, says: str, exit_code: int = 0) -> Path:
    """A program that says the same to every question."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\ncat <<'END'\n{says}\nEND\nexit {exit_code}\n")
    path.chmod(0o755)
    return path


def nvcc(path: Path, patch: int = 88) -> Path:
    return program(path, NVCC_SAYS.format(patch=patch))


@pytest.fixture(autouse=True)
def bare_machine(monkeypatch, tmp_path):
    """No compiler anywhere but what a test puts there. Returns nothing; ``tmp_path / "bin"`` is on the PATH."""
    for name in ("CXX", "JAGTILE_NVCC", "CUDA_HOME", "CUDA_PATH", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "bin").mkdir()
    for tool in ("cat", "sh"):
        (tmp_path / "tools").mkdir(exist_ok=True)
        (tmp_path / "tools" / tool).symlink_to(f"/bin/{tool}")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{tmp_path / 'tools'}")
    monkeypatch.setattr(toolchain, "_USUAL_NVCC", str(tmp_path / "usual" / "nvcc"))
    monkeypatch.setattr(pathfinder, "find_nvidia_binary_utility", lambda name: None)
    toolchain._nvcc.cache_clear()
    toolchain._cxx.cache_clear()
    yield
    toolchain._nvcc.cache_clear()
    toolchain._cxx.cache_clear()


# --- the CUDA compiler


def test_nvcc_is_looked_for_in_the_setting_then_in_wheels_then_on_the_path_then_at_its_usual_place(
    monkeypatch, tmp_path
):
    usual = nvcc(tmp_path / "usual" / "nvcc", 1)
    assert find_nvcc().path == usual
    toolchain._nvcc.cache_clear()
    on_path = nvcc(tmp_path / "bin" / "nvcc", 2)
    assert find_nvcc().path == on_path
    toolchain._nvcc.cache_clear()
    wheel = nvcc(tmp_path / "site-packages" / "nvidia" / "cu13" / "bin" / "nvcc", 3)
    monkeypatch.setattr(pathfinder, "find_nvidia_binary_utility", lambda name: str(wheel) if name == "nvcc" else None)
    assert find_nvcc().path == wheel
    named = nvcc(tmp_path / "mine" / "nvcc", 4)
    monkeypatch.setenv("JAGTILE_NVCC", str(named))
    assert find_nvcc().path == named
    assert find_nvcc().version == "nvcc 13.0.4 (cuda_13.0.r13.0/compiler.36424_0)"


def test_a_missing_nvcc_lists_every_place_tried_and_the_command_that_helps(monkeypatch):
    monkeypatch.setenv("CUDA_HOME", "/opt/no-cuda")
    with pytest.raises(CompilerNotFoundError) as raised:
        find_nvcc()
    for part in (
        "JAGTILE_NVCC: not set",
        "pip and conda toolkits",
        "CUDA_HOME (/opt/no-cuda)",
        "CUDA_PATH (not set)",
        "PATH: none there",
        toolchain._USUAL_NVCC,
        "pip install jagtile[nvcc]",
    ):
        assert part in str(raised.value)


@pytest.mark.parametrize("kind", ["absent", "a folder", "no program", "another program", "failing"])
def test_a_wrong_setting_is_an_error_though_another_nvcc_is_there(monkeypatch, tmp_path, kind):
    nvcc(tmp_path / "bin" / "nvcc")
    named = tmp_path / "named"
    if kind == "a folder":
        named.mkdir()
    elif kind == "no program":
        named.write_text("text")
    elif kind == "another program":
        program(named, "gcc 12")
    elif kind == "failing":
        program(named, NVCC_SAYS, exit_code=3)
    monkeypatch.setenv("JAGTILE_NVCC", str(named))
    with pytest.raises(CompilerNotFoundError, match="JAGTILE_NVCC") as raised:
        find_nvcc()
    assert str(named) in str(raised.value)


def test_a_broken_nvcc_on_the_way_is_passed_over_and_told_of_where_none_works(tmp_path):
    program(tmp_path / "bin" / "nvcc", "cannot execute: wrong architecture", exit_code=126)
    with pytest.raises(CompilerNotFoundError, match=r"exit code 126 and said 'cannot execute"):
        find_nvcc()
    usual = nvcc(tmp_path / "usual" / "nvcc")
    assert find_nvcc().path == usual


def test_the_version_says_what_nvcc_emits_and_not_where_it_is(monkeypatch, tmp_path):
    versions = set()
    for place in ("a", "b"):
        monkeypatch.setenv("JAGTILE_NVCC", str(nvcc(tmp_path / place / "nvcc")))
        versions.add(find_nvcc().version)
    assert len(versions) == 1
    monkeypatch.setenv("JAGTILE_NVCC", str(nvcc(tmp_path / "c" / "nvcc", 89)))
    assert find_nvcc().version not in versions


def test_flags_that_nvcc_adds_by_itself_are_part_of_its_version_without_their_folders(monkeypatch, tmp_path):
    nvcc(tmp_path / "bin" / "nvcc")
    plain = find_nvcc().version
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-lineinfo -ccbin=/opt/conda/bin/g++")
    assert find_nvcc().version == f"{plain} -lineinfo -ccbin=g++"


def test_a_relative_setting_gives_an_absolute_path(monkeypatch, tmp_path):
    named = nvcc(tmp_path / "mine" / "nvcc")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAGTILE_NVCC", "./mine/nvcc")
    assert find_nvcc().path == named


def test_a_link_to_nvcc_is_followed_and_one_to_ccache_is_not(monkeypatch, tmp_path):
    real = nvcc(tmp_path / "cuda" / "bin" / "nvcc")
    (tmp_path / "link").symlink_to(real)
    monkeypatch.setenv("JAGTILE_NVCC", str(tmp_path / "link"))
    assert find_nvcc().path == real
    link = tmp_path / "ccache-links" / "nvcc"
    link.parent.mkdir()
    link.symlink_to(nvcc(tmp_path / "ccache"))
    monkeypatch.setenv("JAGTILE_NVCC", str(link))
    assert find_nvcc().path == link


# --- the C++ compiler


def test_the_cxx_variable_comes_first_and_then_gcc_before_clang(monkeypatch, tmp_path):
    for name in ("clang++", "c++", "g++"):
        newest = program(tmp_path / "bin" / name, f"{name} 12")
        toolchain._cxx.cache_clear()
        assert find_cxx().path == newest
        assert find_cxx().version == f"{name} 12 [{name} 12]"
    named = program(tmp_path / "mine" / "icpx", "icpx 2026")
    monkeypatch.setenv("CXX", str(named))
    assert find_cxx().path == named
    monkeypatch.setenv("CXX", "clang++")
    assert find_cxx().path == tmp_path / "bin" / "clang++"


def test_cxx_may_have_several_words_of_which_flags_count_for_the_version(monkeypatch, tmp_path):
    cache = program(tmp_path / "bin" / "ccache", "g++ 12")
    monkeypatch.setenv("CXX", "ccache g++ -m64")
    found = find_cxx()
    assert found.command == (str(cache), "g++", "-m64")
    assert found.version == "g++ 12 [g++ 12] -m64"


@pytest.mark.parametrize("cxx", ["no-such-compiler", "'unclosed", "broken"])
def test_a_cxx_that_does_not_work_is_passed_over_with_a_word(monkeypatch, tmp_path, caplog, cxx):
    program(tmp_path / "bin" / "broken", "", exit_code=1)
    usual = program(tmp_path / "bin" / "g++", "g++ 12")
    monkeypatch.setenv("CXX", cxx)
    assert find_cxx().path == usual
    assert f"passed over: CXX ({cxx})" in caplog.text


def test_a_missing_cxx_lists_every_name_tried_and_the_command_that_helps(monkeypatch):
    monkeypatch.setenv("CXX", "icpx")
    with pytest.raises(CompilerNotFoundError) as raised:
        find_cxx()
    for part in ("CXX (icpx)", "g++: none there", "c++: none there", "clang++: none there", "apt-get install g++"):
        assert part in str(raised.value)


def test_a_compiler_that_never_answers_is_not_waited_for_forever(monkeypatch, tmp_path):
    hanging = tmp_path / "bin" / "g++"
    hanging.write_text("#!/bin/sh\nexec /bin/sleep 60\n")
    hanging.chmod(0o755)
    monkeypatch.setattr(toolchain, "_ANSWER_SECONDS", 0.1)
    with pytest.raises(CompilerNotFoundError, match="timed out"):
        find_cxx()


def test_a_compiler_found_once_is_not_asked_again_until_the_environment_changes(monkeypatch, tmp_path):
    asked = tmp_path / "asked"
    counting = tmp_path / "bin" / "g++"
    counting.write_text(f"#!/bin/sh\necho x >> {asked}\necho g++ 12\n")
    counting.chmod(0o755)
    for _ in range(3):
        find_cxx()
    assert len(asked.read_text().split()) == 2  # --version and -dumpmachine
    monkeypatch.setenv("CXX", "g++")
    find_cxx()
    assert len(asked.read_text().split()) == 4


# --- ninja and the targets


def test_the_packaged_ninja_comes_before_the_paths(monkeypatch, tmp_path):
    on_path = program(tmp_path / "bin" / "ninja", "1.10")
    packaged = program(tmp_path / "package" / "ninja", "1.13")
    monkeypatch.setattr(toolchain, "_ninja_package", lambda: packaged.parent)
    assert find_ninja() == packaged
    monkeypatch.setattr(toolchain, "_ninja_package", lambda: None)
    assert find_ninja() == on_path


@pytest.mark.parametrize(("package", "said"), [(None, "not installed"), (Path("/no/bin"), "nothing to run in /no/bin")])
def test_a_missing_ninja_lists_both_places_and_the_command_that_helps(monkeypatch, package, said):
    monkeypatch.setattr(toolchain, "_ninja_package", lambda: package)
    with pytest.raises(CompilerNotFoundError) as raised:
        find_ninja()
    for part in (said, "PATH: none there", "pip install ninja"):
        assert part in str(raised.value)


def test_no_flag_holds_a_path_since_flags_are_part_of_keys():
    flags = [flag for target in TARGETS.values() for flag in target.flags]
    names = ("fwd_fp32_d64", "bwd_fp32_d64", "fwd_bf16_d64", "bwd_bf16_d64", "bwd_bf16_d256")
    specs = [KernelSpec.parse(name) for name in names]
    for space in spaces():
        spec = next(spec for spec in specs if not refusal(space, spec))
        flags += space.compile_flags(spec, space.default(spec))
    assert not [flag for flag in flags if "/" in flag]


@pytest.mark.nvcc
def test_the_real_nvcc_tells_its_version(monkeypatch):
    monkeypatch.undo()
    toolchain._nvcc.cache_clear()
    found = find_nvcc()
    assert found.path.is_absolute()
    assert found.version.startswith("nvcc ")
