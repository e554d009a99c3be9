"""The native host in a pack: found by its key, before the cache and a compiler; passed over where it is of no use."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import msgspec
import pytest
import torch
from click.testing import CliRunner

from jagtile.generator import host
from jagtile.generator import pack as packing
from jagtile.generator.cli import cli
from jagtile.generator.pack import build_pack
from jagtile.generator.pack_check import check_pack
from jagtile.generator.pack_place import opened
from jagtile.generator.pack_wheel import write_wheel
from jagtile.runtime import packs
from jagtile.runtime.errors import CompilerNotFoundError, JagtileWarning
from jagtile.runtime.pack import MANIFEST, Pack
from jagtile.runtime.scratch import private_folder
from jagtile.runtime.settings import settings

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def with_host(world, whole, tmp_path_factory) -> Pack:
    """The pack of three kernels and the host, not to be changed."""
    return build_pack(world.plan, tmp_path_factory.mktemp("packs") / world.plan.name, with_host=True)


@pytest.fixture
def folder(with_host, tmp_path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(with_host.folder, tmp_path / "packs" / with_host.name))


def rewrite(folder: Path, path: str, content: bytes) -> None:
    """Put another file into a pack, in agreement with its manifest."""
    (folder / path).write_bytes(content)
    manifest = msgspec.json.decode((folder / MANIFEST).read_bytes())
    manifest["files"][path] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / MANIFEST).write_bytes(msgspec.json.encode(manifest))


def test_a_process_without_compiler_cache_and_jinja2_loads_it_from_the_pack(folder, tmp_path):
    environment = {
        **os.environ,
        "JAGTILE_PACKS": str(folder),
        "JAGTILE_CACHE_DIR": str(tmp_path / "cache"),
        "JAGTILE_JIT": "0",
        "PYTHONPATH": str(ROOT / ".pkg"),
    }
    program = """
import sys
for name in ("jinja2", "optuna", "ninja", "click", "rich", "cuda.pathfinder"):
    sys.modules[name] = None
from jagtile.generator import host
module = host.built()
print(module.__file__, callable(module.serve))
"""
    ran = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == [str(folder / "host" / f"{host._key()}.so"), "True"]


def test_it_is_whole_and_tells_what_it_is_for(with_host):
    assert check_pack(with_host) == []
    found = with_host.host(host._key())
    assert found.meta.config["torch"] == torch.__version__
    assert found.path.read_bytes() == host.artifact().path.read_bytes()
    assert found.meta.report.seconds == 0
    assert found.meta.compiler in with_host.manifest.provenance.compilers


def test_another_torchs_is_passed_over(folder, using, monkeypatch):
    using(folder, jit=False)
    monkeypatch.setattr(torch, "__version__", "2.99")
    with pytest.raises(CompilerNotFoundError, match="JAGTILE_JIT=0 forbids building it"):
        host.built()


def test_a_damaged_one_is_told_and_sought_elsewhere(folder, using):
    (binary,) = (folder / "host").glob("*.so")
    binary.write_bytes(binary.read_bytes()[:-1])
    using(folder, jit=False)
    with pytest.warns(JagtileWarning, match="is damaged: .*the native host is sought elsewhere"):
        assert packs.host(host._key()) is None
    assert any(problem.startswith("host/") for problem in check_pack(Pack(folder)))


def test_one_that_the_system_does_not_load_is_told_and_sought_elsewhere(folder, using):
    (binary,) = (folder / "host").glob("*.so")
    rewrite(folder, f"host/{binary.name}", b"no shared object")
    using(folder, jit=False)
    with (
        pytest.warns(JagtileWarning, match="can't be loaded: .*it is sought elsewhere"),
        pytest.raises(CompilerNotFoundError),
    ):
        host.built()
    assert any("host/" in problem for problem in check_pack(Pack(folder)))


@pytest.mark.parametrize("wrong", [{"key": "0" * 64}, {"config": {}}, {"abi": 1}, {"spec": "fwd_fp32_d16"}], ids=str)
def test_metadata_of_something_else_is_refused(folder, using, wrong):
    (path,) = (folder / "host").glob("*.json")
    meta = json.loads(path.read_text())
    rewrite(folder, f"host/{path.name}", json.dumps({**meta, **wrong}).encode())
    assert any("something else" in problem for problem in check_pack(Pack(folder)))
    using(folder)
    (row,) = json.loads(CliRunner().invoke(cli, ["pack", "list", "--json"]).output)
    assert row["host"] == "damaged"


def test_metadata_without_a_binary_is_no_host(folder, edit):
    files = json.loads((folder / MANIFEST).read_text())["files"]
    (binary,) = (path for path in files if path.startswith("host/") and path.endswith(".so"))
    edit(folder, files={path: file for path, file in files.items() if path != binary})
    (folder / binary).unlink()
    assert check_pack(Pack(folder)) == [f"manifest.json lists no {binary}"]


def test_each_of_several_is_checked(folder):
    rewrite(folder, "host/" + "f" * 64 + ".json", b"{}")
    assert any("f" * 64 in problem for problem in check_pack(Pack(folder)))


def test_its_wheel_is_of_this_platform_and_has_it(with_host, tmp_path):
    wheel = write_wheel(with_host, tmp_path)
    assert not wheel.stem.endswith("any")
    with opened(wheel) as pack:
        assert pack.host_keys == (host._key(),)
        assert check_pack(pack) == []


def test_no_path_of_the_builder_is_in_it(with_host):
    """Packs are the same wherever they are made, and tell nothing of that place."""
    content = with_host.host(host._key()).path.read_bytes()
    torchs, pythons = Path(torch.__file__).parent, sysconfig.get_path("include")
    for path in (torchs, pythons, private_folder(create=True), settings.cache_dir):
        assert str(path).encode() not in content


def test_the_command_line_packs_it_for_gpus_only(using, tmp_path, monkeypatch):
    using(jit=True)
    ran = CliRunner().invoke(cli, ["pack", "build", "--host", "--device", "cpu", "fwd_fp32_d16", "-o", str(tmp_path)])
    assert (ran.exit_code, "--host serves calls on a GPU" in ran.output) == (1, True)
    asked = {}
    monkeypatch.setattr(packing, "build_pack", lambda *_, with_host: asked.update(host=with_host) or sys.exit(7))
    for words in (["--host"], []):
        ran = CliRunner().invoke(cli, ["pack", "build", *words, "--device", "sm90-132sm", "fwd_bf16_d64"])
        assert (ran.exit_code, asked) == (7, {"host": bool(words)})


@pytest.mark.parametrize("words", [["--wheel"], []], ids=["wheel", "folder"])
def test_the_command_line_tells_what_it_packed(using, with_host, tmp_path, monkeypatch, words):
    using(jit=True)
    made = lambda plan, folder, *_, **__: Pack(shutil.copytree(with_host.folder, folder))  # noqa: E731
    monkeypatch.setattr(packing, "build_pack", made)
    command = ["pack", "build", *words, "--host", "--device", "sm90-132sm", "fwd_bf16_d64", "-o", str(tmp_path / "out")]
    assert f"native host for torch {torch.__version__}, " in CliRunner().invoke(cli, command).output


def test_the_pack_is_where_it_is_said_to_come_from(folder, using, with_host):
    using(folder)
    assert host.origin() == f"pack:{with_host.name}"


def test_packs_are_listed_with_the_torch_that_their_host_is_for(folder, using):
    using(folder)
    (row,) = json.loads(CliRunner().invoke(cli, ["pack", "list", "--json"]).output)
    assert row["host"].startswith(f"torch {torch.__version__}, ")
