// The mask on P and dS when they are packed (gradients.cuh): behind all arithmetic, which no branch then keeps apart.
#pragma once
#include <cstdint>

// Queries before a row's limit become 0, whatever they hold; limits count from this thread's first column.
template <int kSteps>
__device__ __forceinline__ void mask_packed(uint32_t (&fragments)[kSteps][4], int upper_limit, int lower_limit) {
#pragma unroll
  for (int i = 0; i < 4 * kSteps; ++i) {
    const int limit = i % 2 ? lower_limit : upper_limit;
    const int column = i / 2 * 8;  // of the pair's lower half
    const uint32_t seen = column < limit ? 0xFFFF0000u : 0xFFFFFFFFu;
    fragments[i / 4][i % 4] = column + 1 < limit ? 0 : fragments[i / 4][i % 4] & seen;
  }
}
