// The dtypes of the tensors: how a vector of them is read as fp32 and written back.
#pragma once

#include "cpu/include/vector.h"

struct Fp32 {
  float value;
  template <int kCount>
  static inline Vec read(const Fp32* from) { return load<Vec, 4 * kCount>(from); }
  template <int kCount>
  static inline void write(Fp32* to, Vec value) { store<4 * kCount>(to, value); }
};

struct Fp16 {
  uint16_t bits;
  template <int kCount>
  static inline Vec read(const Fp16* from) { return widen_fp16(load<HalfVec, 2 * kCount>(from)); }
  template <int kCount>
  static inline void write(Fp16* to, Vec value) { store<2 * kCount>(to, narrow_fp16(value)); }
};

struct Bf16 {
  uint16_t bits;
  template <int kCount>
  static inline Vec read(const Bf16* from) {
    return (Vec)(__builtin_convertvector(load<HalfVec, 2 * kCount>(from), WordVec) << 16);
  }
  template <int kCount>
  static inline void write(Bf16* to, Vec value) {
    const WordVec word = (WordVec)value;
    const WordVec rounded = (word + 0x7fff + (word >> 16 & 1)) >> 16;  // to nearest even
    store<2 * kCount>(to, __builtin_convertvector(select(value != value, word >> 16 | 0x40, rounded), HalfVec));
  }
};
