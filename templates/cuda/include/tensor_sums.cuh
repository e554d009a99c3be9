// Rows of probabilities that the tensor cores sum up as they multiply them with V, beside which there are eight columns of ones.
#pragma once
#include <cstdint>

#include "cuda/include/fragments.cuh"
#include "cuda/include/ptx.cuh"

constexpr int kOnesBytes = 16 * 128;  // a panel of the 16 rows that an instruction multiplies; all its steps read the same

// By all threads of a CTA of at least 128, which meet at a barrier before the first product.
template <Pack kPack>
__device__ __forceinline__ void write_ones(uint32_t ones) {
  const uint32_t pair = kPack(1.0f, 1.0f);
  if (threadIdx.x < kOnesBytes / 16) store_shared_x4(ones + 16 * threadIdx.x, {pair, pair, pair, pair});
  fence_async_proxy();
}

// The descriptor of 64 columns `offset` bytes behind `rows` (a constant, and any number) that are followed by the columns at
// `ones`: the distance from panel to panel is what it takes to get there, (ones - rows - offset) >> 4. In few instructions:
// one multiplication for `rows`, one addition for an offset.
__device__ __forceinline__ uint64_t descriptor_before_ones(uint32_t rows, int offset, uint32_t ones) {
  const uint32_t places = (ones >> 4 << 16) - (rows >> 4) * 0xFFFF - (offset >> 4) * 0xFFFF;
  return wgmma_descriptor(0, 0, 1024) | places;
}

// A number that cannot be known before the first `kCount` probabilities are. An instruction for two of them.
template <int kCount, int kRegisters>
__device__ __forceinline__ float known_after(const float (&probabilities)[kRegisters]) {
  float value = 0.0f;
#pragma unroll
  for (int i = 0; i < kCount; i += 2) value = fmaf(probabilities[i], probabilities[i + 1], value);
  return value;
}
