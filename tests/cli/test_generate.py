"""``jagtile generate``, and what the verbs share: help, exit codes, names that are none."""

from __future__ import annotations

import subprocess
import sys

import pytest

import jagtile
from jagtile.generator.cli import VERBS

SPEC = "fwd_bf16_d64_causal"


def test_help_names_every_verb_and_every_verb_has_help(run):
    overview = run("--help").output
    for verb in VERBS:
        assert verb in overview
        assert "Usage: " in run(verb, "--help").output


def test_help_imports_neither_optuna_nor_jinja2():
    code = """
import sys
from click.testing import CliRunner
from jagtile.generator.cli import cli
CliRunner().invoke(cli, ["--help"])
print([name for name in ("optuna", "jinja2", "rich.table") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_version_is_told_without_an_installation_too(run):
    assert run("--version").output.strip() == jagtile.__version__


def test_a_file_that_can_not_be_written_is_told_in_a_line(run, tmp_path):
    (tmp_path / "file").write_text("")
    output = run("generate", SPEC, "-o", str(tmp_path / "file" / "x.cu"), code=1).output
    assert output.startswith("Error: ")
    assert "file" in output


def test_a_spec_gives_the_source_of_its_default_variant(run, run_json):
    source = run("generate", SPEC, "--target", "sm_90a").stdout
    known = run_json("generate", SPEC, "--target", "sm_90a")
    assert known["source"] == source
    assert known["variant"].startswith(f"sm_90a/{SPEC}/")
    assert run("generate", known["variant"]).stdout == source


def test_a_listed_config_can_be_generated(run, run_json):
    listed = run_json("generate", SPEC, "--target", "sm_90a", "--list")
    legal = [row["config"] for row in listed if row["legal"]]
    assert f"jagtile_{SPEC}_{legal[-1]}" in run("generate", SPEC, "--target", "sm_90a", "--config", legal[-1]).stdout


def test_illegal_configs_are_listed_with_the_reason_and_refused_with_it(run, run_json):
    listed = run_json("generate", SPEC, "--target", "sm_90a", "--list")
    illegal = next(row for row in listed if not row["legal"])
    assert illegal["note"]
    assert illegal["note"] in run("generate", f"sm_90a/{SPEC}/{illegal['config']}", code=1).output


def test_the_list_says_how_many_are_legal(run):
    assert "legal configs of" in run("generate", SPEC, "--list").output


def test_a_source_is_written_to_a_file_or_into_a_folder(run, tmp_path):
    run("generate", SPEC, "--target", "sm_90a", "-o", str(tmp_path / "one.cu"))
    printed = run("generate", SPEC, "--target", "sm_90a", "--print", "-o", f"{tmp_path}/new/").stdout
    (inside,) = (tmp_path / "new").iterdir()
    assert inside.name.startswith(f"jagtile_{SPEC}_")
    assert inside.suffix == ".cu"
    assert printed == inside.read_text() == (tmp_path / "one.cu").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "fwd_bf16"), "is not a name like fwd_bf16_d128"),
        (("generate", "fwd_bf16_d300"), "between 1 and 256"),
        (("generate", SPEC, "--target", "sm_10"), "no target 'sm_10'; there are"),
        (("generate", SPEC, "--config", "nonsense"), "no algorithm 'nonsense'"),
        (("generate", f"sm_90a/{SPEC}/x", "--target", "cpu"), "leave --target and --config out"),
        (("generate", "fwd_fp32_d64", "--target", "sm_90a"), "served by no template"),
        (("generate",), "Missing argument"),
        (("paint",), "No such command"),
    ],
)
def test_a_bad_request_exits_with_1_and_says_what_is_accepted(run, arguments, message):
    assert message in run(*arguments, code=1).output
