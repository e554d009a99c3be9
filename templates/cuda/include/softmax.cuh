// Online softmax on wgmma accumulators. A thread of a warpgroup holds rows r and r + 8 of its warp's 16 and columns
// 8 g + 2 (lane % 4) + {0, 1}: scores[4 g + 2 h + e] is row half h, group g, element e. Four lanes share a row.
#pragma once
#include <cmath>
#include <cstdint>

#include "cuda/include/ptx.cuh"

struct RowState {
  float reference[2] = {-INFINITY, -INFINITY};  // the raw score that probabilities are relative to: the maximum of some
                                                // of the row's blocks; -inf: no key seen
  float sum[2] = {0.0f, 0.0f};                  // of this thread's probabilities
};

// Scores from a row's limit on become -inf; limits count from this thread's first column.
template <int kRegisters>
__device__ __forceinline__ void mask_scores(float (&scores)[kRegisters], int upper_limit, int lower_limit) {
#pragma unroll
  for (int i = 0; i < kRegisters; ++i) {
    if (8 * (i >> 2) + (i & 1) >= ((i >> 1) & 1 ? lower_limit : upper_limit)) scores[i] = -INFINITY;
  }
}

// What is subtracted from a row's scaled scores, base 2. The same rounding wherever it is needed: blocks must agree.
template <int kHeadroom>
__device__ __forceinline__ float probability_offset(float reference, float scale_log2) {
  return fmaf(reference, scale_log2, static_cast<float>(kHeadroom));
}

// A row's reference becomes the largest of its lanes' `maximum`, which its old one is part of; earlier results must be
// multiplied by `rescale`. Returns what is subtracted from the row's scaled scores.
template <int kHeadroom>
__device__ __forceinline__ float take_maximum(float& reference, float maximum, float& rescale, float scale_log2) {
  maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffff, maximum, 1));
  maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffff, maximum, 2));
  const float offset = maximum == -INFINITY ? 0.0f : probability_offset<kHeadroom>(maximum, scale_log2);
  rescale = exp2_approx(probability_offset<kHeadroom>(reference, scale_log2) - offset);
  reference = maximum;
  return offset;
}

// Scores become probabilities relative to the row's new maximum; earlier results must be multiplied by `rescale`. Of a row
// that has seen no key they are zeros. `kHeadroom`: they come out 2^-kHeadroom of what they are.
template <int kHeadroom, int kRegisters>
__device__ __forceinline__ void online_softmax(float (&scores)[kRegisters], RowState& rows, float (&rescale)[2],
                                               float scale_log2) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float maximum = rows.reference[h];
#pragma unroll
    for (int i = 2 * h; i < kRegisters; i += 4) maximum = fmaxf(maximum, fmaxf(scores[i], scores[i + 1]));
    const float offset = take_maximum<kHeadroom>(rows.reference[h], maximum, rescale[h], scale_log2);
    float sum = 0.0f;
#pragma unroll
    for (int i = 2 * h; i < kRegisters; i += 4) {
      scores[i] = exp2_approx(fmaf(scores[i], scale_log2, -offset));
      scores[i + 1] = exp2_approx(fmaf(scores[i + 1], scale_log2, -offset));
      sum += scores[i] + scores[i + 1];
    }
    rows.sum[h] = fmaf(rows.sum[h], rescale[h], sum);
  }
}

// Scores kBegin to kEnd become probabilities against offsets that are not looked at again; their sums are added up.
template <int kBegin, int kEnd, int kRegisters>
__device__ __forceinline__ void exponentials(float (&scores)[kRegisters], const float (&offset)[2], float (&sum)[2],
                                             float scale_log2) {
#pragma unroll
  for (int i = kBegin; i < kEnd; i += 2) {
    const int h = (i >> 1) & 1;
    scores[i] = exp2_approx(fmaf(scores[i], scale_log2, -offset[h]));
    scores[i + 1] = exp2_approx(fmaf(scores[i + 1], scale_log2, -offset[h]));
    sum[h] += scores[i] + scores[i + 1];
  }
}

// Whether any packed probability is 2 or more, infinite or NaN: those have the top bit of the exponent.
template <int kSteps>
__device__ __forceinline__ bool outgrown_bf16(const uint32_t (&probabilities)[kSteps][4]) {
  uint32_t any = 0;
#pragma unroll
  for (int i = 0; i < 4 * kSteps; ++i) any |= probabilities[i / 4][i % 4];
  return (any & 0x40004000) != 0;
}

// Whether any packed probability is 2^14 or more, infinite or NaN. fp16 has too few exponents for a headroom.
template <int kSteps>
__device__ __forceinline__ bool outgrown_fp16(const uint32_t (&probabilities)[kSteps][4]) {
  uint32_t largest = probabilities[0][0];
#pragma unroll
  for (int i = 1; i < 4 * kSteps; ++i) largest = max_fp16x2(largest, probabilities[i / 4][i % 4]);
  return any_at_least_fp16x2(largest, 0x74007400);
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

// What a row's output is multiplied by in the end. 0: the row sees no key.
__device__ __forceinline__ float inverse_of_sum(float sum) { return sum == 0.0f ? 0.0f : reciprocal_approx(sum); }

// A row's lse (natural log) from the sum of its probabilities, which are relative to 2^offset.
__device__ __forceinline__ float log_of_sum(float offset, float sum) {
  return sum == 0.0f ? -INFINITY : (offset + log2_approx(sum)) * 0.693147180559945f;
}
