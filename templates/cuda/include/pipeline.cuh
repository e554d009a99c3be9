// Rings of shared-memory buffers handed to and fro with pairs of mbarriers: full (filled) and empty (free again).
#pragma once
#include <cstdint>

#include "cuda/include/ptx.cuh"

// A place in a ring and the parity of its phase. Consumers wait for `full` with it, producers for `empty` with its
// complement, which passes at once the first time round.
template <int kSlots>
struct RingPosition {
  int slot = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++slot == kSlots) {
      slot = 0;
      parity ^= 1;
    }
  }

  // The place after `count` advances, for who has few registers and counts anyway.
  __device__ __forceinline__ static RingPosition after(uint32_t count) {
    return {static_cast<int>(count % kSlots), count / kSlots % 2};
  }

  // Up to once round the ring.
  __device__ __forceinline__ void advance_by(int steps) {
    slot += steps;
    if (slot >= kSlots) {
      slot -= kSlots;
      parity ^= 1;
    }
  }
};

template <int kSlots>
struct RingBarriers {
  uint64_t full[kSlots];
  uint64_t empty[kSlots];

  __device__ __forceinline__ void init(uint32_t fills, uint32_t releases) {
    for (int slot = 0; slot < kSlots; ++slot) {
      mbarrier_init(smem_address(&full[slot]), fills);
      mbarrier_init(smem_address(&empty[slot]), releases);
    }
  }
  __device__ __forceinline__ void wait_full(const RingPosition<kSlots>& at) {
    mbarrier_wait(smem_address(&full[at.slot]), at.parity);
  }
  __device__ __forceinline__ void wait_empty(const RingPosition<kSlots>& at) {
    mbarrier_wait(smem_address(&empty[at.slot]), at.parity ^ 1);
  }
  __device__ __forceinline__ bool is_full(const RingPosition<kSlots>& at) const {
    return mbarrier_test(smem_address(&full[at.slot]), at.parity);
  }
  __device__ __forceinline__ bool is_empty(const RingPosition<kSlots>& at) const {
    return mbarrier_test(smem_address(&empty[at.slot]), at.parity ^ 1);
  }
  __device__ __forceinline__ void arrive_full(const RingPosition<kSlots>& at) { mbarrier_arrive(smem_address(&full[at.slot])); }
  __device__ __forceinline__ void arrive_empty(const RingPosition<kSlots>& at) { mbarrier_arrive(smem_address(&empty[at.slot])); }
};
