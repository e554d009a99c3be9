// Tiles of consecutive rows of the packed queries, whichever sequences these belong to. Each row has its own range of
// keys; a tile's keys reach from its first row's first to its last row's last. Needs no work list: which sequences a tile
// begins and ends in is searched for in the offsets. Tiles of keys, which queries see, are the same (packed_gradients.cuh).
#pragma once
#include "cuda/include/offsets.cuh"
#include "cuda/include/row_range.cuh"

template <int kRows>
struct alignas(16) PackedTile {
  RowRange rows[kRows];  // from the tile's first key on; neither begins nor ends ever fall from row to row
  int length;            // keys of all rows together
};

// What the two rows of a math thread see, from a block's first key on.
struct ThreadRows {
  RowRange seen[2];

  template <int kRows>
  __device__ __forceinline__ ThreadRows(const PackedTile<kRows>& tile, int first_key) {
    const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
    seen[0] = tile.rows[row].from(first_key);
    seen[1] = tile.rows[row + 8].from(first_key);
  }
};

// What a warp's rows see of a block, in columns; the same in all lanes, and known to be.
struct WarpColumns {
  RowRange of_any;   // all that some row sees lies in this range
  RowRange of_each;  // every row sees all of this one

  __device__ __forceinline__ explicit WarpColumns(const RowRange (&seen)[2])
      : of_any{__reduce_min_sync(0xffffffff, min(seen[0].begin, seen[1].begin)),
               __reduce_max_sync(0xffffffff, max(seen[0].end, seen[1].end))},
        of_each{__reduce_max_sync(0xffffffff, max(seen[0].begin, seen[1].begin)),
                __reduce_min_sync(0xffffffff, min(seen[0].end, seen[1].end))} {}

  __device__ __forceinline__ bool unseen(int column) const {
    return column + 16 <= of_any.begin || column >= of_any.end;
  }
  __device__ __forceinline__ bool seen_whole(int column) const {
    return column >= of_each.begin && column + 16 <= of_each.end;
  }
};

// Pairs of a tile and a head, in order of tiles, are dealt out in runs: a CTA's pairs share few tiles.
struct PairRange {
  int begin;
  int end;
};

// Some CTAs have one pair more than others: the first ones, or the last ones.
template <bool kLastHaveMore = false>
__device__ __forceinline__ PairRange pairs_of_cta(int pairs) {
  const int each = pairs / gridDim.x, longer = pairs % gridDim.x;
  const int cta = blockIdx.x, equal = gridDim.x - longer;
  const int begin = cta * each + (kLastHaveMore ? max(cta - equal, 0) : min(cta, longer));
  return {begin, begin + each + (kLastHaveMore ? cta >= equal : cta < longer)};
}

// The keys that a row sees, in the packed tensor; `beyond`: the first of cu_seqlens_q that is greater than the row.
// Rows before the first sequence and behind the last see none.
template <bool kCausal, typename P>
__device__ __forceinline__ RowRange visible_keys(const P& p, int row, int beyond) {
  const int sequence = min(max(beyond - 1, 0), p.batch - 1);
  RowRange keys = {offset_at(p.cu_seqlens_k, sequence, p.wide_offsets & 2),
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

// Tiles of queries: which offsets their rows are found in, how many rows there are, what a row sees.
template <bool kCausal>
struct QueryRows {
  template <typename P>
  __device__ __forceinline__ static const void* offsets(const P& p) { return p.cu_seqlens_q; }
  template <typename P>
  __device__ __forceinline__ static int wide(const P& p) { return p.wide_offsets & 1; }
  template <typename P>
  __device__ __forceinline__ static int count(const P& p) { return p.total_q; }
  template <typename P>
  __device__ __forceinline__ static RowRange seen(const P& p, int row, int beyond) {
    return visible_keys<kCausal>(p, row, beyond);
  }
};

// What a warp knows of the tile that it loads: each lane has the keys of every 32nd row.
template <int kRows, typename Rows>
class TileFinder {
 public:
  // Called with tiles in order.
  template <typename P>
  __device__ __forceinline__ void find(const P& p, int tile) {
    const int lane = threadIdx.x % 32;
    const int last_row = min((tile + 1) * kRows, Rows::count(p)) - 1;
    const int first = beyond_ = seek(p, tile * kRows);
    beyond_ = seek(p, last_row);
#pragma unroll
    for (int i = 0; i < kRows / 32; ++i) {
      const int row = min(tile * kRows + 32 * i + lane, last_row);
      seen_[i] = Rows::seen(p, row, offset_beyond(Rows::offsets(p), Rows::wide(p), first, beyond_, row));
    }
    begin_ = __shfl_sync(0xffffffff, seen_[0].begin, 0);
    length_ = max(__shfl_sync(0xffffffff, seen_[kRows / 32 - 1].end, 31) - begin_, 0);
  }

  __device__ __forceinline__ void write(PackedTile<kRows>& tile) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kRows / 32; ++i) tile.rows[32 * i + lane] = seen_[i].from(begin_);
    if (lane == 0) tile.length = length_;
  }

  __device__ __forceinline__ int begin() const { return begin_; }    // first key, in the packed tensor
  __device__ __forceinline__ int length() const { return length_; }  // keys from there on

 private:
  // The first of the offsets beyond `row`, most likely among the 32 from that of the row before on.
  template <typename P>
  __device__ __forceinline__ int seek(const P& p, int row) const {
    const int wide = Rows::wide(p), end = p.batch + 1;
    const int near = beyond_ < 0 ? 0 : min(beyond_ + 32, end);
    const int found = warp_offset_beyond(Rows::offsets(p), wide, max(beyond_, 0), near, row);
    return found < near ? found : warp_offset_beyond(Rows::offsets(p), wide, near, end, row);
  }

  RowRange seen_[kRows / 32];
  int begin_, length_;
  int beyond_ = -1;  // the first offset beyond the last row; -1: no tile yet
};
