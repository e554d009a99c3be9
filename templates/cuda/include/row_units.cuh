// Rows of a head on their way through shared memory, where the passes over rows (backward_rows.cuh) are made beside the tiles
// (row_tasks.cuh): copied (TMA, bulk copies) while warps work on the rows before, 8 of them at a time.
#pragma once
#include <cstdint>

#include "cuda/include/backward_params.cuh"
#include "cuda/include/backward_rows.cuh"
#include "cuda/include/fragments.cuh"
#include "cuda/include/ptx.cuh"

enum RowTask { kPrepareRows, kFinishRows, kNoRows };

// Rows of one head that are worked on at once.
struct alignas(16) RowUnit {
  RowTask task;
  int head;
  int token;  // the first
  int count;
  int ends;  // the pair whose slice is prepared with these rows, or -1
};

template <typename Sums, int kHeadDimV, int kUnitRows, int kBufferBytes, int kCount, int kWorkers>
struct RowUnits {
  static constexpr int kBytes = kBufferBytes;
  static constexpr int kBuffers = kCount;
  static constexpr int kWarps = kWorkers;
  static constexpr int kReaders = 32 * kWarps;  // that hand a unit back: every lane for itself
  static constexpr int kRows = 8;            // of a warp, at a time
  static constexpr int kTokens = kUnitRows;  // of a unit, at most: a box of the maps
  static_assert(kWarps == 1 || kWarps * kRows == kTokens);

  // In a buffer O and dO are panels of 64 columns, of rows of 128 bytes, swizzled.
  static constexpr int kPanelBytes = kTokens * 128;
  static constexpr int kPanels = (kHeadDimV + 63) / 64;
  static constexpr int kOutputBytes = kPanels * kPanelBytes;
  static_assert(2 * kOutputBytes <= kBufferBytes && kTokens * Sums::kColumns * 4 <= kBufferBytes);

  // Begins to copy rows, in one thread; `full` completes when they are there.
  __device__ __forceinline__ static void copy(const BackwardParams& p, const RowUnit& unit, uint32_t buffer, uint32_t full) {
    if (unit.task == kPrepareRows) {
      mbarrier_expect_bytes(full, 2 * kOutputBytes);
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel) {
        const uint32_t to = buffer + panel * kPanelBytes;
        tma_load_ragged(to, &p.map_rows_out, full, 64 * panel, 0, unit.head, unit.token, unit.count, kEvictFirst);
        tma_load_ragged(to + kOutputBytes, &p.map_rows_dout, full, 64 * panel, 0, unit.head, unit.token, unit.count,
                        kEvictNormal);  // the tiles read it next
      }
    } else {
      mbarrier_expect_bytes(full, unit.count * Sums::kColumns * 4);
#pragma unroll
      for (int panel = 0; panel < Sums::kPanels; ++panel) {
        bulk_load(buffer + kTokens * Sums::first_column(panel) * 4,
                  Sums::row(p.dq_sums, p.total_q, unit.head, panel, unit.token), unit.count * Sums::columns(panel) * 4, full,
                  kEvictFirst);
      }
    }
  }

  // Calls `work(rows)` for a warp's rows, by the number of these eight.
  template <typename Work>
  __device__ __forceinline__ static void for_each_eight(const RowUnit& unit, int warp, Work work) {
    if constexpr (kWarps > 1) {
      work(warp);
    } else {
#pragma unroll 1
      for (int eight = 0; kRows * eight < unit.count; ++eight) work(eight);
    }
  }

  // delta = rowsum(dO * O) - dlse, of eight rows.
  template <Unpack kUnpack>
  __device__ __forceinline__ static void prepare(const BackwardParams& p, const RowUnit& unit, uint32_t buffer, int eight) {
    const int begin = kRows * eight, rows = min(unit.count - begin, kRows);
    float delta = row_product<kUnpack>(buffer + 128 * begin);
    delta += __shfl_xor_sync(0xffffffff, delta, 8);
    delta += __shfl_xor_sync(0xffffffff, delta, 16);
    const int row = lane_here();
    if (row >= rows) return;
    const long long at = static_cast<long long>(unit.head) * p.total_q + unit.token + begin + row;
    p.delta[at] = delta - (p.dlse == nullptr ? 0.0f : p.dlse[at]);
  }

  // A lane's part of rowsum(dO * O) of row lane % 8: every fourth piece of 8 columns. Eight lanes read eight pieces' places.
  template <Unpack kUnpack>
  __device__ __forceinline__ static float row_product(uint32_t rows) {
    const unsigned lane = lane_here();
    const uint32_t place = rows + 128 * (lane % 8) + 16 * (lane / 8 ^ lane % 8);
    float sum = 0.0f;
#pragma unroll
    for (int column = 0; column < kHeadDimV; column += 32) {
      uint32_t out[4], dout[4];
      const uint32_t at = (place ^ 2 * (column % 64)) + column / 64 * kPanelBytes;
      load_shared_x4(out, at);
      load_shared_x4(dout, at + kOutputBytes);
#pragma unroll
      for (int i = 0; i < 4; ++i) sum += dot_x2<kUnpack>(out[i], dout[i]);
    }
    return sum;
  }

  // dq = scale * sums, of eight rows, a quad a lane: what lanes read of shared memory lies side by side.
  template <Pack kPack, int kPanel = 0>
  __device__ __forceinline__ static void finish(const BackwardParams& p, const RowUnit& unit, uint32_t buffer, int eight) {
    constexpr int kQuads = Sums::columns(kPanel) / 4;
    const auto address_of = [&](unsigned place) {
      const int token = unit.token + place / kQuads;
      const int column = Sums::first_column(kPanel) + Sums::column_of(kPanel, place % kQuads, token);
      return static_cast<uint16_t*>(p.dq) + token * p.dq_token + unit.head * p.dq_head + column;
    };
    const int first = kRows * eight, quads = kQuads * min(unit.count - first, kRows);
    const uint32_t sums_at = buffer + kTokens * Sums::first_column(kPanel) * 4 + 16 * kQuads * first;
    unsigned place = lane_here();
    uint16_t* dq = address_of(kQuads * first + place);
#pragma unroll 1  // there are few registers
    for (int left = kRows * kQuads; left > 0; left -= 32, place += 32) {
      const bool exists = static_cast<int>(place) < quads;
      uint32_t sums[4] = {};
      if (exists) load_shared_x4(sums, sums_at + 16 * place);
      write_quad<Sums, kPack, kPanel>(dq, {sums[0], sums[1], sums[2], sums[3]}, p.scale, place % kQuads, exists);
      // Most panels have a lane's quads in the same columns.
      if constexpr (32 % (kQuads * Sums::kPeriod) == 0) {
        dq += 32 / kQuads * p.dq_token;
      } else {
        dq = address_of(kQuads * first + place + 32);
      }
    }
    if constexpr (kPanel + 1 < Sums::kPanels) finish<kPack, kPanel + 1>(p, unit, buffer, eight);
  }
};
