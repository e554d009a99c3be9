"""``jagtile explain``."""

from __future__ import annotations

import pytest

from jagtile.runtime.settings import settings
from jagtile.tuning_db.schema import ChoiceEntry, Choices, DeviceFacts
from jagtile.tuning_db.store import Database


@pytest.fixture(autouse=True)
def own_cache(tmp_path):
    with settings.override(cache_dir=tmp_path):
        yield


def test_every_look_up_step_is_shown(run, run_json):
    (found,) = run_json("explain", "tiny-d64", "--device", "cpu")
    assert found["variant"].startswith("cpu/fwd_fp32_d64/")
    assert found["source"] == "default"
    assert [step["answer"] for step in found["steps"]][-1].startswith("taken:")
    text = run("explain", "tiny-d64", "--device", "cpu").output
    assert "user choices for cpu-" in text
    assert found["variant"] in text


def test_a_recorded_device_need_not_be_present(run, run_json):
    facts = DeviceFacts(
        slug="sm90-999sm", label="made up", target="sm_90a", units=999, bandwidth_gbs=1.0, compute_capability="9.0"
    )
    listed = run_json("generate", "fwd_bf16_d128_causal", "--target", "sm_90a", "--list")
    legal = [row["config"] for row in listed if row["legal"] and not row["note"]]
    from jagtile.generator.tile import parse_config

    config = parse_config("sm_90a", legal[0])
    entry = ChoiceEntry(default=config.to_dict())
    Database().write_choices(Choices(device=facts, specs={"sm_90a/fwd_bf16_d128_causal": entry}), ship=False)
    (found,) = run_json("explain", "u4k-d128-causal", "--device", facts.slug)
    assert (found["source"], found["regime"]) == ("user", "huge")
    assert found["variant"].endswith(config.name)


def test_lengths_come_from_a_file(run_json, tmp_path):
    (tmp_path / "lengths.txt").write_text("1 900  # one query, many keys\n1 800\n")
    arguments = ("explain", "--lengths", str(tmp_path / "lengths.txt"), "--head-dim", "32", "--device", "cpu")
    (found,) = run_json(*arguments)
    assert (found["workload"], found["spec"], found["regime"]) == ("lengths", "fwd_fp32_d32", "decode")


def test_bad_requests_exit_with_1(run, tmp_path):
    assert "name a workload" in run("explain", code=1).output
    assert "no workload 'nope'; there are" in run("explain", "nope", code=1).output
    assert "--device 'tpu9'" in run("explain", "tiny-d64", "--device", "tpu9", code=1).output
    (tmp_path / "bad.txt").write_text("12\nx\n")
    assert "line 2" in run("explain", "--lengths", str(tmp_path / "bad.txt"), code=1).output
