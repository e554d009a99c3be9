// The backward's two passes over rows, before and after the attention kernel (delta_rows.cuh has who works on which).
#pragma once
#include <cstdint>

#include "cuda/include/backward_params.cuh"
#include "cuda/include/delta_rows.cuh"
#include "cuda/include/dq_sums.cuh"
#include "cuda/include/fragments.cuh"
#include "cuda/include/ptx.cuh"

// A warp's rows, and what becomes of their dQ.
struct RowBlock : TokenRows {
  uint32_t direct, summed;  // a bit a token, the first one's lowest (BackwardParams)
};

__device__ __forceinline__ RowBlock row_block(const BackwardParams& p) {
  RowBlock rows = {token_rows(p)};
  const auto bits = [&](const unsigned* words) {
    return rows.count > 0 ? words[rows.token / 32] >> rows.token % 32 & ((1u << kRowTokens) - 1) : 0;
  };
  rows.direct = bits(p.direct);
  rows.summed = bits(p.summed);
  return rows;
}

__device__ __forceinline__ void zero_counters(int* counters, int count) {
  if (counters == nullptr) return;
  const long long thread = static_cast<long long>(blockIdx.x) * kRowThreads + threadIdx.x;
  for (long long i = thread; i < count; i += static_cast<long long>(gridDim.x) * kRowThreads) counters[i] = 0;
}

// Writes delta; turns become zero, and sums that are used, where no tile stores its part of them.
template <typename Sums, int kHeadDimV, Unpack kUnpack, bool kStored>
__device__ __forceinline__ void prepare_rows(const BackwardParams& p) {
  const RowBlock rows = row_block(p);
  if (rows.count > 0) write_delta<kHeadDimV, kUnpack>(p, rows);
  if (!kStored && rows.summed != 0) {
#pragma unroll
    for (int panel = 0; panel < Sums::kPanels; ++panel) {
      float4* sums = reinterpret_cast<float4*>(Sums::row(p.dq_sums, p.total_q, rows.head, panel, rows.token));
      const int quads = Sums::columns(panel) / 4;  // a row
#pragma unroll 4
      for (unsigned i = threadIdx.x % 32; i < kRowTokens * quads; i += 32) {
        if (rows.summed >> i / quads & 1) sums[i] = {0.0f, 0.0f, 0.0f, 0.0f};
      }
    }
  }
  zero_counters(p.turns, p.turn_count);
}

// dq = scale * sums, a quad a lane. All lanes of a warp.
template <typename Sums, Pack kPack, int kPanel>
__device__ __forceinline__ void write_quad(uint16_t* dq, uint4 sums, float scale, unsigned quad, bool exists) {
  const uint32_t low = kPack(scale * __uint_as_float(sums.x), scale * __uint_as_float(sums.y));
  const uint32_t high = kPack(scale * __uint_as_float(sums.z), scale * __uint_as_float(sums.w));
  uint2 words = {low, high};
  if constexpr (!Sums::kInOrder) {
    const uint2 neighbours = neighbouring_columns(low, high, quad);
    if (!Sums::is_in_order(kPanel, quad)) words = neighbours;
  }
  if (exists) *reinterpret_cast<uint2*>(dq) = words;
}

// A panel of dq = scale * sums, four columns a lane and load, zeros where there are no sums; so many loads at once.
template <typename Sums, Pack kPack, int kAtOnce, int kPanel>
__device__ __forceinline__ void finish_panel(const BackwardParams& p, const RowBlock& rows) {
  constexpr int kColumns = Sums::columns(kPanel), kQuads = kColumns / 4;
  constexpr int kLoads = kRowTokens * kQuads / 32;
  constexpr int kInFlight = kLoads < kAtOnce ? kLoads : kAtOnce;
  const float* sums = Sums::row(p.dq_sums, p.total_q, rows.head, kPanel, rows.token);
  uint16_t* dq = static_cast<uint16_t*>(p.dq) + rows.token * p.dq_token + rows.head * p.dq_head + Sums::first_column(kPanel);
#pragma unroll 1
  for (unsigned base = threadIdx.x % 32; base < kRowTokens * kQuads; base += 32 * kInFlight) {
    uint4 values[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const unsigned place = base + 32 * i;
      values[i] = {};
      // They were added up while this launch ran: by it, or by one that it began beside.
      if (rows.summed >> place / kQuads & 1) values[i] = load_written_x4(sums + 4 * place, kEvictFirst);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const unsigned place = base + 32 * i, row = place / kQuads, quad = place % kQuads;
      const bool exists = row < rows.count && !(rows.direct >> row & 1);
      uint16_t* to = dq + row * p.dq_token + Sums::column_of(kPanel, quad, rows.token + row);
      write_quad<Sums, kPack, kPanel>(to, values[i], p.scale, quad, exists);
    }
  }
}

// All panels from `kPanel` on.
template <typename Sums, Pack kPack, int kAtOnce, int kPanel = 0>
__device__ __forceinline__ void finish_panels(const BackwardParams& p, const RowBlock& rows) {
  finish_panel<Sums, kPack, kAtOnce, kPanel>(p, rows);
  if constexpr (kPanel + 1 < Sums::kPanels) finish_panels<Sums, kPack, kAtOnce, kPanel + 1>(p, rows);
}

// dq = scale * sums, or 0, where the attention kernel has not written it.
template <typename Sums, Pack kPack>
__device__ __forceinline__ void finish_rows(const BackwardParams& p) {
  const RowBlock rows = row_block(p);
  if (rows.count <= 0 || rows.direct == (1u << rows.count) - 1) return;
  finish_panels<Sums, kPack, /*kAtOnce=*/4>(p, rows);
}
