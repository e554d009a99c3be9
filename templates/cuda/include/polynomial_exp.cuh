// Exponentials of which the FMA pipes compute a part by a polynomial: MUFU.EX2, which has the rest, takes eight cycles for
// a warp's, and is what narrow heads are short of. The accumulators' layout: softmax.cuh.
#pragma once
#include "cuda/include/ptx.cuh"

// How far exponents reach down, and their unit: a power of two, by which scaling is exact.
constexpr float kExponentRange = 128.0f;

// 2^(kTop - 128 depth) for a depth from 0 to 1, by a cubic with a relative error of 1.02e-4 at most: minimax on [-1/2, 1/2]
// where 2^0 is to be 1, so that with kTop 1 a depth of 1 gives zero.
template <int kTop>
__device__ __forceinline__ float exp2_below(float depth) {
  constexpr float kScale = static_cast<float>(1 << kTop);
  constexpr float kFirst = -0.69328292f * kScale * kExponentRange;
  constexpr float kSecond = 0.24221096f * kScale * kExponentRange * kExponentRange;
  constexpr float kThird = -0.05500893f * kScale * kExponentRange * kExponentRange * kExponentRange;
  constexpr float kMagic = 1.5f * (1 << 23) / kExponentRange;  // its last place is one exponent
  const float rounded = kMagic - depth;                        // in its last places: minus the whole exponents below kTop
  const float rest = depth + (rounded - kMagic);
  const float power = fmaf(fmaf(fmaf(kThird, rest, kSecond), rest, kFirst), rest, kScale);
  float result = __uint_as_float(__float_as_uint(power) + (__float_as_uint(rounded) << 23));
  asm("" : "+f"(result));  // of an integer that becomes a float at each of its uses there would be copies, between wgmmas
  return result;
}

// As exponentials (softmax.cuh), every `kEvery`th pair's by the polynomial. There a probability of 2^kTop or more comes out
// as 2^kTop, whatever it is, and so does NaN, which saturation takes for a depth of 0: 2^kTop is to tell that a row has
// outgrown its reference. Equal scores may differ by half a place of their offset, as it is rounded once more.
template <int kEvery, int kTop, int kBegin, int kEnd, int kRegisters>
__device__ __forceinline__ void exponentials_by_both(float (&scores)[kRegisters], const float (&offset)[2], float (&sum)[2],
                                                     float scale_log2) {
  const float scale = -scale_log2 / kExponentRange;
#pragma unroll
  for (int i = kBegin; i < kEnd; i += 2) {
    const int h = (i >> 1) & 1;
    if (i / 2 % kEvery == kEvery - 1) {
      const float top = fmaf(offset[h], 1.0f / kExponentRange, kTop / kExponentRange);
      scores[i] = exp2_below<kTop>(__saturatef(fmaf(scores[i], scale, top)));
      scores[i + 1] = exp2_below<kTop>(__saturatef(fmaf(scores[i + 1], scale, top)));
    } else {
      scores[i] = exp2_approx(fmaf(scores[i], scale_log2, -offset[h]));
      scores[i + 1] = exp2_approx(fmaf(scores[i + 1], scale_log2, -offset[h]));
    }
    sum[h] += scores[i] + scores[i + 1];
  }
}
