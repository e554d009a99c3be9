// P V where rows must not be touched by what they do not see. A matrix product multiplies such values by a probability
// of zero, and zero times NaN or infinity is NaN: then the product is computed again, without them.
#pragma once
#include <cstdint>

#include "cuda/include/ptx.cuh"
#include "cuda/include/row_range.cuh"

using Unpack = float2 (*)(uint32_t);  // unpack_bf16 or unpack_fp16

// Whether any value is NaN; true for some infinities too.
template <int kRegisters>
__device__ __forceinline__ bool any_nan(const float (&values)[kRegisters]) {
  float sums[4] = {};
#pragma unroll
  for (int i = 0; i < kRegisters; ++i) sums[i % 4] += values[i];
  const float sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  return sum != sum;
}

// A warp's 16 rows of P V in plain arithmetic, over the keys that a row sees; `seen` counts from the block's first key.
// V's columns lie in one swizzled panel of 128-byte rows, whose registers of the product are kCount from kFirst on. Slow, short,
// and seldom called.
template <Unpack kUnpack, int kFirst, int kCount, int kSteps, int kRegisters>
__device__ __forceinline__ void multiply_seen_columns(float (&product)[kRegisters],
                                                      const uint32_t (&probabilities)[kSteps][4], uint32_t panel,
                                                      const RowRange (&seen)[2]) {
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int group = 0; group < kCount / 4; ++group) {  // of eight columns
    float sums[4] = {};
#pragma unroll
    for (int i = 0; i < 2 * kSteps; ++i) {  // eight keys, two of each lane of a row
#pragma unroll 1
      for (int from = 0; from < 4; ++from) {
        float2 weights[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          weights[h] = kUnpack(__shfl_sync(0xffffffff, probabilities[i / 2][i % 2 * 2 + h], lane / 4 * 4 + from));
        }
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int key = 8 * i + 2 * from + e;
          const float2 value = kUnpack(load_shared(panel + key * 128 + (group ^ key % 8) * 16 + lane % 4 * 4));
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const float weight = e ? weights[h].y : weights[h].x;
            if (seen[h].holds(key)) {
              sums[2 * h] = fmaf(weight, value.x, sums[2 * h]);
              sums[2 * h + 1] = fmaf(weight, value.y, sums[2 * h + 1]);
            }
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) product[kFirst + i] = i / 4 == group ? sums[i % 4] : product[kFirst + i];
  }
  fence_async_proxy();  // V's buffer was read like memory and may be filled by the copy engine next
}

// Likewise, of a product that has nothing else.
template <Unpack kUnpack, int kSteps, int kRegisters>
__device__ __forceinline__ void multiply_seen(float (&product)[kRegisters], const uint32_t (&probabilities)[kSteps][4],
                                              uint32_t panel, const RowRange (&seen)[2]) {
  multiply_seen_columns<kUnpack, 0, kRegisters>(product, probabilities, panel, seen);
}
