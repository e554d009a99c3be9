// How long a warpgroup has something to multiply.
#pragma once

#include "cuda/include/backward_params.cuh"
#include "cuda/include/work_list.cuh"

// How many of a tile's steps have queries that see a key: its first ones, as they go from the sequence's end to its begin.
template <typename KeyTile, int kBlockM>
__device__ __forceinline__ int steps_seen(const BackwardParams& p, const WorkItem& item, int key) {
  const int first = max(KeyTile::first_query(p, item, key), 0);
  return first < item.q_length ? (KeyTile::last_row(item) / kBlockM - first / kBlockM + 1) * p.gqa_ratio : 0;
}
