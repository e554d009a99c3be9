// Online softmax where each row sees a range of a block's keys. 16 columns at a time: those that no row of the warp sees
// are left out, those that every row sees whole are not masked. The accumulators' layout: softmax.cuh.
#pragma once
#include <cmath>
#include <cstdint>

#include "cuda/include/fragments.cuh"
#include "cuda/include/packed_tile.cuh"
#include "cuda/include/ptx.cuh"
#include "cuda/include/softmax.cuh"

// Scores become packed probabilities relative to the rows' new maxima, zeros where a row does not see the key; earlier
// results must be multiplied by `rescale`. `seen` counts from the block's first key.
template <Pack kPack, int kSteps>
__device__ __forceinline__ void range_softmax(float (&scores)[8 * kSteps], uint32_t (&probabilities)[kSteps][4],
                                              const RowRange (&seen)[2], RowState& rows, float (&rescale)[2],
                                              float scale_log2) {
  const WarpColumns columns(seen);
  const int thread_column = threadIdx.x % 4 * 2;
  const RowRange own[2] = {seen[0].from(thread_column), seen[1].from(thread_column)};
  float maximum[2] = {rows.reference[0], rows.reference[1]};
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    if (columns.unseen(16 * step)) continue;
    if (!columns.seen_whole(16 * step)) {
#pragma unroll
      for (int i = 8 * step; i < 8 * step + 8; ++i) {
        if (!own[(i >> 1) & 1].holds(8 * (i >> 2) + (i & 1))) scores[i] = -INFINITY;
      }
    }
#pragma unroll
    for (int i = 8 * step; i < 8 * step + 8; ++i) maximum[(i >> 1) & 1] = fmaxf(maximum[(i >> 1) & 1], scores[i]);
  }
  float offset[2], sum[2] = {};
#pragma unroll
  for (int h = 0; h < 2; ++h) offset[h] = take_maximum<0>(rows.reference[h], maximum[h], rescale[h], scale_log2);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    if (columns.unseen(16 * step)) {
#pragma unroll
      for (int i = 0; i < 4; ++i) probabilities[step][i] = 0;
      continue;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float& first = scores[8 * step + 2 * i];
      float& second = scores[8 * step + 2 * i + 1];
      first = exp2_approx(fmaf(first, scale_log2, -offset[i % 2]));
      second = exp2_approx(fmaf(second, scale_log2, -offset[i % 2]));
      sum[i % 2] += first + second;
      probabilities[step][i] = kPack(first, second);
    }
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) rows.sum[h] = fmaf(rows.sum[h], rescale[h], sum[h]);
}
