// x86-64 with AVX2, FMA and F16C: 32-byte vectors.
#pragma once

#include <immintrin.h>

constexpr int kVectorBytes = 32;

#include "cpu/include/exp2.h"

static inline Vec widen_fp16(HalfVec bits) { return (Vec)_mm256_cvtph_ps((__m128i)bits); }
static inline HalfVec narrow_fp16(Vec value) { return (HalfVec)_mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT); }

// The lower halves of a times b.
static inline LongVec multiply_words(LongVec a, uint32_t b) {
  return (LongVec)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
}
