// Philox4x32-7: random bits as a function of a counter and a key (Salmon et al., "Parallel random numbers: as easy as 1,
// 2, 3", 2011). Seven rounds, as in FlashAttention: the fewest that pass BigCrush.
#pragma once

#include "cpu/include/vector.h"

// A counter of four words becomes four words of bits. Each 64-bit lane computes one counter's in its lower halves; the
// upper ones hold noise.
static inline void philox(LongVec (&words)[4], uint64_t key) {
  uint64_t low = key & 0xffffffff, high = key >> 32;
#pragma GCC unroll 7
  for (int round = 0; round < 7; ++round) {
    const LongVec first = multiply_words(words[0], 0xD2511F53), second = multiply_words(words[2], 0xCD9E8D57);
    words[0] = second >> 32 ^ words[1] ^ low;
    words[1] = second;
    words[2] = first >> 32 ^ words[3] ^ high;
    words[3] = first;
    low = (low + 0x9E3779B9) & 0xffffffff;
    high = (high + 0xBB67AE85) & 0xffffffff;
  }
}
