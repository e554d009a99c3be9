"""From choices to a pack: what goes in, and that the same input gives the same bytes."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import zipfile
from pathlib import Path

import msgspec
import pytest

from jagtile.generator import pack as packing
from jagtile.generator.build import BuildResult
from jagtile.generator.pack import build_pack, plan_pack
from jagtile.generator.pack_check import check_pack
from jagtile.generator.pack_wheel import write_wheel
from jagtile.generator.spec import KernelSpec
from jagtile.generator.tile import legal_configs, space_for
from jagtile.generator.workloads import Workload
from jagtile.runtime.artifact import ABI_VERSION
from jagtile.runtime.device import DeviceId
from jagtile.runtime.dispatch import choose
from jagtile.runtime.errors import BuildError, PackError
from jagtile.runtime.pack import Pack
from jagtile.runtime.problem import regimes_for
from jagtile.runtime.settings import settings
from jagtile.tuning_db.schema import ChoiceEntry, Choices, DeviceFacts
from jagtile.tuning_db.store import Database

ROOT = Path(__file__).resolve().parents[2]
H200 = "sm90-132sm"


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_it_holds_each_variant_that_dispatch_would_choose_once(world, whole):
    assert whole.symbols == tuple(sorted({world.usual.symbol, world.long.symbol, world.backward.symbol}))
    entry = whole.choices.specs[f"cpu/{world.usual.spec.name}"]
    assert set(entry.regimes) == set(regimes_for("fwd", "cpu"))
    assert entry.default == entry.regimes["short"] == world.usual.config.to_dict()
    assert entry.regimes["long"] == world.long.config.to_dict()
    assert check_pack(whole) == []


@pytest.mark.parametrize("tuned", [False, True])
def test_few_is_packed_where_it_is_chosen_and_follows_its_neighbours_elsewhere(tmp_path, tuned):
    """So do packs that are older than the regime."""
    spec = KernelSpec.parse("fwd_bf16_d128")
    configs = [c.to_dict() for c in legal_configs(space_for("sm_90a", "persistent"), spec)[:4]]
    regimes = dict(zip(("medium", "long", "few"), configs, strict=False))
    device = DeviceFacts(
        slug=H200, label="a GPU", target="sm_90a", units=132, bandwidth_gbs=4000, compute_capability="9.0"
    )
    entry = ChoiceEntry(default=configs[3], regimes={r: c for r, c in regimes.items() if tuned or r != "few"})
    database = Database(tmp_path / "user", tmp_path / "shipped")
    database.write_choices(Choices(device=device, specs={f"sm_90a/{spec.name}": entry}), ship=True)
    packed = plan_pack(H200, [spec], database)
    assert ("few" in packed.choices.specs[f"sm_90a/{spec.name}"].regimes) == tuned
    for lengths, neighbour in (((600,) * 10, "medium"), ((4000, 4358, 5031), "long")):
        problem = Workload("w", lengths, lengths, 2, 2, 128, 128).problem("bf16")
        found = choose(problem, DeviceId(**msgspec.structs.asdict(device)), Database(tmp_path, tmp_path), [packed])
        assert found.variant.config.to_dict() == regimes["few" if tuned else neighbour]


def test_it_tells_what_it_is_and_where_it_comes_from(world, whole):
    manifest = whole.manifest
    assert (manifest.name, manifest.abi, manifest.licence) == (
        f"jagtile-kernels-{world.slug}",
        ABI_VERSION,
        "BSD-3-Clause",
    )
    assert set(manifest.provenance.sources) == {world.usual.name, world.long.name, world.backward.name}
    assert whole.artifact(world.long).meta.compiler in manifest.provenance.compilers
    assert whole.read("LICENSE") == (ROOT / "LICENSE").read_bytes()
    lines = whole.read("records.jsonl").splitlines()
    assert [json.loads(line)["date"][:19] for line in lines] == ["2026-01-01T00:00:01", "2026-01-01T00:00:02"]


def test_compiled_anew_it_is_the_same_byte_for_byte(world, whole, tmp_path):
    with settings.override(cache_dir=tmp_path / "cache"):
        again = build_pack(plan_pack(world.slug, [], world.database), tmp_path / "elsewhere" / "pack")
    assert bytes_of(again.folder) == bytes_of(whole.folder)
    first, second = (write_wheel(pack, tmp_path / name) for name, pack in (("a", whole), ("b", again)))
    assert first.name == second.name
    assert first.read_bytes() == second.read_bytes()


def test_a_wheel_has_no_times_or_order_of_its_own_and_tells_every_files_hash(whole, tmp_path):
    with zipfile.ZipFile(write_wheel(whole, tmp_path)) as wheel:
        entries = wheel.infolist()
        *rest, record = (entry.filename for entry in entries)
        rows = list(csv.reader(wheel.read(record).decode().splitlines()))
        hashes = {name: hashlib.sha256(wheel.read(name)).digest() for name in rest}
    assert {(entry.date_time, entry.external_attr >> 16) for entry in entries} == {((1980, 1, 1, 0, 0, 0), 0o100644)}
    assert record.endswith(".dist-info/RECORD")
    assert rest == sorted(rest)
    told = {name: base64.urlsafe_b64decode(digest.removeprefix("sha256=") + "=") for name, digest, size in rows if size}
    assert told == hashes


def test_a_spec_without_choices_is_packed_with_its_default_where_it_is_named(world):
    spec = KernelSpec.parse("fwd_fp32_d8")
    plan = plan_pack(world.slug, [spec], world.database)
    assert [variant.spec for variant in plan.variants] == [spec]
    assert plan.records == ()


def test_the_default_of_another_cpu_is_not_packed(world, tmp_path):
    database = Database(tmp_path / "user", tmp_path / "shipped")
    device = DeviceFacts(
        slug="cpu-other", label="", target="cpu", units=1, bandwidth_gbs=0.0, compute_capability="other"
    )
    database.write_choices(Choices(device=device), ship=True)
    with pytest.raises(PackError, match="fwd_fp32_d8 has no choices for cpu-other, and this machine"):
        plan_pack("cpu-other", [KernelSpec.parse("fwd_fp32_d8")], database)


def test_a_gpus_pack_answers_for_both_16_bit_dtypes():
    plan = plan_pack(H200, [], Database())
    names = {spec.removeprefix("sm_90a/") for spec in plan.choices.specs}
    assert {"fwd_bf16_d128", "fwd_fp16_d128"} <= names
    assert {name.replace("bf16", "fp16") for name in names} == {name for name in names if "fp16" in name}


def test_the_hoppers_pack_covers_the_usual_head_dims_in_every_regime():
    plan = plan_pack(H200, [], Database())
    for way in ("fwd", "bwd"):
        for dtype in ("bf16", "fp16"):
            for dims in ("d32", "d64", "d96", "d128", "d192", "d192_dv128", "d256"):
                for mask in ("", "_causal"):
                    entry = plan.choices.specs[f"sm_90a/{way}_{dtype}_{dims}{mask}"]
                    always = set(regimes_for("bwd", "sm_90a")) - {"huge"}  # which is served as long, unless chosen
                    assert set(entry.regimes) >= always


def test_the_backward_of_a_forward_comes_along_with_its_default(world, tmp_path):
    database = Database(tmp_path / "user", tmp_path / "shipped")
    choices = world.database.choices("shipped", world.slug)
    key = f"cpu/{world.usual.spec.name}"
    database.write_choices(msgspec.structs.replace(choices, specs={key: choices.specs[key]}), ship=True)
    assert world.backward in plan_pack(world.slug, [], database).variants
    other = DeviceFacts(slug="cpu-other", label="", target="cpu", units=1, bandwidth_gbs=0.0, compute_capability="x")
    database.write_choices(Choices(device=other, specs={key: choices.specs[key]}), ship=True)
    assert plan_pack("cpu-other", [], database).choices.specs.keys() == {key}


def test_an_unknown_device_and_one_without_choices_are_told_apart(world, tmp_path):
    empty = Database(tmp_path / "user", tmp_path / "shipped")
    with pytest.raises(PackError, match=f"'sm80-108sm' has no choices and is not of this machine; known: {world.slug}"):
        plan_pack("sm80-108sm", [], empty)
    with pytest.raises(PackError, match=f"no choices for {world.slug}: `jagtile tune`"):
        plan_pack(world.slug, [], empty)


def test_what_does_not_compile_is_named_and_nothing_is_written(world, tmp_path, monkeypatch):
    monkeypatch.setattr(
        packing, "build", lambda variants: [BuildResult(v, "spill", reason="8 bytes") for v in variants]
    )
    with pytest.raises(BuildError, match=rf"3 of 3 kernels.*{world.usual.name} \(spill\): 8 bytes"):
        build_pack(world.plan, tmp_path / "pack")
    assert list(tmp_path.iterdir()) == []


def test_only_a_pack_or_nothing_is_replaced(world, copy, tmp_path):
    (copy / "kernels" / "stray").touch()
    build_pack(world.plan, copy)
    assert check_pack(Pack(copy)) == []
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.tex").touch()
    with pytest.raises(PackError, match=r"taken is there already and is no kernel pack"):
        build_pack(world.plan, taken)
    assert [path.name for path in taken.iterdir()] == ["thesis.tex"]


@pytest.mark.nvcc
def test_a_gpus_pack_is_built_without_a_gpu(tmp_path):
    plan = plan_pack(H200, [KernelSpec.parse("fwd_fp16_d64")], Database())
    pack = build_pack(plan, tmp_path / "pack")
    assert check_pack(pack) == []
    assert msgspec.structs.asdict(pack.device)["compute_capability"] == "9.0"
    assert {path.suffix for path in (pack.folder / "kernels").iterdir()} == {".cubin", ".json"}
    assert write_wheel(pack, tmp_path).name == "jagtile_kernels_sm90_132sm-0.1.0-py3-none-any.whl"
