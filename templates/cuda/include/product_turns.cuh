// Two math warpgroups take turns at a step's products, so that one computes while the other multiplies.
#pragma once
#include "cuda/include/ptx.cuh"

// Of a step each has one turn, the first warpgroup before the second. Named barriers kFirst and kFirst + 1: a warpgroup's own is
// complete when it waits there and the other one has passed the turn on. The last turn that is passed on is nobody's, so the
// barriers are for nothing else.
template <int kFirst>
struct ProductTurns {
  __device__ __forceinline__ static void begin(int warpgroup) {
    if (warpgroup == 1) pass(1);
  }
  __device__ __forceinline__ static void await(int warpgroup) { named_barrier_sync(kFirst + warpgroup, 256); }
  __device__ __forceinline__ static void pass(int warpgroup) {
    asm volatile("bar.arrive %0, 256;" ::"r"(kFirst + 1 - warpgroup) : "memory");
  }
};
