// x86-64 with AVX-512 F, BW, DQ and VL: 64-byte vectors.
#pragma once

#include <immintrin.h>

constexpr int kVectorBytes = 64;

#include "cpu/include/vector.h"

static inline Vec widen_fp16(HalfVec bits) { return (Vec)_mm512_cvtph_ps((__m256i)bits); }
static inline HalfVec narrow_fp16(Vec value) { return (HalfVec)_mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT); }

// The lower halves of a times b.
static inline LongVec multiply_words(LongVec a, uint32_t b) {
  return (LongVec)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
}

// 2^x for x <= 0; 0 for -inf.
template <int kDegree>
static inline Vec exp2_negative(Vec x) {
  const __m512 integer = _mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT);
  const Vec fraction = (Vec)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT);
  return (Vec)_mm512_scalef_ps((__m512)exp2_fraction<kDegree>(fraction), integer);
}
