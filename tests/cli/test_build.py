"""``jagtile build``."""

from __future__ import annotations

import pytest
import torch

from jagtile.generator.spec import KernelSpec
from jagtile.generator.tile import legal_configs
from jagtile.runtime.device import device_id
from jagtile.runtime.dispatch import default_variant
from jagtile.runtime.settings import settings
from jagtile.tuning_db.schema import ChoiceEntry, Choices, DeviceFacts
from jagtile.tuning_db.store import Database

SPEC = "fwd_fp32_d16"


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAGTILE_CACHE_DIR", str(tmp_path))


@pytest.mark.usefixtures("own_cache")
def test_the_default_variant_is_built_and_then_comes_from_the_cache(run, run_json):
    (built,) = run_json("build", SPEC, "--target", "cpu")
    assert (built["state"], built["from"]) == ("ok", "built")
    assert built["report"]["seconds"] > 0
    (again,) = run_json("build", built["variant"])
    assert (again["from"], again["path"]) == ("cache", built["path"])
    assert "1 ok" in run("build", SPEC, "--target", "cpu").output


def test_a_variant_that_is_not_built_exits_with_1(run, run_json):
    listed = run_json("generate", "fwd_bf16_d64", "--target", "sm_90a", "--list")
    illegal = next(row["config"] for row in listed if not row["legal"])
    output = run("build", f"sm_90a/fwd_bf16_d64/{illegal}", code=1).output
    assert "illegal" in output
    assert "not built" in output


def test_without_a_compiler_the_exit_code_is_2_and_the_message_helps(run, monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "g++" in run("build", SPEC, "--target", "cpu", code=2).output


def test_names_that_are_none_exit_with_1(run):
    assert "is not a name like" in run("build", "nonsense", code=1).output
    for arguments in ((), (SPEC, "--device", "cpu"), ("--all", "--target", "cpu")):
        assert "name SPECs or VARIANTs" in run("build", *arguments, code=1).output


def test_without_names_all_builds_what_was_chosen_for_the_device(run, run_json, tmp_path):
    with settings.override(cache_dir=tmp_path):
        assert "there are no choices for cpu" in run("build", "--all", "--device", "cpu", code=1).output
        here, usual = device_id(torch.device("cpu")), default_variant(KernelSpec.parse(SPEC), "cpu")
        other = next(c for c in legal_configs(usual.space, usual.spec) if c != usual.config)
        entry = ChoiceEntry(default=usual.config.to_dict(), regimes={"long": other.to_dict()})
        facts = DeviceFacts(**{name: getattr(here, name) for name in DeviceFacts.__struct_fields__})
        Database().write_choices(Choices(device=facts, specs={f"cpu/{SPEC}": entry}), ship=False)
        built = run_json("build", "--all", "--device", "cpu")
    backward = default_variant(KernelSpec.parse(SPEC.replace("fwd", "bwd")), "cpu")  # of a forward that was chosen
    assert {row["variant"] for row in built} == {usual.name, f"cpu/{SPEC}/{other.name}", backward.name}
    assert all(row["state"] == "ok" for row in built)
