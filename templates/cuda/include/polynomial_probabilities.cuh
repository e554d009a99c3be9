// Probabilities of which the FMA pipes compute a part by a polynomial (polynomial_exp.cuh), on accumulators of S^T
// (gradients.cuh).
#pragma once
#include "cuda/include/polynomial_exp.cuh"

// As probabilities_of_scores, every `kEvery`th pair's by the polynomial. Of these lse that is +inf makes 0, and lse that is NaN
// makes 1: dS shows it all the same, since the output that delta is made of is NaN too.
template <int kEvery, int kRegisters, typename Stats>
__device__ __forceinline__ void probabilities_by_both(float (&scores)[kRegisters], const Stats& lse, float scale_log2) {
  constexpr int kTop = 1;  // as no probability is above 1
  const float scale = -scale_log2 / kExponentRange;
#pragma unroll
  for (int i = 0; i < kRegisters; i += 2) {
    const float2 offset = lse[i / 4];
    if (i / 2 % kEvery == kEvery - 1) {
      const float2 top = {fmaf(offset.x, 1.0f / kExponentRange, kTop / kExponentRange),
                          fmaf(offset.y, 1.0f / kExponentRange, kTop / kExponentRange)};
      scores[i] = exp2_below<kTop>(__saturatef(fmaf(scores[i], scale, top.x)));
      scores[i + 1] = exp2_below<kTop>(__saturatef(fmaf(scores[i + 1], scale, top.y)));
    } else {
      scores[i] = exp2_approx(fmaf(scores[i], scale_log2, -offset.x));
      scores[i + 1] = exp2_approx(fmaf(scores[i + 1], scale_log2, -offset.y));
    }
  }
}
