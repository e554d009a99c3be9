// AArch64: 16-byte vectors and conversions of fp16.
#pragma once

#include <arm_neon.h>

constexpr int kVectorBytes = 16;

#include "cpu/include/exp2.h"

static inline Vec widen_fp16(HalfVec bits) { return (Vec)vcvt_f32_f16((float16x4_t)bits); }
static inline HalfVec narrow_fp16(Vec value) { return (HalfVec)vcvt_f16_f32((float32x4_t)value); }

// The lower halves of a times b.
static inline LongVec multiply_words(LongVec a, uint32_t b) {
  return (LongVec)vmull_u32(vmovn_u64((uint64x2_t)a), vdup_n_u32(b));
}
