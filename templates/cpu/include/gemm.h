// The register-blocked product that both GEMMs of attention are made of.
#pragma once

#include "cpu/include/vector.h"

static inline Vec splat(float value) { return broadcast(value); }
static inline WordVec splat(uint32_t value) { return broadcast(value); }

// sum[kRows][kVectors] += a b, where b[depth][kVectors] are vectors and a[row * kRowStride + step * kStepStride] scalars
// that are broadcast. The sums stay in kRows * kVectors registers.
template <int kRows, int kVectors, int kRowStride, int kStepStride, typename Scalar, typename Operand>
static inline void accumulate(Vec (&sum)[kRows][kVectors], const Scalar* a, const Operand* b, int depth) {
#pragma GCC unroll 1
  for (int step = 0; step < depth; ++step) {
    Operand row[kVectors];
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) row[j] = b[step * kVectors + j];
#pragma GCC unroll 32
    for (int i = 0; i < kRows; ++i) {
      const Operand scalar = splat(a[i * kRowStride + step * kStepStride]);
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) sum[i][j] = multiply_add(sum[i][j], scalar, row[j]);
    }
  }
}

// c[kRows][kVectors] = c * factor + a b. A factor of null stands for 0.
template <int kRows, int kVectors, int kRowStride, int kStepStride, typename Scalar, typename Operand>
static inline void multiply(Vec* c, const Vec* factor, const Scalar* a, const Operand* b, int depth) {
  Vec sum[kRows][kVectors];
#pragma GCC unroll 32
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) sum[i][j] = factor ? c[i * kVectors + j] * factor[j] : Vec{};
  }
  accumulate<kRows, kVectors, kRowStride, kStepStride>(sum, a, b, depth);
#pragma GCC unroll 32
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) c[i * kVectors + j] = sum[i][j];
  }
}

// c[kRows][kVectors] += a b.
template <int kRows, int kVectors, int kRowStride, int kStepStride, typename Scalar, typename Operand>
static inline void multiply_onto(Vec* c, const Scalar* a, const Operand* b, int depth) {
  Vec sum[kRows][kVectors];
#pragma GCC unroll 32
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) sum[i][j] = c[i * kVectors + j];
  }
  accumulate<kRows, kVectors, kRowStride, kStepStride>(sum, a, b, depth);
#pragma GCC unroll 32
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) c[i * kVectors + j] = sum[i][j];
  }
}
