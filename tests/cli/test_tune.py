"""``jagtile tune``: what its options mean, what it shows, and one real tune of a small case on the CPU."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch
from click.testing import CliRunner

from jagtile.generator import tune as tune_module
from jagtile.generator import tune_all as tune_all_module
from jagtile.generator.cli import cli
from jagtile.generator.cli_common import parse_budget
from jagtile.generator.spec import KernelSpec
from jagtile.generator.tile import all_configs, legal_configs, parse_config, space_for, spaces_of
from jagtile.generator.tune_all import Outcome
from jagtile.generator.tune_types import DEFAULT_BUDGET, Budget, RegimeResult, Silent, TuneResult
from jagtile.generator.workloads import representative
from jagtile.runtime.problem import REGIMES, regimes_for
from jagtile.runtime.settings import settings
from jagtile.tuning_db.schema import ChoiceEntry, Choices, DeviceFacts, TuningRecord
from jagtile.tuning_db.store import Database

SPEC = "fwd_fp32_d64"
DEVICE = DeviceFacts(
    slug="cpu-generic", label="Some CPU", target="cpu", units=2, bandwidth_gbs=0.0, compute_capability="generic"
)


class FakeTune:
    """Stands in for the tuner: remembers how it was called, reports two configs of every regime."""

    def __init__(self, interrupted: bool = False) -> None:
        self.calls = []
        self.interrupted = interrupted

    def __call__(self, spec, device, regimes, **options):
        self.calls.append((spec.name, device, tuple(regimes), options))
        fast, slow = legal_configs(spaces_of("cpu", spec)[0], spec)[:2]
        results = []
        for regime in regimes:
            (workload,) = representative(spec, regime, "cpu")
            options["progress"].regime_started(regime, workload, 2, 0)
            if self.interrupted:
                raise KeyboardInterrupt
            for config, state in ((fast, "ok"), (slow, "incorrect")):
                record = TuningRecord(
                    device=DEVICE.slug,
                    target="cpu",
                    spec=spec.name,
                    regime=regime,
                    workload=workload.name,
                    config=config.to_dict(),
                    state=state,
                    reason="" if state == "ok" else "relative error 0.5",
                    time_us=12.5 if state == "ok" else None,
                )
                options["progress"].recorded(record)
            options["progress"].finals_started(regime, 1)
            results.append(
                RegimeResult(regime, workload.name, fast, 12.5, 0.25, slow, None, 12.5, 0.01, {"ok": 1, "incorrect": 1})
            )
        choices = Choices(device=DEVICE, specs={f"cpu/{spec.name}": ChoiceEntry(default=fast.to_dict())})
        return TuneResult(spec, choices, Path("choices.json"), tuple(results), (), 3.0)


@pytest.fixture
def fake(monkeypatch):
    fake = FakeTune()
    monkeypatch.setattr(tune_module, "tune", fake)
    return fake


@pytest.mark.parametrize(
    ("texts", "budget"),
    [
        (["40"], (40, None)),
        (["5m"], (None, 300.0)),
        (["90s"], (None, 90.0)),
        (["1h30m"], (None, 5400.0)),
        (["40,5m"], (40, 300.0)),
        (["40", "5m"], (40, 300.0)),
    ],
)
def test_a_budget_is_a_number_of_trials_a_time_or_both(texts, budget):
    assert parse_budget(texts) == budget


def test_without_options_every_regime_is_tuned_within_the_default_budget(run, fake):
    run("tune", SPEC, "--device", "cpu")
    ((name, device, regimes, options),) = fake.calls
    assert (name, device, regimes) == (SPEC, torch.device("cpu"), regimes_for("fwd", "cpu"))
    assert options["budget"] == DEFAULT_BUDGET
    assert (options["ship"], options["seed"], options["storage"], options["resume"]) == (False, 0, None, True)


def test_options_reach_the_tuner(run, fake):
    storage = "sqlite:///x.db"
    arguments = ["--regime", "long", "--budget", "7,2m", "--ship", "--seed", "3", "--storage", storage, "--fresh"]
    run("tune", SPEC, "fwd_bf16_d64", "--device", "cpu", *arguments)
    assert [call[0] for call in fake.calls] == [SPEC, "fwd_bf16_d64"]
    _, _, regimes, options = fake.calls[0]
    assert regimes == ("long",)
    assert options["budget"] == Budget(7, 120.0)
    assert (options["ship"], options["seed"], options["storage"], options["resume"]) == (True, 3, storage, False)


def test_exhaustive_is_a_budget_without_limits(run, fake):
    run("tune", SPEC, "--device", "cpu", "--regime", "long", "--exhaustive")
    assert fake.calls[0][3]["budget"] == Budget(None, None)


def test_all_tunes_what_is_chosen_and_tells_what_was_done_and_what_failed(run, monkeypatch, fake):
    calls = []

    def outcomes(device, regimes, **options):
        calls.append((device, tuple(regimes), options))
        options.pop("progress_of")
        spec = KernelSpec.parse(SPEC)
        yield Outcome(KernelSpec.parse("fwd_fp32_d32"), None)
        yield Outcome(spec, fake(spec, device, regimes_for("fwd", "cpu"), progress=Silent()))
        yield Outcome(KernelSpec.parse("fwd_fp32_d96"), None, "none of 3 configs works")

    monkeypatch.setattr(tune_all_module, "tune_all", outcomes)
    result = run("tune", "--all", "--device", "cpu", "--budget", "30m", "--ship", code=1)
    assert calls == [
        (
            torch.device("cpu"),
            REGIMES,
            {"budget": Budget(None, 1800.0), "ship": True, "seed": 0, "timeout": 30.0, "resume": True},
        )
    ]
    assert "fwd_fp32_d32: done already" in result.stderr
    assert f"{SPEC} on Some CPU" in result.stdout
    assert "fwd_fp32_d96: none of 3 configs works" in result.stderr


def test_the_summary_names_the_chosen_configs_and_the_progress_why_others_failed(run, fake):
    result = run("tune", SPEC, "--device", "cpu", "--regime", "medium")
    chosen = legal_configs(spaces_of("cpu", KernelSpec.parse(SPEC))[0], KernelSpec.parse(SPEC))[0].name
    assert chosen in result.stdout
    assert "1 incorrect, 1 ok" in result.stdout
    assert "choices: choices.json" in result.stdout
    assert "incorrect: relative error 0.5" in result.stderr


def test_json_has_the_regimes_and_nothing_else_on_stdout(run_json, fake):
    (result,) = run_json("tune", SPEC, "--device", "cpu", "--regime", "medium")
    assert result["spec"] == SPEC
    assert [regime["regime"] for regime in result["regimes"]] == ["medium"]
    assert result["regimes"][0]["chosen_us"] == 12.5
    assert result["device"]["slug"] == DEVICE.slug


def test_an_interrupt_says_that_nothing_measured_is_lost(monkeypatch):
    monkeypatch.setattr(tune_module, "tune", FakeTune(interrupted=True))
    result = CliRunner().invoke(cli, ["tune", SPEC, "--device", "cpu"])
    assert result.exit_code == 130
    assert "the same command goes on from there" in result.stderr


def test_a_dry_run_lists_candidates_and_workloads_and_measures_nothing(run, run_json, fake):
    (plan,) = run_json("tune", SPEC, "--device", "cpu", "--dry-run", "--regime", "short", "--budget", "3")
    spec = KernelSpec.parse(SPEC)
    legal = [c.name for space in spaces_of("cpu", spec) for c in legal_configs(space, spec)]
    assert [candidate["config"] for candidate in plan["candidates"]] == legal
    assert plan["trials"] == 3
    assert plan["workloads"] == {"short": [w.name for w in representative(spec, "short", "cpu")]}
    shown = run("tune", SPEC, "--device", "cpu", "--dry-run").stdout
    assert legal[0] in shown
    assert f"{len(plan['candidates'])} candidates" in shown
    assert not fake.calls


def test_a_dry_run_for_a_gpu_that_is_not_here_predicts_and_gives_the_reasons_of_what_it_rejects(run, run_json, fake):
    spec = KernelSpec.parse("fwd_bf16_d128")
    spaces = spaces_of("sm_90a", spec)
    (plan,) = run_json("tune", spec.name, "--dry-run", "--target", "sm_90a")
    assert plan["device"] == "sm90-132sm"
    legal = {c.name for space in spaces for c in legal_configs(space, spec)}
    assert {each["config"] for each in plan["candidates"]} == legal
    for each in plan["candidates"]:
        config = parse_config("sm_90a", each["config"])
        space = space_for("sm_90a", config.algorithm)
        assert each["smem_bytes"] == space.launch(spec, config)["smem_bytes"] <= 227 * 1024
        assert each["registers"] == space.predicted_registers(spec, config)
        assert all(guess["us"] > 0 and guess["bound"] for guess in each["predicted"].values())
        assert each["predicted"].keys() == set(REGIMES)
    rejected = {each["config"]: each["reason"] for each in plan["rejected"]}
    grid = [(space, config) for space in spaces for config in all_configs(space, spec)]
    space, config = next((space, config) for space, config in grid if config.name in rejected)
    assert rejected[config.name] == space.rejection(spec, config)
    assert len(rejected) + len(plan["candidates"]) == len(grid)
    shown = run("tune", spec.name, "--dry-run", "--target", "sm_90a", "--regime", "long").stdout
    assert plan["rejected"][0]["reason"] in shown
    assert "long us, bound by" in shown
    assert not fake.calls


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "name SPECs; or --all"),
        ((SPEC, "--all"), "name SPECs; or --all"),
        (("--all", "--dry-run"), "name SPECs; or --all"),
        (("--all", "--storage", "sqlite:///x.db"), "name SPECs; or --all"),
        ((SPEC, "--exhaustive", "--budget", "3"), "--exhaustive has no --budget"),
        ((SPEC, "--target", "cpu"), "--target goes with --dry-run"),
        ((SPEC, "--target", "cpu", "--device", "cpu", "--dry-run"), "without --device"),
        ((SPEC, "--target", "sm_20", "--dry-run"), "no device of target 'sm_20'"),
        ((SPEC, "--target", "sm_90a", "--dry-run"), "dtype must be bf16 or fp16"),
        (("fwd_fp32",), "is not a name like"),
        ((SPEC, "--regime", "vast"), "no regime vast; there are tiny, short"),
        ((SPEC, "--regime", "few", "--device", "cpu"), "on cpu has no regime few; it has tiny"),
        (("bwd_bf16_d128", "--regime", "few", "--target", "sm_90a", "--dry-run"), "on sm_90a has no regime few"),
        ((SPEC, "--budget", "soon"), "neither a number of trials"),
        ((SPEC, "--budget", "0"), "neither a number of trials"),
        ((SPEC, "--device", "abacus"), "--device 'abacus'"),
    ],
)
def test_a_bad_request_exits_with_1_and_says_what_is_accepted(run, fake, arguments, message):
    assert message in run("tune", *arguments, code=1).output
    assert not fake.calls


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_exits_with_3(run, fake):
    assert "jagtile doctor" in run("tune", SPEC, "--device", "cuda", code=3).output


def test_a_real_tune_on_the_cpu_leaves_records_and_choices(run_json, tmp_path):
    """Two configs of a tiny head dim, built, checked and timed by the real worker."""
    spec = "fwd_fp32_d16"
    with settings.override(cache_dir=tmp_path):
        (result,) = run_json("tune", spec, "--device", "cpu", "--regime", "decode", "--budget", "2,60s")
        database = Database()
        slug = result["device"]["slug"]
        choices = database.choices("user", slug)
        records = database.records(device=slug, spec=spec)
    assert result["regimes"][0]["states"]["ok"] >= 1
    assert choices is not None
    assert msgspec.to_builtins(choices)["specs"][f"cpu/{spec}"]["regimes"]["decode"]
    assert len(records) == result["records"] > 0
