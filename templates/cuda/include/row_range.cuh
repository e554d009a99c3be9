// Some rows of a tensor that follow each other: those of keys that a row of queries sees, for one.
#pragma once

struct alignas(8) RowRange {
  int begin;
  int end;  // not after `begin`: none

  __device__ __forceinline__ RowRange from(int row) const { return {begin - row, end - row}; }
  __device__ __forceinline__ bool holds(int row) const { return row >= begin && row < end; }
};
