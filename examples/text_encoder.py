"""Encode real text with a small transformer on nested tensors, once with torch's attention and once with jagtile's.

    python examples/text_encoder.py [--device cuda] [--dtype bf16]

The text is Python's own standard library: every function of its modules is one sequence of bytes, ragged by nature.
The model is plain torch; jagtile takes over inside ``with jagtile.enabled()``. Prints by how much the outputs differ
and what the time was; exits with 1 where they differ by more than rounding explains.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice

import torch
from ragged_text import BYTES, Batch, byte_tokens, functions, nested_batch
from transformer import Transformer

import jagtile

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Two computations of the same model, each rounding in its own order, differ by this much at most (relative, in norm).
AGREEMENT = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 3e-3}


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


def nested_batches(sizes: Sizes, device: torch.device) -> list[Batch]:
    """The text in batches."""
    texts = map(byte_tokens, functions(sizes.max_bytes))
    return [nested_batch(list(islice(texts, sizes.batch)), device) for _ in range(sizes.batches)]


def encoder(sizes: Sizes) -> Transformer:
    """Of bytes."""
    return Transformer(BYTES, sizes.max_bytes, sizes.layers, sizes.heads, sizes.head_dim, expansion=2)


def timed(model: Transformer, batch: Batch, attention: AbstractContextManager[object]) -> tuple[torch.Tensor, float]:
    """Packed features (total, E) and the seconds that they took."""
    cuda = batch.tokens.is_cuda
    if cuda:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    with attention:
        features = model(*batch)
    if cuda:
        torch.cuda.synchronize()
    return features.values(), time.perf_counter() - begin


def compare(model: Transformer, batches: list[Batch], rounds: int) -> tuple[float, float, dict[str, float]]:
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
    model = encoder(sizes).to(device, DTYPES[dtype]).eval()
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
