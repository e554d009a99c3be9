// Tiles of consecutive rows of the packed queries, whichever sequences these belong to. Each row has its own range of
// keys; a tile's keys reach from its first row's first to its last row's last. Needs no work list: which sequences a tile
// begins and ends in is searched for in the offsets.
#pragma once
#include "cuda/include/offsets.cuh"
#include "cuda/include/params.cuh"

struct alignas(8) KeyRange {
  int begin;
  int end;  // not after `begin`: no key

  __device__ __forceinline__ KeyRange from(int key) const { return {begin - key, end - key}; }
  __device__ __forceinline__ bool holds(int key) const { return key >= begin && key < end; }
};

template <int kRows>
struct alignas(16) PackedTile {
  KeyRange rows[kRows];  // from the tile's first key on; neither begins nor ends ever fall from row to row
  int keys;              // of all rows together
};

// What the two rows of a math thread see, from a block's first key on.
struct ThreadRows {
  KeyRange keys[2];

  template <int kRows>
  __device__ __forceinline__ ThreadRows(const PackedTile<kRows>& tile, int first_key) {
    const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
    keys[0] = tile.rows[row].from(first_key);
    keys[1] = tile.rows[row + 8].from(first_key);
  }
};

// Pairs of a tile and a head, in order of tiles, are dealt out in runs: a CTA's pairs share few tiles.
struct PairRange {
  int begin;
  int end;
};

__device__ __forceinline__ PairRange pairs_of_cta(int pairs) {
  const int each = pairs / gridDim.x, longer = pairs % gridDim.x;  // the first CTAs have one more
  const int cta = blockIdx.x;
  const int begin = cta * each + min(cta, longer);
  return {begin, begin + each + (cta < longer)};
}

// The keys that a row sees, in the packed tensor; `beyond`: the first of cu_seqlens_q that is greater than the row.
// Rows before the first sequence and behind the last see none.
template <bool kCausal>
__device__ __forceinline__ KeyRange visible_keys(const Params& p, int row, int beyond) {
  const int sequence = min(max(beyond - 1, 0), p.batch - 1);
  KeyRange keys = {offset_at(p.cu_seqlens_k, sequence, p.wide_offsets & 2),
                   offset_at(p.cu_seqlens_k, sequence + 1, p.wide_offsets & 2)};
  if (beyond == 0) keys.end = keys.begin;
  if (beyond > p.batch) keys.begin = keys.end;
  if constexpr (kCausal) {
    const int q_begin = offset_at(p.cu_seqlens_q, sequence, p.wide_offsets & 1);
    int visible = row - q_begin + 1;
    if (p.bottom_right) {
      const int q_end = offset_at(p.cu_seqlens_q, sequence + 1, p.wide_offsets & 1);
      visible += (keys.end - keys.begin) - (q_end - q_begin);
    }
    keys.end = min(keys.end, keys.begin + max(visible, 0));
  }
  return keys;
}

// What a warp knows of the tile that it loads: each lane has the keys of every 32nd row.
template <int kRows, bool kCausal>
class TileFinder {
 public:
  // Called with tiles in order.
  __device__ __forceinline__ void find(const Params& p, int tile) {
    const int lane = threadIdx.x % 32;
    const int last_row = min((tile + 1) * kRows, p.total_q) - 1;
    const int first = beyond_ = seek(p, tile * kRows);
    beyond_ = seek(p, last_row);
#pragma unroll
    for (int i = 0; i < kRows / 32; ++i) {
      const int row = min(tile * kRows + 32 * i + lane, last_row);
      keys_[i] = visible_keys<kCausal>(p, row, offset_beyond(p.cu_seqlens_q, p.wide_offsets & 1, first, beyond_, row));
    }
    begin_ = __shfl_sync(0xffffffff, keys_[0].begin, 0);
    length_ = max(__shfl_sync(0xffffffff, keys_[kRows / 32 - 1].end, 31) - begin_, 0);
  }

  __device__ __forceinline__ void write(PackedTile<kRows>& tile) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kRows / 32; ++i) tile.rows[32 * i + lane] = keys_[i].from(begin_);
    if (lane == 0) tile.keys = length_;
  }

  __device__ __forceinline__ int begin() const { return begin_; }    // first key, in the packed tensor
  __device__ __forceinline__ int length() const { return length_; }  // keys from there on

 private:
  // The first of cu_seqlens_q beyond `row`, most likely among the 32 from that of the row before on.
  __device__ __forceinline__ int seek(const Params& p, int row) const {
    const int wide = p.wide_offsets & 1, end = p.batch + 1;
    const int near = beyond_ < 0 ? 0 : min(beyond_ + 32, end);
    const int found = warp_offset_beyond(p.cu_seqlens_q, wide, max(beyond_, 0), near, row);
    return found < near ? found : warp_offset_beyond(p.cu_seqlens_q, wide, near, end, row);
  }

  KeyRange keys_[kRows / 32];
  int begin_, length_;
  int beyond_ = -1;  // the first offset beyond the last row; -1: no tile yet
};
