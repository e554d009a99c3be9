"""Training the small language model: both ways learn the same, and what does not is found out."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import train_lm
from transformer import nested_attention

import jagtile
from jagtile.runtime.routes import BACKWARD_ROUTES

CPU = torch.device("cpu")
TINY = train_lm.Sizes(batch=3, max_bytes=40, layers=1, heads=2, head_dim=16, held_out=2)


def test_both_learn_the_same_through_kernels_of_ours(capsys):
    assert train_lm.train(TINY, CPU, "fp32", steps=4, picture=None) == 0
    said = capsys.readouterr().out
    assert "fwd_fp32_d16_causal" in said
    assert "bwd_fp32_d16_causal" in said
    assert "losses    agree" in said
    assert any(route[:4] == (torch.float32, 16, 16, True) for route in BACKWARD_ROUTES)


def test_an_attention_that_sees_the_future_is_found_out(capsys, monkeypatch):
    monkeypatch.setattr(train_lm, "causal_nested_attention", partial(nested_attention, is_causal=False))
    assert train_lm.train(TINY, CPU, "fp32", steps=3, picture=None) == 1
    assert "losses    DISAGREE" in capsys.readouterr().out


def test_lost_gradients_are_found_out(monkeypatch):
    def detached(query, key, value):
        return nested_attention(query, key.detach(), value, is_causal=True)

    monkeypatch.setattr(train_lm, "causal_nested_attention", detached)
    assert train_lm.train(TINY, CPU, "fp32", steps=6, picture=None) == 1


def test_the_targets_are_the_bytes_that_follow():
    text = train_lm.Text(TINY, CPU)
    (tokens, places), targets = text.draw()
    assert tokens.size(0) == TINY.batch
    begin = 0
    for sequence, numbers in zip(tokens.unbind(), places.unbind(), strict=True):
        assert numbers.tolist() == list(range(len(sequence)))
        end = begin + len(sequence)
        assert torch.equal(sequence[1:], targets[begin : end - 1])
        begin = end
    assert begin == len(targets)


def test_the_order_of_batches_is_always_the_same():
    first, again = (train_lm.Text(TINY, CPU) for _ in range(2))
    for _ in range(3):
        assert torch.equal(first.draw().targets, again.draw().targets)


@pytest.mark.parametrize(("losses", "apart"), [([2.0, 1.1], 0.1), ([2.0, float("nan")], float("inf"))])
def test_the_largest_difference_of_two_runs(losses, apart):
    assert train_lm.largest_difference(losses, [2.0, 1.0]) == pytest.approx(apart)


def test_it_says_why_there_are_no_kernels_to_train_with(monkeypatch):
    def refuse(*kind, **rest):
        raise jagtile.UnsupportedError("no kernel for bwd_bf16_d16_causal on GPUs")

    monkeypatch.setattr(jagtile, "warmup", refuse)
    assert train_lm.warmed_up(TINY, "bf16", CPU).startswith("none to train with (no kernel for bwd_bf16_d16_causal")


def test_it_draws_the_losses(tmp_path):
    pytest.importorskip("matplotlib", reason="the plot needs the extra bench")
    racing = train_lm.contenders(TINY, CPU, "fp32")
    for contender in racing.values():
        contender.losses, contender.seconds = [2.0, 1.0], [0.1, 0.1]
    train_lm.plot(racing, "title", tmp_path / "curves.svg")
    assert "</svg>" in (tmp_path / "curves.svg").read_text()


@pytest.mark.parametrize("option", ["--steps=0", "--dtype=fp64"])
def test_bad_options_are_refused(option, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        train_lm.main([option])
    assert option.partition("=")[0] in capsys.readouterr().err
