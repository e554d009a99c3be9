// Shared memory's addresses, copies by TMA and by cp.async, ldmatrix and stmatrix. Copies are queued: the scheduler
// carries them out at a random later moment, or when nobody can go on without.
#include <cstring>

#include "machine.h"
#include "ptx.h"

namespace emu {

namespace {

struct Range {
  uint64_t begin, end;
};
std::vector<Range> allocations;  // of global memory; none: anything goes
size_t parameters = 0;           // the first of them, which are the launch's own

struct TensorMap {  // what tests/emulator/driver.py puts into the 128 bytes
  uint64_t address;
  uint32_t magic;
  uint8_t rank, element_bytes, swizzle, type;
  uint32_t last[5];  // extent - 1
  uint16_t box[5];
  uint16_t unused;
  uint64_t stride[4];
};
static_assert(sizeof(TensorMap) == 80);
constexpr uint32_t kMagic = 0x544D4150;

TensorMap decoded(const void* map, int rank) {
  if (reinterpret_cast<uintptr_t>(map) % 64) fail("the tensor map at %p is not aligned to 64 bytes", map);
  TensorMap result;
  std::memcpy(&result, map, sizeof result);
  if (result.magic != kMagic) fail("there is no tensor map at %p", map);
  if (result.rank != rank) fail("an instruction of rank %d on a tensor map of rank %d", rank, result.rank);
  return result;
}

uint32_t box_bytes(const TensorMap& map) {
  uint32_t bytes = map.element_bytes;
  for (int d = 0; d < map.rank; ++d) bytes *= map.box[d];
  return bytes;
}

uint32_t swizzled(uint32_t address, int swizzle) {  // 0 none, 1 32 B, 2 64 B, 3 128 B
  const uint32_t rows = swizzle == 3 ? 7 : swizzle == 2 ? 3 : swizzle;
  return address ^ (address >> 7 & rows) << 4;
}

void check_box(const TensorMap& map, uint32_t smem) {
  if (smem % 128) fail("a tensor copy's shared address is a multiple of 128, got 0x%x", smem);
  const uint32_t inner = map.box[0] * map.element_bytes, span = 16u << map.swizzle;
  if (map.swizzle && inner != span)
    fail("a box %u bytes wide under a swizzle of %u bytes is not modelled", inner, span);
}

// Calls visit(shared address, global address or null, bytes) for every 16 bytes of the box; out of bounds is null.
template <typename Visit>
void for_each_chunk(const TensorMap& map, uint32_t smem, const int* origin, Visit visit) {
  const uint32_t inner = map.box[0] * map.element_bytes, per_chunk = 16u / map.element_bytes;
  uint32_t at = smem;
  int index[5] = {};
  while (true) {
    uint64_t row = map.address;
    bool inside = true;
    for (int d = 1; d < map.rank; ++d) {
      const int64_t coordinate = int64_t{origin[d]} + index[d];
      inside &= coordinate >= 0 && coordinate <= int64_t{map.last[d]};
      row += static_cast<uint64_t>(coordinate) * map.stride[d - 1];
    }
    for (uint32_t offset = 0; offset < inner; offset += 16) {
      const int64_t first = int64_t{origin[0]} + offset / map.element_bytes;
      uint32_t valid = 0, skipped = 0;  // elements of the chunk that are inside, after some that are before
      if (inside) {
        const int64_t begin = first < 0 ? 0 : first;
        const int64_t end = std::min<int64_t>(first + per_chunk, int64_t{map.last[0]} + 1);
        if (end > begin) {
          valid = static_cast<uint32_t>(end - begin);
          skipped = static_cast<uint32_t>(begin - first);
        }
      }
      const uint64_t address = row + static_cast<uint64_t>(first + skipped) * map.element_bytes;
      visit(swizzled(at + offset, map.swizzle), reinterpret_cast<char*>(address), skipped * map.element_bytes,
            valid * map.element_bytes);
    }
    at += inner;
    int d = 1;
    while (d < map.rank && ++index[d] == map.box[d]) index[d++] = 0;
    if (d >= map.rank) return;
  }
}

template <typename Add>
void combine_into(char* to, const char* from, uint32_t bytes, uint32_t size, Add add) {
  for (uint32_t i = 0; i < bytes; i += size) add(to + i, from + i);
}

void write_global(char* to, const char* from, uint32_t bytes, Combine combine) {
  check_global(to, bytes, true);
  switch (combine) {
    case Combine::kNone:
      std::memcpy(to, from, bytes);
      return;
    case Combine::kAddF32:
      combine_into(to, from, bytes, 4, [](char* t, const char* f) {
        float sum, term;
        std::memcpy(&sum, t, 4);
        std::memcpy(&term, f, 4);
        sum += term;
        std::memcpy(t, &sum, 4);
      });
      return;
    case Combine::kAddBf16:
    case Combine::kAddF16:
      combine_into(to, from, bytes, 2, [combine](char* t, const char* f) {
        uint16_t a, b;
        std::memcpy(&a, t, 2);
        std::memcpy(&b, f, 2);
        a = combine == Combine::kAddBf16 ? float_to_bf16(bf16_to_float(a) + bf16_to_float(b))
                                         : float_to_f16(f16_to_float(a) + f16_to_float(b));
        std::memcpy(t, &a, 2);
      });
  }
}

void clean(Cta& cta, uint32_t address, uint32_t bytes) {
  for (uint32_t g = address / kGranule; g < (address + bytes + kGranule - 1) / kGranule; ++g)
    cta.unfenced_writer[g] = 0;
}

std::shared_ptr<CopyGroup> opened(std::shared_ptr<CopyGroup>& group) {
  if (group == nullptr) group = std::make_shared<CopyGroup>();
  return group;
}

void settle(CopyGroup& group) {
  if (group.waiting == nullptr) return;
  wake(*group.waiting);
  group.waiting = nullptr;
}

void copy_lands(Cta& cta, uint32_t smem, uint32_t bytes, uint32_t barrier) {
  Fiber& fiber = current();
  copy_writes(*fiber.warp, cta, barrier, smem, bytes, fiber.caller);
}

// Reads now-or-later from shared memory, then, later again, writes to global memory.
struct Piece {
  char* to;
  uint32_t bytes;
  char data[16];
};
void queue_store(uint32_t smem, uint32_t bytes, std::function<std::vector<Piece>(Cta&)> read, Combine combine,
                 const char* who) {
  Fiber* fiber = &current();
  Cta* cta = fiber->cta;
  const std::shared_ptr<CopyGroup> group = opened(fiber->open_bulk);
  ++group->unread;
  ++group->unwritten;
  const uint32_t number = store_reads(*fiber->warp, smem, bytes, fiber->caller);
  check_fenced(*fiber->warp, *cta, smem, bytes, who, "reads");
  group->last_store = number;
  const size_t actor = global_stores_of(*fiber->warp);
  void* place = fiber->caller;
  const auto clock = std::make_shared<Clock>(fiber->warp->clock);
  queue(*cta, true, [=] {
    auto pieces = std::make_shared<std::vector<Piece>>(read(*cta));
    --group->unread;
    settle(*group);
    queue(*cta, false, [=] {
      for (const Piece& piece : *pieces) {
        write_global(piece.to, piece.data, piece.bytes, combine);
        stored_globally(actor, *clock, number, piece.to, piece.bytes, combine != Combine::kNone, place);
      }
      --group->unwritten;
      settle(*group);
    });
  });
}

}  // namespace

// ---- addresses ------------------------------------------------------------------------------------------------------

char* window(Cta& cta, uint32_t address, uint32_t bytes) {
  if (address < kSharedBegin || address + bytes > cta.end || address + bytes < address) {
    fail("shared addresses 0x%x to 0x%x, of 0x%x to 0x%x", address, address + bytes, kSharedBegin, cta.end);
  }
  return cta.shared + address;
}

uint32_t shared_address(const void* pointer) {
  Cta& cta = *current().cta;
  const uint64_t offset = static_cast<uint64_t>(static_cast<const char*>(pointer) - cta.shared);
  if (offset < kSharedBegin || offset > cta.end) fail("%p is not a pointer into shared memory", pointer);
  return static_cast<uint32_t>(offset);
}

void* shared_pointer(uint32_t address, uint32_t bytes) { return window(*current().cta, address, bytes); }

void* dynamic_shared() { return current().cta->shared + kSharedBegin; }

void* static_shared(int id, uint32_t bytes, uint32_t alignment) {
  Cta& cta = *current().cta;
  Cluster& cluster = *cta.cluster;
  auto [at, fresh] = cluster.statics.try_emplace({id, bytes}, 0);  // instantiations of a template differ
  if (fresh) {
    at->second = (cluster.end + alignment - 1) / alignment * alignment;
    cluster.end = at->second + bytes;
    if (cluster.end > kWindowBytes) fail("more than %u bytes of shared memory", kWindowBytes);
    for (Cta* other : cluster.ctas) other->end = cluster.end;
  }
  return cta.shared + at->second;
}

void check_global(const void* pointer, uint64_t bytes, bool write) {
  if (allocations.empty()) return;
  const uint64_t begin = reinterpret_cast<uint64_t>(pointer);
  for (size_t i = 0; i < allocations.size(); ++i) {
    if (begin < allocations[i].begin || allocations[i].end < begin + bytes) continue;
    if (self != nullptr && i >= parameters) check_awaited("touches global memory");
    return;
  }
  fail("%s of %llu bytes of global memory at %p, which is in no tensor", write ? "write" : "read",
       static_cast<unsigned long long>(bytes), pointer);
}

// ---- the two proxies ------------------------------------------------------------------------------------------------

void mark_written(Fiber& fiber, uint32_t address, uint32_t bytes) {
  for (uint32_t g = address / kGranule; g <= (address + bytes - 1) / kGranule; ++g) {
    fiber.cta->unfenced_writer[g] = fiber.index + 1;
    fiber.unfenced.push_back(g);
  }
}

void proxy_fence() {
  Fiber& fiber = current();
  for (uint32_t granule : fiber.unfenced) {
    int& writer = fiber.cta->unfenced_writer[granule];
    if (writer == fiber.index + 1) writer = 0;
  }
  fiber.unfenced.clear();
  fence_known_writes(*fiber.warp);
  mbarrier_init_fence();
}

void check_fenced(const Warp& issuer, const Cta& cta, uint32_t address, uint32_t bytes, const char* who, const char* does) {
  for (uint32_t g = address / kGranule; g < (address + bytes + kGranule - 1) / kGranule; ++g) {
    if (g >= cta.unfenced_writer.size() || cta.unfenced_writer[g] == 0) continue;
    const int thread = cta.unfenced_writer[g] - 1;
    if (is_fenced(issuer, cta, g, *cta.fibers[static_cast<size_t>(thread)]->warp)) continue;
    fail("%s %s shared address 0x%x, written by thread %d without fence.proxy.async since", who, does, g * kGranule,
         thread);
  }
}

void check_exit(Fiber& fiber) {
  check_awaited("ends");
  if (!fiber.warp->in_flight.empty()) fail("a thread ends with wgmma in flight");
  if (fiber.open_bulk != nullptr) fail("a thread ends with bulk copies that it has not committed");
  for (auto& group : fiber.bulk) {
    if (group->unread) fail("a thread ends while its bulk copies may still be reading shared memory");
  }
}

// ---- tensor and bulk copies -----------------------------------------------------------------------------------------

Combine tensor_addition(const void* map) {
  TensorMap probe;
  std::memcpy(&probe, map, sizeof probe);
  switch (decoded(map, probe.rank).type) {
    case 6:
      return Combine::kAddF16;
    case 7:
      return Combine::kAddF32;
    case 9:
      return Combine::kAddBf16;
    default:
      fail("a reduction into a tensor of type %d", probe.type);
  }
}

void tensor_prefetch(const void* map) {
  TensorMap probe;
  std::memcpy(&probe, map, sizeof probe);
  decoded(map, probe.rank);
}

namespace {

void load_box(Cta& cta, const TensorMap& map, uint32_t smem, uint32_t barrier, const std::vector<int>& origin) {
  const uint32_t bytes = box_bytes(map);
  if (&cta != current().cta) check_alive(cta);
  window(cta, smem, bytes);
  check_usable_by_copies(cta, barrier);
  copy_lands(cta, smem, bytes, barrier);
  queue(cta, true, [=, &cta] {
    for_each_chunk(map, smem, origin.data(), [&](uint32_t to, const char* from, uint32_t skipped, uint32_t valid) {
      if (valid) check_global(from, valid, false);
      char* target = window(cta, to, 16);
      std::memset(target, 0, 16);
      if (valid) std::memcpy(target + skipped, from, valid);
    });
    clean(cta, smem, bytes);
    complete_bytes(cta, barrier, bytes);
  });
}

}  // namespace

void tensor_load(uint32_t smem, const void* map, uint32_t barrier, int rank, const int* coordinates, uint32_t ctas) {
  EMU_ENTER();
  check_awaited("copies from global memory");
  const TensorMap decoded_map = decoded(map, rank);
  check_box(decoded_map, smem);
  const std::vector<int> origin(coordinates, coordinates + rank);
  const std::vector<Cta*>& cluster = current().cta->cluster->ctas;
  if (ctas == 0 || ctas >> cluster.size()) fail("CTAs 0x%x of a cluster of %zu", ctas, cluster.size());
  for (uint32_t to = 0; to < cluster.size(); ++to) {
    if (ctas >> to & 1) load_box(*cluster[to], decoded_map, smem, barrier, origin);
  }
  preempt();
}

void tensor_prefetch_box(const void* map, int rank, const int* coordinates) {
  for_each_chunk(decoded(map, rank), 0, coordinates, [&](uint32_t, const char* from, uint32_t, uint32_t valid) {
    if (valid) check_global(from, valid, false);
  });
}

void tensor_store(const void* map, uint32_t smem, int rank, const int* coordinates, Combine combine) {
  EMU_ENTER();
  check_awaited("copies to global memory");
  const TensorMap decoded_map = decoded(map, rank);
  check_box(decoded_map, smem);
  const uint32_t bytes = box_bytes(decoded_map);
  window(*current().cta, smem, bytes);
  std::vector<int> origin(coordinates, coordinates + rank);
  queue_store(
      smem, bytes,
      [=](Cta& cta) {
        std::vector<Piece> pieces;
        for_each_chunk(decoded_map, smem, origin.data(),
                       [&](uint32_t from, char* to, uint32_t skipped, uint32_t valid) {
                         if (!valid) return;
                         pieces.push_back({to, valid, {}});
                         std::memcpy(pieces.back().data, window(cta, from, 16) + skipped, valid);
                       });
        return pieces;
      },
      combine, "a tensor store");
  preempt();
}

namespace {
void check_bulk(uint32_t smem, const void* global, uint32_t bytes) {
  if ((smem | bytes) % 16 || reinterpret_cast<uintptr_t>(global) % 16) {
    fail("bulk copies take addresses and sizes that are multiples of 16, got 0x%x, %p, %u bytes", smem, global, bytes);
  }
  if (bytes) window(*current().cta, smem, bytes);
}
}  // namespace

void bulk_load(uint32_t smem, const void* global, uint32_t bytes, uint32_t barrier) {
  EMU_ENTER();
  check_awaited("copies from global memory");
  check_bulk(smem, global, bytes);
  Cta* cta = current().cta;
  check_usable_by_copies(*cta, barrier);
  if (bytes) copy_lands(*cta, smem, bytes, barrier);
  global_access(*current().warp, global, bytes, Access::kRead, current().caller);  // of what is there by now
  queue(*cta, true, [=] {
    check_global(global, bytes, false);
    std::memcpy(window(*cta, smem, bytes), global, bytes);
    clean(*cta, smem, bytes);
    complete_bytes(*cta, barrier, bytes);
  });
  preempt();
}

void bulk_store(void* global, uint32_t smem, uint32_t bytes, Combine combine) {
  EMU_ENTER();
  check_awaited("copies to global memory");
  check_bulk(smem, global, bytes);
  queue_store(
      smem, bytes,
      [=](Cta& cta) {
        std::vector<Piece> pieces;
        for (uint32_t at = 0; at < bytes; at += 16) {
          pieces.push_back({static_cast<char*>(global) + at, 16, {}});
          std::memcpy(pieces.back().data, window(cta, smem + at, 16), 16);
        }
        return pieces;
      },
      combine, "a bulk store");
  preempt();
}

void bulk_commit() {
  Fiber& fiber = current();
  fiber.bulk.push_back(opened(fiber.open_bulk));
  fiber.open_bulk = nullptr;
}

void bulk_wait(int pending, bool read_only) {
  EMU_ENTER();
  preempt();
  Fiber& fiber = current();
  const auto done = [&](const CopyGroup& group) { return (read_only ? group.unread : group.unwritten) == 0; };
  const size_t count =
      fiber.bulk.size() > static_cast<size_t>(pending) ? fiber.bulk.size() - static_cast<size_t>(pending) : 0;
  uint32_t last_store = 0;  // an empty group has none
  for (size_t i = 0; i < count; ++i) {
    while (!done(*fiber.bulk[i])) {
      fiber.bulk[i]->waiting = &fiber;
      sleep({"cp.async.bulk.wait_group", 0, 0});
    }
    last_store = std::max(last_store, fiber.bulk[i]->last_store);
  }
  if (last_store) {
    stores_done(*fiber.warp, last_store);
    if (!read_only) global_stores_done(*fiber.warp, last_store);
  }
  // A group whose writes were not waited for stays, written or not: the warp does not know of them yet.
  if (!read_only) fiber.bulk.erase(fiber.bulk.begin(), fiber.bulk.begin() + static_cast<ptrdiff_t>(count));
}

// ---- cp.async -------------------------------------------------------------------------------------------------------

void async_copy(uint32_t smem, const void* global, uint32_t bytes, uint32_t source_bytes) {
  EMU_ENTER();
  check_awaited("copies from global memory");
  if (smem % bytes || reinterpret_cast<uintptr_t>(global) % bytes)
    fail("cp.async of %u bytes: misaligned address", bytes);
  if (source_bytes > bytes) fail("cp.async of %u bytes from %u", bytes, source_bytes);
  Fiber* fiber = &current();
  Cta* cta = fiber->cta;
  window(*cta, smem, bytes);
  generic_access(*fiber->warp, smem, bytes, true, fiber->caller);
  const std::shared_ptr<CopyGroup> group = opened(fiber->open_copies);
  ++group->unwritten;
  ++fiber->copies_outstanding;
  const uint64_t number = fiber->copies_issued++;
  queue(*cta, true, [=] {
    char* to = window(*cta, smem, bytes);
    std::memset(to, 0, bytes);
    if (source_bytes) {
      check_global(global, source_bytes, false);
      std::memcpy(to, global, source_bytes);
    }
    mark_written(*fiber, smem, bytes);  // cp.async goes through the generic proxy
    --group->unwritten;
    --fiber->copies_outstanding;
    settle(*group);
    for (CopyArrival& arrival : fiber->arrivals) {
      if (number < arrival.end && --arrival.remaining == 0) arrive(*cta, arrival.barrier, 1);
    }
  });
}

void async_arrive(uint32_t barrier, bool counted) {
  EMU_ENTER();
  Fiber& fiber = current();
  if (!counted) expect_arrivals(*fiber.cta, barrier, 1);
  release_to(fiber, *fiber.cta, barrier);
  if (fiber.copies_outstanding == 0) {
    arrive(*fiber.cta, barrier, 1);
  } else {
    fiber.arrivals.push_back({barrier, fiber.copies_issued, fiber.copies_outstanding});
  }
}

void async_commit() {
  Fiber& fiber = current();
  fiber.copies.push_back(opened(fiber.open_copies));
  fiber.open_copies = nullptr;
}

void async_wait(int pending) {
  EMU_ENTER();
  Fiber& fiber = current();
  while (fiber.copies.size() > static_cast<size_t>(pending)) {
    while (fiber.copies.front()->unwritten) {
      fiber.copies.front()->waiting = &fiber;
      sleep({"cp.async.wait_group", 0, 0});
    }
    fiber.copies.pop_front();
  }
}

}  // namespace emu

// Memory that copies may touch: pairs of begin and end, those of the launch's parameters first. None: no checks.
extern "C" void emu_allow(const uint64_t* ranges, int count, int of_parameters) {
  emu::allocations.clear();
  emu::parameters = static_cast<size_t>(of_parameters);
  for (int i = 0; i < count; ++i) emu::allocations.push_back({ranges[2 * i], ranges[2 * i + 1]});
}
