// Probabilities and the scores' gradients on accumulators of S^T and dP^T: rows are keys, columns are queries (softmax.cuh has
// the layout). lse and delta are a query's: float pairs of shared memory, those of this thread's first two columns on.
#pragma once
#include <cstdint>

#include "cuda/include/ptx.cuh"

constexpr int kNoQuery = 1 << 30;  // the first query that sees a key which none sees

// Probabilities of queries before a row's limit become 0; limits count from this thread's first column. (Scores of -inf would
// not do: the scale may be negative or 0.)
template <int kRegisters>
__device__ __forceinline__ void mask_queries(float (&probabilities)[kRegisters], int upper_limit, int lower_limit) {
#pragma unroll
  for (int i = 0; i < kRegisters; ++i) {
    if (8 * (i >> 2) + (i & 1) < ((i >> 1) & 1 ? lower_limit : upper_limit)) probabilities[i] = 0.0f;
  }
}

// exp2(scores * scale_log2 - lse), lse base 2.
template <int kRegisters>
__device__ __forceinline__ void probabilities_of_scores(float (&scores)[kRegisters], const float2* lse, float scale_log2) {
#pragma unroll
  for (int i = 0; i < kRegisters; i += 4) {
    const float2 offset = lse[i];
    scores[i] = exp2_approx(fmaf(scores[i], scale_log2, -offset.x));
    scores[i + 1] = exp2_approx(fmaf(scores[i + 1], scale_log2, -offset.y));
    scores[i + 2] = exp2_approx(fmaf(scores[i + 2], scale_log2, -offset.x));
    scores[i + 3] = exp2_approx(fmaf(scores[i + 3], scale_log2, -offset.y));
  }
}

// dS = P * (dP - delta), in place of dP.
template <int kRegisters>
__device__ __forceinline__ void gradients_of_scores(float (&dp)[kRegisters], const float (&probabilities)[kRegisters],
                                                    const float2* delta) {
#pragma unroll
  for (int i = 0; i < kRegisters; i += 4) {
    const float2 offset = delta[i];
    dp[i] = probabilities[i] * (dp[i] - offset.x);
    dp[i + 1] = probabilities[i + 1] * (dp[i + 1] - offset.y);
    dp[i + 2] = probabilities[i + 2] * (dp[i + 2] - offset.x);
    dp[i + 3] = probabilities[i + 3] * (dp[i + 3] - offset.y);
  }
}
