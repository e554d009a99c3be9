"""Opening and verifying a pack: whatever is not as it was made is found and named."""

from __future__ import annotations

import json
import re

import msgspec
import pytest

from jagtile.generator import render
from jagtile.generator.pack_check import check_pack, outdated_sources
from jagtile.generator.pack_place import install
from jagtile.runtime.artifact import ABI_VERSION
from jagtile.runtime.errors import PackError
from jagtile.runtime.pack import FORMAT, Pack


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


DAMAGE = {
    "gone": (lambda path: path.unlink(), "can't be read: No such file"),
    "truncated": (truncate, r"has \d+ bytes, \d+ expected"),
    "changed": (flip, "has sha256 [0-9a-f]{64}, [0-9a-f]{64} expected"),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize(
    "file", ["choices.json", "LICENSE", "records.jsonl", "kernels/{symbol}.json", "kernels/{symbol}.so"]
)
def test_damage_to_any_file_is_found(world, copy, file, kind):
    file = file.format(symbol=world.long.symbol)
    damage, message = DAMAGE[kind]
    damage(copy / file)
    expected = rf"{re.escape(file)} {message}"
    if file == "choices.json":
        with pytest.raises(PackError, match=expected):
            Pack(copy)
        return
    pack = Pack(copy)
    assert any(re.fullmatch(expected, problem.partition(" or directory")[0]) for problem in check_pack(pack))
    if file.startswith("kernels/"):
        with pytest.raises(PackError, match=expected):
            pack.artifact(world.long)
        assert pack.artifact(world.usual).origin == f"pack:{pack.name}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": FORMAT + 1}, f"it has format {FORMAT + 1}, this jagtile reads {FORMAT}; a newer jagtile made it"),
        ({"format": FORMAT + 1, "files": 3, "device": None}, "upgrade jagtile"),
        ({"abi": ABI_VERSION + 1}, f"its kernels have ABI {ABI_VERSION + 1}, this jagtile launches {ABI_VERSION}"),
        ({"files": {}}, "manifest.json lists no choices.json"),
        ({"files": {"../secret": {"size": 1, "sha256": ""}}}, "lists '../secret', which is no path inside the pack"),
        ({"files": {"/etc/passwd": {"size": 1, "sha256": ""}}}, "lists '/etc/passwd'"),
        ({"device": {}}, "manifest.json can't be understood: .*slug"),
    ],
)
def test_a_manifest_that_can_not_be_followed_is_refused(copy, edit, changes, message):
    edit(copy, **changes)
    with pytest.raises(PackError, match=message):
        Pack(copy)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]"])
def test_a_garbled_manifest_is_refused(copy, content):
    (copy / "manifest.json").write_bytes(content)
    with pytest.raises(PackError, match=r"manifest.json can't be understood"):
        Pack(copy)


def test_choices_of_another_device_than_the_manifests_are_refused(copy, edit, whole):
    edit(copy, device={**msgspec.to_builtins(whole.device), "slug": "cpu-other"})
    with pytest.raises(PackError, match=f"choices.json is for {whole.device.slug}, manifest.json for cpu-other"):
        Pack(copy)


def test_a_kernel_in_anothers_place_is_found(world, copy, edit, whole):
    files = msgspec.to_builtins(whole.manifest.files)
    here, there = (f"kernels/{variant.symbol}.json" for variant in (world.usual, world.long))
    (copy / here).write_bytes(whole.read(there))
    edit(copy, files={**files, here: files[there]})
    with pytest.raises(PackError, match=f"describes another kernel than {world.usual.name}"):
        Pack(copy).artifact(world.usual)


def test_verifying_tells_of_files_that_are_not_listed_and_kernels_that_lack(world, copy, edit, whole):
    files = msgspec.to_builtins(whole.manifest.files)
    edit(copy, files={path: facts for path, facts in files.items() if world.long.symbol not in path})
    assert set(check_pack(Pack(copy))) == {
        f"choices.json names {world.long.name}, which is not in the pack",
        f"kernels/{world.long.symbol}.json is not listed in manifest.json",
        f"kernels/{world.long.symbol}.so is not listed in manifest.json",
    }


def test_kernels_of_other_sources_than_todays_are_told(world, whole, monkeypatch):
    assert outdated_sources(whole) == []
    real = render.render_unchecked

    def changed(variant):
        source = real(variant)
        return source if variant != world.long else render.Source(source.text + "int;", source.suffix, source.headers)

    monkeypatch.setattr(render, "render_unchecked", changed)
    assert outdated_sources(whole) == [world.long.name]


def test_a_damaged_pack_is_not_installed(world, copy, using, tmp_path):
    flip(copy / "kernels" / f"{world.long.symbol}.so")
    using(tmp_path / "installed")
    with pytest.raises(PackError, match=rf"is not installed: kernels/{world.long.symbol}.so has sha256"):
        install(copy)
    assert not (tmp_path / "installed").exists()
    assert json.loads((copy / "manifest.json").read_bytes())["format"] == FORMAT
