"""Which weights dropout keeps, written down a second time: Philox4x32 in NumPy's unsigned integers."""

from __future__ import annotations

import numpy as np

WORD = np.uint64(0xFFFFFFFF)


def philox(counter, key, rounds: int = 7) -> list[np.ndarray]:
    """Four words from a counter of four and a key of two (Salmon et al., 2011)."""
    c = [np.asarray(word, dtype=np.uint64) for word in counter]
    k = [int(word) for word in key]
    for _ in range(rounds):
        products = [c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)]
        (high0, low0), (high1, low1) = ((product >> np.uint64(32), product & WORD) for product in products)
        c = [high1 ^ c[1] ^ np.uint64(k[0]), low1, high0 ^ c[3] ^ np.uint64(k[1]), low0]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def kept_weights(kept: int, seed: int, offset: int, heads: int, rows: range, keys: range) -> np.ndarray:
    """(heads, rows, keys) bool: 16 bits for each weight, eight weights a counter (docs/dropout.md)."""
    if not rows or not keys:
        return np.zeros((heads, len(rows), len(keys)), dtype=bool)
    row, group = np.array(rows)[:, None], np.arange(keys.start // 8, -(-keys.stop // 8))
    words = philox((row, group, np.arange(heads)[:, None, None], offset % 2**32), (seed % 2**32, (seed >> 32) % 2**32))
    bits = np.stack(np.broadcast_arrays(*words), axis=-1).astype("<u4").view("<u2").reshape(heads, len(rows), -1)
    return bits[..., keys.start % 8 :][..., : len(keys)] < kept
