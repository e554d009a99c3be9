// Pairs of CTAs (clusters of two) that share tiles: how the first tells the second which it has claimed for both.
#pragma once
#include <cstdint>

#include "cuda/include/cluster.cuh"
#include "cuda/include/work_list.cuh"

// As balancing_heads, where pairs take tiles: there are half as many of them as there are CTAs.
template <typename P>
__device__ __forceinline__ int balancing_heads_of_pairs(WorkListHeader list, const P& p) {
  list.total *= 2.0f;
  return balancing_heads(list, p);
}

template <int kSlots>
struct PairClaims {
  uint64_t told[kSlots];   // of the second CTA
  uint64_t heard[kSlots];  // of the first
  int tiles[kSlots];       // of the second

  __device__ __forceinline__ void init() {
    for (int slot = 0; slot < kSlots; ++slot) {
      mbarrier_init(smem_address(&told[slot]), 1);
      mbarrier_init(smem_address(&heard[slot]), 1);
    }
  }
  // By one thread of the first CTA.
  __device__ __forceinline__ void tell(const RingPosition<kSlots>& at, int tile) {
    mbarrier_wait_cluster(smem_address(&heard[at.slot]), at.parity ^ 1);
    *const_cast<int*>(variable_of(&tiles[computed_here(at.slot)], 1)) = tile;
    mbarrier_release_cluster(address_of(smem_address(&told[at.slot]), 1));
  }
  // By one thread of the second.
  __device__ __forceinline__ int hear(const RingPosition<kSlots>& at) {
    mbarrier_wait_cluster(smem_address(&told[at.slot]), at.parity);
    const int tile = tiles[at.slot];
    mbarrier_release_cluster(address_of(smem_address(&heard[at.slot]), 0));
    return tile;
  }
};
