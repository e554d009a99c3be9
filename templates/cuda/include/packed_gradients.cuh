// The backward's probabilities and their gradients where each row of a tile (packed_tile.cuh) sees a range of a block's
// columns: rows are queries and columns keys, or the other way round. 16 columns at a time: those that no row of the
// warp sees are left out, those that every row sees whole are not masked. The accumulators' layout: softmax.cuh.
#pragma once
#include <cstdint>

#include "cuda/include/fragments.cuh"
#include "cuda/include/offsets.cuh"
#include "cuda/include/packed_tile.cuh"
#include "cuda/include/ptx.cuh"
#include "cuda/include/row_gradients.cuh"

// The queries that see a key, in the packed tensor; `beyond`: the first of cu_seqlens_k that is greater than its row.
// Keys before the first sequence and behind the last are seen by none.
template <bool kCausal, typename P>
__device__ __forceinline__ RowRange seeing_queries(const P& p, int row, int beyond) {
  const int sequence = min(max(beyond - 1, 0), p.batch - 1);
  RowRange queries = {offset_at(p.cu_seqlens_q, sequence, p.wide_offsets & 1),
                      offset_at(p.cu_seqlens_q, sequence + 1, p.wide_offsets & 1)};
  if (beyond == 0) queries.end = queries.begin;
  if (beyond > p.batch) queries.begin = queries.end;
  if constexpr (kCausal) {
    const int k_begin = offset_at(p.cu_seqlens_k, sequence, p.wide_offsets & 2);
    int blind = row - k_begin;  // queries before the first that sees the key
    if (p.bottom_right) {
      const int k_end = offset_at(p.cu_seqlens_k, sequence + 1, p.wide_offsets & 2);
      blind -= (k_end - k_begin) - (queries.end - queries.begin);
    }
    queries.begin = min(queries.begin + max(blind, 0), queries.end);  // clamped: begins must not fall from row to row
  }
  return queries;
}

// Tiles of keys, as QueryRows.
template <bool kCausal>
struct KeyRows {
  template <typename P>
  __device__ __forceinline__ static const void* offsets(const P& p) { return p.cu_seqlens_k; }
  template <typename P>
  __device__ __forceinline__ static int wide(const P& p) { return p.wide_offsets & 2; }
  template <typename P>
  __device__ __forceinline__ static int count(const P& p) { return p.total_k; }
  template <typename P>
  __device__ __forceinline__ static RowRange seen(const P& p, int row, int beyond) {
    return seeing_queries<kCausal>(p, row, beyond);
  }
};

// lse, base 2, and delta of consecutive queries of a head.
template <int kQueries>
struct alignas(16) QueryStats {
  float lse[kQueries];
  float delta[kQueries];
};

// On their way there through a warp's registers, so that they can be asked for before there is room.
template <int kQueries>
class StatsLoader {
 public:
  // Queries from `row` on, of which there are `length`.
  template <typename P>
  __device__ __forceinline__ StatsLoader(const P& p, int head, int row, int length) {
    const long long first = static_cast<long long>(head) * p.total_q + row;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int query = 32 * i + threadIdx.x % 32;
      const bool exists = query < min(length, kQueries);
      lse_[i] = exists ? p.lse[first + query] : -INFINITY;
      delta_[i] = exists ? p.delta[first + query] : 0.0f;
    }
  }

  __device__ __forceinline__ void write(QueryStats<kQueries>& stats) const {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int query = 32 * i + threadIdx.x % 32;
      if (query < kQueries) {
        stats.lse[query] = lse_offset(lse_[i]);
        stats.delta[query] = delta_[i];
      }
    }
  }

 private:
  static constexpr int kEach = (kQueries + 31) / 32;
  float lse_[kEach], delta_[kEach];
};

// A thread's numbers of each pair of accumulators where rows are queries.
struct StatsOfRows {
  float own_lse[2], own_delta[2];

  template <int kQueries>
  __device__ __forceinline__ explicit StatsOfRows(const QueryStats<kQueries>& stats) {
    const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      own_lse[h] = stats.lse[row + 8 * h];
      own_delta[h] = stats.delta[row + 8 * h];
    }
  }
  __device__ __forceinline__ float2 lse(int pair) const { return {own_lse[pair % 2], own_lse[pair % 2]}; }
  __device__ __forceinline__ float2 delta(int pair) const { return {own_delta[pair % 2], own_delta[pair % 2]}; }
};

// And where columns are, read as they are needed.
struct StatsOfColumns {
  const float2* first_lse;
  const float2* first_delta;

  template <int kQueries>
  __device__ __forceinline__ explicit StatsOfColumns(const QueryStats<kQueries>& stats)
      : first_lse(reinterpret_cast<const float2*>(stats.lse) + threadIdx.x % 4),
        first_delta(reinterpret_cast<const float2*>(stats.delta) + threadIdx.x % 4) {}
  __device__ __forceinline__ float2 lse(int pair) const { return first_lse[4 * (pair / 2)]; }
  __device__ __forceinline__ float2 delta(int pair) const { return first_delta[4 * (pair / 2)]; }
};

// Scores become probabilities, zeros where row and column do not belong together; `seen` counts from the block's first
// column. Those of columns that no row of the warp sees are left as they are.
template <typename Stats, int kRegisters>
__device__ __forceinline__ void range_probabilities(float (&scores)[kRegisters], const RowRange (&seen)[2],
                                                    const WarpColumns& columns, const Stats& stats, float scale_log2) {
  const int thread_column = threadIdx.x % 4 * 2;
  const RowRange own[2] = {seen[0].from(thread_column), seen[1].from(thread_column)};
#pragma unroll
  for (int step = 0; step < kRegisters / 8; ++step) {
    if (columns.unseen(16 * step)) continue;
#pragma unroll
    for (int pair = 4 * step; pair < 4 * step + 4; ++pair) {
      const float2 lse = stats.lse(pair);
      scores[2 * pair] = exp2_approx(fmaf(scores[2 * pair], scale_log2, -lse.x));
      scores[2 * pair + 1] = exp2_approx(fmaf(scores[2 * pair + 1], scale_log2, -lse.y));
    }
    if (!columns.seen_whole(16 * step)) {
#pragma unroll
      for (int i = 8 * step; i < 8 * step + 8; ++i) {
        if (!own[(i >> 1) & 1].holds(8 * (i >> 2) + (i & 1))) scores[i] = 0.0f;
      }
    }
  }
}

// Probabilities, packed.
template <Pack kPack, int kSteps>
__device__ __forceinline__ void pack_range(uint32_t (&fragments)[kSteps][4], const float (&probabilities)[8 * kSteps],
                                           const WarpColumns& columns) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const bool unseen = columns.unseen(16 * step);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = 8 * step + 2 * i;
      fragments[step][i] = unseen ? 0 : kPack(probabilities[at], probabilities[at + 1]);
    }
  }
}

// dS = P * (dP - delta), packed; zero where P is, whatever is in dP there.
template <Pack kPack, typename Stats, int kSteps>
__device__ __forceinline__ void range_gradients(uint32_t (&ds)[kSteps][4], const float (&probabilities)[8 * kSteps],
                                                const float (&dp)[8 * kSteps], const WarpColumns& columns,
                                                const Stats& stats) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) ds[step][i] = 0;
    if (columns.unseen(16 * step)) continue;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int pair = 4 * step + i;
      const float2 delta = stats.delta(pair);
      const float first = probabilities[2 * pair], second = probabilities[2 * pair + 1];
      ds[step][i] = kPack(first == 0.0f ? 0.0f : first * (dp[2 * pair] - delta.x),
                          second == 0.0f ? 0.0f : second * (dp[2 * pair + 1] - delta.y));
    }
  }
}
