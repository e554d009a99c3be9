// Fibers, who runs next, collectives of a warp, launches.
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include <sys/mman.h>
#if !defined(__x86_64__) || defined(EMU_UCONTEXT)
#include <ucontext.h>
#endif

#include "machine.h"

namespace emu {

Thread* self = nullptr;
Dim3 grid{}, block{};
Random rng;
double early_products = 0.0;

namespace {

constexpr uint64_t kIdlePolls = 2'000'000, kPatience = 2'000;
constexpr double kSlowness = 0.95;  // how often a slow warp is passed over for other warps and copies

struct Launch {
  void (*entry)(void**) = nullptr;
  void** arguments = nullptr;
  uint32_t smem = 0;
  int registers = 0, cluster = 1;  // CTAs of one
  bool dependent = false;          // it begins while launches before it may be running
  double async_rate = 0.0, preemption = 0.0;
  int slow_warp = -1;  // of each CTA; -1: none
  std::vector<std::unique_ptr<Cta>> resident;
  std::vector<Warp*> ready;
  std::vector<AsyncOperation> pending;
  uint64_t idle_polls = 0, switches = 0;
  uint64_t polls_beside_copies = 0;  // since one was last made, progress or not: who polls may do other things meanwhile
  std::string error;
};
Launch* launch = nullptr;
void* scheduler_stack_pointer = nullptr;
std::vector<char*> free_stacks;
std::vector<char*> free_windows;

#if defined(__x86_64__) && !defined(EMU_UCONTEXT)
asm(R"(
.text
.type emu_switch_context, @function
emu_switch_context:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emu_switch_context, .-emu_switch_context
)");
extern "C" void emu_switch_context(void** save, void* load);

void* first_context(char* stack, void (*entry)()) {
  uintptr_t top = (reinterpret_cast<uintptr_t>(stack) + kStackBytes) & ~uintptr_t{15};
  void** frame = reinterpret_cast<void**>(top - 64);
  std::memset(frame, 0, 64);
  frame[6] = reinterpret_cast<void*>(entry);  // six registers below the return address
  return frame;
}
#else
extern "C" void emu_switch_context(void** save, void* load) {
  if (*save == nullptr) *save = new ucontext_t;
  swapcontext(static_cast<ucontext_t*>(*save), static_cast<ucontext_t*>(load));
}
void* first_context(char* stack, void (*entry)()) {
  constexpr size_t kReserved = 4096;  // the stack's far end holds the context
  static_assert(sizeof(ucontext_t) <= kReserved);
  ucontext_t* context = reinterpret_cast<ucontext_t*>(stack);
  getcontext(context);
  context->uc_stack.ss_sp = stack + kReserved;
  context->uc_stack.ss_size = kStackBytes - kReserved;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
  return context;
}
#endif

char* mapped(std::vector<char*>& pool, size_t bytes) {
  if (!pool.empty()) {
    char* taken = pool.back();
    pool.pop_back();
    return taken;
  }
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("no memory for another thread's stack");
  return static_cast<char*>(memory);
}

void to_scheduler() {
  Fiber& fiber = current();
  emu_switch_context(&fiber.stack_pointer, scheduler_stack_pointer);
}

void make_ready(Fiber& fiber) {
  fiber.state = Fiber::State::kReady;
  Warp& warp = *fiber.warp;
  warp.ready |= 1u << fiber.lane;
  if (!warp.queued) {
    warp.queued = true;
    launch->ready.push_back(&warp);
  }
}

void run_fiber() {
  launch->entry(launch->arguments);
  Fiber& fiber = current();
  check_exit(fiber);
  fiber.state = Fiber::State::kExited;
  to_scheduler();
  std::abort();
}

void try_finish(Warp& warp, size_t position) {
  Collective& collective = *warp.open[position];
  const uint32_t needed = collective.aligned ? warp.live : collective.mask;
  if (collective.arrived != needed || needed == 0) return;
  const std::unique_ptr<Collective> done = std::move(warp.open[position]);
  warp.open.erase(warp.open.begin() + static_cast<long>(position));
  if (!done->finish(warp, *done)) return;
  for (int lane = 0; lane < 32; ++lane) {
    if (!(done->arrived >> lane & 1)) continue;
    warp.lanes[lane]->result = done->result[lane];
    wake(*warp.lanes[lane]);
  }
}

void exited(Fiber& fiber) {
  Warp& warp = *fiber.warp;
  warp.live &= ~(1u << fiber.lane);
  --fiber.cta->live;
  free_stacks.push_back(fiber.stack);
  fiber.stack = nullptr;
  ++launch->switches;
  launch->idle_polls = 0;
  for (size_t i = 0; i < warp.open.size(); ++i) {
    if (!warp.open[i]->aligned && warp.open[i]->mask >> fiber.lane & 1) {
      fail("lane %d exits, but others of its warp wait for it in %s with mask %08x", fiber.lane, warp.open[i]->kind,
           warp.open[i]->mask);
    }
  }
  for (size_t i = warp.open.size(); i-- > 0;) {
    if (warp.open[i]->aligned) try_finish(warp, i);
  }
  recheck_thread_barriers(*fiber.cta);
  recheck_cluster_barrier(*fiber.cta->cluster);
  if (fiber.cta->live == 0) {
    if (fiber.cta->copies > 0) {
      fail("CTA %d ends while %d asynchronous copies use its shared memory", fiber.cta->index, fiber.cta->copies);
    }
    end_of_shared(*fiber.cta);
  }
}

void start_cta(int index, const std::shared_ptr<Cluster>& cluster) {
  const int rank = static_cast<int>(cluster->ctas.size());
  auto cta = std::make_unique<Cta>();
  cta->index = index;
  cta->cluster = cluster;
  cluster->ctas.push_back(cta.get());
  cta->block = {index % grid.x, index / grid.x % grid.y, index / grid.x / grid.y};
  cta->shared = mapped(free_windows, kWindowBytes);
  std::memset(cta->shared, 0xFF, kWindowBytes);  // NaN in every format: what is read before it is written shows
  cta->dynamic_bytes = launch->smem;
  cta->end = cluster->end = (kSharedBegin + launch->smem + 127) / 128 * 128;
  if (launch->cluster > 1) forget_accesses(cta->shared, kWindowBytes);
  cta->unfenced_writer.assign(kWindowBytes / kGranule, 0);
  const int threads = static_cast<int>(block.x * block.y * block.z);
  cta->live = threads;
  cta->registers = launch->registers * threads;
  for (int first = 0; first < threads; first += 32) {
    auto warp = std::make_unique<Warp>();
    warp->cta = cta.get();
    warp->index = first / 32;
    warp->registers = launch->registers;
    if (warp->index % 4 == 0) {
      cta->groups.push_back(std::make_unique<Warpgroup>());
      cta->groups.back()->cta = cta.get();
      cta->groups.back()->index = warp->index / 4;
    }
    warp->group = cta->groups.back().get();
    for (int lane = 0; lane < 32 && first + lane < threads; ++lane) {
      auto fiber = std::make_unique<Fiber>();
      const unsigned thread = static_cast<unsigned>(first + lane);
      fiber->thread = {thread % block.x, thread / block.x % block.y, thread / block.x / block.y};
      fiber->block = cta->block;
      fiber->at = "";
      fiber->awaits_launches = launch->dependent;
      fiber->cta = cta.get();
      fiber->warp = warp.get();
      fiber->index = first + lane;
      fiber->lane = lane;
      fiber->stack = mapped(free_stacks, kStackBytes);
      fiber->stack_pointer = first_context(fiber->stack, run_fiber);
      warp->lanes[lane] = fiber.get();
      warp->live |= 1u << lane;
      cta->fibers.push_back(std::move(fiber));
    }
    cta->warps.push_back(std::move(warp));
  }
  start_races(*cta, rank, launch->cluster);
  for (auto& fiber : cta->fibers) make_ready(*fiber);
  launch->resident.push_back(std::move(cta));
}

void start_cluster(int first) {
  const auto cluster = std::make_shared<Cluster>();
  for (int index = first; index < first + launch->cluster; ++index) start_cta(index, cluster);
}

void run_pending() {
  const size_t which = rng.below(static_cast<uint32_t>(launch->pending.size()));
  AsyncOperation operation = std::move(launch->pending[which]);
  launch->pending[which] = std::move(launch->pending.back());
  launch->pending.pop_back();
  launch->idle_polls = launch->polls_beside_copies = 0;
  operation.run();
}

void run_warp() {
  size_t which = rng.below(static_cast<uint32_t>(launch->ready.size()));
  if (launch->ready[which]->index == launch->slow_warp && rng.chance(kSlowness)) {
    if (launch->ready.size() == 1 && !launch->pending.empty()) return run_pending();
    which = (which + 1) % launch->ready.size();
  }
  Warp& warp = *launch->ready[which];
  // All lanes that are ready, from a random one on. Nothing else happens until each has come to a place where it waits:
  // to the rest of the machine a warp that has not diverged is one thread.
  warp.pass = warp.ready;
  warp.ready = 0;
  for (int lane = static_cast<int>(rng.below(32)); warp.pass; lane = (lane + 1) % 32) {
    if (!(warp.pass >> lane & 1)) continue;
    warp.pass &= ~(1u << lane);
    Fiber& fiber = *warp.lanes[lane];
    self = &fiber;
    emu_switch_context(&scheduler_stack_pointer, fiber.stack_pointer);
    if (!launch->error.empty()) return;
    if (fiber.state == Fiber::State::kExited) exited(fiber);
    self = nullptr;
  }
  if (warp.ready == 0) {
    warp.queued = false;
    for (size_t i = 0; i < launch->ready.size(); ++i) {
      if (launch->ready[i] == &warp) {
        launch->ready[i] = launch->ready.back();
        launch->ready.pop_back();
        break;
      }
    }
  }
}

// What everyone waits for: lanes, and warps, with the same reason together.
std::string stuck() {
  std::string report;
  for (auto& cta : launch->resident) {
    std::map<std::string, std::string> warps_by_reason;
    for (auto& warp : cta->warps) {
      std::map<std::string, uint32_t> lanes_by_reason;
      for (int lane = 0; lane < 32; ++lane) {
        const Fiber* fiber = warp->lanes[lane];
        if (fiber == nullptr || fiber->state == Fiber::State::kExited) continue;
        const Reason& reason = fiber->waits_for;
        std::string why = "polls";
        if (fiber->state == Fiber::State::kBlocked) why = format(reason.text, reason.first, reason.second);
        if (reason.mbarrier) why += ": " + describe(*cta, reason.second);
        lanes_by_reason[format("%s @%p", why.c_str(), fiber->caller)] |= 1u << lane;
      }
      for (auto& [why, lanes] : lanes_by_reason) {
        warps_by_reason[format("lanes %08x, %s", lanes, why.c_str())] += format(" %d", warp->index);
      }
    }
    for (auto& [why, warps] : warps_by_reason)
      report += format("\n  CTA %d warps%s: %s", cta->index, warps.c_str(), why.c_str());
  }
  return report;
}

void retire_finished() {
  auto& resident = launch->resident;
  for (size_t i = 0; i < resident.size();) {
    int live = 0;
    for (const Cta* cta : resident[i]->cluster->ctas) live += cta->live;
    if (live > 0) {
      ++i;
      continue;
    }
    free_windows.push_back(resident[i]->shared);
    resident[i] = std::move(resident.back());
    resident.pop_back();
  }
}

void run_to_end(int ctas, int slots) {
  int started = 0;
  size_t finished_checks = 0;
  while (true) {
    for (; static_cast<int>(launch->resident.size()) + launch->cluster <= slots && started < ctas;
         started += launch->cluster) {
      start_cluster(started);
    }
    if (launch->resident.empty()) break;
    if (!launch->pending.empty() && (launch->ready.empty() || rng.chance(launch->async_rate))) {
      run_pending();
    } else if (!launch->ready.empty()) {
      run_warp();
      if (!launch->error.empty()) return;
    } else {
      throw std::runtime_error("deadlock: no thread can run" + stuck());
    }
    if (launch->polls_beside_copies > kPatience && !launch->pending.empty()) run_pending();
    if (launch->idle_polls > kIdlePolls) {
      throw std::runtime_error("livelock: threads poll what nobody changes" + stuck());
    }
    if (launch->switches != finished_checks) {
      finished_checks = launch->switches;
      retire_finished();
    }
  }
  while (!launch->pending.empty()) run_pending();
}

}  // namespace

std::string format(const char* text, ...) {
  char buffer[2048];
  va_list arguments;
  va_start(arguments, text);
  std::vsnprintf(buffer, sizeof buffer, text, arguments);
  va_end(arguments);
  return buffer;
}

void fail(const char* text, ...) {
  char buffer[2048];
  va_list arguments;
  va_start(arguments, text);
  std::vsnprintf(buffer, sizeof buffer, text, arguments);
  va_end(arguments);
  if (self == nullptr) throw std::runtime_error(buffer);
  Fiber& fiber = current();
  launch->error = buffer + format("\n  CTA %d warp %d lane %d: %s @%p", fiber.cta->index, fiber.warp->index, fiber.lane,
                                  *fiber.at ? fiber.at : "no PTX yet", fiber.caller);
  if (fiber.state == Fiber::State::kExited) throw std::runtime_error(launch->error);
  to_scheduler();
  std::abort();
}

std::string name_of(uint64_t address) {
  for (auto& cta : launch->resident) {
    const uint64_t offset = address - reinterpret_cast<uint64_t>(cta->shared);
    if (offset < kWindowBytes) {
      return format("shared address 0x%x of CTA %d", static_cast<unsigned>(offset), cta->index);
    }
  }
  return format("global memory at 0x%llx", static_cast<unsigned long long>(address));
}

Fiber& current() { return *static_cast<Fiber*>(self); }

void sleep(Reason why) {
  Fiber& fiber = current();
  if (fiber.warp->ready >> fiber.lane & 1) {  // woken before it slept
    to_scheduler();
    return;
  }
  fiber.state = Fiber::State::kBlocked;
  fiber.waits_for = why;
  to_scheduler();
}

void wake(Fiber& fiber) {
  launch->idle_polls = 0;
  make_ready(fiber);
}

void progress() { launch->idle_polls = 0; }

void await_launches() {
  current().awaits_launches = false;
  preempt();
}

void check_awaited(const char* does) {
  if (current().awaits_launches) fail("a thread %s, without griddepcontrol.wait in a dependent launch", does);
}

void preempt() {
  const Fiber& fiber = current();
  if (fiber.warp->live != 1u << fiber.lane || !rng.chance(launch->preemption)) return;  // lanes stay together
  make_ready(current());
  to_scheduler();
}

void poll() {
  ++launch->idle_polls;
  ++launch->polls_beside_copies;
  make_ready(current());
  to_scheduler();
}

uint64_t converge(uint32_t mask, bool aligned, const char* kind, uint64_t tag, uint64_t value, uint64_t extra,
                  bool (*finish)(Warp&, Collective&)) {
  Fiber& fiber = current();
  Warp& warp = *fiber.warp;
  if (!aligned) {
    if (!(mask >> fiber.lane & 1)) fail("%s: the mask %08x is without the calling lane", kind, mask);
    if (mask & ~warp.live) fail("%s: lanes %08x of the mask have exited", kind, mask & ~warp.live);
  }
  size_t position = 0;
  for (; position < warp.open.size(); ++position) {
    Collective& other = *warp.open[position];
    if (other.aligned == aligned && (aligned || other.mask == mask)) break;
    if (!aligned && !other.aligned && other.mask & mask) {
      fail("%s with mask %08x while lanes %08x of the warp are in %s with mask %08x", kind, mask, other.arrived,
           other.kind, other.mask);
    }
  }
  if (position == warp.open.size()) {
    warp.open.push_back(std::make_unique<Collective>());
    Collective& opened = *warp.open.back();
    opened.mask = mask;
    opened.aligned = aligned;
    opened.kind = kind;
    opened.tag = tag;
    opened.finish = finish;
  }
  Collective& collective = *warp.open[position];
  if (std::strcmp(collective.kind, kind) != 0 || collective.tag != tag) {
    fail("%s (%llx) while lanes %08x of the warp are in %s (%llx)", kind, static_cast<unsigned long long>(tag),
         collective.arrived, collective.kind, static_cast<unsigned long long>(collective.tag));
  }
  collective.arrived |= 1u << fiber.lane;
  collective.value[fiber.lane] = value;
  collective.extra[fiber.lane] = extra;
  fiber.state = Fiber::State::kBlocked;
  fiber.waits_for = {kind, 0, 0};
  try_finish(warp, position);
  to_scheduler();  // even if all have come: lanes leave together
  return fiber.result;
}

void queue(Cta& cta, bool touches_shared, std::function<void()> run) {
  Cta* owner = &cta;
  cta.copies += touches_shared;
  launch->pending.push_back({[owner, touches_shared, run = std::move(run)] {
    run();
    if (touches_shared) --owner->copies;
  }});
}

}  // namespace emu

// Runs a kernel to its end; null, or what went wrong. `registers`: a thread's at launch. `cluster`: CTAs of one. `slots`:
// CTAs resident at a time. `dependent`: launches before it may not have ended.
extern "C" const char* emu_launch(void (*entry)(void**), void** arguments, const unsigned* grid, const unsigned* block,
                                  unsigned smem, int registers, int cluster, int slots, int dependent, uint64_t seed) {
  static std::string error;
  emu::Launch state;
  emu::launch = &state;
  emu::grid = {grid[0], grid[1], grid[2]};
  emu::block = {block[0], block[1], block[2]};
  emu::rng.state = seed * 0x9E3779B97F4A7C15ull + 0x1234567;
  for (int i = 0; i < 8; ++i) emu::rng.next();
  static const double kRates[] = {0.0, 0.02, 0.3, 0.9};
  static const double kPreemption[] = {0.0, 0.01, 0.2};
  state.async_rate = kRates[emu::rng.below(4)];
  state.preemption = kPreemption[emu::rng.below(3)];
  emu::early_products = emu::rng.below(3) * 0.5;
  const uint32_t warps = (block[0] * block[1] * block[2] + 31) / 32;
  if (emu::rng.below(2)) state.slow_warp = static_cast<int>(emu::rng.below(warps));
  state.entry = entry;
  state.arguments = arguments;
  state.smem = smem;
  state.registers = registers;
  state.cluster = cluster;
  state.dependent = dependent != 0;
  error.clear();
  try {
    emu::start_global_races(size_t{grid[0]} * grid[1] * grid[2], warps);
    emu::run_to_end(static_cast<int>(grid[0] * grid[1] * grid[2]), slots);
    error = state.error;
  } catch (const std::exception& problem) {
    error = problem.what();
  }
  for (auto& cta : state.resident) {
    for (auto& fiber : cta->fibers) {
      if (fiber->stack != nullptr) emu::free_stacks.push_back(fiber->stack);
    }
    emu::free_windows.push_back(cta->shared);
  }
  emu::self = nullptr;
  emu::launch = nullptr;
  return error.empty() ? nullptr : error.c_str();
}
