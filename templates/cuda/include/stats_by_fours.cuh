// lse and delta of a step read four numbers at a time, as they are needed: half the loads of StatsInMemory, and few registers.
#pragma once
#include "cuda/include/gradients.cuh"

template <int kColumns>
struct StatsByFours {
  const float4* first;

  __device__ __forceinline__ static int place(int query) { return StatsInRegisters<kColumns>::place(query); }

  __device__ __forceinline__ StatsByFours(const float* stats, int quad)
      : first(reinterpret_cast<const float4*>(stats) + quad) {}
  // What two neighbouring groups of columns have in common is read once.
  __device__ __forceinline__ float2 operator[](int group) const {
    const float4 four = first[group / 2 * 4];
    return group % 2 ? float2{four.z, four.w} : float2{four.x, four.y};
  }
};
