"""Encode real text with a small transformer on nested tensors, once with torch's attention and once with jagtile's.

    python examples/text_encoder.py [--device cuda] [--dtype bf16]

The text is Python's own standard library: every function of its modules is one sequence of bytes, ragged by nature.
The model is plain torch; jagtile takes over inside ``with jagtile.enabled()``. Prints by how much the outputs differ
and what the time was; exits with 1 where they differ by more than rounding explains.
"""

from __future__ import annotations

import argparse
import ast
import statistics
import sys
import sysconfig
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import jagtile

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Two computations of the same model, each rounding in its own order, differ by this much at most (relative, in norm).
AGREEMENT = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 3e-3}
BYTES = 256  # the vocabulary


@dataclass(frozen=True)
class Sizes:
    """Of the model and the data."""

    batches: int
    batch: int  # functions
    max_bytes: int  # of a function; longer ones are cut
    layers: int
    heads: int
    head_dim: int = 64


SIZES = {
    "cpu": Sizes(batches=3, batch=32, max_bytes=512, layers=2, heads=4),
    "cuda": Sizes(batches=8, batch=512, max_bytes=4096, layers=4, heads=16),
}


def functions(max_bytes: int) -> Iterator[bytes]:
    """The source of every function of the standard library's top-level modules, always in the same order."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        source = path.read_bytes()
        lines = source.splitlines(keepends=True)
        try:
            tree = ast.parse(source)
        except SyntaxError:
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                yield b"".join(lines[node.lineno - 1 : node.end_lineno])[:max_bytes]


class Batch(NamedTuple):
    """Nested tensors (B, j) of one raggedness."""

    tokens: torch.Tensor
    places: torch.Tensor  # of each token in its sequence


def nested_batches(sizes: Sizes, device: torch.device) -> list[Batch]:
    """The text in batches."""
    texts = functions(sizes.max_bytes)
    batches = []
    for _ in range(sizes.batches):
        sequences = [torch.tensor(list(text)) for text in islice(texts, sizes.batch)]
        lengths = [len(sequence) for sequence in sequences]
        offsets = torch.tensor([0, *accumulate(lengths)], device=device)
        tokens, places = (
            torch.nested.nested_tensor_from_jagged(
                torch.cat(rows).to(device), offsets, min_seqlen=min(lengths), max_seqlen=max(lengths)
            )
            for rows in (sequences, [torch.arange(length) for length in lengths])
        )
        batches.append(Batch(tokens, places))
    return batches


class Block(nn.Module):
    """A pre-norm transformer block on (B, j, E)."""

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        width = heads * head_dim
        self.heads, self.head_dim = heads, head_dim
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.project = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.norm_attention(x)
        query, key, value = (
            projection(normed).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        attended = scaled_dot_product_attention(query, key, value)
        x = x + self.project(attended.transpose(1, 2).flatten(-2))
        return x + self.mlp(self.norm_mlp(x))


class Encoder(nn.Module):
    """Bytes and their places (B, j) to features (B, j, E)."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width = sizes.heads * sizes.head_dim
        self.embed, self.position = nn.Embedding(BYTES, width), nn.Embedding(sizes.max_bytes, width)
        self.blocks = nn.ModuleList(Block(sizes.heads, sizes.head_dim) for _ in range(sizes.layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, batch: Batch) -> torch.Tensor:
        x = self.embed(batch.tokens) + self.position(batch.places)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def timed(model: Encoder, batch: Batch, attention: AbstractContextManager[object]) -> tuple[torch.Tensor, float]:
    """Packed features (total, E) and the seconds that they took."""
    cuda = batch.tokens.is_cuda
    if cuda:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    with attention:
        features = model(batch)
    if cuda:
        torch.cuda.synchronize()
    return features.values(), time.perf_counter() - begin


def compare(model: Encoder, batches: list[Batch], rounds: int) -> tuple[float, float, dict[str, float]]:
    """Largest relative (in norm) and absolute difference of a batch, and seconds for all batches."""
    seconds: dict[str, list[float]] = {"torch": [], "jagtile": []}
    worst_rel = worst_abs = 0.0
    for batch in batches:
        of_batch: dict[str, list[float]] = {"torch": [], "jagtile": []}
        for _ in range(rounds):
            expected, took = timed(model, batch, nullcontext())
            of_batch["torch"].append(took)
            features, took = timed(model, batch, jagtile.enabled())
            of_batch["jagtile"].append(took)
        difference = (features - expected).double()
        worst_rel = max(worst_rel, float(difference.norm() / expected.double().norm()))
        worst_abs = max(worst_abs, float(difference.abs().max()))
        for name, times in of_batch.items():
            seconds[name].append(statistics.median(times))
    return worst_rel, worst_abs, {name: sum(times) for name, times in seconds.items()}


def main() -> int:
    """Run the comparison; the process's exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bf16 on a GPU, fp32 on the CPU")
    parser.add_argument("--rounds", type=int, help="passes over each batch; default: 5 on a GPU, 1 on the CPU")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    dtype = arguments.dtype or ("bf16" if device.type == "cuda" else "fp32")
    sizes = SIZES[device.type]

    warnings.filterwarnings("ignore", message="The PyTorch API of nested tensors is in prototype stage")
    torch.manual_seed(0)
    model = Encoder(sizes).to(device, DTYPES[dtype]).eval()
    batches = nested_batches(sizes, device)
    lengths = [int(length) for batch in batches for length in batch.tokens.offsets().diff()]
    print(
        f"text      {len(lengths)} functions of Python's standard library as bytes: {min(lengths)} to {max(lengths)}, "
        f"median {statistics.median(lengths):g}, {sum(lengths)} tokens in {len(batches)} batches"
    )
    print(
        f"model     {sizes.layers} layers, {sizes.heads} heads of {sizes.head_dim}, {dtype}, on {device}, "
        f"torch {torch.__version__}"
    )
    with torch.no_grad():
        kernels = jagtile.warmup(sizes.head_dim, DTYPES[dtype], device=device)
        print(f"kernels   {', '.join(kernels)}")
        timed(model, batches[0], nullcontext())
        timed(model, batches[0], jagtile.enabled())
        rounds = arguments.rounds or (5 if device.type == "cuda" else 1)
        relative, absolute, seconds = compare(model, batches, rounds)
    agree = relative <= AGREEMENT[dtype]
    print(
        f"outputs   {'agree' if agree else 'DISAGREE'}: relative difference {relative:.2e} "
        f"(at most {AGREEMENT[dtype]:.0e}), max abs {absolute:.2e}"
    )
    for name in seconds:
        print(f"{name:9} {1e3 * seconds[name]:10.2f} ms for all batches, whole model")
    print(f"speed-up  {seconds['torch'] / seconds['jagtile']:.2f}x by jagtile's attention")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
