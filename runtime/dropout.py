"""Dropout of attention weights: its rate, its random numbers, and which weights they keep.

A weight is kept where 16 bits of Philox4x32-7 (Salmon et al., 2011) are below ``Dropout.kept``. The generator's key is
the seed, its counter (query row, key row / 8, head, offset), rows of the packed tensors, so that a mask is the same for
every kernel, tile and number of threads, in the forward, the backward and a recomputation. Of the four words that a
counter gives, word i decides for the keys 8 n + 2 i (lower half) and 8 n + 2 i + 1 (upper half).
"""

from __future__ import annotations

from functools import lru_cache
from operator import index
from typing import Any, NamedTuple

import torch

from jagtile.generator.spec import KernelSpec
from jagtile.runtime.errors import UnsupportedError
from jagtile.runtime.problem import DTYPE_NAMES

WEIGHTS = 1 << 16  # ``kept`` counts in parts of this
KEYS_A_COUNTER = 8
_ROUNDS = 7
_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)

KEEP_ALL = (WEIGHTS, 0, 0)  # as Dropout.on_host


class Dropout(NamedTuple):
    """What a call drops. The mask's definition is in this module's first lines."""

    kept: int  # of 65536 weights so many are kept
    state: torch.Tensor  # (2,) int64 on the operands' device: seed, offset, of which the lower 32 bits count

    @property
    def scale(self) -> float:
        """By what the kept weights are multiplied; exactly one over the rate at which they are kept."""
        return WEIGHTS / self.kept if self.kept else 0.0

    def on_host(self) -> tuple[int, int, int]:
        """kept, seed and offset as unsigned numbers. It waits for the device."""
        seed, offset = self.state.tolist()
        return self.kept, seed & (1 << 64) - 1, offset & (1 << 64) - 1


def check_dropout_p(dropout_p: object) -> float:
    """TypeError unless it is a number, ValueError unless it is from 0 to 1."""
    if not isinstance(dropout_p, (float, int)):
        raise TypeError(f"dropout_p must be a float, got {type(dropout_p).__name__}")
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p must be from 0 to 1, got {dropout_p}")
    return float(dropout_p)


def check_dropout_served(dropout_p: float, q: torch.Tensor, v: torch.Tensor, is_causal: bool) -> None:
    """UnsupportedError where a kernel serves the packed operands but none of its target has dropout."""
    reason = _reason_of(q.dtype, index(q.shape[2]), index(v.shape[2]), is_causal, q.device)  # index: no symbols
    if reason:
        raise UnsupportedError(f"dropout_p is {dropout_p}; served: 0 ({reason})")


def _reason_of(*case: Any) -> str | None:
    return why_no_dropout(*case)


# What torch.compiler.assume_constant_result sets; the decorator itself would import the whole compiler.
_reason_of._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache(maxsize=256)
def why_no_dropout(
    dtype: torch.dtype, head_dim: int, head_dim_v: int, is_causal: bool, device: torch.device
) -> str | None:
    """The reason; None where some kernel has it. Fake tensors of a GPU that is not here ask any GPU's target."""
    from jagtile.generator.tile import spaces_of, targets
    from jagtile.runtime.device import device_id

    if device.type == "meta":
        return None
    spec = KernelSpec("fwd", DTYPE_NAMES[dtype], head_dim, head_dim_v, is_causal, dropout=True)
    there = device.type != "cuda" or torch.cuda.is_available()
    asked = [device_id(device).target] if there else [target for target in targets() if target != "cpu"]
    if any(spaces_of(target, spec) for target in asked):
        return None
    return f"no kernel for {spec.name} on target {' or '.join(asked)}"


def arguments_of(
    dropout_p: float, q: torch.Tensor, v: torch.Tensor, is_causal: bool, by_kernel: bool
) -> tuple[float, torch.Tensor]:
    """What a call with dropout has behind its other arguments. UnsupportedError as above."""
    if by_kernel:
        check_dropout_served(dropout_p, q, v, is_causal)
    return dropout_p, draw_state(q.device)


def draw_state(device: torch.device) -> torch.Tensor:
    """``Dropout.state`` from torch's default generator of the device, without a wait."""
    return torch.randint(1 << 62, (2,), dtype=torch.int64, device=device)


def dropout_of(dropout_p: float, state: torch.Tensor | None) -> Dropout:
    """Of a rate, which is rounded to a multiple of 1 / 65536, above 0."""
    if state is None:
        raise ValueError(f"dropout_p is {dropout_p} and dropout_state None: dropout needs a seed and an offset")
    return Dropout(round((1 - dropout_p) * WEIGHTS), state)


def keep_mask(dropout: Dropout, rows: torch.Tensor, heads: int, first_key: int, keys: int) -> torch.Tensor:
    """(heads, len(rows), keys) bool: what is kept of the weights of packed query rows on consecutive packed key rows.

    In torch's operations: for what no kernel computes, and for kernels to be compared with.
    """
    device, skipped = rows.device, first_key % KEYS_A_COUNTER
    groups = torch.arange(-(-(skipped + keys) // KEYS_A_COUNTER), device=device) + first_key // KEYS_A_COUNTER
    head = torch.arange(heads, device=device)
    seed, offset = dropout.state.unbind()
    counter = ((rows & _WORD)[:, None], groups & _WORD, head[:, None, None], offset & _WORD)
    bits = philox(counter, (seed & _WORD, seed >> 32 & _WORD))
    kept = [half < dropout.kept for word in bits for half in (word & 0xFFFF, word >> 16)]
    return torch.stack(kept, dim=-1).flatten(2)[..., skipped : skipped + keys]


def philox(
    counter: tuple[torch.Tensor, ...], key: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Philox4x32-7 of int64 tensors that hold 32-bit words."""
    a, b, c, d = counter
    low, high = key
    for _ in range(_ROUNDS):
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]  # modulo 2^64: the bits are those of unsigned numbers
        a, b, c, d = (
            (second >> 32 & _WORD) ^ b ^ low,
            second & _WORD,
            (first >> 32 & _WORD) ^ d ^ high,
            first & _WORD,
        )
        low, high = low + _WEYL[0] & _WORD, high + _WEYL[1] & _WORD
    return a, b, c, d
