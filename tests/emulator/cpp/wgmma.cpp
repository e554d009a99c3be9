// Asynchronous matrix products: queued when all warps of a warpgroup have issued them, carried out at once or when a
// wait demands it; their accumulators hold NaN until the warp's own wait.
#include <cstring>

#include "machine.h"
#include "ptx.h"

namespace emu {

namespace {

constexpr uint32_t kInFlight = 0x7FC0DEAD;  // a NaN

// ---- descriptors ----------------------------------------------------------------------------------------------------

enum class Swizzle { kNone, k128, k64, k32 };

struct Layout {
  uint32_t start, leading, stride;
  Swizzle swizzle;
};

Layout layout(uint64_t descriptor, const char* operand) {
  constexpr uint64_t kFields = 0x3FFF3FFF3FFFull | 7ull << 49 | 3ull << 62;
  if (descriptor & ~kFields) {
    fail("descriptor of %s: reserved bits are set in %016llx", operand, static_cast<unsigned long long>(descriptor));
  }
  if (descriptor >> 49 & 7) {
    fail("descriptor of %s: base offsets are not modelled (%016llx)", operand,
         static_cast<unsigned long long>(descriptor));
  }
  const auto field = [&](int bit) { return static_cast<uint32_t>(descriptor >> bit & 0x3FFF) << 4; };
  return {field(0), field(16), field(32), static_cast<Swizzle>(descriptor >> 62)};
}

uint32_t swizzled(uint32_t address, Swizzle swizzle) {
  switch (swizzle) {
    case Swizzle::k128:
      return address ^ (address >> 7 & 7) << 4;
    case Swizzle::k64:
      return address ^ (address >> 7 & 3) << 4;
    case Swizzle::k32:
      return address ^ (address >> 7 & 1) << 4;
    default:
      return address;
  }
}

// The address of element (mn, k) of an operand: rows of A, columns of B are mn.
uint32_t element_address(const Layout& l, bool transposed, int mn, int k) {
  if (l.swizzle == Swizzle::kNone) {
    const uint32_t inside = transposed ? k % 8 * 16 + mn % 8 * 2 : mn % 8 * 16 + k % 8 * 2;
    return l.start + mn / 8 * l.stride + k / 8 * l.leading + inside;
  }
  const uint32_t row_bytes = l.swizzle == Swizzle::k128 ? 128 : l.swizzle == Swizzle::k64 ? 64 : 32;
  const int row_elements = static_cast<int>(row_bytes / 2);
  const uint32_t plain = transposed ? l.start + mn / row_elements * l.leading + k / 8 * l.stride + k % 8 * row_bytes +
                                          mn % row_elements * 2
                                    : l.start + mn / 8 * l.stride + mn % 8 * row_bytes + k * 2;
  return swizzled(plain, l.swizzle);
}

// Calls visit(address, mn, k) for every eight values of an operand of 16 x `count` that lie together.
template <typename Visit>
void for_each_chunk(uint64_t descriptor, bool transposed, int count, const char* operand, Visit visit) {
  const Layout l = layout(descriptor, operand);
  const uint32_t pattern = l.swizzle == Swizzle::k128 ? 1024 : l.swizzle == Swizzle::k64 ? 512 : 256;
  const uint32_t row = l.swizzle == Swizzle::k128 ? 128 : l.swizzle == Swizzle::k64 ? 64 : 32;
  if (l.swizzle != Swizzle::kNone && l.start % pattern / row != 0) {
    fail(
        "descriptor of %s: start address 0x%x is not at the beginning of a swizzle pattern of %u bytes (plus an offset "
        "inside of a row)",
        operand, l.start, pattern);
  }
  const int mn_step = transposed ? 8 : 1, k_step = transposed ? 1 : 8;
  for (int k = 0; k < 16; k += k_step) {
    for (int mn = 0; mn < count; mn += mn_step) visit(element_address(l, transposed, mn, k), mn, k);
  }
}

// An operand, k by k.
void gather(Cta& cta, uint64_t descriptor, bool transposed, bool bf16, int count, float* to, const char* operand) {
  for_each_chunk(descriptor, transposed, count, operand, [&](uint32_t address, int mn, int k) {
    uint16_t bits[8];
    std::memcpy(bits, window(cta, address, 16), 16);
    for (int i = 0; i < 8; ++i) {
      const float value = bf16 ? bf16_to_float(bits[i]) : f16_to_float(bits[i]);
      (transposed ? to[k * count + mn + i] : to[(k + i) * count + mn]) = value;
    }
  });
}

void check_order(Warp& warp, uint64_t number, uint64_t descriptor, bool transposed, int count, const char* operand) {
  void* place = warp.lanes[0]->caller;
  for_each_chunk(descriptor, transposed, count, operand, [&](uint32_t address, int, int) {
    window(*warp.cta, address, 16);
    product_reads(warp, number, address, 16, place);
    check_fenced(warp, *warp.cta, address, 16, operand, "reads");
  });
}

// ---- execution ------------------------------------------------------------------------------------------------------

int row_of(int thread, int i) { return thread / 32 * 16 + thread % 32 / 4 + 8 * (i >> 1 & 1); }
int column_of(int thread, int i) { return 8 * (i >> 2) + 2 * (thread & 3) + (i & 1); }

#if defined(__x86_64__)
__attribute__((target_clones("avx512f", "avx2,fma", "default")))
#endif
void multiply(float* __restrict d, const float* __restrict a, const float* __restrict b, int n) {
  for (int row = 0; row < 64; ++row) {
    float* to = d + row * n;
    for (int k = 0; k < 16; ++k) {
      const float factor = a[k * 64 + row];
      const float* from = b + k * n;
      for (int column = 0; column < n; ++column) to[column] += factor * from[column];
    }
  }
}

void execute(Cta& cta, PendingProduct& product) {
  const Wgmma& op = product.operation;
  static float a[16 * 64], b[16 * 256];
  if (op.a_in_registers) {
    for (int thread = 0; thread < 128; ++thread) {
      for (int i = 0; i < 4; ++i) {
        const RegisterA& source = product.a[thread][i];
        const uint32_t packed = source.live != nullptr ? *source.live : source.value;
        const int row = thread / 32 * 16 + thread % 32 / 4 + 8 * (i & 1), k = 2 * (thread & 3) + 8 * (i >> 1);
        for (int half = 0; half < 2; ++half) {
          a[(k + half) * 64 + row] = op.bf16 ? half_of<true>(packed, half) : half_of<false>(packed, half);
        }
      }
    }
  } else {
    gather(cta, op.a, op.transpose_a, op.bf16, 64, a, "wgmma A");
  }
  gather(cta, op.b, op.transpose_b, op.bf16, op.n, b, "wgmma B");
  if (op.scale_a * op.scale_b < 0) {
    for (float& value : a) value = -value;
  }
  std::vector<float>& d = product.accumulators->values;
  if (!op.accumulate) std::fill(d.begin(), d.end(), 0.0f);
  multiply(d.data(), a, b, op.n);
}

void execute_until(Warpgroup& group, uint64_t end) {
  for (; group.executed < end; ++group.executed) {
    execute(*group.cta, *group.products[group.executed - group.first_product]);
  }
}

bool all_issued(const Warpgroup& group, uint64_t end) {
  for (uint64_t number = group.first_product; number < end; ++number) {
    const uint64_t place = number - group.first_product;
    if (place >= group.products.size() || group.products[place]->issued < 4) return false;
  }
  return true;
}

// Gives a warp the accumulators of whose products none is left in flight.
void retire(Warp& warp, uint64_t end) {
  auto& sets = warp.in_flight;
  for (size_t i = 0; i < sets.size();) {
    Accumulators& set = *sets[i];
    const int place = warp.index % 4;
    if (set.last_operation[place] > end) {
      ++i;
      continue;
    }
    const int registers = set.n / 2;
    for (int lane = 0; lane < 32; ++lane) {
      const int thread = 32 * place + lane;
      for (int r = 0; r < registers; ++r) {
        float* to = set.registers[static_cast<size_t>(thread * registers + r)];
        if (as<uint32_t>(*to) != kInFlight) {
          fail("accumulator %d of lane %d was written between wgmma and its wait", r, lane);
        }
        *to = set.values[static_cast<size_t>(row_of(thread, r) * set.n + column_of(thread, r))];
      }
    }
    sets.erase(sets.begin() + static_cast<long>(i));
  }
}

void finish_wait(Warp& warp) {
  execute_until(*warp.group, warp.wait_target);
  retire(warp, warp.wait_target);
  products_done(warp, warp.wait_target);
  warp.fenced = false;
  warp.waiting = false;
}

bool same(const Wgmma& a, const Wgmma& b) {
  return a.n == b.n && a.bf16 == b.bf16 && a.a_in_registers == b.a_in_registers && a.accumulate == b.accumulate &&
         a.scale_a == b.scale_a && a.scale_b == b.scale_b && a.transpose_a == b.transpose_a &&
         a.transpose_b == b.transpose_b && (a.a_in_registers || a.a == b.a) && a.b == b.b;
}

struct LaneOperands {
  const Wgmma* operation;
  float* const* d;
  const RegisterA* a;
};

bool in_flight_as(const Accumulators& set, const Warp& warp, const LaneOperands* lanes) {
  const int registers = set.n / 2, n = lanes[0].operation->n;
  bool overlaps = false, equal = set.n == n;
  for (int lane = 0; lane < 32; ++lane) {
    float* const* mine = &set.registers[static_cast<size_t>((32 * (warp.index % 4) + lane) * registers)];
    if (equal && std::memcmp(mine, lanes[lane].d, sizeof(float*) * static_cast<size_t>(registers)) != 0) equal = false;
  }
  if (equal) return true;
  for (int i = 0; i < registers && !overlaps; ++i) {
    float* held = set.registers[static_cast<size_t>(32 * (warp.index % 4) * registers + i)];
    for (int j = 0; j < n / 2; ++j) overlaps |= held == lanes[0].d[j];
  }
  if (overlaps) fail("wgmma on accumulators of which others of another shape are in flight");
  return false;
}

bool issue(Warp& warp, Collective& all) {
  if (warp.live != kFull) fail("wgmma after lanes of the warp have exited");
  LaneOperands lanes[32];
  for (int lane = 0; lane < 32; ++lane) {
    lanes[lane] = *reinterpret_cast<const LaneOperands*>(all.value[lane]);
    if (!same(*lanes[lane].operation, *lanes[0].operation)) {
      fail("wgmma: lanes 0 and %d disagree on descriptors, scales or flags", lane);
    }
  }
  const Wgmma& op = *lanes[0].operation;
  Warpgroup& group = *warp.group;
  const int place = warp.index % 4;
  const uint64_t number = warp.issued++;
  if (number - group.first_product == group.products.size()) {
    group.products.push_back(std::make_shared<PendingProduct>());
    group.products.back()->operation = op;
  }
  PendingProduct& product = *group.products[number - group.first_product];
  if (!same(product.operation, op)) fail("wgmma: warps of the warpgroup disagree on descriptors, scales or flags");

  std::shared_ptr<Accumulators> set;
  for (auto& candidate : warp.in_flight) {
    if (in_flight_as(*candidate, warp, lanes)) set = candidate;
  }
  if (set == nullptr) {
    if (!warp.fenced) fail("wgmma on registers that may have been accessed since the last wgmma.fence");
    set = product.accumulators;
    if (set == nullptr) {
      set = std::make_shared<Accumulators>();
      set->n = op.n;
      set->values.resize(static_cast<size_t>(64 * op.n));
      set->registers.resize(static_cast<size_t>(128 * op.n / 2));
    }
    if (set->n != op.n || set->registered[place]) fail("wgmma: warps of the warpgroup disagree on accumulators");
    set->registered[place] = true;
    const int registers = op.n / 2;
    for (int lane = 0; lane < 32; ++lane) {
      const int thread = 32 * place + lane;
      for (int r = 0; r < registers; ++r) {
        float* from = lanes[lane].d[r];
        set->registers[static_cast<size_t>(thread * registers + r)] = from;
        set->values[static_cast<size_t>(row_of(thread, r) * op.n + column_of(thread, r))] = *from;
        *from = as<float>(kInFlight);
      }
    }
    warp.in_flight.push_back(set);
  }
  if (product.accumulators == nullptr) product.accumulators = set;
  if (product.accumulators != set) fail("wgmma: warps of the warpgroup disagree on accumulators");
  set->last_operation[place] = number + 1;
  if (op.a_in_registers) {
    for (int lane = 0; lane < 32; ++lane) std::memcpy(product.a[32 * place + lane], lanes[lane].a, sizeof product.a[0]);
  }
  if (!op.a_in_registers) check_order(warp, number, op.a, op.transpose_a, 64, "wgmma A");
  check_order(warp, number, op.b, op.transpose_b, op.n, "wgmma B");
  if (++product.issued < 4) return true;
  if (early_products > 0.0 && rng.chance(early_products)) execute_until(group, number + 1);
  for (auto& other : warp.cta->warps) {
    if (other->group != &group || !other->waiting || !all_issued(group, other->wait_target)) continue;
    finish_wait(*other);
    for (Fiber* fiber : other->lanes) wake(*fiber);
  }
  return true;
}

}  // namespace

void wgmma(const Wgmma& operation, float* const* d, const RegisterA* a) {
  EMU_ENTER();
  preempt();
  const LaneOperands mine{&operation, d, a};
  converge(kFull, true, "wgmma.mma_async", 0, reinterpret_cast<uint64_t>(&mine), 0, issue);
}

void wgmma_fence() {
  EMU_ENTER();
  converge(kFull, true, "wgmma.fence", 0, 0, 0, [](Warp& warp, Collective&) {
    warp.fenced = true;
    return true;
  });
}

void wgmma_commit() {
  EMU_ENTER();
  converge(kFull, true, "wgmma.commit_group", 0, 0, 0, [](Warp& warp, Collective&) {
    warp.committed.push_back(warp.issued);
    return true;
  });
  preempt();
}

void wgmma_wait(int pending) {
  EMU_ENTER();
  preempt();
  converge(kFull, true, "wgmma.wait_group", static_cast<uint64_t>(pending), 0, 0, [](Warp& warp, Collective& all) {
    uint64_t end = 0;
    while (warp.committed.size() > all.tag) {
      end = warp.committed.front();
      warp.committed.pop_front();
    }
    Warpgroup& group = *warp.group;
    warp.wait_target = end > warp.wait_target ? end : warp.wait_target;
    if (all_issued(group, warp.wait_target)) {
      finish_wait(warp);
      return true;
    }
    warp.waiting = true;
    for (Fiber* fiber : warp.lanes)
      fiber->waits_for = {"wgmma.wait_group, for the warpgroup's other warps to issue", 0, 0};
    return false;
  });
  // Drop what every warp has been given.
  Warpgroup& group = *current().warp->group;
  uint64_t settled = group.executed;
  for (auto& warp : current().cta->warps) {
    if (warp->group == &group) settled = std::min(settled, warp->wait_target);
  }
  for (; group.first_product < settled; ++group.first_product) group.products.pop_front();
}

}  // namespace emu
