"""A real pack of three small CPU kernels, built once a worker, and copies of it to be damaged."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
import torch

from jagtile.generator.pack import PackPlan, build_pack, plan_pack
from jagtile.generator.spec import KernelSpec
from jagtile.generator.tile import Variant, legal_configs, space_for
from jagtile.generator.toolchain import find_cxx
from jagtile.runtime import routes
from jagtile.runtime.device import device_id
from jagtile.runtime.dispatch import default_variant
from jagtile.runtime.errors import CompilerNotFoundError
from jagtile.runtime.pack import MANIFEST, Pack
from jagtile.runtime.settings import settings
from jagtile.tuning_db.schema import ChoiceEntry, Choices, DeviceFacts, TuningRecord
from jagtile.tuning_db.store import Database

SPEC = KernelSpec.parse("fwd_fp32_d16")
BACKWARD = KernelSpec.parse("bwd_fp32_d16")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class World:
    """What the pack was made of: choices and records of this CPU, the specs' defaults but for one regime, "long"."""

    database: Database
    usual: Variant
    long: Variant
    backward: Variant
    plan: PackPlan

    @property
    def slug(self) -> str:
        return self.plan.choices.device.slug


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("database")
    database = Database(root / "user", root / "shipped")
    usual = default_variant(SPEC, "cpu")
    other = next(c for c in legal_configs(space_for("cpu", usual.config.algorithm), SPEC) if c != usual.config)
    here = device_id(CPU)
    device = DeviceFacts(**{name: getattr(here, name) for name in DeviceFacts.__struct_fields__})
    entry = ChoiceEntry(default=usual.config.to_dict(), regimes={"long": other.to_dict()})
    backward = default_variant(BACKWARD, "cpu")
    specs = {f"cpu/{SPEC.name}": entry, f"cpu/{BACKWARD.name}": ChoiceEntry(default=backward.config.to_dict())}
    database.write_choices(Choices(device=device, specs=specs), ship=True)
    with database.writer(here.slug, ship=True) as writer:
        for second, config in ((2, usual.config), (1, other)):
            writer.append(
                TuningRecord(
                    device=here.slug,
                    target="cpu",
                    spec=SPEC.name,
                    regime="long",
                    workload="w",
                    config=config.to_dict(),
                    state="ok",
                    time_us=1.0,
                    date=f"2026-01-01T00:00:0{second}+00:00",
                )
            )
    return World(database, usual, Variant("cpu", SPEC, other), backward, plan_pack(here.slug, [], database))


@pytest.fixture(scope="session")
def whole(world: World, tmp_path_factory: pytest.TempPathFactory) -> Pack:
    """The pack, not to be changed."""
    try:
        find_cxx()
    except CompilerNotFoundError as error:
        pytest.skip(f"needs a C++ compiler: {error}")
    return build_pack(world.plan, tmp_path_factory.mktemp("packs") / world.plan.name)


@pytest.fixture
def copy(whole: Pack, tmp_path: Path) -> Path:
    """The folder of a copy of the pack."""
    return Path(shutil.copytree(whole.folder, tmp_path / "packs" / whole.name))


@pytest.fixture
def edit() -> Callable[..., None]:
    """``edit(folder, abi=7)``: change fields of a pack's manifest."""

    def change(folder: Path, **fields: object) -> None:
        manifest = msgspec.json.decode((folder / MANIFEST).read_bytes())
        (folder / MANIFEST).write_bytes(msgspec.json.encode({**manifest, **fields}))

    return change


@pytest.fixture
def using(tmp_path: Path) -> Iterator[Callable[..., None]]:
    """``using(folder, ...)``: this process finds these packs, an empty cache and no choices but theirs."""
    before = dict(settings.overrides)

    def see(*folders: Path, **others: object) -> None:
        settings.overrides = {**before, "packs": folders, "cache_dir": tmp_path / "cache", **others}
        routes.forget()

    yield see
    settings.overrides = before
    routes.forget()
