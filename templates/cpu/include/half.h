// Conversions of fp16 by integer arithmetic, for instruction sets without their own.
#pragma once

#include "cpu/include/vector.h"

static inline Vec widen_fp16(HalfVec bits) {
  const WordVec word = __builtin_convertvector(bits, WordVec);
  const WordVec magnitude = (word & 0x7fff) << 13;
  WordVec value = (WordVec)((Vec)magnitude * broadcast(0x1p112f));  // rebias the exponent; subnormals included
  value = select(magnitude >= 0x0f800000, value | 0x7f800000, value);  // infinity and NaN
  return (Vec)(value | (word & 0x8000) << 16);
}

// Rounds to nearest even.
static inline HalfVec narrow_fp16(Vec value) {
  const WordVec word = (WordVec)value;
  const WordVec magnitude = word & 0x7fffffff;
  const WordVec rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
  WordVec half = (rounded - 0x38000000) >> 13;
  half = select(magnitude < 0x38800000, (WordVec)((Vec)magnitude + 0.5f) - 0x3f000000, half);  // subnormal
  half = select(rounded >= 0x47800000, broadcast(uint32_t{0x7c00}), half);                      // overflow
  half = select(magnitude > 0x7f800000, broadcast(uint32_t{0x7e00}), half);                     // NaN
  return __builtin_convertvector(half | (word >> 16 & 0x8000), HalfVec);
}
