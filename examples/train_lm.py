"""Train a small language model on real text in nested tensors, once with torch's attention and once with jagtile's.

    python examples/train_lm.py [--device cuda] [--dtype bf16] [--steps 300] [--plot curves.svg]

The text is Python's own standard library: every function of its modules is one sequence of bytes, ragged by nature.
Both start from the same weights and see the same batches; a step of one follows a step of the other. jagtile takes
over inside ``with jagtile.enabled()``, forward and backward. Prints losses and times; exits with 1 where the losses
differ by more than rounding explains. ``--plot`` needs matplotlib (the extra ``bench``).
"""

from __future__ import annotations

import argparse
import copy
import math
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from ragged_text import BYTES, Batch, byte_tokens, functions, nested_batch
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from transformer import Attention, Transformer, nested_attention

import jagtile

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# By how much two losses of a step, and of the held-out text in the end, may differ, relative.
AGREEMENT = {"fp32": 1e-5, "bf16": 2e-2}
REPORTS = 10  # lines of losses


@dataclass(frozen=True)
class Sizes:
    """Of the model and the data."""

    batch: int  # functions
    max_bytes: int  # of a function; longer ones are cut
    layers: int
    heads: int
    head_dim: int = 64
    held_out: int = 128  # functions that are not trained on
    learning_rate: float = 2e-3


SIZES = {
    "cpu": Sizes(batch=8, max_bytes=512, layers=2, heads=2),
    "cuda": Sizes(batch=128, max_bytes=2048, layers=6, heads=8, learning_rate=6e-4),
}


class Example(NamedTuple):
    """A batch and, packed (total,), the byte that follows each of its bytes."""

    batch: Batch
    targets: torch.Tensor


class Text:
    """Batches of functions in an order that is always the same, and some that are held out."""

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        self._sizes, self._device = sizes, device
        self._functions = [byte_tokens(text) for text in functions(sizes.max_bytes + 1) if len(text) > 1]
        self._rng = random.Random(0)
        self._rng.shuffle(self._functions)
        self.held_out = self._example(self._functions[: sizes.held_out])
        self._functions = self._functions[sizes.held_out :]
        self.lengths = [len(text) - 1 for text in self._functions]

    def draw(self) -> Example:
        """The next batch to train on."""
        return self._example(self._rng.sample(self._functions, self._sizes.batch))

    def _example(self, texts: Sequence[torch.Tensor]) -> Example:
        targets = torch.cat([text[1:] for text in texts])
        return Example(nested_batch([text[:-1] for text in texts], self._device), targets.to(self._device))


class LanguageModel(nn.Module):
    """The mean loss of predicting every next byte."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.body = Transformer(BYTES, sizes.max_bytes, sizes.layers, sizes.heads, sizes.head_dim)
        self.head = nn.Linear(sizes.heads * sizes.head_dim, BYTES)

    def forward(self, example: Example, attention: Attention) -> torch.Tensor:
        logits = self.head(self.body(*example.batch, attention).values())
        return cross_entropy(logits.float(), example.targets)


def attention_by_sequence(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A dense causal call for each sequence of nested tensors (B, j, heads, head_dim).

    It is torch's way on the CPU, where its nested attention refuses causal.
    """
    lengths = query.offsets().diff().tolist()
    sequences = zip(*(x.values().split(lengths) for x in (query, key, value)), strict=True)
    rows = [
        scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in sequence), is_causal=True)[0].transpose(0, 1)
        for sequence in sequences
    ]
    return torch.nested.nested_tensor_from_jagged(torch.cat(rows), query.offsets())


causal_nested_attention: Attention = partial(nested_attention, is_causal=True)


@dataclass
class Contender:
    """A model in training, with its way of attention."""

    model: LanguageModel
    attention: Attention
    around: Callable[[], AbstractContextManager[object]]  # of every forward
    autocast: torch.dtype | None
    learning_rate: float
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._optimizer = torch.optim.AdamW(self.model.parameters(), self.learning_rate)

    def step(self, example: Example) -> None:
        """Learn from one batch."""
        begin = time.perf_counter()
        loss = self._loss(example)
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.losses.append(loss.item())  # which waits for a GPU
        self.seconds.append(time.perf_counter() - begin)

    @torch.no_grad()
    def loss_on(self, example: Example) -> float:
        """Without learning from it."""
        return self._loss(example).item()

    def _loss(self, example: Example) -> torch.Tensor:
        device = example.targets.device.type
        with self.around(), torch.autocast(device, self.autocast, enabled=self.autocast is not None):
            return self.model(example, self.attention)


def contenders(sizes: Sizes, device: torch.device, dtype: str) -> dict[str, Contender]:
    """torch's and ours, with equal weights."""
    torch.manual_seed(0)
    model = LanguageModel(sizes).to(device)
    autocast = None if dtype == "fp32" else DTYPES[dtype]
    torchs = causal_nested_attention if device.type == "cuda" else attention_by_sequence
    return {
        name: Contender(copy.deepcopy(model), attention, around, autocast, sizes.learning_rate)
        for name, attention, around in (
            ("torch", torchs, nullcontext),
            ("jagtile", causal_nested_attention, jagtile.enabled),
        )
    }


def largest_difference(losses: Sequence[float], others: Sequence[float]) -> float:
    """Of two runs' losses of a step, relative; infinite where one is not finite."""
    differences = [abs(loss - other) / abs(other) for loss, other in zip(losses, others, strict=True)]
    return max(difference if math.isfinite(difference) else math.inf for difference in differences)


def warmed_up(sizes: Sizes, dtype: str, device: torch.device) -> str:
    """Which kernels jagtile trains with, or for want of them the reason."""
    kind = {"is_causal": True, "device": device}
    try:
        return ", ".join(jagtile.warmup(sizes.head_dim, DTYPES[dtype], training=True, **kind))
    except jagtile.UnsupportedError as reason:
        return f"none to train with ({reason}): torch's own attention trains both"


def plot(racing: dict[str, Contender], title: str, path: Path) -> None:
    """The losses against the step, and how far they are apart."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.fonttype"] = "none"  # text as text: a third of the size
    figure, (curves, apart) = pyplot.subplots(1, 2, figsize=(9.0, 3.6), layout="constrained")
    for style, (name, contender) in zip(("-", "--"), racing.items(), strict=True):
        curves.plot(contender.losses, style, label=name, linewidth=1)
    curves.set(xlabel="step", ylabel="loss, nats a byte", title=title)
    curves.legend()
    pairs = zip(*(contender.losses for contender in racing.values()), strict=True)
    apart.plot([abs(ours - theirs) / theirs for theirs, ours in pairs], linewidth=1)
    apart.set(xlabel="step", title="relative difference of the two losses")
    figure.savefig(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train both; the process's exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=AGREEMENT, help="of autocast; default: bf16 on a GPU, fp32 on the CPU")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the losses into FILE (.svg, .png)")
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error(f"--steps must be at least 1, got {options.steps}")
    device = torch.device(options.device)
    dtype = options.dtype or ("bf16" if device.type == "cuda" else "fp32")
    return train(SIZES[device.type], device, dtype, options.steps, options.plot)


def train(sizes: Sizes, device: torch.device, dtype: str, steps: int, picture: Path | None) -> int:
    """Train both side by side, and say how it went; the process's exit code."""
    warnings.filterwarnings("ignore", message="The PyTorch API of nested tensors is in prototype stage")
    text, racing = Text(sizes, device), contenders(sizes, device, dtype)
    parameters = sum(parameter.numel() for parameter in racing["torch"].model.parameters())
    described = f"{parameters / 1e6:.2g} M parameters, {dtype}, {device.type}"
    print(
        f"text      {len(text.lengths)} functions of Python's standard library as bytes: {min(text.lengths)} to "
        f"{max(text.lengths)}, median {statistics.median(text.lengths):g}; {sizes.batch} a step, "
        f"{sizes.held_out} held out"
    )
    print(
        f"model     {described}; {sizes.layers} layers, {sizes.heads} heads of {sizes.head_dim}, causal; "
        f"torch {torch.__version__}"
    )
    print(f"torch     {'its nested attention' if device.type == 'cuda' else 'a dense call for each sequence'}")
    print(f"kernels   {warmed_up(sizes, dtype, device)}", flush=True)
    torchs, ours = racing["torch"], racing["jagtile"]
    print(f"{'step':>9} {'torch':>10} {'jagtile':>10} {'difference':>11}")
    for step in range(steps):
        example = text.draw()
        for contender in racing.values():
            contender.step(example)
        if step % max(1, steps // REPORTS) == 0 or step == steps - 1:
            there, here = torchs.losses[-1], ours.losses[-1]
            print(f"{step:9} {there:10.4f} {here:10.4f} {abs(here - there) / there:11.1e}", flush=True)
    held_out = {name: contender.loss_on(text.held_out) for name, contender in racing.items()}
    print(f"held out  torch {held_out['torch']:.4f}, jagtile {held_out['jagtile']:.4f}")
    apart = largest_difference([*ours.losses, held_out["jagtile"]], [*torchs.losses, held_out["torch"]])
    agree = apart <= AGREEMENT[dtype]
    print(
        f"losses    {'agree' if agree else 'DISAGREE'}: of every step, at most {apart:.1e} apart, relative "
        f"(at most {AGREEMENT[dtype]:.0e})"
    )
    for name, contender in racing.items():
        print(
            f"{name:9} {sum(contender.seconds):8.2f} s for all steps, whole model; "
            f"median {1e3 * statistics.median(contender.seconds):.1f} ms a step"
        )
    print(f"speed-up  {sum(torchs.seconds) / sum(ours.seconds):.2f}x by jagtile's attention")
    if picture is not None:
        plot(racing, described, picture)
        print(f"plot      {picture}")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
