// Query heads of one kv head packed into the rows of a tile: a warpgroup's 64 rows are `tokens` tokens of the first head,
// then the same tokens of the next. Rows are left over where the heads do not divide 64.
#pragma once
#include <cstdint>

#include "cuda/include/ptx.cuh"

struct PackedRow {
  int head;   // within the pack
  int token;  // within the warpgroup's
};

constexpr int kNoToken = 255;  // of a row that is left over: more than a warpgroup has

__device__ __forceinline__ PackedRow packed_row(int row, int tokens, int heads) {
  const int head = row / tokens;
  return {head, head < heads ? row - head * tokens : kNoToken};
}

// A thread's two rows in one register, to be unpacked where they are needed: registers are short in between.
struct ThreadRows {
  uint32_t packed;

  __device__ __forceinline__ ThreadRows(const PackedRow& upper, const PackedRow& lower)
      : packed(upper.head | upper.token << 8 | lower.head << 16 | lower.token << 24) {}
  __device__ __forceinline__ PackedRow operator[](int h) const {
    const uint32_t row = computed_here(packed) >> 16 * h;
    return {static_cast<int>(row & 0xff), static_cast<int>(row >> 8 & 0xff)};
  }
};

// Rows that are left over are never loaded but are multiplied: no NaN may be in them. All threads, before any load.
__device__ __forceinline__ void clear_left_over_rows(unsigned char* q_tiles, int bytes, int heads) {
  if (64 % heads == 0) return;
  for (int at = 16 * threadIdx.x; at < bytes; at += 16 * blockDim.x) {
    *reinterpret_cast<int4*>(q_tiles + at) = make_int4(0, 0, 0, 0);
  }
  fence_async_proxy();
}
