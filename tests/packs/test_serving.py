"""What a program gets from packs: kernels without a compiler, and the next source where a pack is not to be used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch

import jagtile
from jagtile.generator.oracle import reference
from jagtile.generator.pack import build_pack
from jagtile.generator.pack_wheel import write_wheel
from jagtile.runtime import packs
from jagtile.runtime.errors import JagtileWarning
from jagtile.runtime.isa import ISAS
from jagtile.runtime.pack import FORMAT
from jagtile.tuning_db.schema import ChoiceEntry, Choices
from jagtile.tuning_db.store import Database

SRC = Path(jagtile.__file__).parent.parent
CU = torch.tensor([0, 3, 3, 10], dtype=torch.int32)

# Prints as JSON how wrong a call and its gradients are, the call's milliseconds, and what explain says. Whatever builds
# or tunes is hidden.
BARE = f"""
import json, sys, time
for name in ("jinja2", "optuna", "ninja", "click", "rich", "cuda.pathfinder"):
    sys.modules[name] = None
sys.path.insert(0, {str(SRC)!r})
import torch, jagtile
torch.manual_seed(0)
q, k, v = torch.randn(3, 10, 2, 16).requires_grad_()
cu = torch.tensor([0, 3, 3, 10], dtype=torch.int32)
begin = time.thread_time()
out = jagtile.varlen_attention(q, k, v, cu, cu)
milliseconds = 1e3 * (time.thread_time() - begin)
dense = [torch.nn.functional.scaled_dot_product_attention(*(x[a:b].transpose(0, 1) for x in (q, k, v))).transpose(0, 1)
         for a, b in ((0, 3), (3, 10))]
dense = torch.cat(dense)
ours, torchs = (torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (out, dense))
found = jagtile.explain(q, k, v, cu, cu)
jagtile.warmup(16, torch.float32)
print(json.dumps({{
    "error": max((a - b).abs().max().item() for a, b in zip((out, *ours), (dense, *torchs))),
    "milliseconds": milliseconds,
    "source": found.decision.source, "artifact": found.artifact,
}}))
"""


def bare_process(**environment: str) -> dict[str, object]:
    """What ``BARE`` prints where there is no compiler on the PATH, nothing cached and nothing configured."""
    foreign = ("JAGTILE_", "CXX", "CUDA_", "PYTHON")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    done = subprocess.run(
        [sys.executable, "-c", BARE],
        env={**clean, "PATH": "/nowhere", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "JagtileWarning" not in done.stderr
    return json.loads(done.stdout)


def call() -> None:
    """One call of regime short that must be right."""
    q, k, v = torch.randn(3, 10, 2, 16)
    out = jagtile.varlen_attention(q, k, v, CU, CU)
    torch.testing.assert_close(out, reference(q, k, v, CU, CU)[0].float(), rtol=1e-5, atol=1e-5)


def explained() -> jagtile.runtime.explain.Explanation:
    x = torch.ones(10, 2, 16)
    return jagtile.explain(x, x, x, CU, CU)


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setitem(sys.modules, "jagtile.generator.build", None)


def record_choice(world, variant) -> None:
    """As the user's own choice on this CPU."""
    entry = ChoiceEntry(default=variant.config.to_dict())
    choices = Choices(device=world.plan.choices.device, specs={f"cpu/{variant.spec.name}": entry})
    Database().write_choices(choices, ship=False)


def test_a_folder_serves_without_compiler_jinja2_or_optuna_and_fast(whole, tmp_path):
    environment = {"JAGTILE_PACKS": str(whole.folder.parent), "JAGTILE_CACHE_DIR": str(tmp_path)}
    environment["PYTHONPYCACHEPREFIX"] = str(tmp_path)
    found = bare_process(**environment)
    assert found["error"] < 1e-5
    assert found["source"] == f"pack:{whole.name}"
    assert found["artifact"] == "memory"
    # Again, with the modules' byte code cached as in an installation. Of this thread, and up to three times: others
    # want the CPU and its caches too.
    assert any(bare_process(**environment)["milliseconds"] < 50 for _ in range(3))


def test_an_installed_wheel_serves_likewise_and_its_removal_ends_that(whole, tmp_path):
    wheel, site = write_wheel(whole, tmp_path), tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run([*pip, "install", "--no-index", "--no-deps", "--target", site, wheel], check=True)
    environment = {"PYTHONPATH": str(site), "JAGTILE_CACHE_DIR": str(tmp_path), "XDG_DATA_HOME": str(tmp_path)}
    assert bare_process(**environment)["source"] == f"pack:{whole.name}"
    with pytest.raises(AssertionError, match=r"CompilerNotFoundError.*install a kernel pack"):
        bare_process(**environment, JAGTILE_PACKS="none")


def test_wheels_are_found_on_the_path_the_first_of_each_and_without_metadata_too(tmp_path, monkeypatch):
    """What an uninstallation left half done, or another version of, must not end a call."""
    for site, version, name in (("b", "1.0", "other"), ("a", "2.0", "it"), ("a", "1.0", "other"), ("b", "1.0", "it")):
        info = tmp_path / site / f"{name}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "entry_points.txt").write_text(
            f"[console_scripts]\n{name} = {name}:run\n[jagtile.packs]\n{name} = {name}_1\n"
        )
        if site == "a":
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (tmp_path / "b" / "third-1.0.dist-info").mkdir()
    (tmp_path / "b" / "third-1.0.dist-info" / "entry_points.txt").write_text("[jagtile.packs]\nthird = third_1\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "a"), str(tmp_path / "b")])
    found = list(packs._installed())
    assert [place.folder for place in found] == [
        tmp_path / "a" / "it_1",
        tmp_path / "a" / "other_1",
        tmp_path / "b" / "third_1",
    ]
    assert {place.origin for place in found} == {"wheel"}


def test_explain_tells_the_pack_and_the_file(world, copy, using, no_compiler):
    using(copy.parent)
    found = explained()
    assert (found.decision.source, found.variant) == (f"pack:{copy.name}", world.usual)
    assert found.decision.steps[1].place == f"pack choices for {world.slug}"
    assert found.artifact == f"pack:{copy.name}: {copy}/kernels/{world.usual.symbol}.so"
    call()


def test_the_users_choices_come_before_a_packs_and_these_before_the_shipped(world, copy, using, monkeypatch, tmp_path):
    monkeypatch.setattr("jagtile.tuning_db.store._SHIPPED", world.database.shipped_root)
    using()
    assert explained().decision.source == "shipped"
    using(copy)
    assert explained().decision.source == f"pack:{copy.name}"
    record_choice(world, world.long)
    found = explained()
    assert (found.decision.source, found.variant) == ("user", world.long)
    assert found.artifact.startswith(f"pack:{copy.name}: ")  # whoever chose it, the pack has it


def test_a_choice_that_nothing_can_build_is_answered_with_another_kernel_of_the_pack(world, copy, using, no_compiler):
    using(copy)
    spare = next(c for c in _configs(world) if c not in (world.usual.config, world.long.config))
    record_choice(world, replace(world.usual, config=spare))
    with pytest.warns(
        JagtileWarning, match=rf"{spare.name} \(user choices\) can't be had, {world.usual.config.name} of"
    ):
        call()


def _configs(world):
    from jagtile.generator.tile import legal_configs

    return legal_configs(world.usual.space, world.usual.spec)


@pytest.mark.parametrize("damage", [lambda b: b[:-100], lambda b: b[:-1] + b"!"], ids=["truncated", "tampered"])
def test_a_damaged_kernel_is_refused_and_built_instead(world, copy, using, damage):
    binary = copy / "kernels" / f"{world.usual.symbol}.so"
    binary.write_bytes(damage(binary.read_bytes()))
    using(copy)
    with pytest.warns(JagtileWarning, match=rf"{copy} is damaged: kernels/{binary.name} has .* is sought elsewhere"):
        call()


def test_without_a_compiler_a_damaged_kernel_is_answered_with_another_of_the_pack(world, copy, using, no_compiler):
    (copy / "kernels" / f"{world.usual.symbol}.so").write_bytes(b"")
    using(copy)
    with pytest.warns(JagtileWarning) as told:
        call()
    assert "is damaged" in str(told[0].message)
    assert f"{world.long.config.name} of a kernel pack takes its place" in str(told[-1].message)


def test_a_kernel_that_does_not_load_here_is_built_instead(world, tmp_path, using, monkeypatch):
    real = packs.Pack.artifact

    def unloadable(pack, variant):
        artifact = real(pack, variant)
        (tmp_path / "text.so").write_text("no library")
        return msgspec.structs.replace(artifact, path=tmp_path / "text.so")

    pack = build_pack(world.plan, tmp_path / "pack")
    monkeypatch.setattr(packs.Pack, "artifact", unloadable)
    using(pack.folder)
    with pytest.warns(JagtileWarning, match=rf"pack:{pack.name}: .*text.so can't be loaded.*sought elsewhere"):
        call()


def test_a_pack_of_a_newer_format_is_refused_and_the_next_source_used(copy, using, edit):
    edit(copy, format=FORMAT + 1)
    using(copy)
    with pytest.warns(JagtileWarning, match=rf"{copy} is refused: it has format 2, this jagtile reads 1.*upgrade"):
        assert explained().decision.source == "default"


def for_device(world, folder: Path, slug: str, capability: str) -> Path:
    """The pack as if it had been made for another CPU."""
    device = msgspec.structs.replace(world.plan.choices.device, slug=slug, compute_capability=capability)
    choices = msgspec.structs.replace(world.plan.choices, device=device)
    return build_pack(replace(world.plan, choices=choices), folder).folder


def test_a_pack_for_another_device_is_refused_and_the_next_source_used(world, tmp_path, using):
    foreign = for_device(world, tmp_path / "foreign", "cpu-vax", "vax")
    using(foreign)
    with pytest.warns(JagtileWarning, match=rf"is refused: it is for cpu-vax .*, this device is {world.slug}"):
        assert explained().decision.source == "default"


def test_beside_a_pack_that_fits_a_foreign_one_is_passed_over_in_silence(world, copy, tmp_path, using):
    using(for_device(world, tmp_path / "foreign", "cpu-vax", "vax"), copy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert explained().decision.source == f"pack:{copy.name}"


def test_a_relatives_pack_serves_after_the_devices_own_choices(world, tmp_path, using, no_compiler):
    if world.slug == "cpu-generic":
        pytest.skip("the generic CPU has no relative")
    assert "generic" in next(iter(ISAS.values()))
    using(for_device(world, tmp_path / "pack", "cpu-generic", "generic"))
    found = explained()
    assert (found.decision.source, found.variant) == ("relative:cpu-generic", world.usual)
    call()


def test_folders_that_hold_no_pack_are_told_but_for_the_users_own(tmp_path, using, monkeypatch):
    using(tmp_path / "nowhere")
    with pytest.warns(JagtileWarning, match=r"nowhere is refused: there is no pack in it"):
        explained()
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    using(tmp_path / "jagtile" / "packs")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        explained()


def test_none_switches_packs_off(whole, using):
    using(packs=None)
    assert packs.discover() == ()


def test_warmup_sees_a_pack_that_was_installed_meanwhile(whole, using, no_compiler, tmp_path):
    using(tmp_path)
    assert [place.pack for place in packs.discover()] == [None]
    (tmp_path / whole.name).symlink_to(whole.folder)
    assert len(jagtile.warmup(16, torch.float32)) == 2
