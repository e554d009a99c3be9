// Rows of a head on their way through shared memory, where the passes over rows (backward_rows.cuh) are made beside the tiles
// (row_tasks.cuh): copied (TMA, bulk copies) while the warp works on the rows before.
#pragma once
#include <cstdint>

#include "cuda/include/backward_params.cuh"
#include "cuda/include/fragments.cuh"
#include "cuda/include/ptx.cuh"

using MultiplyAdd = void (*)(float (&)[4], const uint32_t (&)[4], uint32_t, uint32_t);  // multiply_add_bf16 or _fp16

enum RowTask { kPrepareRows, kFinishRows };

// Rows of one head that are worked on at once.
struct alignas(16) RowUnit {
  RowTask task;
  int head;
  int token;  // the first
  int count;
  int ends;     // the pair whose slice is prepared with these rows, or -1
  bool summed;  // else dQ is complete in one tile
};

// What a lane reads of a buffer at once.
__device__ __forceinline__ uint4 copied(uint32_t place) {
  uint32_t words[4];
  load_shared_x4(words, place);
  return {words[0], words[1], words[2], words[3]};
}

template <typename Sums, int kHeadDimV, int kBufferBytes>
struct RowUnits {
  static constexpr int kTokens = 32;  // of a unit, at most: a box of the maps

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

  // delta = rowsum(dO * O) - dlse: the diagonal of O dO^T, of 8 rows at a time. The product has twice these rows of O.
  template <MultiplyAdd kMultiplyAdd>
  __device__ __forceinline__ static void prepare(const BackwardParams& p, const RowUnit& unit, uint32_t buffer) {
    if (unit.summed) zero_sums(p, unit);
    const unsigned lane = lane_here();
#pragma unroll 2
    for (int begin = 0; begin < kTokens; begin += 8) {
      // Lanes 8 i to 8 i + 7 point to the rows of a matrix of columns 8 i on, of each 32.
      const uint32_t place = buffer + 128 * (begin + lane % 8) + 16 * (lane / 8 ^ lane % 8);
      float sums[4] = {};
#pragma unroll
      for (int column = 0; column < kHeadDimV; column += 32) {
        uint32_t out[4], dout[4];
        const uint32_t at = (place ^ 2 * (column % 64)) + column / 64 * kPanelBytes;
        load_matrix_x4(out, at);
        load_matrix_x4(dout, at + kOutputBytes);
        kMultiplyAdd(sums, {out[0], out[0], out[1], out[1]}, dout[0], dout[1]);
        kMultiplyAdd(sums, {out[2], out[2], out[3], out[3]}, dout[2], dout[3]);
      }
      const int row = begin + lane / 4;
      if (row >= unit.count || lane % 4 != lane / 8) continue;  // who has the diagonal's number of a row
      const long long at = static_cast<long long>(unit.head) * p.total_q + unit.token + row;
      p.delta[at] = (row % 2 ? sums[1] : sums[0]) - (p.dlse == nullptr ? 0.0f : p.dlse[at]);
    }
  }

  template <int kPanel = 0>
  __device__ __forceinline__ static void zero_sums(const BackwardParams& p, const RowUnit& unit) {
    constexpr int kQuads = Sums::columns(kPanel) / 4;
    const int lane = lane_here(), count = unit.count;
    float4* sums = reinterpret_cast<float4*>(Sums::row(p.dq_sums, p.total_q, unit.head, kPanel, unit.token)) + lane;
    if (count == kTokens) {
#pragma unroll
      for (int i = 0; i < kQuads; ++i) sums[32 * i] = {};
    } else {
#pragma unroll 1
      for (int left = count * kQuads - lane; left > 0; left -= 32, sums += 32) *sums = {};
    }
    if constexpr (kPanel + 1 < Sums::kPanels) zero_sums<kPanel + 1>(p, unit);
  }

  // dq = scale * sums. A lane has whole groups of 16 columns, four pieces of 16 bytes; a panel's last group may have 8.
  template <Pack kPack, int kPanel = 0>
  __device__ __forceinline__ static void finish(const BackwardParams& p, const RowUnit& unit, uint32_t buffer) {
    constexpr int kColumns = Sums::columns(kPanel), kGroups = (kColumns + 15) / 16;
    const auto address_of = [&](unsigned group) {
      const int token = unit.token + group / kGroups, column = 16 * (group % kGroups) ^ Sums::group_swap(kPanel, token);
      return static_cast<uint16_t*>(p.dq) + token * p.dq_token + unit.head * p.dq_head + Sums::first_column(kPanel) + column;
    };
    unsigned group = lane_here();
    uint16_t* dq = address_of(group);
#pragma unroll 1
    for (int round = 0; round < kGroups; ++round, group += 32) {
      const unsigned row = group / kGroups;
      const uint32_t place = buffer + kTokens * Sums::first_column(kPanel) * 4 + 4 * kColumns * row + 64 * (group % kGroups);
      const bool half = kColumns % 16 != 0 && group % kGroups == kGroups - 1;
      uint32_t low[4], high[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint4 sums = copied(place + (i < 2 || !half ? 16 * i : 0));
        low[i] = kPack(p.scale * __uint_as_float(sums.x), p.scale * __uint_as_float(sums.y));
        high[i] = kPack(p.scale * __uint_as_float(sums.z), p.scale * __uint_as_float(sums.w));
      }
      if (row < unit.count) {
        if (half) {  // as they are
          *reinterpret_cast<uint4*>(dq) = {low[0], high[0], low[1], high[1]};
        } else {
          reinterpret_cast<uint4*>(dq)[0] = {low[0], low[1], low[2], low[3]};
          reinterpret_cast<uint4*>(dq)[1] = {high[0], high[1], high[2], high[3]};
        }
      }
      // Most panels have a lane's groups in the same columns, an even number of rows apart.
      if constexpr (32 % kGroups == 0) {
        dq += 32 / kGroups * p.dq_token;
      } else {
        dq = address_of(group + 32);
      }
    }
    if constexpr (kPanel + 1 < Sums::kPanels) finish<kPack, kPanel + 1>(p, unit, buffer);
  }
};
