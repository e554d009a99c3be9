"""``jagtile doctor``: reports what is there, and what helps where something is not."""

from __future__ import annotations

import warnings
from importlib import metadata

import pytest
import torch

from jagtile.generator import doctor, toolchain
from jagtile.generator.doctor import examine
from jagtile.runtime.errors import CompilerNotFoundError, JagtileWarning
from jagtile.runtime.settings import settings
from jagtile.runtime.store import ArtifactStore


@pytest.fixture
def findings():
    def by_name():
        return {(finding.topic, finding.name): finding for finding in examine()}

    return by_name


def test_the_report_covers_every_topic(run, run_json):
    found = run_json("doctor")
    topics = {"versions", "devices", "compilers", "settings", "cache", "packs", "tuning database", "peers"}
    assert {finding["topic"] for finding in found} == topics
    shown = run("doctor").stdout
    for topic in topics:
        assert topic in shown


def test_every_setting_is_shown_with_where_its_value_comes_from(findings, monkeypatch):
    monkeypatch.setenv("JAGTILE_JOBS", "3")
    assert "3 (environment)" in findings()["settings", "JAGTILE_JOBS"].value
    assert {name for topic, name in findings() if topic == "settings"} == {s.variable for s in settings.describe()}


def test_a_setting_that_makes_no_sense_is_reported_not_raised(findings, monkeypatch):
    monkeypatch.setenv("JAGTILE_JOBS", "many")
    finding = findings()["settings", "environment"]
    assert finding.state == "wrong"
    assert "JAGTILE_JOBS is 'many'" in finding.value
    assert finding.advice


def test_a_missing_compiler_comes_with_what_helps(findings, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    finding = findings()["compilers", "C++ (target cpu)"]
    assert finding.state == "missing"
    assert "apt-get install g++" in finding.advice


def test_a_compiler_that_is_found_is_named_with_its_version(findings):
    assert toolchain.find_cxx().version in findings()["compilers", "C++ (target cpu)"].value


def test_it_tells_whether_calls_on_a_gpu_have_a_compiled_host(findings, monkeypatch, tmp_path):
    def told():
        finding = findings()["cache", "native host"]
        return finding.state, finding.value, finding.advice

    with settings.override(native_host="off"):
        assert told()[:2] == ("ok", "off, as JAGTILE_NATIVE_HOST says")
    with settings.override(cache_dir=tmp_path, native_host="auto"):
        assert told()[:2] == ("ok", "not built yet: a thread does on the first use of a GPU, some 15 s")
        with settings.override(native_host="wait"):
            assert "waits for it" in told()[1]
        with settings.override(jit=False):
            assert told()[:2] == ("missing", "not there, and JAGTILE_JIT=0 forbids building it")
        monkeypatch.setattr(doctor, "find_cxx", no_compiler)
        state, value, advice = told()
        assert (state, value) == ("missing", "not there, and no compiler can build it")
        assert "--host" in advice
        monkeypatch.setattr(ArtifactStore, "holds", lambda *_: True)
        assert told()[:2] == ("ok", "cache, for this torch and Python")


def test_a_damaged_host_of_a_pack_is_told(monkeypatch):
    def origin():
        warnings.warn("the kernel pack is damaged", JagtileWarning, stacklevel=1)

    monkeypatch.setattr(doctor.host, "origin", origin)
    told = [(finding.state, finding.value) for finding in examine() if finding.name == "native host"]
    assert told[0] == ("wrong", "the kernel pack is damaged")


def no_compiler():
    raise CompilerNotFoundError("no C++ compiler was found")


def test_corrupt_entries_set_aside_in_the_cache_are_reported(findings, tmp_path):
    with settings.override(cache_dir=tmp_path):
        assert ("cache", "set aside") not in findings()
        (tmp_path / "x.bad-1").mkdir()
        assert findings()["cache", "set aside"].state == "wrong"


def test_a_device_without_choices_is_told_to_tune(findings, tmp_path):
    with settings.override(cache_dir=tmp_path):
        untuned = [f for f in findings().values() if f.topic == "tuning database" and f.state == "missing"]
    for finding in untuned:
        assert "jagtile tune" in finding.advice
        assert finding.name.endswith("(here)")


@pytest.mark.parametrize(("cuda", "told"), [(None, False), ("13.0", True)])
def test_cuda_bindings_are_missed_only_where_torch_can_use_a_gpu(findings, monkeypatch, cuda, told):
    def version(package):
        if package == "cuda-bindings":
            raise metadata.PackageNotFoundError(package)
        return "1.0"

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert (("versions", "cuda-bindings") in findings()) == told
