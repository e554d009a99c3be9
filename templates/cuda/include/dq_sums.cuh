// Where dQ is summed up: float32, without padding. A head's columns are split into panels of 64 (the last may be narrower);
// a panel is rows of tokens, so that what a warpgroup has of a query block is one piece of memory. Within a row, groups of
// 16 columns lie so that a thread's four accumulators of a group are neighbours: places 4 q + e of a group hold its columns
// 8 (e >> 1) + 2 q + (e & 1), q = lane % 4. Rows of odd tokens have their groups swapped in pairs, which keeps shared
// memory free of bank conflicts where a row is a multiple of 128 bytes.
#pragma once
#include <cstdint>

#include "cuda/include/ptx.cuh"

template <int kHeadDim>
struct DqSums {
  static constexpr int kPanels = (kHeadDim + 63) / 64;

  __host__ __device__ static constexpr int columns(int panel) { return kHeadDim - 64 * panel < 64 ? kHeadDim - 64 * panel : 64; }

  // A token's row of a panel.
  __device__ __forceinline__ static float* row(float* sums, int total_q, int head, int panel, int token) {
    return sums + static_cast<long long>(head) * total_q * kHeadDim + static_cast<long long>(total_q) * 64 * panel +
           static_cast<long long>(token) * columns(panel);
  }
};

// What is added to the place of an even group, and taken from that of an odd one, in this token's row.
template <int kColumns>
__device__ __forceinline__ int group_swap(int token) {
  return kColumns % 32 == 0 ? 16 * (token & 1) : 0;
}

// Calls `put(place, values...)`, four or two values, for a thread's accumulators of one row of a panel: `half` 0 for the upper
// of its two rows, 1 for the lower; the panel's accumulators begin at `kFirst`.
template <int kColumns, int kFirst, int kRegisters, typename Put>
__device__ __forceinline__ void for_each_piece(const float (&dq)[kRegisters], int half, int quad, int swap, Put put) {
#pragma unroll
  for (int group = 0; group < kColumns / 16; ++group) {
    const int i = kFirst + 8 * group + 2 * half;
    put(16 * group + (group % 2 ? -swap : swap) + 4 * quad, dq[i], dq[i + 1], dq[i + 4], dq[i + 5]);
  }
  if constexpr (kColumns % 16 != 0) {
    constexpr int i = kFirst + kColumns / 16 * 8;
    put(kColumns / 16 * 16 + 2 * quad, dq[i + 2 * half], dq[i + 2 * half + 1]);
  }
}
