// Data races in shared memory, whatever the schedule: vector clocks over the warps of a cluster's CTAs and what acts for
// them.
//
// Actors: the warps; the products of each warpgroup; the bulk stores of each warp; the copies that complete on each
// mbarrier. A warp knows how far each actor has come (its clock): arrivals and barriers pass clocks on,
// wgmma.wait_group and bulk waits add the warpgroup's and the warp's own, an mbarrier's completed phase its copies'. An
// access of four bytes must come after the last write, a write also after all reads since, by the clock of the warp
// that does it or issued it. Lanes of a warp are taken to be in order.
//
// Clocks end with another part, how far each warp's writes are known to be fenced for the asynchronous proxy. A fence
// of a warp takes what it knows of; so it may be anywhere on the way from a write to what products and copies do there.
// What lanes of its own warp write, since that warp's last arrival, each has to fence itself.
#include <cstdlib>
#include <cstring>

#include "machine.h"

namespace emu {

namespace {

constexpr uint32_t kWord = 4, kWords = kWindowBytes / kWord;
constexpr size_t kMostMbarriers = 64;

}  // namespace

struct Races {
  size_t warps, groups;
  size_t first;                  // of the CTA's actors in a clock, which has those of the whole cluster
  size_t actors, fenced, ctas;   // of a CTA; where a clock says how far the cluster's warps are fenced; of the cluster
  std::vector<uint32_t*> reads;  // by actor, of warps, warpgroups and bulk stores; made at the first read
  std::vector<uint16_t> writer = std::vector<uint16_t>(kWords);  // actor
  std::vector<uint32_t> write_clock = std::vector<uint32_t>(kWords);
  std::vector<void*> write_place = std::vector<void*>(kWords), read_place = std::vector<void*>(kWords);
  std::map<uint32_t, size_t> mbarrier_index;
  std::map<uint32_t, Clock> flags;  // released by st.release and the like

  ~Races() {
    for (uint32_t* words : reads) std::free(words);
  }
  size_t products_of(const Warpgroup& group) const { return warps + static_cast<size_t>(group.index); }
  size_t stores_of(const Warp& warp) const { return warps + groups + static_cast<size_t>(warp.index); }
  size_t copies_of(uint32_t mbarrier) {
    const size_t index = mbarrier_index.try_emplace(mbarrier, mbarrier_index.size()).first->second;
    if (index >= kMostMbarriers) fail("more than %zu mbarriers", kMostMbarriers);
    return 2 * warps + groups + index;
  }
  std::string name(size_t actor) const {
    if (actor < warps) return format("warp %zu", actor);
    if (actor < warps + groups) return format("wgmma of warpgroup %zu", actor - warps);
    if (actor < 2 * warps + groups) return format("a bulk store of warp %zu", actor - warps - groups);
    for (auto& [address, index] : mbarrier_index) {
      if (index == actor - 2 * warps - groups) return format("a copy that completes on mbarrier 0x%x", address);
    }
    return "nobody";
  }
};

void join(Clock& to, const Clock& from) {
  for (size_t i = 0; i < from.size(); ++i) to[i] = std::max(to[i], from[i]);
}

namespace {

[[noreturn]] void race(const Races& races, const char* what, size_t actor, uint32_t word, const char* before,
                       size_t other, void* place) {
  fail("race on shared address 0x%x: the %s by %s is not ordered after the %s by %s @%p", word * kWord, what,
       races.name(actor).c_str(), before, races.name(other).c_str(), place);
}

void check_read(const Races& races, const Clock& clock, size_t actor, uint32_t first, uint32_t end) {
  for (uint32_t word = first; word < end; ++word) {
    const size_t writer = races.writer[word];
    if (races.write_clock[word] > clock[races.first + writer]) {
      race(races, "read", actor, word, "write", writer, races.write_place[word]);
    }
  }
}

void record_read(Races& races, size_t actor, uint32_t time, uint32_t first, uint32_t end, void* place) {
  uint32_t*& times = races.reads[actor];
  if (times == nullptr) times = static_cast<uint32_t*>(std::calloc(kWords, sizeof(uint32_t)));
  for (uint32_t word = first; word < end; ++word) {
    times[word] = time;
    races.read_place[word] = place;
  }
}

void check_write(const Races& races, const Clock& clock, size_t actor, uint32_t first, uint32_t end) {
  for (uint32_t word = first; word < end; ++word) {
    const size_t writer = races.writer[word];
    if (races.write_clock[word] > clock[races.first + writer]) {
      race(races, "write", actor, word, "write", writer, races.write_place[word]);
    }
  }
  for (size_t reader = 0; reader < races.reads.size(); ++reader) {
    const uint32_t* times = races.reads[reader];
    if (times == nullptr) continue;
    for (uint32_t word = first; word < end; ++word) {
      if (times[word] > clock[races.first + reader]) race(races, "write", actor, word, "read", reader, races.read_place[word]);
    }
  }
}

void record_write(Races& races, size_t actor, uint32_t time, uint32_t first, uint32_t end, void* place) {
  for (uint32_t word = first; word < end; ++word) {
    races.writer[word] = static_cast<uint16_t>(actor);
    races.write_clock[word] = time;
    races.write_place[word] = place;
  }
}

uint32_t first_word(uint32_t address) { return address / kWord; }
uint32_t end_word(uint32_t address, uint32_t bytes) { return (address + bytes + kWord - 1) / kWord; }
size_t self_of(const Warp& warp) { return static_cast<size_t>(warp.index); }

}  // namespace

void start_races(Cta& cta, int rank, int cluster) {
  cta.races = std::make_shared<Races>();
  cta.races->warps = cta.warps.size();
  cta.races->groups = cta.groups.size();
  cta.races->reads.resize(2 * cta.warps.size() + cta.groups.size());
  const size_t actors = cta.races->reads.size() + kMostMbarriers;
  cta.races->first = static_cast<size_t>(rank) * actors;
  cta.races->actors = actors;
  cta.races->ctas = static_cast<size_t>(cluster);
  cta.races->fenced = cta.races->ctas * actors;
  for (auto& warp : cta.warps) {
    warp->clock.assign(cta.races->ctas * (actors + cta.warps.size()), 0);
    warp->clock[cta.races->first + self_of(*warp)] = 1;
    add_shared_clock(*warp);
  }
}

void generic_access(Warp& warp, uint32_t address, uint32_t bytes, bool is_write, void* place) {
  Races& races = *warp.cta->races;
  const size_t self = self_of(warp);
  const uint32_t first = first_word(address), end = end_word(address, bytes), now = warp.clock[races.first + self];
  if (is_write) {
    check_write(races, warp.clock, self, first, end);
    record_write(races, self, now, first, end, place);
  } else {
    check_read(races, warp.clock, self, first, end);
    record_read(races, self, now, first, end, place);
  }
}

// ---- passing clocks on
// -----------------------------------------------------------------------------------------------

void release(Warp& warp, Clock& to) {
  if (to.empty()) to.assign(warp.clock.size(), 0);
  join(to, warp.clock);
  ++warp.clock[warp.cta->races->first + self_of(warp)];
  tick(warp);
}

void acquire(Warp& warp, const Clock& from) { join(warp.clock, from); }

void merge(Clock& to, Clock& from) {
  if (to.empty()) to.assign(from.size(), 0);
  join(to, from);
  from.clear();
}

void release_flag(uint32_t address) {
  Warp& warp = *current().warp;
  release(warp, warp.cta->races->flags[address]);
}

void acquire_flag(uint32_t address) {
  Warp& warp = *current().warp;
  acquire(warp, warp.cta->races->flags[address]);
}

// ---- what acts for a warp
// ----------------------------------------------------------------------------------------------

void product_reads(Warp& warp, uint64_t number, uint32_t address, uint32_t bytes, void* place) {
  Races& races = *warp.cta->races;
  const size_t actor = races.products_of(*warp.group);
  const uint32_t first = first_word(address), end = end_word(address, bytes);
  check_read(races, warp.clock, actor, first, end);
  record_read(races, actor, static_cast<uint32_t>(number + 1), first, end, place);
}

void products_done(Warp& warp, uint64_t end) {
  uint32_t& known = warp.clock[warp.cta->races->first + warp.cta->races->products_of(*warp.group)];
  known = std::max(known, static_cast<uint32_t>(end));
}

uint32_t store_reads(Warp& warp, uint32_t address, uint32_t bytes, void* place) {
  Races& races = *warp.cta->races;
  const size_t actor = races.stores_of(warp);
  const uint32_t first = first_word(address), end = end_word(address, bytes), number = ++warp.stores;
  check_read(races, warp.clock, actor, first, end);
  record_read(races, actor, number, first, end, place);
  return number;
}

void stores_done(Warp& warp, uint32_t number) {
  uint32_t& known = warp.clock[warp.cta->races->first + warp.cta->races->stores_of(warp)];
  known = std::max(known, number);
}

void copy_writes(Warp& warp, Cta& cta, uint32_t mbarrier, uint32_t address, uint32_t bytes, void* place) {
  Races& races = *cta.races;
  const size_t actor = races.copies_of(mbarrier);
  const uint64_t phase = cta.mbarriers[mbarrier].phase;
  const uint32_t first = first_word(address), end = end_word(address, bytes);
  check_write(races, warp.clock, actor, first, end);
  check_fenced(warp, cta, address, bytes, "a copy", "overwrites");
  record_write(races, actor, static_cast<uint32_t>(phase + 1), first, end, place);
}

void copies_done(Warp& warp, uint32_t mbarrier, uint64_t phases) {
  uint32_t& known = warp.clock[warp.cta->races->first + warp.cta->races->copies_of(mbarrier)];
  known = std::max(known, static_cast<uint32_t>(phases));
}

// ---- the two proxies
// ---------------------------------------------------------------------------------------------------

void fence_known_writes(Warp& warp) {
  const Races& races = *warp.cta->races;
  const size_t own = races.first + self_of(warp);
  for (size_t cta = 0; cta < races.ctas; ++cta) {
    for (size_t other = 0; other < races.warps; ++other) {
      const size_t actor = cta * races.actors + other;
      uint32_t& fenced = warp.clock[races.fenced + cta * races.warps + other];
      fenced = std::max(fenced, warp.clock[actor] - (actor == own));
    }
  }
}

bool is_fenced(const Warp& warp, const Cta& cta, uint32_t granule, const Warp& writer) {
  const Races& races = *cta.races;
  const size_t self = self_of(writer), rank = races.first / races.actors;
  const uint32_t fenced = warp.clock[races.fenced + rank * races.warps + self];
  for (uint32_t word = granule * kGranule / kWord; word < (granule + 1) * kGranule / kWord; ++word) {
    if (races.writer[word] == self && races.write_clock[word] > fenced) return false;
  }
  return true;
}

}  // namespace emu
