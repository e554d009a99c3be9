// Warp collectives, named barriers, mbarriers.
#include <cstring>

#include "machine.h"

namespace emu {

// ---- warps ----------------------------------------------------------------------------------------------------------

uint32_t shuffle(uint32_t mask, uint32_t value, int mode, int operand, int width) {
  EMU_ENTER();
  const uint64_t how = static_cast<uint64_t>(mode) << 32 | static_cast<uint32_t>(width);
  return static_cast<uint32_t>(
      converge(mask, false, "shfl.sync", how, value, static_cast<uint32_t>(operand), [](Warp&, Collective& all) {
        const int mode = static_cast<int>(all.tag >> 32), width = static_cast<int>(all.tag & 0xFFFFFFFF);
        for (int lane = 0; lane < 32; ++lane) {
          if (!(all.arrived >> lane & 1)) continue;
          const int operand = static_cast<int>(all.extra[lane]), base = lane / width * width;
          int from = mode == 0   ? base + (operand & (width - 1))
                     : mode == 1 ? lane - operand
                     : mode == 2 ? lane + operand
                                 : lane ^ operand;
          if (from < base || from >= base + width) from = lane;
          if (!(all.arrived >> from & 1))
            fail("shfl.sync: lane %d reads lane %d, which is not in the mask", lane, from);
          all.result[lane] = all.value[from];
        }
        return true;
      }));
}

uint32_t ballot(uint32_t mask, bool value) {
  EMU_ENTER();
  return static_cast<uint32_t>(converge(mask, false, "vote.sync", 0, value, 0, [](Warp&, Collective& all) {
    uint32_t votes = 0;
    for (int lane = 0; lane < 32; ++lane)
      votes |= static_cast<uint32_t>(all.arrived >> lane & 1 & all.value[lane]) << lane;
    for (uint64_t& result : all.result) result = votes;
    return true;
  }));
}

uint32_t match_any(uint32_t mask, uint64_t value) {
  EMU_ENTER();
  return static_cast<uint32_t>(converge(mask, false, "match.any.sync", 0, value, 0, [](Warp&, Collective& all) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int other = 0; other < 32; ++other) {
        if (all.arrived >> other & 1 && all.value[other] == all.value[lane]) all.result[lane] |= uint64_t{1} << other;
      }
    }
    return true;
  }));
}

void sync_warp(uint32_t mask) {
  EMU_ENTER();
  converge(mask, false, "bar.warp.sync", 0, 0, 0, [](Warp&, Collective&) { return true; });
}

bool elect(uint32_t mask, uint32_t& leader) {
  EMU_ENTER();
  leader = static_cast<uint32_t>(converge(mask, false, "elect.sync", 0, 0, 0, [](Warp&, Collective& all) {
    for (uint64_t& result : all.result) result = static_cast<uint64_t>(__builtin_ctz(all.arrived));
    return true;
  }));
  return static_cast<int>(leader) == current().lane;
}

namespace {

// To warps that ask for more than they have, from what the others have released.
void give_registers(Cta& cta) {
  int spare = cta.registers;
  for (auto& warp : cta.warps) spare -= 32 * warp->registers;
  for (auto& warp : cta.warps) {
    const int more = 32 * (warp->registers_asked - warp->registers);
    if (more <= 0 || more > spare) continue;
    spare -= more;
    warp->registers = warp->registers_asked;
    for (Fiber* fiber : warp->lanes) {
      if (fiber->state == Fiber::State::kBlocked) wake(*fiber);
    }
  }
}

}  // namespace

void set_registers(int count, bool grow) {
  EMU_ENTER();
  if (count % 8 || count < 24 || count > 256) fail("setmaxnreg takes multiples of 8 from 24 to 256, got %d", count);
  converge(kFull, true, grow ? "setmaxnreg.inc" : "setmaxnreg.dec", static_cast<uint64_t>(count), 0, 0,
           [](Warp& warp, Collective& all) {
             if (warp.live != kFull) fail("setmaxnreg after lanes of the warp have exited");
             const int asked = static_cast<int>(all.tag);
             const bool grows = std::strcmp(all.kind, "setmaxnreg.inc") == 0;
             if (grows ? asked < warp.registers : asked > warp.registers) {
               fail("%s to %d registers from %d", all.kind, asked, warp.registers);
             }
             for (auto& other : warp.cta->warps) {
               if (other->group != warp.group || other->registers_asked == 0 || other->registers_asked == asked)
                 continue;
               fail("setmaxnreg: warp %d of the warpgroup asked for %d registers, warp %d for %d", other->index,
                    other->registers_asked, warp.index, asked);
             }
             warp.registers_asked = asked;
             if (!grows) warp.registers = asked;
             give_registers(*warp.cta);
             if (warp.registers == asked) return true;
             for (Fiber* fiber : warp.lanes)
               fiber->waits_for = {"setmaxnreg.inc, for registers that others release", 0, 0};
             return false;
           });
}

// ---- named barriers -------------------------------------------------------------------------------------------------

namespace {

bool complete(NamedBarrier& barrier, int needed) {
  if (barrier.arrived < needed) return false;
  if (barrier.arrived > needed) fail("a barrier of %d threads got %d", needed, barrier.arrived);
  uint64_t result = 0;
  if (barrier.reduce == Reduce::kOr) result = barrier.trues > 0;
  if (barrier.reduce == Reduce::kAnd) result = barrier.trues == barrier.votes;
  if (barrier.reduce == Reduce::kPopc) result = static_cast<uint64_t>(barrier.trues);
  const std::vector<Fiber*> waiting = std::move(barrier.waiting);
  const Clock clock = std::move(barrier.clock);
  barrier = {};
  for (Fiber* fiber : waiting) {
    acquire(*fiber->warp, clock);
    fiber->result = result;
    wake(*fiber);
  }
  return true;
}

struct Arrival {
  int id, threads;
  bool wait;
  Reduce reduce;
};

Arrival unpack(uint64_t tag) {
  return {static_cast<int>(tag & 0xFF),
          static_cast<int>(tag >> 8 & 0xFFFF) == 0xFFFF ? kAllThreads : static_cast<int>(tag >> 8 & 0xFFFF),
          (tag >> 24 & 1) != 0, static_cast<Reduce>(tag >> 25 & 3)};
}

NamedBarrier& joined(Cta& cta, const Arrival& arrival) {
  NamedBarrier& barrier = cta.barriers[arrival.id];
  if (barrier.arrived == 0) {
    barrier.expected = arrival.threads;
    barrier.reduce = arrival.reduce;
  }
  if (barrier.expected != arrival.threads) {
    fail("barrier %d is used with %d threads by one and with %d by another", arrival.id, barrier.expected,
         arrival.threads);
  }
  if (barrier.reduce != arrival.reduce) fail("barrier %d is used with different reductions", arrival.id);
  return barrier;
}

int needed_by(const NamedBarrier& barrier, const Cta& cta) {
  if (barrier.expected != kAllThreads) return barrier.expected;
  int threads = 0;  // exited threads of a live warp count along with it
  for (auto& warp : cta.warps) threads += warp->live ? 32 : 0;
  return threads;
}

}  // namespace

uint32_t barrier(int id, int threads, bool aligned, bool wait, Reduce reduce, bool value) {
  EMU_ENTER();
  preempt();
  if (id < 0 || id > 15) fail("there are barriers 0 to 15, got %d", id);
  if (threads != kAllThreads && (threads <= 0 || threads % 32)) {
    fail("a barrier's thread count is a multiple of 32, got %d", threads);
  }
  Fiber& fiber = current();
  const uint64_t tag = static_cast<uint64_t>(id) | static_cast<uint64_t>(threads & 0xFFFF) << 8 |
                       static_cast<uint64_t>(wait) << 24 | static_cast<uint64_t>(reduce) << 25;
  if (!aligned) {
    NamedBarrier& here = joined(*fiber.cta, unpack(tag));
    release(*fiber.warp, here.clock);
    here.arrived += 1;
    here.votes += 1;
    here.trues += value;
    if (wait) {
      here.waiting.push_back(&fiber);
      fiber.state = Fiber::State::kBlocked;
    }
    complete(here, needed_by(here, *fiber.cta));
    if (wait) sleep({"barrier %d of %d threads", static_cast<uint32_t>(id), static_cast<uint32_t>(threads)});
    return static_cast<uint32_t>(fiber.result);
  }
  return static_cast<uint32_t>(
      converge(kFull, true, wait ? "bar.sync" : "bar.arrive", tag, value, 0, [](Warp& warp, Collective& all) {
        const Arrival arrival = unpack(all.tag);
        NamedBarrier& here = joined(*warp.cta, arrival);
        release(warp, here.clock);
        here.arrived += 32;
        for (int lane = 0; lane < 32; ++lane) {
          if (!(all.arrived >> lane & 1)) continue;
          ++here.votes;
          here.trues += all.value[lane] != 0;
          if (!arrival.wait) continue;
          here.waiting.push_back(warp.lanes[lane]);
          warp.lanes[lane]->waits_for = {"barrier %d of %d threads", static_cast<uint32_t>(arrival.id),
                                         static_cast<uint32_t>(arrival.threads)};
        }
        complete(here, needed_by(here, *warp.cta));
        return !arrival.wait;
      }));
}

void recheck_thread_barriers(Cta& cta) {
  for (auto& [id, barrier] : cta.barriers) {
    (void)id;
    if (barrier.arrived && barrier.expected == kAllThreads) complete(barrier, needed_by(barrier, cta));
  }
}

// ---- mbarriers ------------------------------------------------------------------------------------------------------

namespace {

constexpr int64_t kMostBytes = (1 << 20) - 1;
constexpr uint64_t kCookie = 0x6A62617272696572;  // what an mbarrier's bytes hold while it is one

Mbarrier& found(Cta& cta, uint32_t address) {
  const auto at = cta.mbarriers.find(address);
  if (at == cta.mbarriers.end()) fail("there is no initialised mbarrier at shared address 0x%x", address);
  uint64_t bytes;
  std::memcpy(&bytes, cta.shared + address, sizeof bytes);
  if (bytes != kCookie) fail("the mbarrier at shared address 0x%x was overwritten", address);
  return at->second;
}

bool finish_phase(Mbarrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return false;
  ++barrier.phase;
  if (!barrier.arriving.empty()) merge(barrier.completed, barrier.arriving);
  barrier.pending = barrier.expected;
  for (Fiber* fiber : barrier.waiting) wake(*fiber);
  barrier.waiting.clear();
  progress();
  return true;
}

}  // namespace

std::string describe(Cta& cta, uint32_t address) {
  const Mbarrier& barrier = cta.mbarriers[address];
  return format("mbarrier 0x%x is in phase %llu, waits for %u of %u arrivals and %lld bytes", address,
                static_cast<unsigned long long>(barrier.phase), barrier.pending, barrier.expected,
                static_cast<long long>(barrier.bytes));
}

void mbarrier_init(uint32_t address, uint32_t arrivals) {
  EMU_ENTER();
  Cta& cta = *current().cta;
  if (address % 8) fail("an mbarrier's address is a multiple of 8, got 0x%x", address);
  if (arrivals < 1 || arrivals > kMostBytes) fail("an mbarrier expects 1 to 2^20 - 1 arrivals, got %u", arrivals);
  window(cta, address, 8);
  if (cta.mbarriers.count(address)) fail("the mbarrier at shared address 0x%x is initialised twice", address);
  Mbarrier& barrier = cta.mbarriers[address];
  barrier.expected = barrier.pending = arrivals;
  std::memcpy(cta.shared + address, &kCookie, sizeof kCookie);
  generic_access(*current().warp, address, 8, true, current().caller);
  current().unfenced_barriers.push_back(address);
}

void mbarrier_invalidate(uint32_t address) {
  EMU_ENTER();
  Cta& cta = *current().cta;
  if (!found(cta, address).waiting.empty()) fail("mbarrier.inval of a barrier that threads wait for");
  cta.mbarriers.erase(address);
}

void mbarrier_init_fence() {
  Fiber& fiber = current();
  for (uint32_t address : fiber.unfenced_barriers) fiber.cta->mbarriers[address].visible_to_copies = true;
  fiber.unfenced_barriers.clear();
}

void check_usable_by_copies(Cta& cta, uint32_t mbarrier) {
  if (!found(cta, mbarrier).visible_to_copies) {
    fail(
        "the mbarrier at shared address 0x%x is used by a copy without fence.mbarrier_init or fence.proxy.async after "
        "its initialisation",
        mbarrier);
  }
}

void arrive(Cta& cta, uint32_t address, uint32_t count) {
  Mbarrier& barrier = found(cta, address);
  if (count > barrier.pending) {
    fail("%u arrivals more than the mbarrier at 0x%x expects in its phase (%s)", count - barrier.pending, address,
         describe(cta, address).c_str());
  }
  barrier.pending -= count;
  finish_phase(barrier);
}

void release_to(Fiber& fiber, Cta& cta, uint32_t address) { release(*fiber.warp, found(cta, address).arriving); }

void expect_arrivals(Cta& cta, uint32_t mbarrier, uint32_t count) { found(cta, mbarrier).pending += count; }

void complete_bytes(Cta& cta, uint32_t address, uint32_t bytes) {
  Mbarrier& barrier = found(cta, address);
  barrier.bytes -= bytes;
  if (barrier.bytes < -kMostBytes) fail("%s: its byte count underflows", describe(cta, address).c_str());
  finish_phase(barrier);
}

void mbarrier_expect(uint32_t address, uint32_t bytes) {
  EMU_ENTER();
  Mbarrier& barrier = found(*current().cta, address);
  barrier.bytes += bytes;
  if (barrier.bytes > kMostBytes) fail("%s: more bytes than it can count", describe(*current().cta, address).c_str());
}

uint64_t mbarrier_arrive(uint32_t address, uint32_t count, uint32_t expected_bytes) {
  EMU_ENTER();
  preempt();
  const auto [cta, local] = place_in_cluster(address);
  if (expected_bytes) mbarrier_expect(own_offset(address), expected_bytes);
  Mbarrier& barrier = found(*cta, local);
  const uint64_t state = barrier.phase;
  if (cta != current().cta) global_access(*current().warp, cta->shared + local, 8, Access::kAdd, current().caller);
  release_to(current(), *cta, local);
  arrive(*cta, local, count);
  preempt();
  return state;
}

bool mbarrier_wait(uint32_t address, bool parity, bool may_block) {
  EMU_ENTER();
  preempt();
  Fiber& fiber = current();
  Mbarrier& barrier = found(*fiber.cta, address);
  const auto passed = [&] {
    const Mbarrier& now = found(*fiber.cta, address);
    if ((now.phase & 1) == parity) return false;
    acquire(*fiber.warp, now.completed);
    copies_done(*fiber.warp, address, now.phase);
    return true;
  };
  if (passed()) return true;
  if (!may_block) {
    poll();
  } else {
    barrier.waiting.push_back(&fiber);
    sleep({"the phase of parity %d of mbarrier 0x%x", parity, address, true});
  }
  return passed();  // not, if a whole phase more went by
}

}  // namespace emu
