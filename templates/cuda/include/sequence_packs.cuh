// Tiles of several short sequences: neighbours in the packed tensors whose queries fit in one tile's rows and whose keys fit in
// one block. Such a tile is an item like any other, of all their queries and keys; each row's mask leaves it the keys of its own
// sequence.
#pragma once
#include <climits>

#include "cuda/include/offsets.cuh"
#include "cuda/include/row_range.cuh"
#include "cuda/include/work_list.cuh"

constexpr int kPackedSequences = 8;  // in a tile, at most: those of four threads of a list builder

// Which sequences an item has, in place of its piece of keys.
struct SequencePack {
  static constexpr int kMostFirst = (1 << 28) - 1;
  int first, count;

  __device__ __forceinline__ explicit SequencePack(const WorkItem& item)
      : first(item.piece & kMostFirst), count((item.piece >> 28 & 7) + 1) {}
  __device__ __forceinline__ static bool has(const WorkItem& item) { return item.piece < 0; }
  __device__ __forceinline__ static int packed(int first, int count) { return INT_MIN | (count - 1) << 28 | first; }
};

// Packs a thread's sequences with its neighbours', first come, first served, among the eight of four threads: `packed` is how many
// each one's tile has, 0 where it is in the tile of one before. `q` and `k`: the offsets of the thread's sequences, of which
// `exist` do, from its first; `tiles`: of each, alone, and then what is left. All threads of a warp.
template <int kPerThread>
__device__ __forceinline__ void pack_sequences(const int (&q)[kPerThread + 1], const int (&k)[kPerThread + 1], int exist, int block_q,
                                               int block_k, int (&tiles)[kPerThread], int (&packed)[kPerThread]) {
  constexpr int kThreads = kPackedSequences / kPerThread;
  const int lane = threadIdx.x % 32, own = kPerThread * (lane % kThreads);  // number of the thread's first
  const int all = exist + own;
  auto of_all = [&](const int(&offsets)[kPerThread + 1], int number) {
    return __shfl_sync(0xffffffff, offsets[number % kPerThread], lane - lane % kThreads + number / kPerThread);
  };
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) packed[i] = 1;
  int first = -1, first_q = 0, first_k = 0;  // of the pack that is being filled
  int begin_q = of_all(q, 0), begin_k = of_all(k, 0);
#pragma unroll
  for (int number = 0; number < kPackedSequences; ++number) {
    const bool is_last = number + 1 == kPackedSequences;
    const int end_q = is_last ? __shfl_sync(0xffffffff, q[kPerThread], lane | (kThreads - 1)) : of_all(q, is_last ? 0 : number + 1);
    const int end_k = is_last ? __shfl_sync(0xffffffff, k[kPerThread], lane | (kThreads - 1)) : of_all(k, is_last ? 0 : number + 1);
    const bool rises = number < all && end_q >= begin_q && end_k >= begin_k;
    const bool joins = rises && first >= 0 && end_q - first_q <= block_q && end_k - first_k <= block_k;
    if (joins) {
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        if (own + i == first) packed[i] = number - first + 1, tiles[i] = end_q > first_q;
        if (own + i == number) packed[i] = tiles[i] = 0;
      }
    } else {
      first = rises && end_q - begin_q <= block_q && end_k - begin_k <= block_k ? number : -1;
      first_q = begin_q;
      first_k = begin_k;
    }
    begin_q = end_q;
    begin_k = end_k;
  }
}

// Where a pack's sequences begin and end, from its own begin on: lane i has the offsets of number i.
struct PackOffsets {
  int q, k;

  template <typename P>
  __device__ __forceinline__ void read(const P& p, const WorkItem& item) {
    const SequencePack pack(item);
    const int index = pack.first + min(static_cast<int>(threadIdx.x % 32), pack.count);
    q = offset_at(p.cu_seqlens_q, index, p.wide_offsets & 1) - item.q_begin;
    k = offset_at(p.cu_seqlens_k, index, p.wide_offsets & 2) - item.k_begin;
  }

  // The pack's keys that a thread's two rows see; `tokens`: which of the pack's these are. All lanes of a warp.
  template <bool kCausal>
  __device__ __forceinline__ void find(RowRange (&keys)[2], const int (&tokens)[2], bool bottom_right) const {
    keys[0] = keys[1] = {0, 0};
    int begin_q = 0, begin_k = 0;
#pragma unroll
    for (int number = 1; number <= kPackedSequences; ++number) {
      const int end_q = __shfl_sync(0xffffffff, q, number), end_k = __shfl_sync(0xffffffff, k, number);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if (tokens[h] < begin_q || tokens[h] >= end_q) continue;
        keys[h] = {begin_k, end_k};
        if constexpr (kCausal) {
          const int shift = bottom_right ? end_k - begin_k - (end_q - begin_q) : 0;
          keys[h].end = min(end_k, begin_k + tokens[h] - begin_q + shift + 1);
        }
      }
      begin_q = end_q;
      begin_k = end_k;
    }
  }
};

// Scores of keys that their row does not see become -inf; `first_column`: the thread's.
template <int kRegisters>
__device__ __forceinline__ void mask_others(float (&scores)[kRegisters], const RowRange (&keys)[2], int first_column) {
#pragma unroll
  for (int i = 0; i < kRegisters; ++i) {
    if (!keys[i >> 1 & 1].holds(first_column + 8 * (i >> 2) + (i & 1))) scores[i] = -INFINITY;
  }
}
