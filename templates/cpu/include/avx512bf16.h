// x86-64 with AVX-512 and its bf16 dot product: a lane of an operand is a pair of bf16 numbers.
#pragma once

#include "cpu/include/avx512.h"

// c + a0 b0 + a1 b1 of the two halves of each lane.
static inline Vec multiply_add(Vec c, WordVec a, WordVec b) {
  return (Vec)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
}

static inline HalfVec narrow_bf16(Vec value) { return (HalfVec)_mm512_cvtneps_pbh((__m512)value); }

// Rounds to bf16; the halves of a lane are low and high.
static inline WordVec pack_pairs(Vec low, Vec high) {
  return __builtin_convertvector(narrow_bf16(low), WordVec) | __builtin_convertvector(narrow_bf16(high), WordVec) << 16;
}
