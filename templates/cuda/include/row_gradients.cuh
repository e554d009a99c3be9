// Probabilities and the scores' gradients on accumulators of S and dP: rows are queries, columns are keys (softmax.cuh has the
// layout). lse and delta belong to the thread's two rows.
#pragma once
#include <cstdint>

#include "cuda/include/ptx.cuh"

// What `of` (heads, total_q) has of a thread's two rows, `row` of a sequence and the one 8 below it; `absent` past the end.
__device__ __forceinline__ void read_rows(float (&values)[2], const float* of, int total_q, int head, int begin, int length,
                                          int row, float absent) {
  const float* at = of + static_cast<long long>(head) * total_q + begin + row;
  values[0] = row < length ? at[0] : absent;
  values[1] = row + 8 < length ? at[8] : absent;
}

// A query's lse, base 2, or what makes its probabilities zero where there is no such query and where it sees no key.
__device__ __forceinline__ float lse_offset(float natural) {
  return natural == -INFINITY ? INFINITY : natural * 1.44269504088896f;
}

// exp2(scores * scale_log2 - lse).
template <int kRegisters>
__device__ __forceinline__ void probabilities_of_rows(float (&scores)[kRegisters], const float (&lse)[2], float scale_log2) {
#pragma unroll
  for (int i = 0; i < kRegisters; ++i) scores[i] = exp2_approx(fmaf(scores[i], scale_log2, -lse[(i >> 1) & 1]));
}

// Probabilities of keys from a row's limit on become 0; limits count from this thread's first column. (Scores of -inf would
// not do: the scale may be negative or 0.)
template <int kRegisters>
__device__ __forceinline__ void mask_keys(float (&probabilities)[kRegisters], int upper_limit, int lower_limit) {
#pragma unroll
  for (int i = 0; i < kRegisters; ++i) {
    if (8 * (i >> 2) + (i & 1) >= ((i >> 1) & 1 ? lower_limit : upper_limit)) probabilities[i] = 0.0f;
  }
}

// dS = P * (dP - delta), in place of dP; P as stage_rows left it in swizzled 64-column panels.
template <float2 (*kUnpack)(uint32_t), int kPanelBytes, int kRegisters>
__device__ __forceinline__ void gradients_of_rows(float (&dp)[kRegisters], uint32_t panels, const float (&delta)[2], int warp,
                                                  int lane) {
  static_assert(kRegisters % 8 == 0);
  const uint32_t row = panels + (16 * (warp % 4) + lane % 16) * 128;
#pragma unroll
  for (int group = 0; group < kRegisters / 4; group += 2) {
    const int columns = group + lane / 16;
    uint32_t packed[4];
    load_matrix_x4(packed, row + columns / 8 * kPanelBytes + (columns % 8 ^ lane % 8) * 16);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 probabilities = kUnpack(packed[i]);
      float* const at = dp + 4 * group + 2 * i;
      at[0] = probabilities.x * (at[0] - delta[i & 1]);
      at[1] = probabilities.y * (at[1] - delta[i & 1]);
    }
  }
}
