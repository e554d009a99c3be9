// Probabilities of half of a step's queries at a time, with products issued between the two (gradients.cuh).
#pragma once
#include "cuda/include/gradients.cuh"

template <int kRegisters>
__device__ __forceinline__ float (&first_half(float (&scores)[kRegisters]))[kRegisters / 2] {
  return reinterpret_cast<float(&)[kRegisters / 2]>(scores[0]);
}

template <int kRegisters>
__device__ __forceinline__ float (&second_half(float (&scores)[kRegisters]))[kRegisters / 2] {
  return reinterpret_cast<float(&)[kRegisters / 2]>(scores[kRegisters / 2]);
}

// lse or delta of the columns from group `first` of 8 on.
template <typename Stats>
struct StatsFrom {
  const Stats& stats;
  int first;

  __device__ __forceinline__ float2 operator[](int group) const { return stats[first + group]; }
};
