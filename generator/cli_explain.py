"""``jagtile explain``: which variant a workload would run on a device, from which record, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from jagtile.generator.cli_common import (
    device_option,
    json_option,
    pick_workloads,
    print_json,
    torch_device,
    workload_options,
)

if TYPE_CHECKING:
    from jagtile.generator.workloads import Workload
    from jagtile.runtime.explain import Explanation


@click.command()
@workload_options
@device_option
@click.option("--dtype", type=click.Choice(["fp32", "bf16", "fp16"]), help="[default: bf16 on a GPU, fp32 on the CPU]")
@click.option("--no-max", is_flag=True, help="As if the caller did not give max_seqlen.")
@json_option
def explain(
    workloads: tuple[str, ...], device: str | None, dtype: str | None, no_max: bool, as_json: bool, **described: Any
) -> None:
    """Show which variant a workload would run, every look-up step and where the kernel would come from.

    DEVICE may also be the slug of a device in the tuning database (`jagtile db list`), present or not.

    \b
    jagtile explain vit-d64
    jagtile explain u4k-d128-causal --device sm90-132sm
    """
    chosen = pick_workloads(workloads, **described)
    if not chosen:
        raise click.UsageError("name a workload (`jagtile bench --list` shows them) or give --lengths FILE")
    explanations = [_explain(workload, device, dtype, no_max) for workload in chosen]
    if as_json:
        print_json([_as_json(w, e) for w, e in zip(chosen, explanations, strict=True)])
        return
    for workload, explanation in zip(chosen, explanations, strict=True):
        click.echo(f"workload  {workload.name}\n{explanation}\n")


def _explain(workload: Workload, device: str | None, dtype: str | None, no_max: bool) -> Explanation:
    import msgspec

    from jagtile.generator.spec import DTYPES
    from jagtile.runtime import packs
    from jagtile.runtime.device import DeviceId
    from jagtile.runtime.dispatch import choose
    from jagtile.runtime.explain import Explanation, explain_problem
    from jagtile.tuning_db.store import Database

    database = Database()
    recorded = {facts.slug: facts for facts in (*database.devices("shipped"), *database.devices("user"))}
    name = dtype or ("fp32" if (device or str(torch_device(device))).startswith("cpu") else "bf16")
    problem = workload.problem(next(known for known in DTYPES if known == name), not no_max)
    if device in recorded:
        identity = DeviceId(**msgspec.structs.asdict(recorded[device]))
        decision = choose(problem, identity, database, packs.fitting(identity))
        return Explanation(problem, identity, decision, "not looked up for a recorded device")
    return explain_problem(problem, torch_device(device), database=database)


def _as_json(workload: Workload, explanation: Explanation) -> dict[str, object]:
    decision = explanation.decision
    return {
        "workload": workload.name,
        "device": explanation.device,
        "spec": explanation.problem.spec.name,
        "regime": decision.regime,
        "variant": decision.variant.name,
        "source": decision.source,
        "steps": decision.steps,
        "artifact": explanation.artifact,
    }
