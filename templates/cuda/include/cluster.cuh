// What the CTAs of a cluster do to each other's shared memory: arrivals at barriers, copies to all of them at once.
#pragma once
#include <cstdint>

#include "cuda/include/pipeline.cuh"

// Number of this CTA in its cluster.
__device__ __forceinline__ int cluster_rank() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// A shared address as another CTA of the cluster has it, for an arrival there.
__device__ __forceinline__ uint32_t address_of(uint32_t smem, int cta) {
  uint32_t found;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(found) : "r"(smem), "r"(cta));
  return found;
}

// At a barrier of any CTA of the cluster, by address_of; after what only tensor cores and the copy engine did. No fence.
__device__ __forceinline__ void mbarrier_arrive_cluster(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// The same, with a fence of the whole device: what was written before is seen behind mbarrier_wait_cluster.
__device__ __forceinline__ void mbarrier_release_cluster(uint32_t barrier) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// For what mbarrier_release_cluster publishes.
__device__ __forceinline__ void mbarrier_wait_cluster(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "wait_%=:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1, 0x989680;\n"
      "@done bra.uni ready_%=;\n"
      "bra.uni wait_%=;\n"
      "ready_%=:\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// A place of the ring of a CTA of the cluster is free again.
template <int kSlots>
__device__ __forceinline__ void arrive_empty_of(RingBarriers<kSlots>& ring, const RingPosition<kSlots>& at, int cta) {
  mbarrier_arrive_cluster(address_of(smem_address(&ring.empty[at.slot]), cta));
}

// As tma_load_ragged, to the same place in each CTA of the cluster that `ctas` has a bit for, where it completes on the same
// barrier.
__device__ __forceinline__ void tma_multicast_ragged(uint32_t smem, const void* map, uint32_t barrier, uint16_t ctas,
                                                     int column, int row, int head, int begin, int length,
                                                     uint64_t cache_hint) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
      ".L2::cache_hint [%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8, %9;" ::"r"(smem),
      "l"(map), "r"(barrier), "r"(column), "r"(kRaggedExtent - length + row), "r"(head), "r"(kRaggedExtent),
      "r"(begin + length), "h"(ctas), "l"(cache_hint)
      : "memory");
}
