"""Settings: read from the environment when asked, replaceable for a while, and each one documented."""

from __future__ import annotations

import os
import re
from pathlib import Path

import platformdirs
import pytest

from jagtile.runtime.errors import JagtileWarning, SettingError
from jagtile.runtime.settings import settings

ROOT = Path(__file__).resolve().parents[2]
VARIABLE = re.compile(r"\bJAGTILE_[A-Z0-9_]+\b")


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch):
    for name in list(os.environ):
        if name.startswith("JAGTILE_"):
            monkeypatch.delenv(name)


def test_defaults_hold_where_nothing_is_set(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert settings.cache_dir == tmp_path / "jagtile"
    assert settings.nvcc is None
    assert settings.jit is True
    assert settings.jobs >= 1


def test_values_are_read_anew_at_each_access(monkeypatch, tmp_path):
    for number in ("3", "5"):
        monkeypatch.setenv("JAGTILE_JOBS", number)
        assert settings.jobs == int(number)
    monkeypatch.setenv("JAGTILE_CACHE_DIR", str(tmp_path))
    assert settings.cache_dir == tmp_path
    monkeypatch.setenv("JAGTILE_NVCC", "/opt/cuda/bin/nvcc")
    assert settings.nvcc == "/opt/cuda/bin/nvcc"


@pytest.mark.parametrize(("text", "value"), [("0", False), ("off", False), ("No", False), ("1", True), ("TRUE", True)])
def test_switches_take_the_usual_words(monkeypatch, text, value):
    monkeypatch.setenv("JAGTILE_JIT", text)
    assert settings.jit is value


@pytest.mark.parametrize("text", ["", "   "])
@pytest.mark.parametrize("name", ["cache_dir", "nvcc", "jit", "jobs"])
def test_an_empty_value_counts_as_unset(monkeypatch, name, text):
    before = getattr(settings, name)
    monkeypatch.setenv(f"JAGTILE_{name.upper()}", text)
    assert getattr(settings, name) == before


@pytest.mark.parametrize(
    ("variable", "text", "accepted"),
    [
        ("JAGTILE_JIT", "maybe", "must be one of 1, true"),
        ("JAGTILE_JOBS", "0", "whole number of at least 1"),
        ("JAGTILE_JOBS", "many", "whole number of at least 1"),
        ("JAGTILE_CACHE_DIR", "~nobody-of-this-name/x", "home"),
    ],
)
def test_nonsense_is_refused_with_the_variable_its_text_and_what_is_accepted(monkeypatch, variable, text, accepted):
    monkeypatch.setenv(variable, text)
    with pytest.raises(SettingError, match=re.escape(variable)) as raised:
        getattr(settings, variable.removeprefix("JAGTILE_").lower())
    assert repr(text) in str(raised.value)
    assert accepted in str(raised.value)


def test_a_cache_folder_is_absolute_and_may_start_with_a_tilde(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("JAGTILE_CACHE_DIR", "~/kernels")
    assert settings.cache_dir == tmp_path / "kernels"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAGTILE_CACHE_DIR", "here")
    assert settings.cache_dir == tmp_path / "here"


@pytest.mark.parametrize("newer", [True, False], ids=["platformdirs raises", "platformdirs gives ~"])
def test_without_a_home_the_cache_is_a_private_temporary_folder_with_a_warning(monkeypatch, tmp_path, newer):
    def no_home(*_: object, **__: object) -> str:
        if newer:
            raise RuntimeError("could not determine the home directory")
        return "~/.cache/jagtile"

    monkeypatch.setattr(platformdirs, "user_cache_dir", no_home)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.warns(JagtileWarning, match="no home folder.*JAGTILE_CACHE_DIR"):
        folder = settings.cache_dir
    assert folder.is_relative_to(tmp_path)
    assert folder.parent.stat().st_mode & 0o077 == 0


def test_an_override_wins_over_the_environment_until_its_block_ends(monkeypatch, tmp_path):
    monkeypatch.setenv("JAGTILE_JOBS", "3")
    with settings.override(jobs=7):
        with settings.override(cache_dir=tmp_path):
            assert (settings.jobs, settings.cache_dir) == (7, tmp_path)
        assert settings.jobs == 7
    assert settings.jobs == 3
    with pytest.raises(KeyError), settings.override(jobs=9):
        raise KeyError
    assert settings.jobs == 3


def test_an_override_of_an_unknown_setting_says_which_there_are():
    with pytest.raises(SettingError, match=r"no setting is called speed; there are cache_dir, nvcc, jit, jobs"):
        settings.override(speed=11).__enter__()


def test_describe_tells_each_value_and_where_it_comes_from(monkeypatch):
    monkeypatch.setenv("JAGTILE_JOBS", "3")
    with settings.override(jit=False):
        described = {setting.variable: setting for setting in settings.describe()}
    assert (described["JAGTILE_JOBS"].value, described["JAGTILE_JOBS"].origin) == (3, "environment")
    assert (described["JAGTILE_JIT"].value, described["JAGTILE_JIT"].origin) == (False, "override")
    assert described["JAGTILE_NVCC"].origin == "default"
    assert all(setting.doc and setting.default for setting in described.values())


def test_every_variable_is_documented_and_every_documented_one_exists():
    documented = set(VARIABLE.findall((ROOT / "docs" / "environment.md").read_text()))
    read_by_jagtile = {setting.variable for setting in settings.describe()}
    scripts = [*(ROOT / ".ci").glob("*"), *(ROOT / "tests").glob("*.sh"), *(ROOT / "examples").rglob("*.sh")]
    mentioned = {name for script in scripts if script.is_file() for name in VARIABLE.findall(script.read_text())}
    assert documented == read_by_jagtile | mentioned


def test_no_source_names_a_variable_that_is_no_setting():
    known = {setting.variable for setting in settings.describe()}
    sources = [path for room in ("runtime", "generator", "tuning_db") for path in (ROOT / room).rglob("*.py")]
    unknown = {f"{path.name}: {name}" for path in sources for name in VARIABLE.findall(path.read_text())} - {
        f"{path.name}: {name}" for path in sources for name in known
    }
    assert not unknown
