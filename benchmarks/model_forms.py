"""Ways to take a ragged batch through one transformer: nested, packed or padded, each with an attention of its own."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention

import jagtile

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
from ragged_text import Batch, nested_batch
from transformer import Transformer, nested_attention

Inputs = Any  # a NamedTuple of the form's own


class Form(Protocol):
    """One way."""

    name: str
    jagtile: bool  # whether jagtile is to serve

    def refuses(self, is_causal: bool, dtype: torch.dtype, device: torch.device, compiled: bool) -> str | None:
        """Why it is not run; None where it is."""

    def inputs(self, sequences: Sequence[torch.Tensor], device: torch.device) -> Inputs:
        """What ``features`` takes, on the device, of tokens (length,) each."""

    def features(self, body: Transformer, inputs: Inputs, is_causal: bool) -> torch.Tensor:
        """Packed features (total, width)."""


class Nested:
    """Nested tensors with cached lengths, through ``F.scaled_dot_product_attention``."""

    def __init__(self, name: str, *, jagtile: bool) -> None:
        self.name, self.jagtile = name, jagtile

    def refuses(self, is_causal: bool, dtype: torch.dtype, device: torch.device, compiled: bool) -> str | None:
        if is_causal and device.type == "cpu" and not self.jagtile:
            return "torch's nested attention is not causal on the CPU"
        return None

    def inputs(self, sequences: Sequence[torch.Tensor], device: torch.device) -> Batch:
        return nested_batch(sequences, device)

    def features(self, body: Transformer, inputs: Batch, is_causal: bool) -> torch.Tensor:
        return body(inputs.tokens, inputs.places, partial(nested_attention, is_causal=is_causal)).values()


class PackedInputs(NamedTuple):
    """(total,), (total,), (B+1,) int32, the longest length."""

    tokens: torch.Tensor
    places: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int


class _Packed:
    """Sequences behind one another, without nested tensors."""

    def inputs(self, sequences: Sequence[torch.Tensor], device: torch.device) -> PackedInputs:
        lengths = [len(sequence) for sequence in sequences]
        return PackedInputs(
            torch.cat(list(sequences)).to(device),
            torch.cat([torch.arange(length) for length in lengths]).to(device),
            torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device),
            max(lengths),
        )


class JagtilePacked(_Packed):
    """``jagtile.varlen_attention``."""

    name, jagtile = "jagtile-varlen", True

    def refuses(self, is_causal: bool, dtype: torch.dtype, device: torch.device, compiled: bool) -> str | None:
        return None

    def features(self, body: Transformer, inputs: PackedInputs, is_causal: bool) -> torch.Tensor:
        cu, longest = inputs.cu_seqlens, inputs.max_seqlen

        def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            return jagtile.varlen_attention(query, key, value, cu, cu, longest, longest, is_causal=is_causal)

        return body(inputs.tokens, inputs.places, attention)


class TorchPacked(_Packed):
    """``torch.nn.attention.varlen.varlen_attn``."""

    name, jagtile = "torch-varlen", False

    def refuses(self, is_causal: bool, dtype: torch.dtype, device: torch.device, compiled: bool) -> str | None:
        if device.type != "cuda":
            return "CUDA only"
        if find_spec("torch.nn.attention.varlen") is None:
            return "this torch has no torch.nn.attention.varlen"
        return "computes in bf16 and fp16" if dtype == torch.float32 else None

    def features(self, body: Transformer, inputs: PackedInputs, is_causal: bool) -> torch.Tensor:
        from torch.nn.attention.varlen import varlen_attn

        cu, longest, window = inputs.cu_seqlens, inputs.max_seqlen, (-1, 0 if is_causal else -1)

        def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            return varlen_attn(query, key, value, cu, cu, longest, longest, window_size=window)

        return body(inputs.tokens, inputs.places, attention)


class TorchLoop(_Packed):
    """A Python loop of dense calls over the sequences; in float32 what everybody is compared with."""

    name, jagtile = "torch-loop", False

    def refuses(self, is_causal: bool, dtype: torch.dtype, device: torch.device, compiled: bool) -> str | None:
        return "would be compiled for every batch anew" if compiled else None

    def features(self, body: Transformer, inputs: PackedInputs, is_causal: bool) -> torch.Tensor:
        lengths = inputs.cu_seqlens.diff().tolist()

        def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            rows = []
            for sequence in zip(*(x.split(lengths) for x in (query, key, value)), strict=True):
                heads_first = (x.transpose(0, 1).unsqueeze(0) for x in sequence)
                rows.append(scaled_dot_product_attention(*heads_first, is_causal=is_causal)[0].transpose(0, 1))
            return torch.cat(rows)

        return body(inputs.tokens, inputs.places, attention)


class PaddedInputs(NamedTuple):
    """(B, L), (1, L), which of them are tokens as a mask (B, 1, 1, L), and their places in (B*L,)."""

    tokens: torch.Tensor
    places: torch.Tensor
    mask: torch.Tensor
    kept: torch.Tensor


class Padded:
    """Padding at the end and dense ``F.scaled_dot_product_attention``, by whichever backend torch takes.

    A causal query sees no padding that lies behind it, so that the decoder needs no mask beside ``is_causal``.
    """

    name, jagtile = "padded", False

    def refuses(self, is_causal: bool, dtype: torch.dtype, device: torch.device, compiled: bool) -> str | None:
        return None

    def inputs(self, sequences: Sequence[torch.Tensor], device: torch.device) -> PaddedInputs:
        tokens = torch.nn.utils.rnn.pad_sequence(list(sequences), batch_first=True)
        lengths = torch.tensor([len(sequence) for sequence in sequences])
        places = torch.arange(tokens.shape[1])[None]
        mask = places < lengths[:, None]
        found = (tokens, places, mask[:, None, None], mask.flatten().nonzero().squeeze(1))
        return PaddedInputs(*(x.to(device) for x in found))

    def features(self, body: Transformer, inputs: PaddedInputs, is_causal: bool) -> torch.Tensor:
        mask = None if is_causal else inputs.mask

        def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            heads_first = (x.transpose(1, 2) for x in (query, key, value))
            return scaled_dot_product_attention(*heads_first, attn_mask=mask, is_causal=is_causal).transpose(1, 2)

        return body(inputs.tokens, inputs.places, attention).flatten(0, 1)[inputs.kept]


REFERENCE = TorchLoop.name
FORMS: dict[str, Form] = {
    form.name: form
    for form in (
        Nested("jagtile-njt", jagtile=True),
        JagtilePacked(),
        Nested("torch-njt", jagtile=False),
        TorchPacked(),
        Padded(),
        TorchLoop(),
    )
}
