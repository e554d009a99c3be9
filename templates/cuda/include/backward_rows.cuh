// The backward's two passes over rows, before and after the attention kernel. A row is a query and head. A warp has the rows
// of one head and 16 tokens, and the warps beside it the other heads of these tokens: loads and stores are whole lines,
// several a thread are in flight, and nothing is divided row by row.
#pragma once
#include <cstdint>

#include "cuda/include/backward_params.cuh"
#include "cuda/include/dq_sums.cuh"
#include "cuda/include/fragments.cuh"
#include "cuda/include/ptx.cuh"

using Unpack = float2 (*)(uint32_t);
using LoadSums = uint4 (*)(const void*, uint64_t);  // load_x4, or load_written_x4 where this launch has added them up

constexpr int kRowThreads = 256;
constexpr int kRowTokens = 16;  // a warp

// The smallest power of two, up to a warp, that is not below `count`.
__host__ __device__ constexpr int lanes_for(int count) { return count <= 1 ? 1 : 2 * lanes_for((count + 1) / 2); }

// A warp's rows.
struct RowBlock {
  int head;
  int token;  // the first
  int count;  // of tokens; 0 or less where there are none left
  uint32_t direct, summed;  // a bit a token, the first one's lowest (BackwardParams)
};

__device__ __forceinline__ RowBlock row_block(const BackwardParams& p) {
  const unsigned warp = __shfl_sync(0xffffffff, blockIdx.x * (kRowThreads / 32) + threadIdx.x / 32, 0);  // known to be uniform
  const unsigned block = warp / p.heads;
  RowBlock rows;
  rows.head = warp - block * p.heads;
  rows.token = kRowTokens * block;
  rows.count = min(p.total_q - rows.token, kRowTokens);
  const auto bits = [&](const unsigned* words) {
    return rows.count > 0 ? words[rows.token / 32] >> rows.token % 32 & ((1u << kRowTokens) - 1) : 0;
  };
  rows.direct = bits(p.direct);
  rows.summed = bits(p.summed);
  return rows;
}

template <Unpack kUnpack>
__device__ __forceinline__ float dot_x2(uint32_t a, uint32_t b) {
  const float2 left = kUnpack(a), right = kUnpack(b);
  return fmaf(left.x, right.x, left.y * right.y);
}

// delta = rowsum(dO * O) - dlse, 16 bytes a lane.
template <int kHeadDimV, Unpack kUnpack>
__device__ __forceinline__ void write_delta(const BackwardParams& p, const RowBlock& rows) {
  constexpr int kLanes = lanes_for(kHeadDimV / 8) == 1 ? 32 / kRowTokens : lanes_for(kHeadDimV / 8);  // a row
  constexpr int kStep = 32 / kLanes;                                                                  // rows a load
  constexpr int kLoads = kRowTokens / kStep;
  constexpr int kInFlight = kLoads < 4 ? kLoads : 4;
  const int piece = threadIdx.x % kLanes;
  const int first = threadIdx.x % 32 / kLanes;
  const long long token = rows.token + first;
  const uint16_t* out = static_cast<const uint16_t*>(p.out) + token * p.out_token + rows.head * p.out_head + 8 * piece;
  const uint16_t* dout = static_cast<const uint16_t*>(p.dout) + token * p.dout_token + rows.head * p.dout_head + 8 * piece;
  const long long at = static_cast<long long>(rows.head) * p.total_q + token;
#pragma unroll 1
  for (int load = 0; load < kLoads; load += kInFlight) {
    uint4 a[kInFlight], b[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int row = (load + i) * kStep;
      a[i] = b[i] = {};
      if (first + row < rows.count && 8 * piece < kHeadDimV) {
        a[i] = load_x4(out + row * p.out_token, kEvictFirst);
        b[i] = load_x4(dout + row * p.dout_token, kEvictNormal);  // the attention kernel reads it next
      }
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int row = (load + i) * kStep;
      float delta = dot_x2<kUnpack>(a[i].x, b[i].x) + dot_x2<kUnpack>(a[i].y, b[i].y) + dot_x2<kUnpack>(a[i].z, b[i].z) +
                    dot_x2<kUnpack>(a[i].w, b[i].w);
#pragma unroll
      for (int distance = kLanes / 2; distance > 0; distance /= 2) delta += __shfl_xor_sync(0xffffffff, delta, distance);
      if (first + row < rows.count && piece == 0) p.delta[at + row] = delta - (p.dlse == nullptr ? 0.0f : p.dlse[at + row]);
    }
  }
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

// Quad number `quad` of a token's row of a panel of sums, as dq has it: whether it is of a last group of 8 columns, which are
// in order, and the first of the four columns that its lane writes.
template <typename Sums, int kPanel>
__device__ __forceinline__ bool is_in_order(unsigned quad) {
  return Sums::columns(kPanel) % 16 != 0 && quad / 4 == Sums::columns(kPanel) / 16;
}
template <typename Sums, int kPanel>
__device__ __forceinline__ unsigned column_of(unsigned quad, int token) {
  return is_in_order<Sums, kPanel>(quad) ? 4 * quad : (quad / 4 * 16 ^ Sums::group_swap(kPanel, token)) + first_neighbour(quad);
}

// dq = scale * sums, a quad a lane. All lanes of a warp.
template <typename Sums, Pack kPack, int kPanel>
__device__ __forceinline__ void write_quad(uint16_t* dq, uint4 sums, float scale, unsigned quad, bool exists) {
  const uint32_t low = kPack(scale * __uint_as_float(sums.x), scale * __uint_as_float(sums.y));
  const uint32_t high = kPack(scale * __uint_as_float(sums.z), scale * __uint_as_float(sums.w));
  uint2 words = neighbouring_columns(low, high, quad);
  if (is_in_order<Sums, kPanel>(quad)) words = {low, high};
  if (exists) *reinterpret_cast<uint2*>(dq) = words;
}

// A panel of dq = scale * sums, four columns a lane and load, zeros where there are no sums; so many loads at once.
template <typename Sums, LoadSums kLoad, Pack kPack, int kAtOnce, int kPanel>
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
      if (rows.summed >> place / kQuads & 1) values[i] = kLoad(sums + 4 * place, kEvictFirst);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const unsigned place = base + 32 * i, row = place / kQuads, quad = place % kQuads;
      const bool exists = row < rows.count && !(rows.direct >> row & 1);
      uint16_t* to = dq + row * p.dq_token + column_of<Sums, kPanel>(quad, rows.token + row);
      write_quad<Sums, kPack, kPanel>(to, values[i], p.scale, quad, exists);
    }
  }
}

// All panels from `kPanel` on.
template <typename Sums, LoadSums kLoad, Pack kPack, int kAtOnce, int kPanel = 0>
__device__ __forceinline__ void finish_panels(const BackwardParams& p, const RowBlock& rows) {
  finish_panel<Sums, kLoad, kPack, kAtOnce, kPanel>(p, rows);
  if constexpr (kPanel + 1 < Sums::kPanels) finish_panels<Sums, kLoad, kPack, kAtOnce, kPanel + 1>(p, rows);
}

// dq = scale * sums, or 0, where the attention kernel has not written it.
template <typename Sums, Pack kPack>
__device__ __forceinline__ void finish_rows(const BackwardParams& p) {
  const RowBlock rows = row_block(p);
  if (rows.count <= 0 || rows.direct == (1u << rows.count) - 1) return;
  finish_panels<Sums, load_x4, kPack, 4>(p, rows);
}
