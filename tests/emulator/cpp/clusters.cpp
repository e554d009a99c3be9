// Clusters: CTAs that start together, their barrier, and the shared memory of each other that they touch.
#include "machine.h"

namespace emu {

namespace {

constexpr uint32_t kRankShift = 24;  // shared addresses have the CTA's rank from this bit on, as an H100's do
constexpr uint32_t kOffset = (1u << kRankShift) - 1;
static_assert(kWindowBytes <= kOffset);

// Whether all threads that have not exited have arrived.
bool all_arrived(const Cluster& cluster) {
  for (const Cta* cta : cluster.ctas) {
    for (auto& warp : cta->warps) {
      if (warp->live && !(warp->at_cluster_barrier && warp->cluster_phase == cluster.phase)) return false;
    }
  }
  return true;
}

void pass(Warp& warp) {
  acquire(warp, warp.cta->cluster->arrived);
  warp.at_cluster_barrier = false;
}

void complete(Cluster& cluster) {
  if (!all_arrived(cluster)) return;
  cluster.arrived = std::move(cluster.arriving);
  cluster.arriving.clear();
  ++cluster.phase;
  for (Fiber* fiber : cluster.waiting) {
    pass(*fiber->warp);
    wake(*fiber);
  }
  cluster.waiting.clear();
}

}  // namespace

void cluster_arrive(bool releases) {
  EMU_ENTER();
  preempt();
  converge(kFull, true, "barrier.cluster.arrive", releases, 0, 0, [](Warp& warp, Collective& all) {
    Cluster& cluster = *warp.cta->cluster;
    if (warp.at_cluster_barrier) fail("barrier.cluster.arrive twice without a wait");
    warp.at_cluster_barrier = true;
    warp.cluster_phase = cluster.phase;
    if (all.tag) release(warp, cluster.arriving);
    complete(cluster);
    return true;
  });
}

void cluster_wait() {
  EMU_ENTER();
  converge(kFull, true, "barrier.cluster.wait", 0, 0, 0, [](Warp& warp, Collective& all) {
    Cluster& cluster = *warp.cta->cluster;
    if (!warp.at_cluster_barrier) fail("barrier.cluster.wait without an arrival");
    if (cluster.phase != warp.cluster_phase) {
      pass(warp);
      return true;
    }
    for (int lane = 0; lane < 32; ++lane) {
      if (!(all.arrived >> lane & 1)) continue;
      cluster.waiting.push_back(warp.lanes[lane]);
      warp.lanes[lane]->waits_for = {"the barrier of the cluster"};
    }
    return false;
  });
}

void recheck_cluster_barrier(Cluster& cluster) { complete(cluster); }

uint32_t cluster_rank() {
  const Cta& cta = *current().cta;
  return static_cast<uint32_t>(cta.index) % static_cast<uint32_t>(cta.cluster->ctas.size());
}

void* pointer_in_cluster(const void* pointer, uint32_t rank) {
  const Cta& cta = *current().cta;
  if (rank >= cta.cluster->ctas.size()) fail("mapa of CTA %u, in a cluster of %zu", rank, cta.cluster->ctas.size());
  return cta.cluster->ctas[rank]->shared + shared_address(pointer);
}

Cta* peer_with(const Cta& cta, const void* pointer) {
  for (Cta* other : cta.cluster->ctas) {
    if (other == &cta || static_cast<uint64_t>(static_cast<const char*>(pointer) - other->shared) >= kWindowBytes) {
      continue;
    }
    check_alive(*other);
    return other;
  }
  return nullptr;
}

void check_alive(const Cta& cta) {
  if (cta.cluster->phase == 0) fail("shared memory of CTA %d, which may not have begun yet", cta.index);
  if (cta.live == 0) fail("shared memory of CTA %d, which has ended", cta.index);
}

uint32_t address_in_cluster(uint32_t address, uint32_t rank) {
  const Cluster& cluster = *current().cta->cluster;
  if (rank >= cluster.ctas.size()) fail("mapa of CTA %u, in a cluster of %zu", rank, cluster.ctas.size());
  return (address & kOffset) | rank << kRankShift;
}

uint32_t own_offset(uint32_t address) {
  if (address >> kRankShift != cluster_rank()) fail("shared address 0x%x is not in this CTA's shared memory", address);
  return address & kOffset;
}

Place place_in_cluster(uint32_t address) {
  Cta& own = *current().cta;
  const uint32_t rank = address >> kRankShift;
  if (rank >= own.cluster->ctas.size()) fail("shared address 0x%x is in no CTA of the cluster", address);
  Cta& cta = *own.cluster->ctas[rank];
  if (&cta != &own) check_alive(cta);
  return {&cta, address & kOffset};
}

void end_of_shared(Cta& cta) {
  if (!cta.cluster->has_peers()) return;
  Clock clock = cta.warps[0]->clock;
  for (auto& warp : cta.warps) join(clock, warp->clock);
  check_untouched(clock, cta);
}

}  // namespace emu
