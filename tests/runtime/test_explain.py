"""explain: what would run and why, without a launch or a build."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import jagtile
from jagtile.generator.spec import KernelSpec
from jagtile.generator.tile import spaces
from jagtile.runtime import dropout, loader
from jagtile.runtime.device import DeviceId
from jagtile.runtime.errors import CompilerNotFoundError
from jagtile.runtime.isa import host_isa
from jagtile.runtime.problem import Problem
from jagtile.runtime.settings import settings
from jagtile.tuning_db.schema import ChoiceEntry, Choices, DeviceFacts
from jagtile.tuning_db.store import Database

explain = importlib.import_module("jagtile.runtime.explain")  # the name in the package is the function

CU = torch.tensor([0, 3, 5])


@pytest.fixture(autouse=True)
def empty_world(plain_spaces, monkeypatch, tmp_path):
    """Plain spaces, an empty cache, no choices, and whatever builds or launches fails."""
    cache: dict[str, object] = {}
    monkeypatch.setattr(explain, "cached", lambda variant: cache.get(variant.name))
    monkeypatch.setattr(loader, "load", None)
    monkeypatch.setitem(sys.modules, "jagtile.generator.build", None)
    monkeypatch.setattr("jagtile.tuning_db.store._SHIPPED", tmp_path / "shipped")
    with settings.override(cache_dir=tmp_path):
        yield cache


def packed(**changes):
    x = torch.ones(5, 4, 64)
    return {"q": x, "k": x[:, :2], "v": x[:, :2], "cu_seqlens_q": CU, "cu_seqlens_k": CU, **changes}


def test_it_tells_spec_device_regime_variant_and_every_step():
    found = jagtile.explain(**packed(), is_causal=True)
    assert found.problem == Problem(KernelSpec("fwd", "fp32", 64, 64, True), 2, 5, 5, 4, 2)
    assert found.device.slug == f"cpu-{host_isa()}"
    assert found.decision.regime == "tiny"
    assert found.decision.source == "default"
    assert found.variant.name == "cpu/fwd_fp32_d64_causal/plain_b64"
    assert len(found.decision.steps) == 3


def test_its_text_is_for_people(monkeypatch):
    h200 = DeviceId("sm90-132sm", "sm_90a", "NVIDIA H200", 132, 4917, "9.0")
    monkeypatch.setattr(explain, "device_id", lambda device: h200)
    problem = Problem(KernelSpec("fwd", "bf16", 128, 128, True), 32, 32768, 32768, 32, 8, max_seqlen_k=4096)
    assert str(explain.explain_problem(problem, "cuda:0")).splitlines() == [
        "spec      fwd_bf16_d128_causal",
        "device    sm90-132sm (NVIDIA H200, 132 units, 4917 GB/s), target sm_90a",
        "problem   32 sequences, 32768 queries, 32768 keys, 32 heads over 8, max_seqlen_k 4096",
        "regime    long",
        "look-up   user choices for sm90-132sm: nothing recorded",
        "look-up   shipped choices for sm90-132sm: nothing recorded",
        "look-up   default of sm_90a/plain: taken: plain_b64",
        "variant   sm_90a/fwd_bf16_d128_causal/plain_b64",
        "source    default",
        "artifact  would build",
    ]


def test_why_a_batch_is_huge_is_told(monkeypatch):
    h200 = DeviceId("sm90-132sm", "sm_90a", "NVIDIA H200", 132, 4917, "9.0")
    monkeypatch.setattr(explain, "device_id", lambda device: h200)
    problem = Problem(KernelSpec("fwd", "bf16", 128, 128, True), 8, 32768, 32768, 32, 8)
    why = "2048 tokens or more in the mean, or 16384 in the longest sequence"
    lines = str(explain.explain_problem(problem, "cuda:0")).splitlines()
    assert f"regime    huge: {why}; served as long, as nothing is chosen for it" in lines


def test_why_a_batch_is_few_is_told_and_as_what_it_is_served(monkeypatch):
    h200 = DeviceId("sm90-132sm", "sm_90a", "NVIDIA H200", 132, 4917, "9.0")
    monkeypatch.setattr(explain, "device_id", lambda device: h200)
    problem = Problem(KernelSpec("fwd", "bf16", 128, 128, True), 3, 13389, 13389, 2, 2)
    lines = str(explain.explain_problem(problem, "cuda:0")).splitlines()
    why = "26778 query rows in all heads, less than 330 tiles of 128"
    assert f"regime    few: {why}; served as long, as nothing is chosen for it" in lines


def test_what_a_space_makes_of_the_heads_is_told(monkeypatch):
    space = type(jagtile.explain(**packed()).variant.space)
    monkeypatch.setattr(space, "remark", lambda self, heads, heads_kv: f"{heads} on {heads_kv}", raising=False)
    assert "tiles     4 on 2" in str(jagtile.explain(**packed())).splitlines()


def test_it_reads_the_users_choices(plain_spaces):
    slug = f"cpu-{host_isa()}"
    facts = DeviceFacts(slug=slug, label="", target="cpu", units=2, bandwidth_gbs=0.0, compute_capability=host_isa())
    entry = ChoiceEntry(default=plain_spaces(128))
    Database().write_choices(Choices(device=facts, specs={"cpu/fwd_fp32_d64": entry}), ship=False)
    found = jagtile.explain(**packed())
    assert (found.decision.source, found.variant.config.block) == ("user", 128)


def test_it_takes_nested_tensors_as_sdpa_does():
    x = torch.nested.nested_tensor_from_jagged(torch.ones(5, 4, 64), CU, min_seqlen=2, max_seqlen=3).transpose(1, 2)
    found = jagtile.explain(x, x, x)
    assert found.problem == Problem(KernelSpec("fwd", "fp32", 64, 64, False), 2, 5, 5, 4, 4, 3, 3)


def test_it_tells_the_kernel_with_dropout(monkeypatch):
    monkeypatch.setattr(type(spaces()[0]), "dropout", True, raising=False)
    monkeypatch.setattr(dropout, "why_no_dropout", lambda *case: None)
    assert jagtile.explain(**packed(), dropout_p=0.1).variant.name == "cpu/fwd_fp32_d64_drop/plain_b64"
    assert jagtile.explain(**packed(), dropout_p=0.0).problem.spec.name == "fwd_fp32_d64"


def test_dropout_without_kernels_is_refused_as_in_the_call(no_dropout):
    with pytest.raises(jagtile.UnsupportedError, match=r"dropout_p is 0\.1; served: 0"):
        jagtile.explain(**packed(), dropout_p=0.1)
    with pytest.raises(ValueError, match="dropout_p must be from 0 to 1"):
        jagtile.explain(**packed(), dropout_p=-1)


def test_bad_operands_raise_as_in_the_call():
    with pytest.raises(ValueError, match="k has head_dim 32, q 64"):
        jagtile.explain(**packed(k=torch.ones(5, 2, 32)))


@pytest.mark.parametrize(
    ("x", "reason"),
    [
        (torch.ones(5, 4, 64, dtype=torch.float64), "no kernel computes in torch.float64"),
        (torch.ones(5, 4, 264), "no kernel takes a head_dim above 256, such as 264"),
    ],
    ids=["float64", "a wide head"],
)
def test_what_no_kernel_covers_is_told(x, reason, recwarn):
    with pytest.raises(jagtile.UnsupportedError, match=f"{reason}: no kernel would run, slow operations of torch"):
        jagtile.explain(x, x, x, CU, CU)
    assert not recwarn.list


def test_a_kernel_in_memory_is_told(monkeypatch):
    monkeypatch.setattr(loader.kernel_table(), "holds", lambda variant, device: device == torch.device("cpu"))
    assert jagtile.explain(**packed()).artifact == "memory"


def test_a_cached_kernel_is_told_with_its_path(empty_world):
    name = jagtile.explain(**packed()).variant.name
    empty_world[name] = SimpleNamespace(origin="cache", path=Path("/somewhere/kernel.so"))
    assert jagtile.explain(**packed()).artifact == "cache: /somewhere/kernel.so"


def test_without_jit_a_missing_kernel_is_told():
    with settings.override(jit=False):
        assert jagtile.explain(**packed()).artifact == "none: not in the cache, and JAGTILE_JIT=0 forbids building it"


def test_a_missing_compiler_is_told(monkeypatch):
    def cached(variant):
        raise CompilerNotFoundError("no C++ compiler: tried CXX")

    monkeypatch.setattr(explain, "cached", cached)
    assert jagtile.explain(**packed()).artifact == "none: no C++ compiler: tried CXX"
