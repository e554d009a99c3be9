// Pairs of CTAs (clusters of two) with neighbouring blocks of keys add up their dQ before it goes to its sums: each keeps a half
// of every block, and is sent the other CTA's part of it, float32, into a buffer in its shared memory.
#pragma once
#include <cstdint>

#include "cuda/include/cluster.cuh"
#include "cuda/include/ptx.cuh"

// Four numbers to another CTA of the cluster, where they complete on a barrier.
__device__ __forceinline__ void store_async_x4(uint32_t to, uint32_t barrier, float a, float b, float c, float d) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%2, %3, %4, %5}, [%1];" ::"r"(to),
      "r"(barrier), "f"(a), "f"(b), "f"(c), "f"(d)
      : "memory");
}

template <int kBytes>
struct Halves {
  uint64_t received;  // the other CTA's part is there
  uint64_t allowed;   // the other CTA's buffer may be written

  __device__ __forceinline__ void init() {
    mbarrier_init(smem_address(&received), 1);
    mbarrier_init(smem_address(&allowed), 4);
  }

  // By all warps of a warpgroup, when the buffer has been read and what was read is on its way elsewhere.
  __device__ __forceinline__ void allow(int warp, int lane) {
    __syncwarp();
    if (lane == 0) {
      if (warp % 4 == 0) mbarrier_expect_bytes(smem_address(&received), kBytes);
      mbarrier_arrive_cluster(address_of(computed_here(smem_address(&allowed)), other()));
    }
  }

  // A warpgroup's accumulators to the other CTA's buffer, at the same place, for the same thread of a warpgroup.
  template <int kRegisters>
  __device__ __forceinline__ void send(const float (&dq)[kRegisters], uint32_t buffer, uint32_t parity, unsigned thread) {
    static_assert(kRegisters * 128 * 4 == kBytes);
    mbarrier_wait(smem_address(&allowed), parity);
    // Addresses computed here take no registers through the loop.
    const uint32_t place = address_of(buffer + 16 * (computed_here(thread) % 128), other());
    const uint32_t barrier = address_of(computed_here(smem_address(&received)), other());
#pragma unroll
    for (int i = 0; i < kRegisters; i += 4) {
      store_async_x4(place + i / 4 * 128 * 16, barrier, dq[i], dq[i + 1], dq[i + 2], dq[i + 3]);
    }
  }

  // What was sent is added.
  template <int kRegisters>
  __device__ __forceinline__ void add(float (&dq)[kRegisters], uint32_t buffer, uint32_t parity, unsigned thread) {
    static_assert(kRegisters * 128 * 4 == kBytes);
    mbarrier_wait(smem_address(&received), parity);
    const uint32_t from = buffer + 16 * (computed_here(thread) % 128);
#pragma unroll
    for (int i = 0; i < kRegisters; i += 4) {
      uint32_t sent[4];
      load_shared_x4(sent, from + i / 4 * 128 * 16);
#pragma unroll
      for (int j = 0; j < 4; ++j) dq[i + j] += __uint_as_float(sent[j]);
    }
  }

 private:
  __device__ __forceinline__ static int other() { return 1 - cluster_rank(); }
};
