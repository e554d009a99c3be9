"""``jagtile pack``: kernels that were tuned and compiled before, for machines without a compiler."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from jagtile.generator.cli_common import device_slug, json_option, parse_spec, print_json, print_table

if TYPE_CHECKING:
    from jagtile.runtime.pack import Pack
    from jagtile.runtime.packs import Found

_PATH = click.Path(path_type=Path)


@click.group()
def pack() -> None:
    """Make, verify, install and list kernel packs.

    A pack holds the compiled kernels of one device, the choices among them and the records behind these. A program that
    finds one needs neither compiler nor tuner.
    """


@pack.command()
@click.argument("specs", nargs=-1, metavar="[SPEC]...")
@click.option(
    "--device",
    metavar="DEVICE",
    help="Whose kernels: a slug of `jagtile db list`, cpu, cuda, cuda:1, ... [default: cuda where there is one]",
)
@click.option("-o", "--output", type=_PATH, default=Path(), show_default="here", help="Folder to put the pack into.")
@click.option("--wheel", is_flag=True, help="Write a wheel for pip instead of a folder.")
@click.option("--host", is_flag=True, help="Also the native host of GPU calls, for the torch and Python at hand.")
@click.option("--version", help="Of the pack. [default: jagtile's]")
@json_option
def build(
    specs: tuple[str, ...],
    device: str | None,
    output: Path,
    wheel: bool,
    host: bool,
    version: str | None,
    as_json: bool,
) -> None:
    """Compile what the choices for a device name and pack it: jagtile-kernels-SLUG, a folder or a wheel.

    Without SPECs: everything that has choices for the device, and the backward of each forward. Needs the compiler of
    its target, not the device; --host a C++ compiler.

    \b
    jagtile pack build --device sm90-132sm --wheel -o dist
    jagtile pack build --device sm90-132sm --wheel --host -o dist
    jagtile pack build fwd_fp32_d64 fwd_fp32_d64_causal --device cpu
    """
    import tempfile

    import jagtile
    from jagtile.generator.pack import build_pack, plan_pack
    from jagtile.generator.pack_wheel import check_version, write_wheel
    from jagtile.tuning_db.store import Database

    version = check_version(version or jagtile.__version__)
    plan = plan_pack(device_slug(device), [parse_spec(name) for name in specs], Database())
    if host and plan.choices.device.target == "cpu":
        raise click.UsageError(f"--host serves calls on a GPU, and {plan.choices.device.slug} is none")
    click.echo(f"packing {len(plan.variants)} kernels of {len(plan.choices.specs)} specs", err=True)
    if wheel:
        with tempfile.TemporaryDirectory(prefix="jagtile-pack-") as temporary:
            made = build_pack(plan, Path(temporary) / plan.name, version, with_host=host)
            _tell(made, write_wheel(made, output), as_json)
    else:
        path = output / plan.name
        _tell(build_pack(plan, path, version, with_host=host), path, as_json)


@pack.command()
@click.argument("paths", nargs=-1, type=_PATH, metavar="[PATH]...")
@json_option
def verify(paths: tuple[Path, ...], as_json: bool) -> None:
    """Read packs whole and tell all that is wrong: folders or wheels; without PATH those that a program would find.

    Also tells which kernels come from other sources than this jagtile's templates; they may be used all the same.
    """
    from jagtile.generator.pack_check import check_pack, outdated_sources
    from jagtile.generator.pack_place import opened
    from jagtile.runtime.errors import PackError
    from jagtile.runtime.packs import discover

    rows: list[dict[str, object]] = []
    for path in paths or [found.folder for found in discover()]:
        outdated: list[str] = []
        try:
            with opened(path) as found:
                problems, facts = check_pack(found), _facts(found)
                if not problems:
                    outdated = outdated_sources(found)
        except PackError as error:
            problems, facts = [str(error)], {}
        rows.append({"path": str(path), **facts, "problems": problems, "outdated": outdated})
    if as_json:
        print_json(rows)
    else:
        for row in rows:
            click.echo(_verdict(row))
        if not rows:
            click.echo("no packs are installed; name a folder or a wheel")
    if bad := [str(row["path"]) for row in rows if row["problems"]]:
        raise click.ClickException(f"not to be used: {', '.join(bad)}")


@pack.command()
@click.argument("path", type=_PATH)
@json_option
def install(path: Path, as_json: bool) -> None:
    """Verify the pack in a folder or a wheel and copy it to where programs of this user find it.

    That is the first folder of JAGTILE_PACKS. For all users of a Python environment, `pip install` the wheel instead.
    """
    from jagtile.generator.pack_place import install as run

    installed = run(path)
    _tell(installed, installed.folder, as_json)


@pack.command("list")
@json_option
def list_(as_json: bool) -> None:
    """List the packs that programs find, in the order in which they are asked, and why some are refused."""
    from jagtile.runtime.packs import discover

    rows = [_listed(found) for found in discover()]
    if as_json:
        print_json(rows)
        return
    columns = ("name", "version", "device", "specs", "kernels", "megabytes", "host", "from", "path", "refused")
    print_table("Kernel packs", columns, [[row.get(name, "") for name in columns] for row in rows], right=columns[3:6])


def _tell(pack: Pack, path: Path, as_json: bool) -> None:
    """What a pack that is still there is, and where the command leaves it."""
    if as_json:
        print_json({**_facts(pack), "path": str(path)})
    else:
        click.echo(f"{path}: {_described(pack)}")


def _facts(pack: Pack) -> dict[str, object]:
    return {
        "name": pack.name,
        "version": pack.manifest.version,
        "device": pack.device.slug,
        "specs": len(pack.choices.specs),
        "kernels": len(pack.symbols),
        "host": _host_of(pack),
        "megabytes": round(sum(file.size for file in pack.manifest.files.values()) / 1e6, 2),
    }


def _host_of(pack: Pack) -> str:
    """What the native hosts in it are for, "" without any."""
    from jagtile.runtime.errors import PackError

    try:
        hosts = [artifact.meta.config for key in pack.host_keys if (artifact := pack.host(key)) is not None]
    except PackError:
        return "damaged"
    return "; ".join(f"torch {host['torch']}, {host['python']}" for host in hosts)


def _listed(found: Found) -> dict[str, object]:
    facts = _facts(found.pack) if found.pack else {}
    return {**facts, "from": found.origin, "path": str(found.folder), "refused": found.refusal}


def _described(pack: Pack) -> str:
    facts = _facts(pack)
    kernels = "{name} {version}, {kernels} kernels of {specs} specs for {device}".format(**facts)
    return f"{kernels}{_with_host(facts)}, {facts['megabytes']} MB"


def _with_host(facts: dict[str, object]) -> str:
    return f", native host for {facts['host']}" if facts["host"] else ""


def _verdict(row: dict[str, object]) -> str:
    problems, outdated = row["problems"], row["outdated"]
    assert isinstance(problems, list)
    assert isinstance(outdated, list)
    if problems:
        return "\n  ".join([f"{row['path']}: damaged or of no use here", *problems])
    late = f"; {len(outdated)} kernels are of other sources than the templates here: {', '.join(outdated)}"
    found = f"{row['kernels']} kernels for {row['device']}{_with_host(row)}"
    return f"{row['path']}: all right, {found}{late if outdated else ''}"
