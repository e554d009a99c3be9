// Probabilities and the scores' gradients on accumulators of S^T and dP^T: rows are keys, columns are queries (softmax.cuh has
// the layout). lse and delta are a query's.
#pragma once
#include <cstdint>

#include "cuda/include/fragments.cuh"
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

// A thread's lse or delta of each 8 columns, from those of a step. Read at once, four numbers at a time: those that a thread
// has of 16 columns are neighbours.
template <int kColumns>
struct StatsInRegisters {
  float2 pairs[kColumns / 8];

  __device__ __forceinline__ static int place(int query) {
    return query / 16 * 16 + query % 8 / 2 * 4 + query / 8 % 2 * 2 + query % 2;
  }

  __device__ __forceinline__ StatsInRegisters(const float* stats, int quad) {
#pragma unroll
    for (int i = 0; i < kColumns / 8; i += 2) {
      const float4 four = reinterpret_cast<const float4*>(stats)[2 * i + quad];
      pairs[i] = {four.x, four.y};
      pairs[i + 1] = {four.z, four.w};
    }
  }
  __device__ __forceinline__ float2 operator[](int group) const { return pairs[group]; }
};

// Likewise, for kernels that are short of registers: in order, read as they are needed.
struct StatsInMemory {
  const float2* first;

  __device__ __forceinline__ static int place(int query) { return query; }

  __device__ __forceinline__ StatsInMemory(const float* stats, int quad)
      : first(reinterpret_cast<const float2*>(stats) + quad) {}
  __device__ __forceinline__ float2 operator[](int group) const { return first[4 * group]; }
};

// exp2(scores * scale_log2 - lse), lse base 2.
template <int kRegisters, typename Stats>
__device__ __forceinline__ void probabilities_of_scores(float (&scores)[kRegisters], const Stats& lse, float scale_log2) {
#pragma unroll
  for (int i = 0; i < kRegisters; i += 4) {
    const float2 offset = lse[i / 4];
    scores[i] = exp2_approx(fmaf(scores[i], scale_log2, -offset.x));
    scores[i + 1] = exp2_approx(fmaf(scores[i + 1], scale_log2, -offset.y));
    scores[i + 2] = exp2_approx(fmaf(scores[i + 2], scale_log2, -offset.x));
    scores[i + 3] = exp2_approx(fmaf(scores[i + 3], scale_log2, -offset.y));
  }
}

// dS = P * (dP - delta), in place of dP.
template <int kRegisters, typename Stats>
__device__ __forceinline__ void gradients_of_scores(float (&dp)[kRegisters], const float (&probabilities)[kRegisters],
                                                    const Stats& delta) {
#pragma unroll
  for (int i = 0; i < kRegisters; i += 4) {
    const float2 offset = delta[i / 4];
    dp[i] = probabilities[i] * (dp[i] - offset.x);
    dp[i + 1] = probabilities[i + 1] * (dp[i + 1] - offset.y);
    dp[i + 2] = probabilities[i + 2] * (dp[i + 2] - offset.x);
    dp[i + 3] = probabilities[i + 3] * (dp[i + 3] - offset.y);
  }
}

// P and dS = P * (dP - delta), packed side by side: what they are made of is then needed no more, pair by pair.
template <Pack kPack, int kSteps, typename Stats>
__device__ __forceinline__ void pack_gradients(uint32_t (&probabilities)[kSteps][4], uint32_t (&ds)[kSteps][4],
                                               const float (&p)[8 * kSteps], const float (&dp)[8 * kSteps],
                                               const Stats& delta) {
#pragma unroll
  for (int i = 0; i < 4 * kSteps; ++i) {
    const float2 offset = delta[i / 2];
    ds[i / 4][i % 4] = kPack(p[2 * i] * (dp[2 * i] - offset.x), p[2 * i + 1] * (dp[2 * i + 1] - offset.y));
    probabilities[i / 4][i % 4] = kPack(p[2 * i], p[2 * i + 1]);
  }
}
