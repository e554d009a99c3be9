// Online softmax on wgmma accumulators. A thread of a warpgroup holds rows r and r + 8 of its warp's 16 and columns
// 8 g + 2 (lane % 4) + {0, 1}: scores[4 g + 2 h + e] is row half h, group g, element e. Four lanes share a row.
#pragma once
#include <cmath>
#include <cstdint>

#include "cuda/include/ptx.cuh"

struct RowState {
  float reference[2] = {-INFINITY, -INFINITY};  // the raw score that probabilities are relative to: the row's maximum,
                                                // or (lazy) one that it exceeds by less than kSlack once scaled
  float sum[2] = {0.0f, 0.0f};                  // of this thread's probabilities
};

// How far, as a power of two, a row's maximum may outgrow a lazy reference before earlier results are rescaled. With 8,
// probabilities stay below 256 and rescaling is rare after a row's first blocks (FlashAttention-4's lazy rescaling).
constexpr float kSlack = 8.0f;

// Scores from a row's limit on become -inf; limits count from this thread's first column.
template <int kRegisters>
__device__ __forceinline__ void mask_scores(float (&scores)[kRegisters], int upper_limit, int lower_limit) {
#pragma unroll
  for (int i = 0; i < kRegisters; ++i) {
    if (8 * (i >> 2) + (i & 1) >= ((i >> 1) & 1 ? lower_limit : upper_limit)) scores[i] = -INFINITY;
  }
}

// Scores become probabilities. True where earlier results of some row of this warp must be multiplied by `rescale`.
// kGuarded: a row may have seen no key yet, its reference is -inf.
template <bool kGuarded, bool kLazy, int kRegisters>
__device__ __forceinline__ bool online_softmax(float (&scores)[kRegisters], RowState& rows, float (&rescale)[2],
                                               float scale_log2) {
  bool outgrown = !kLazy;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float maximum = kLazy ? fmaxf(scores[2 * h], scores[2 * h + 1]) : rows.reference[h];
#pragma unroll
    for (int i = 2 * h; i < kRegisters; i += 4) maximum = fmaxf(maximum, fmaxf(scores[i], scores[i + 1]));
    maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffff, maximum, 1));
    maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffff, maximum, 2));
    float reference = maximum;
    if (kLazy) {
      const bool grown = (maximum - rows.reference[h]) * scale_log2 > kSlack;
      reference = grown ? maximum : rows.reference[h];
      outgrown |= grown;
    }
    const float offset = kGuarded && reference == -INFINITY ? 0.0f : reference * scale_log2;
    rescale[h] = exp2_approx(fmaf(rows.reference[h], scale_log2, -offset));
    rows.reference[h] = reference;
    float sum = 0.0f;
#pragma unroll
    for (int i = 2 * h; i < kRegisters; i += 4) {
      scores[i] = exp2_approx(fmaf(scores[i], scale_log2, -offset));
      scores[i + 1] = exp2_approx(fmaf(scores[i + 1], scale_log2, -offset));
      sum += scores[i] + scores[i + 1];
    }
    rows.sum[h] = fmaf(rows.sum[h], rescale[h], sum);
  }
  return kLazy ? __any_sync(0xffffffff, outgrown) : true;
}

template <int kRegisters>
__device__ __forceinline__ void scale_rows(float (&values)[kRegisters], const float (&factor)[2]) {
#pragma unroll
  for (int i = 0; i < kRegisters; ++i) values[i] *= factor[(i >> 1) & 1];
}

// Sum over the four lanes of a row.
__device__ __forceinline__ float sum_of_row(float value) {
  value += __shfl_xor_sync(0xffffffff, value, 1);
  return value + __shfl_xor_sync(0xffffffff, value, 2);
}
