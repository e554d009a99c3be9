"""Building: what comes out, in which order, under which key, and what a failure says."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import subprocess
from pathlib import Path

import pytest

from jagtile.generator import build as build_module
from jagtile.generator import ninja_run, render
from jagtile.generator.build import BuildResult, artifact_key, build, build_one
from jagtile.generator.tile import Variant
from jagtile.runtime import entries
from jagtile.runtime.artifact import Artifact
from jagtile.runtime.errors import (
    BuildError,
    CacheError,
    CompilerNotFoundError,
    IllegalConfigError,
    JagtileWarning,
    RejectedVariantError,
)
from jagtile.runtime.settings import settings

pytestmark = pytest.mark.usefixtures("cache", "compiler")


def call(artifact: Artifact) -> int:
    return int(ctypes.CDLL(str(artifact.path))[artifact.meta.symbol]())


def folders(root: Path, name: str) -> list[Path]:
    return sorted(root.glob(f"*/{name}/*"))


def test_a_built_kernel_runs_and_the_next_one_comes_from_the_cache(toy, compiler):
    built = build_one(toy(1))
    assert (call(built), built.origin) == (101, "built")
    again = build_one(toy(1))
    assert (again.path, again.meta, again.origin) == (built.path, built.meta, "cache")
    assert compiler.runs == 1


def test_the_metadata_says_what_the_kernel_is(toy):
    variant = toy(1)
    meta = build_one(variant).meta
    assert (meta.target, meta.spec, meta.config) == ("cpu", "fwd_fp32_d8", variant.config.to_dict())
    assert (meta.symbol, meta.launch, meta.key) == (variant.symbol, {"threads": 128}, artifact_key(variant))
    assert meta.report.seconds > 0


def test_results_keep_the_order_of_the_variants_and_repeated_ones_are_built_once(toy, compiler):
    variants = [toy(3), toy(13), toy(1), toy(3)]
    results = build(variants, jobs=2)
    assert [result.variant for result in results] == variants
    assert [result.state for result in results] == ["ok", "illegal", "ok", "ok"]
    assert compiler.runs == 2


def test_each_result_is_delivered_while_others_still_compile(toy, compiler, tmp_path):
    compiler.hook(f'case "$*" in *n9*) for i in $(seq 600); do [ -e {tmp_path}/go ] && break; sleep 0.05; done ;; esac')
    seen: list[Variant] = []

    def on_result(result: BuildResult) -> None:
        seen.append(result.variant)
        (tmp_path / "go").touch()

    build([toy(9), toy(1)], jobs=2, on_result=on_result)
    assert seen == [toy(1), toy(9)]


def test_cached_variants_are_delivered_first(toy):
    build_one(toy(2))
    seen: list[Variant] = []
    build([toy(1), toy(2)], on_result=lambda result: seen.append(result.variant))
    assert seen == [toy(2), toy(1)]


def test_a_failed_compilation_fails_alone_and_says_why_and_where(toy, cache):
    bad, good = build([toy(1, "syntax"), toy(2)])
    assert (bad.state, bad.artifact, good.state) == ("compile", None, "ok")
    assert "exit code 1" in bad.reason
    assert "this is no C++" in bad.reason
    (kept,) = folders(cache, "failed")
    assert str(kept) in bad.reason


def test_the_kept_failure_can_be_compiled_again_by_hand(toy, cache):
    build([toy(1, "syntax")])
    (kept,) = folders(cache, "failed")
    again = subprocess.run(["sh", "compile.sh"], cwd=kept, capture_output=True, text=True, check=False)
    assert again.returncode == 1
    assert "error" in again.stderr
    assert again.stderr == (kept / "log").read_text()


def test_long_compiler_output_is_cut_in_the_reason_only(toy, compiler, cache):
    compiler.hook("seq 5000; exit 7")
    (result,) = build([toy(1)])
    (kept,) = folders(cache, "failed")
    assert len(result.reason) < 5000
    assert "characters more" in result.reason
    assert len((kept / "log").read_text()) > 20000


@pytest.mark.parametrize(
    ("hook", "said"),
    [
        ("exit 0", "wrote no file"),
        ('for file; do :; done; : > "$file"; exit 0', "wrote 0 bytes"),
        ('for file; do :; done; seq 1000 > "$file"; exit 0', "no 64-bit ELF"),
        (
            'for file; do :; done; {real} "$@"; head -c 5000 "$file" > cut; mv cut "$file"; exit 0',
            "5000 bytes of an ELF",
        ),
        ("kill -9 $$", "killed by signal 9"),
    ],
)
def test_a_compiler_that_lies_or_dies_is_not_believed(toy, compiler, cache, hook, said):
    real = compiler.path.read_text().split("exec ")[1].split()[0]
    compiler.hook(hook.replace("{real}", real))
    (result,) = build([toy(1)])
    assert result.state == "compile"
    assert said in result.reason
    assert not folders(cache, "store")


def test_a_binary_without_the_symbol_is_refused(toy):
    (result,) = build([toy(1, "nosymbol")])
    assert result.state == "compile"
    assert f"defines no {result.variant.symbol}" in result.reason


def test_a_template_that_does_not_render_fails_alone(toy):
    bad, good = build([toy(1, "undefined"), toy(1)])
    assert (bad.state, good.state) == ("compile", "ok")
    assert "toy.cpp.j2" in bad.reason
    assert "nothing_of_this_name" in bad.reason


def test_build_one_raises_the_class_of_the_failure(toy, monkeypatch):
    with pytest.raises(IllegalConfigError, match="13 brings bad luck"):
        build_one(toy(13))
    with pytest.raises(BuildError, match="this is no C"):
        build_one(toy(1, "syntax"))
    monkeypatch.setattr(build_module.ptxas, "rejection", lambda report: ("spill", "8 bytes spilled"))
    with pytest.raises(RejectedVariantError, match="8 bytes spilled"):
        build_one(toy(1))


def test_without_a_compiler_nothing_is_tried(toy, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CompilerNotFoundError, match=r"g\+\+"):
        build([toy(1)])


def test_a_ninja_that_fails_is_no_verdict_on_the_variants(toy, monkeypatch, tmp_path):
    broken = tmp_path / "ninja"
    broken.write_text("#!/bin/sh\necho out of order\nexit 3\n")
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(ninja_run, "find_ninja", lambda: broken)
    with pytest.raises(BuildError, match="exit code 3 before 1 of 1 compilations: out of order"):
        build([toy(1)])


def test_a_full_disk_is_no_verdict_on_the_variants(toy, compiler):
    compiler.hook("echo 'fatal: No space left on device'; exit 1")
    with pytest.raises(BuildError, match="is full"):
        build([toy(1)])


def test_an_exception_in_on_result_stops_the_batch_and_leaves_a_usable_cache(toy, tmp_path):
    def on_result(result: BuildResult) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        build([toy(1), toy(2), toy(3)], jobs=1, on_result=on_result)
    assert not list(tmp_path.rglob("staging/*"))
    assert call(build_one(toy(3))) == 103


class TestKey:
    def test_does_not_depend_on_where_the_compiler_or_the_templates_are(self, toy, compiler, templates, monkeypatch):
        before = artifact_key(toy(1))
        monkeypatch.setenv("CXX", str(compiler.path.rename(compiler.path.with_name("moved"))))
        monkeypatch.setattr(render, "TEMPLATES", templates.rename(templates.with_name("elsewhere")))
        render.environment.cache_clear()
        render.render_unchecked.cache_clear()
        assert artifact_key(toy(1)) == before

    def test_depends_on_all_that_shapes_the_artifact(self, toy, templates, monkeypatch):
        keys = {artifact_key(toy(1)), artifact_key(toy(2))}
        space = toy(1).space
        monkeypatch.setattr(type(space), "flags", ("-DNDEBUG",))
        keys.add(artifact_key(toy(1)))
        monkeypatch.setattr(type(space), "threads", 256)
        keys.add(artifact_key(toy(1)))
        monkeypatch.setattr(build_module, "ABI_VERSION", 99)
        keys.add(artifact_key(toy(1)))
        (templates / "toy" / "offset.h").write_text("#define OFFSET 200\n")
        render.render_unchecked.cache_clear()
        keys.add(artifact_key(toy(1)))
        assert len(keys) == 6

    def test_depends_on_the_compilers_version(self, toy, compiler, monkeypatch):
        before = artifact_key(toy(1))
        newer = compiler.path.with_name("newer-compiler")
        newer.write_text("#!/bin/sh\necho 'g++ 99.1'\n")
        newer.chmod(0o755)
        monkeypatch.setenv("CXX", str(newer))
        assert artifact_key(toy(1)) != before

    def test_stands_for_the_headers_that_were_rendered_with(self, toy, templates):
        before = artifact_key(toy(1))  # renders, and remembers
        (templates / "toy" / "offset.h").write_text("#define OFFSET 200\n")
        built = build_one(toy(1))
        assert (built.meta.key, call(built)) == (before, 101)

    def test_file_times_do_not_matter(self, toy, templates, compiler):
        build_one(toy(1))
        for path in templates.rglob("*.*"):
            path.touch()
        render.render_unchecked.cache_clear()
        build_one(toy(1))
        assert compiler.runs == 1


def truncate(binary: Path, meta: Path) -> None:
    binary.write_bytes(binary.read_bytes()[:-100])


def empty(binary: Path, meta: Path) -> None:
    binary.write_bytes(b"")


def remove(binary: Path, meta: Path) -> None:
    binary.unlink()


def garble_meta(binary: Path, meta: Path) -> None:
    meta.write_bytes(b"\xff\xfe{not json")


def cut_meta(binary: Path, meta: Path) -> None:
    meta.write_bytes(meta.read_bytes()[:200])


def foreign_abi(binary: Path, meta: Path) -> None:
    meta.write_text(meta.read_text().replace('"abi": ', '"abi": 9'))


@pytest.mark.parametrize("damage", [truncate, empty, remove, garble_meta, cut_meta, foreign_abi])
def test_a_damaged_entry_is_set_aside_with_a_warning_and_built_again(toy, compiler, cache, damage):
    entry = build_one(toy(1)).path.parent
    damage(entry / (toy(1).symbol + ".so"), entry / "meta.json")
    with pytest.warns(JagtileWarning, match=entry.name):
        again = build_one(toy(1))
    assert (call(again), again.origin, compiler.runs) == (101, "built", 2)
    assert len(list(entry.parent.glob("*.bad-*"))) == 1


def test_an_unwritable_cache_costs_a_warning_not_the_kernel(toy, tmp_path):
    (tmp_path / "file").touch()
    with settings.override(cache_dir=tmp_path / "file" / "cache"):
        with pytest.warns(JagtileWarning, match="can't be written"):
            built = build_one(toy(1))
        assert call(built) == 101
        assert build_one(toy(1)).origin == "cache"


def fill_up(monkeypatch: pytest.MonkeyPatch, *full: Path) -> None:
    """Let every write of an entry below these folders fail as on a full disk."""
    write = entries.write

    def failing(path: Path, content: bytes) -> None:
        if any(folder in path.parents for folder in full):
            path.write_bytes(content[:1])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, content)

    monkeypatch.setattr(entries, "write", failing)


def test_a_cache_that_fills_up_costs_one_warning_not_the_kernels(toy, cache, monkeypatch):
    fill_up(monkeypatch, cache)
    with pytest.warns(JagtileWarning, match="No space left") as warned:
        results = build([toy(1), toy(2)])
    assert [call(result.artifact) for result in results] == [101, 102]
    assert len(warned) == 1
    assert not folders(cache, "store")


def test_no_space_anywhere_is_no_verdict_on_the_variants(toy, tmp_path, monkeypatch):
    fill_up(monkeypatch, tmp_path)
    with pytest.warns(JagtileWarning, match="No space left"), pytest.raises(CacheError, match="JAGTILE_CACHE_DIR"):
        build([toy(1)])


def test_sources_that_can_not_be_written_are_no_verdict_on_the_variants(toy, monkeypatch):
    def full(self: Path, *args: object, **kwargs: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    variant = toy(1)
    artifact_key(variant)
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(BuildError, match="TMPDIR"):
        build([variant])


@pytest.mark.nvcc
class TestCuda:
    def test_the_report_is_of_the_variants_own_kernel(self, toy):
        result = build([toy(1, target="sm_90a")])[0]
        assert (result.state, result.report.static_smem_bytes, result.report.spill_bytes) == ("ok", 512, 0)
        assert 0 < result.report.registers < 64
        assert result.artifact.path.suffix == ".cubin"

    def test_bad_ones_are_told_apart(self, toy):
        spill, serialised, syntax = build([toy(1, trouble, "sm_90a") for trouble in ("spill", "setmaxnreg", "syntax")])
        assert (spill.state, serialised.state, syntax.state) == ("spill", "rejected", "compile")
        assert f"{spill.report.spill_bytes} bytes" in spill.reason
        assert "C7508" in serialised.reason
        assert "no_such_name" in syntax.reason

    def test_cubins_are_the_same_byte_for_byte_wherever_they_are_built(self, toy, tmp_path):
        first = build_one(toy(1, target="sm_90a"))
        with settings.override(cache_dir=tmp_path / "another"):
            second = build_one(toy(1, target="sm_90a"))
        assert second.origin == "built"
        assert (first.path.read_bytes(), first.meta.key) == (second.path.read_bytes(), second.meta.key)

    def test_one_batch_may_hold_both_targets(self, toy):
        results = build([toy(1), toy(1, target="sm_90a")])
        assert [result.state for result in results] == ["ok", "ok"]
        assert results[0].variant.symbol == results[1].variant.symbol
