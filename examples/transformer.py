"""A small transformer in plain torch whose sequences may be of any form: nested, packed or padded."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

# Attention within each sequence, of query, key and value (..., tokens, heads, head_dim), in the same form.
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def nested_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, is_causal: bool = False
) -> torch.Tensor:
    """torch's function on nested tensors (B, j, heads, head_dim): jagtile's inside ``with jagtile.enabled()``."""
    heads_first = (x.transpose(1, 2) for x in (query, key, value))
    return scaled_dot_product_attention(*heads_first, is_causal=is_causal).transpose(1, 2)


class Block(nn.Module):
    """A pre-norm transformer block on (..., tokens, width)."""

    def __init__(self, heads: int, head_dim: int, expansion: int) -> None:
        super().__init__()
        width = heads * head_dim
        self.heads, self.head_dim = heads, head_dim
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.project = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, expansion * width), nn.GELU(), nn.Linear(expansion * width, width))

    def forward(self, x: torch.Tensor, attention: Attention) -> torch.Tensor:
        normed = self.norm_attention(x)
        query, key, value = (
            projection(normed).unflatten(-1, (self.heads, self.head_dim))
            for projection in (self.query, self.key, self.value)
        )
        x = x + self.project(attention(query, key, value).flatten(-2))
        return x + self.mlp(self.norm_mlp(x))


class Transformer(nn.Module):
    """Tokens and their places (..., tokens) to features (..., tokens, width)."""

    def __init__(
        self, vocabulary: int, max_length: int, layers: int, heads: int, head_dim: int = 64, expansion: int = 4
    ) -> None:
        super().__init__()
        width = heads * head_dim
        self.embed, self.position = nn.Embedding(vocabulary, width), nn.Embedding(max_length, width)
        self.blocks = nn.ModuleList(Block(heads, head_dim, expansion) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(
        self, tokens: torch.Tensor, places: torch.Tensor, attention: Attention = nested_attention
    ) -> torch.Tensor:
        x = self.embed(tokens) + self.position(places)
        for block in self.blocks:
            x = block(x, attention)
        return self.norm(x)
