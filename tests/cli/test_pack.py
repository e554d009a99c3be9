"""``jagtile pack``: from a build to an installation, in folders and wheels, and what it says of damage."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from jagtile.generator.doctor import examine
from jagtile.generator.toolchain import find_cxx
from jagtile.runtime import packs
from jagtile.runtime.device import device_id
from jagtile.runtime.errors import CompilerNotFoundError
from jagtile.runtime.settings import settings

SPEC = "fwd_fp32_d16"
SLUG = device_id(torch.device("cpu")).slug
NAME = f"jagtile-kernels-{SLUG}"


@pytest.fixture
def installed(tmp_path):
    """The folder that packs are installed into, in force."""
    packs.forget()
    with settings.override(packs=(tmp_path / "installed",)):
        yield tmp_path / "installed"
    packs.forget()


@pytest.fixture
def built(run_json, tmp_path):
    """A wheel."""
    try:
        find_cxx()
    except CompilerNotFoundError as error:
        pytest.skip(f"needs a C++ compiler: {error}")
    return run_json("pack", "build", SPEC, "--device", "cpu", "--wheel", "-o", str(tmp_path), "--version", "1.2.post3")


def test_a_wheel_is_built_verified_installed_and_listed(run, run_json, built, installed):
    assert {**built, "path": Path(built["path"]).name.partition("-py3")[0]} == {
        "name": NAME,
        "version": "1.2.post3",
        "device": SLUG,
        "specs": 1,
        "kernels": 1,
        "host": "",
        "megabytes": built["megabytes"],
        "path": f"{NAME.replace('-', '_')}-1.2.post3",
    }
    assert run_json("pack", "verify", built["path"])[0]["problems"] == []
    assert run_json("pack", "install", built["path"])["path"] == str(installed / NAME)
    packs.forget()
    (listed,) = run_json("pack", "list")
    assert (listed["name"], listed["from"], listed["refused"]) == (NAME, "folder", "")
    assert NAME in run("pack", "list").stdout
    assert f"{installed / NAME}: all right, 1 kernels for {SLUG}" in run("pack", "verify").stdout
    assert f"1.2.post3 (folder), 1 kernels for {SLUG}" in doctor_says(NAME).value


def test_damage_is_told_by_verify_list_and_doctor(run, run_json, built, installed):
    run("pack", "install", built["path"])
    manifest = installed / NAME / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-9])
    packs.forget()
    assert "manifest.json can't be understood" in run("pack", "verify", code=1).stdout
    assert "can't be understood" in run_json("pack", "list")[0]["refused"]
    finding = doctor_says(NAME)
    assert finding.state == "wrong"
    assert "jagtile pack verify" in finding.advice


def doctor_says(name):
    (finding,) = (finding for finding in examine() if (finding.topic, finding.name) == ("packs", name))
    return finding


@pytest.mark.parametrize("keep", [0.5, 0.0])
def test_a_broken_wheel_is_refused(run, built, installed, keep):
    wheel = Path(built["path"])
    wheel.write_bytes(wheel.read_bytes()[: int(wheel.stat().st_size * keep)])
    assert "is no whole wheel" in run("pack", "verify", str(wheel), code=1).output
    assert "is no whole wheel" in run("pack", "install", str(wheel), code=1).output
    assert not installed.exists()


def test_a_folder_is_the_other_form(run, installed, tmp_path, built):
    run("pack", "build", SPEC, "--device", SLUG, "-o", str(tmp_path / "out"))
    assert f"{tmp_path / 'out' / NAME}: all right" in run("pack", "verify", str(tmp_path / "out" / NAME)).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("build", "fwd_fp32"), "fwd_fp32"),
        (("build", SPEC, "--device", "sm80-108sm"), "device 'sm80-108sm' has no choices and is not of this machine"),
        (("build", SPEC, "--device", "cpu", "--version", "1.0-alpha"), "version '1.0-alpha' must be as of PEP 440"),
        (("verify", "nothing-of-this-name"), "neither a folder nor a wheel"),
        (("install", "nothing-of-this-name"), "neither a folder nor a wheel"),
    ],
)
def test_what_can_not_be_done_is_told(run, installed, arguments, message):
    assert message in run("pack", *arguments, code=1).output


def test_without_a_folder_for_packs_nothing_is_installed(run, built):
    with settings.override(packs=None):
        assert "JAGTILE_PACKS names no folder" in run("pack", "install", built["path"], code=1).output
