// Probabilities of which the FMA pipes compute a part by a polynomial (polynomial_exp.cuh), on accumulators of S^T
// (gradients.cuh).
#pragma once
#include "cuda/include/polynomial_exp.cuh"

// The lesser of `value` and 0; NaN where it is NaN.
__device__ __forceinline__ float at_most_zero(float value) {
  float least;
  asm("min.NaN.f32 %0, %1, 0f00000000;" : "=f"(least) : "f"(value));
  return least;
}

// As probabilities_of_scores, every `kEvery`th pair's by the polynomial. Saturation takes NaN for a depth of 0, so it is given
// back where lse has it, as it has where a score does.
template <int kEvery, int kRegisters, typename Stats>
__device__ __forceinline__ void probabilities_by_both(float (&scores)[kRegisters], const Stats& lse, float scale_log2) {
  constexpr int kTop = 1;  // as no probability is above 1
  const float scale = -scale_log2 / kExponentRange;
#pragma unroll
  for (int i = 0; i < kRegisters; ++i) {
    const float2 pair = lse[i / 4];
    const float offset = i % 2 ? pair.y : pair.x;
    if (i / 2 % kEvery == kEvery - 1) {
      const float top = fmaf(offset, 1.0f / kExponentRange, kTop / kExponentRange);
      const float power = exp2_below<kTop>(__saturatef(fmaf(scores[i], scale, top)));
      scores[i] = fmaf(at_most_zero(top), 0.0f, power);
    } else {
      scores[i] = exp2_approx(fmaf(scores[i], scale_log2, -offset));
    }
  }
}
