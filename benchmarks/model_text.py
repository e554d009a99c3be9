"""What the model benchmark runs: sizes of models, and batches of real text in word tokens."""

from __future__ import annotations

import random
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
from ragged_text import documents, functions

Tokens = npt.NDArray[np.int64]

_WORD = re.compile(rb"\w+|\s+|[^\w\s]")
_MASKED_SHARE = 0.15  # of the encoder's tokens, as in BERT (Devlin et al. 2019)
_PLENTY = 1 << 20  # bytes: no function is longer


@dataclass(frozen=True)
class Model:
    """A transformer, and how it is fed: as an encoder it fills masked words in, as a decoder it predicts next words."""

    name: str  # "encoder" or "decoder"
    layers: int
    heads: int
    head_dim: int
    vocabulary: int
    max_length: int  # longer sequences are cut
    batch: int  # sequences
    batches: int
    pool: int | None = None  # the first texts that sequences are drawn from; None is all

    @property
    def is_causal(self) -> bool:
        return self.name == "decoder"


SIZES = {
    "tiny": (
        Model("encoder", 2, 2, 16, vocabulary=256, max_length=48, batch=6, batches=2, pool=60),
        Model("decoder", 2, 2, 16, vocabulary=256, max_length=64, batch=4, batches=2, pool=60),
    ),
    "small": (
        Model("encoder", 4, 4, 64, vocabulary=4096, max_length=256, batch=16, batches=2),
        Model("decoder", 4, 4, 64, vocabulary=4096, max_length=512, batch=8, batches=2),
    ),
    # BERT-base and the smallest GPT-2, vocabularies padded to multiples of 64, as is usual in training. An odd number
    # of columns takes slow products, or is padded, by trials that the compiler makes beside those of the other forms.
    "base": (
        Model("encoder", 12, 12, 64, vocabulary=30528, max_length=512, batch=128, batches=4),
        Model("decoder", 12, 12, 64, vocabulary=50304, max_length=2048, batch=32, batches=4),
    ),
}


@dataclass(frozen=True)
class TextBatch:
    """On the host, in numpy's arrays, which cross to other processes."""

    sequences: tuple[Tokens, ...]  # (length,) each
    rows: Tokens  # (n,): the packed rows whose features predict
    targets: Tokens  # (n,): what

    @property
    def tokens(self) -> int:
        return sum(len(sequence) for sequence in self.sequences)

    @property
    def padded_tokens(self) -> int:
        return len(self.sequences) * max(len(sequence) for sequence in self.sequences)

    def first(self, count: int) -> TextBatch:
        """The batch of its first sequences; where they predict nothing, their first row does."""
        kept = self.sequences[:count]
        inside = self.rows < sum(len(sequence) for sequence in kept)
        if not inside.any():
            return TextBatch(kept, np.zeros(1, np.int64), self.targets[:1])
        return TextBatch(kept, self.rows[inside], self.targets[inside])


@dataclass(frozen=True)
class TextFacts:
    """How ragged the batches of a model are."""

    sequences: int
    tokens: int
    padded_tokens: int
    shortest: int
    longest: int


def facts_of(texts: Sequence[TextBatch]) -> TextFacts:
    lengths = [len(sequence) for text in texts for sequence in text.sequences]
    return TextFacts(len(lengths), sum(lengths), sum(text.padded_tokens for text in texts), min(lengths), max(lengths))


@lru_cache(maxsize=2)  # a model is raced several times
def text_batches(model: Model, seed: int = 0) -> tuple[TextBatch, ...]:
    """Batches of sequences that are drawn at random: functions for the encoder, whole classes too for the decoder.

    Words are numbered by how frequent they are; the two last numbers are those of rare words and of masked ones.
    """
    rng = random.Random(seed)
    texts = islice(documents() if model.is_causal else functions(_PLENTY), model.pool)
    words = [_WORD.findall(text)[: model.max_length + 1] for text in texts]
    counts = Counter(word for text in words for word in text)
    rare, masked = model.vocabulary - 2, model.vocabulary - 1
    numbers = {word: number for number, (word, _) in enumerate(counts.most_common(rare))}
    sequences = [np.array([numbers.get(word, rare) for word in text]) for text in words if len(text) > 1]
    drawn = (rng.sample(sequences, model.batch) for _ in range(model.batches))
    if model.is_causal:
        return tuple(_next_words(sequences) for sequences in drawn)
    return tuple(_masked_words([s[: model.max_length] for s in sequences], masked, rng) for sequences in drawn)


def _next_words(sequences: Sequence[Tokens]) -> TextBatch:
    inputs = tuple(sequence[:-1] for sequence in sequences)
    return TextBatch(inputs, np.arange(sum(map(len, inputs))), np.concatenate([s[1:] for s in sequences]))


def _masked_words(sequences: Sequence[Tokens], masked: int, rng: random.Random) -> TextBatch:
    packed = np.concatenate(sequences)
    rows = np.array(sorted(rng.sample(range(len(packed)), max(1, int(_MASKED_SHARE * len(packed))))))
    targets = packed[rows]
    packed[rows] = masked
    borders = np.cumsum([len(sequence) for sequence in sequences])[:-1]
    return TextBatch(tuple(np.split(packed, borders)), rows, targets)
