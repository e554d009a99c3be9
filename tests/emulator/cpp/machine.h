// The emulated machine: CTAs of fibers, one a CUDA thread, of which one runs at a time.
#pragma once
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "emulator.h"

namespace emu {

struct Cta;
struct Fiber;
struct Warp;
struct Warpgroup;

constexpr uint32_t kWindowBytes = 256 * 1024;  // of shared addresses
constexpr uint32_t kGranule = 16;              // bytes that writes through the generic proxy are followed by
constexpr uint32_t kFull = 0xFFFFFFFFu;
constexpr size_t kStackBytes = 128 * 1024;

struct Races;
using Clock = std::vector<uint32_t>;  // how far each actor is known to have come, see races.cpp

struct CopyGroup {
  int unread = 0, unwritten = 0;  // copies that have not read their source, or are not complete
  uint32_t last_store = 0;        // number of the last of its warp's bulk stores
  Fiber* waiting = nullptr;
};

struct CopyArrival {  // an mbarrier that waits for the cp.async before it
  uint32_t barrier;
  uint64_t end;
  int remaining;
};

// Why a thread waits: a format of one or two integers, written out only in reports.
struct Reason {
  const char* text = "";
  uint32_t first = 0, second = 0;
  bool mbarrier = false;  // `second` is the address of one
};

struct Fiber : Thread {
  enum class State { kReady, kBlocked, kExited };
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  Cta* cta = nullptr;
  Warp* warp = nullptr;
  int index = 0, lane = 0;
  State state = State::kReady;
  Reason waits_for;        // while blocked
  void* caller = nullptr;  // where in the kernel it last entered the runtime
  uint64_t result = 0;     // of the collective that woke it
  std::shared_ptr<CopyGroup> open_bulk;
  std::deque<std::shared_ptr<CopyGroup>> bulk;
  std::shared_ptr<CopyGroup> open_copies;  // cp.async
  std::deque<std::shared_ptr<CopyGroup>> copies;
  uint64_t copies_issued = 0;
  int copies_outstanding = 0;
  bool awaits_launches = false;  // it may not touch global memory, since launches before this one may be running
  std::vector<CopyArrival> arrivals;
  std::vector<uint32_t> unfenced;  // granules written through the generic proxy since the last proxy fence
  std::vector<uint32_t> unfenced_barriers;
};

struct Collective {
  uint32_t mask = 0;  // who takes part; with `aligned` whoever of the warp has not exited
  bool aligned = false;
  const char* kind = nullptr;
  uint64_t tag = 0;  // must agree
  uint32_t arrived = 0;
  uint64_t value[32] = {}, extra[32] = {}, result[32] = {};
  bool (*finish)(Warp&, Collective&) = nullptr;  // true: the lanes go on; false: whoever completes the wait wakes them
};

struct Accumulators {  // of a warpgroup, while products are in flight
  int n = 0;
  std::vector<float> values;      // 64 x n
  std::vector<float*> registers;  // 128 threads x n / 2
  bool registered[4] = {};
  uint64_t last_operation[4] = {};  // one past the last operation that a warp issued on them
};

struct PendingProduct {
  Wgmma operation;
  std::shared_ptr<Accumulators> accumulators;
  RegisterA a[128][4];
  int issued = 0;  // warps
};

struct Warpgroup {
  Cta* cta = nullptr;
  int index = 0;
  std::deque<std::shared_ptr<PendingProduct>> products;  // numbers first_product...
  uint64_t first_product = 0, executed = 0;
  std::map<int, int> registers;  // by warp, of setmaxnreg
};

struct Warp {
  Cta* cta = nullptr;
  Warpgroup* group = nullptr;
  int index = 0;
  Fiber* lanes[32] = {};
  uint32_t live = 0, ready = 0, pass = 0;  // lanes; `pass`: those that are still to run in the current turn
  bool queued = false;
  std::vector<std::unique_ptr<Collective>> open;
  // wgmma
  uint64_t issued = 0;
  std::deque<uint64_t> committed;  // operations issued before each commit that has not been waited for
  std::vector<std::shared_ptr<Accumulators>> in_flight;
  bool fenced = false, waiting = false;
  uint64_t wait_target = 0;
  int registers = 0, registers_asked = 0;  // a thread; the latter by the last setmaxnreg
  Clock clock, fenced_clock;               // the latter: what was known at the last fence
  uint32_t stores = 0;                     // bulk stores so far
  bool at_cluster_barrier = false;         // it has arrived and not waited
  uint64_t cluster_phase = 0;              // in which it arrived
};

struct NamedBarrier {
  int arrived = 0, expected = 0;
  std::vector<Fiber*> waiting;
  Reduce reduce = Reduce::kNone;
  int trues = 0, votes = 0;
  Clock clock;
};

struct Mbarrier {
  uint32_t expected = 0, pending = 0;
  int64_t bytes = 0;
  uint64_t phase = 0;
  bool visible_to_copies = false;
  Clock arriving, completed;
  std::vector<Fiber*> waiting;
};

struct Place {  // in the shared memory of a CTA
  Cta* cta;
  uint32_t address;
};

struct Cluster {  // CTAs that run at the same time and read each other's shared memory; often of one
  std::vector<Cta*> ctas;
  std::map<std::pair<int, uint32_t>, uint32_t> statics;  // addresses in the window of each, by declaration and size
  uint32_t end = 0;
  uint64_t phase = 0;  // how often all have arrived at the barrier
  std::vector<Fiber*> waiting;
  Clock arriving, arrived;  // at the barrier: in this phase, in the last

  bool has_peers() const { return ctas.size() > 1; }
};

struct Cta {
  Dim3 block{};
  int index = 0;
  std::shared_ptr<Cluster> cluster;
  char* shared = nullptr;  // of kWindowBytes; address 0 is its first byte
  uint32_t dynamic_bytes = 0, end = 0;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<std::unique_ptr<Warp>> warps;
  std::vector<std::unique_ptr<Warpgroup>> groups;
  std::map<int, NamedBarrier> barriers;
  std::map<uint32_t, Mbarrier> mbarriers;
  std::shared_ptr<Races> races;
  std::vector<int> unfenced_writer;  // of a granule: thread + 1
  int registers = 0;                 // of all threads, at launch
  int live = 0, copies = 0;          // threads; asynchronous operations on its shared memory
};

struct AsyncOperation {
  std::function<void()> run;
};

// ---- schedule.cpp
std::string name_of(uint64_t address);  // of shared or global memory
struct Random {
  uint64_t state = 1;
  uint64_t next() {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state * 0x2545F4914F6CDD1Dull;
  }
  uint32_t below(uint32_t bound) { return static_cast<uint32_t>((next() >> 32) * bound >> 32); }
  bool chance(double probability) { return (next() >> 11) * 0x1p-53 < probability; }
};
extern Random rng;
extern double early_products;  // probability that a product is carried out at once

Fiber& current();
void check_awaited(const char* does);  // that the thread may touch what launches before this one write
void sleep(Reason why);  // until woken
void wake(Fiber& fiber);
uint64_t converge(uint32_t mask, bool aligned, const char* kind, uint64_t tag, uint64_t value, uint64_t extra,
                  bool (*finish)(Warp&, Collective&));
void queue(Cta& cta, bool touches_shared, std::function<void()> run);
std::string format(const char* text, ...);

#define EMU_ENTER() (current().caller = __builtin_return_address(0))

// ---- barriers.cpp
std::string describe(Cta& cta, uint32_t mbarrier);
void check_usable_by_copies(Cta& cta, uint32_t mbarrier);
void complete_bytes(Cta& cta, uint32_t mbarrier, uint32_t bytes);
void arrive(Cta& cta, uint32_t mbarrier, uint32_t count);
void release_to(Fiber& fiber, Cta& cta, uint32_t mbarrier);         // what an arrival of the thread publishes
void expect_arrivals(Cta& cta, uint32_t mbarrier, uint32_t count);  // in this phase, besides those of every phase
void recheck_thread_barriers(Cta& cta);                             // after a thread has exited

// ---- clusters.cpp
Cta* peer_with(const Cta& cta, const void* pointer);  // whose shared memory it is in, if another CTA's of the cluster
Place place_in_cluster(uint32_t address);              // of a shared address, which may be one that mapa gave
void check_alive(const Cta& cta);                      // as one whose shared memory another CTA touches
void recheck_cluster_barrier(Cluster& cluster);        // after a thread has exited
void end_of_shared(Cta& cta);                          // all of its threads have exited

// ---- races.cpp
void start_races(Cta& cta, int rank, int cluster);  // one of so many CTAs
void generic_access(Warp& warp, uint32_t address, uint32_t bytes, bool write, void* place);
void release(Warp& warp, Clock& to);
void acquire(Warp& warp, const Clock& from);
void join(Clock& to, const Clock& from);
void merge(Clock& to, Clock& from);  // and clear the latter
void product_reads(Warp& warp, uint64_t number, uint32_t address, uint32_t bytes, void* place);
void products_done(Warp& warp, uint64_t end);
uint32_t store_reads(Warp& warp, uint32_t address, uint32_t bytes, void* place);
void stores_done(Warp& warp, uint32_t number);
void copy_writes(Warp& warp, Cta& cta, uint32_t mbarrier, uint32_t address, uint32_t bytes, void* place);  // of the CTA
void copies_done(Warp& warp, uint32_t mbarrier, uint64_t phases);
void fence_known_writes(Warp& warp);  // for the asynchronous proxy
bool is_fenced(const Warp& warp, const Cta& cta, uint32_t granule, const Warp& writer);  // by all that the former knows

// ---- global_races.cpp
// `kCopied`: read by an asynchronous copy, not remembered; `kExchange`: an addition that sees those before it.
enum class Access { kRead, kCopied, kWrite, kAdd, kExchange };
void start_global_races(size_t ctas, size_t warps);
void add_shared_clock(Warp& warp);  // with the part that all CTAs share
void tick(Warp& warp);
void forget_accesses(const void* begin, uint64_t bytes);
void check_untouched(const Clock& clock, const Cta& cta);  // that nobody touches its shared memory after this
void global_access(Warp& warp, const void* pointer, uint64_t bytes, Access access, void* place);
size_t global_stores_of(const Warp& warp);  // the actor that its bulk stores are
void stored_globally(size_t actor, const Clock& clock, uint32_t number, const void* pointer, uint64_t bytes, bool adds,
                     void* place);
void global_stores_done(Warp& warp, uint32_t number);

// ---- copies.cpp
void check_fenced(const Warp& issuer, const Cta& cta, uint32_t address, uint32_t bytes, const char* who, const char* does);
void mark_written(Fiber& fiber, uint32_t address, uint32_t bytes);  // through the generic proxy
void check_exit(Fiber& fiber);
char* window(Cta& cta, uint32_t address, uint32_t bytes);

}  // namespace emu
