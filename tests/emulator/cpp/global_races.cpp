// Data races in global memory, also between CTAs: the clocks of races.cpp go on with a part that all CTAs share.
//
// Actors of that part: every warp of the grid, and the bulk stores of each, known of after cp.async.bulk.wait_group
// (not .read). Between CTAs clocks go through the words that atomic operations meet on. A release, or a relaxed one
// after a fence, leaves its warp's clock there; whoever reads it by an atomic operation or a strong load takes it,
// fence or not: a missing fence of the reader is not found. Additions are in no order with each other.
//
// Shared memory of clusters is looked at here too, besides in races.cpp, since other CTAs read it; their barrier passes
// clocks on.
#include <unordered_map>

#include "machine.h"

namespace emu {

namespace {

constexpr uint64_t kWord = 2, kPageWords = 1024;  // the smallest elements: two CTAs may own the halves of four bytes
constexpr size_t kMostWarps = 1024;  // of a grid; larger ones are not looked at

struct Seen {
  size_t actor;
  uint32_t time;
  void* place;
};

struct Word {
  bool written = false;
  Seen write{};
  std::vector<Seen> reads, additions;
};

struct Page {
  Word words[kPageWords];
};

size_t grid_warps = 0, cta_warps = 0, first = 0;  // `first`: where the shared part of a clock begins
std::unordered_map<uint64_t, std::unique_ptr<Page>> pages;
std::unordered_map<uint64_t, Clock> meetings;  // by address: the shared part of clocks

uint64_t last_number = 0;
Page* last = nullptr;  // that was looked at

Page* page_of(uint64_t word, bool make) {
  const uint64_t number = word / kPageWords;
  if (last != nullptr && last_number == number) return last;
  const auto found = pages.find(number);
  if (found == pages.end() && !make) return nullptr;
  Page* page = found != pages.end() ? found->second.get() : (pages[number] = std::make_unique<Page>()).get();
  last_number = number;
  last = page;
  return page;
}

std::string name(size_t actor) {
  const char* what = actor < grid_warps ? "" : "a bulk store of ";
  const size_t warp = actor % grid_warps;
  return format("%sCTA %zu warp %zu", what, warp / cta_warps, warp % cta_warps);
}

void check(const Clock& clock, const char* what, size_t actor, const char* before, const Seen& other, uint64_t word) {
  if (other.time <= clock[first + other.actor]) return;
  fail("race on %s: the %s by %s is not ordered after the %s by %s @%p", name_of(word * kWord).c_str(), what,
       name(actor).c_str(), before, name(other.actor).c_str(), other.place);
}

void note(std::vector<Seen>& seen, const Seen& now) {
  for (Seen& other : seen) {
    if (other.actor != now.actor) continue;
    other = now;
    return;
  }
  seen.push_back(now);
}

void visit(const Clock& clock, const Seen& now, uint64_t address, uint64_t bytes, Access access) {
  for (uint64_t word = address / kWord; word < (address + bytes + kWord - 1) / kWord; ++word) {
    Page* page = page_of(word, access != Access::kCopied);
    if (page == nullptr) continue;
    Word& here = page->words[word % kPageWords];
    const bool adds = access == Access::kAdd || access == Access::kExchange;
    const char* what = access == Access::kWrite ? "write" : adds ? "addition" : "read";
    if (here.written) check(clock, what, now.actor, "write", here.write, word);
    if (!adds) {
      for (const Seen& other : here.additions) check(clock, what, now.actor, "addition", other, word);
    }
    if (access == Access::kWrite || adds) {
      for (const Seen& other : here.reads) check(clock, what, now.actor, "read", other, word);
    }
    if (access == Access::kRead) note(here.reads, now);
    if (access == Access::kExchange) here.additions.clear();  // it comes after them, and all that follows from it
    if (adds) note(here.additions, now);
    if (access == Access::kWrite) {
      here.written = true;
      here.write = now;
      here.reads.clear();
      here.additions.clear();
    }
  }
}

size_t actor_of(const Warp& warp) {
  return static_cast<size_t>(warp.cta->index) * cta_warps + static_cast<size_t>(warp.index);
}

void join_meeting(Clock& clock, const Clock& meeting) {
  for (size_t i = 0; i < meeting.size(); ++i) clock[first + i] = std::max(clock[first + i], meeting[i]);
}

void leave(Clock& meeting, const Clock& clock) {
  meeting.resize(2 * grid_warps, 0);
  for (size_t i = 0; i < meeting.size(); ++i) meeting[i] = std::max(meeting[i], clock[first + i]);
}

}  // namespace

void start_global_races(size_t ctas, size_t warps) {
  pages.clear();
  last = nullptr;
  meetings.clear();
  cta_warps = warps;
  grid_warps = ctas * warps <= kMostWarps ? ctas * warps : 0;
}

void add_shared_clock(Warp& warp) {
  first = warp.clock.size();
  warp.clock.resize(first + 2 * grid_warps, 0);
  warp.fenced_clock.clear();
  if (grid_warps) warp.clock[first + actor_of(warp)] = 1;
}

void tick(Warp& warp) {
  if (grid_warps) ++warp.clock[first + actor_of(warp)];
}

void forget_accesses(const void* begin, uint64_t bytes) {
  last = nullptr;
  const uint64_t from = reinterpret_cast<uint64_t>(begin) / kWord / kPageWords;
  for (uint64_t page = from; page < from + bytes / kWord / kPageWords; ++page) pages.erase(page);
}

void check_untouched(const Clock& clock, const Cta& cta) {
  if (grid_warps == 0) return;
  const auto check_all = [&](const std::vector<Seen>& seen, const char* what, uint64_t word) {
    for (const Seen& one : seen) check(clock, "end of the CTA", actor_of(*cta.warps[0]), what, one, word);
  };
  const uint64_t begin = reinterpret_cast<uint64_t>(cta.shared) / kWord;
  for (uint64_t word = begin; word < begin + cta.end / kWord; ++word) {
    const Page* page = page_of(word, false);
    if (page == nullptr) continue;
    const Word& here = page->words[word % kPageWords];
    check_all(here.reads, "read", word);
    check_all(here.additions, "arrival", word);
    if (here.written) check_all({here.write}, "write", word);
  }
}

void global_access(Warp& warp, const void* pointer, uint64_t bytes, Access access, void* place) {
  if (grid_warps == 0 || bytes == 0) return;
  const size_t actor = actor_of(warp);
  visit(warp.clock, {actor, warp.clock[first + actor], place}, reinterpret_cast<uint64_t>(pointer), bytes, access);
}

size_t global_stores_of(const Warp& warp) { return grid_warps + actor_of(warp); }

void stored_globally(size_t actor, const Clock& clock, uint32_t number, const void* pointer, uint64_t bytes, bool adds,
                     void* place) {
  if (grid_warps == 0) return;
  const Seen now{actor, number, place};
  visit(clock, now, reinterpret_cast<uint64_t>(pointer), bytes, adds ? Access::kAdd : Access::kWrite);
}

void global_stores_done(Warp& warp, uint32_t number) {
  if (grid_warps == 0) return;
  uint32_t& known = warp.clock[first + grid_warps + actor_of(warp)];
  known = std::max(known, number);
}

void global_fence() {
  Warp& warp = *current().warp;
  if (grid_warps == 0) return;
  leave(warp.fenced_clock, warp.clock);
  tick(warp);
}

void strong_access(const void* pointer, unsigned bytes, Strong kind, bool releases) {
  Fiber& fiber = current();
  fiber.caller = __builtin_return_address(0);
  const uint64_t address = reinterpret_cast<uint64_t>(pointer);
  if (static_cast<uint64_t>(static_cast<const char*>(pointer) - fiber.cta->shared) < kWindowBytes) {
    const uint32_t smem = shared_address(pointer);
    acquire_flag(smem);
    if (releases) release_flag(smem);
    if (fiber.cta->cluster->has_peers()) {
      const Access access = kind == Strong::kLoad ? Access::kRead : Access::kAdd;
      global_access(*fiber.warp, pointer, bytes, access, fiber.caller);
    }
    return;
  }
  const bool writes = kind != Strong::kLoad;
  check_global(pointer, bytes, writes);
  if (grid_warps == 0) return;
  Warp& warp = *fiber.warp;
  Clock& meeting = meetings[address];
  if (meeting.empty()) meeting.resize(2 * grid_warps, 0);
  join_meeting(warp.clock, meeting);
  if (!writes) return;
  if (releases) {
    leave(meeting, warp.clock);
    tick(warp);
  } else if (!warp.fenced_clock.empty()) {
    for (size_t i = 0; i < meeting.size(); ++i) meeting[i] = std::max(meeting[i], warp.fenced_clock[i]);
  }
  global_access(warp, pointer, bytes, kind == Strong::kExchange ? Access::kExchange : Access::kAdd, fiber.caller);
}

}  // namespace emu
