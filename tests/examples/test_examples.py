"""The examples, the code of the README and the scripts do what they say."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import text_encoder
import torch
from ragged_text import functions

import jagtile

ROOT = Path(__file__).resolve().parents[2]


def test_the_text_is_ragged_cut_where_it_is_too_long_and_always_the_same():
    first = [text for text, _ in zip(functions(300), range(50), strict=False)]
    assert first == [text for text, _ in zip(functions(300), range(50), strict=False)]
    assert len({len(text) for text in first}) > 10
    assert max(map(len, first)) == 300


def test_tokens_and_places_have_one_raggedness():
    sizes = text_encoder.Sizes(batches=2, batch=3, max_bytes=40, layers=1, heads=1)
    for tokens, places in text_encoder.nested_batches(sizes, torch.device("cpu")):
        assert tokens.offsets() is places.offsets()
        for row, numbers in zip(tokens.unbind(), places.unbind(), strict=True):
            assert numbers.tolist() == list(range(len(row)))


def test_the_encoder_computes_the_same_with_jagtile_as_with_torch():
    sizes = text_encoder.Sizes(batches=1, batch=4, max_bytes=60, layers=1, heads=2, head_dim=16)
    torch.manual_seed(0)
    model = text_encoder.encoder(sizes).eval()
    with torch.no_grad():
        relative, _, seconds = text_encoder.compare(
            model, text_encoder.nested_batches(sizes, torch.device("cpu")), rounds=1
        )
    assert relative <= text_encoder.AGREEMENT["fp32"]
    assert set(seconds) == {"torch", "jagtile"}


def test_the_code_of_the_readme_runs(capsys):
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(block, "README.md", "exec"), names)
    assert "variant" in capsys.readouterr().out
    out = names["out"]
    assert isinstance(out, torch.Tensor)
    assert out.is_nested
    expected = jagtile.varlen_attention(names["q"], names["k"], names["v"], names["cu_seqlens"], names["cu_seqlens"])
    torch.testing.assert_close(out.transpose(1, 2).values(), expected)


@pytest.mark.parametrize("script", ["examples/quickstart.sh", "tests/run.sh", ".ci/run", ".ci/setup.sh"])
def test_scripts_are_valid_bash(script):
    subprocess.run(["bash", "-n", ROOT / script], check=True)
