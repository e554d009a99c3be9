// The forward's work list: blocks of query rows, each with all key blocks that it visits.
#pragma once

#include "cuda/include/query_blocks.cuh"
#include "cuda/include/work_list.cuh"

// All CTAs of a list: count, counting sort by cost, write.
template <int kCtas>
__device__ __forceinline__ void build_query_list(const Params& p) {
  using Builder = ListBuilder<kCtas, kWorkBuckets, QueryBlocks<>>;
  __shared__ typename Builder::Memory memory;
  Builder builder(p, memory, [] {});
  WorkItem* items = work_items(p.work_list);

  Totals before;
  int own_most;
  WorkItem first = {};
  const Totals all = count_query_blocks(builder, p.max_items, before, own_most, first,
                                        [](const WorkItem& item) { return work_bucket(item.kv_blocks); },
                                        [](const WorkItem&) { return false; });
  const int together = go_heads_together(all.items, p.batch, p.causal_rows > 0);
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    *static_cast<WorkListHeader*>(p.work_list) = {all.items, all.longest, static_cast<float>(all.cost()), together};
  }
  builder.begin_buckets(work_bucket(all.longest), false, [](int, int) {});
  builder.leave();
  __syncthreads();

  WorkItem* items_by_sequence = items + p.max_items + before.items;  // of this CTA
  builder.for_each_tile([&](int before_chunk, int tile) {
    builder.begin_round(tile);
    const int number = before_chunk + tile;
    const bool active = tile < builder.tiles && number < own_most;
    WorkItem item = first;
    if (active && number != threadIdx.x) item = query_item(builder, tile);
    const int place = place_in_bucket(memory.begins, active ? work_bucket(item.kv_blocks) : -1);
    store_items(items, active ? place : -1, item);
    if (together == kDearestFirst) return;
    int by_sequence = -1;
    if (active) {
      // Of a sequence the last rows, which see the most keys, come first.
      const int* first_tile = &memory.chunk.first_tile[builder.owner(tile)];
      const int end = min(first_tile[1], own_most - before_chunk);
      by_sequence = before_chunk + first_tile[0] + end - 1 - tile;
    }
    store_items(items_by_sequence, by_sequence, item);
  });
  builder.await_leave();
}

extern "C" __global__ void __launch_bounds__(kAloneThreads, 1)
jagtile_build_work_list(const __grid_constant__ Params p) {
  build_query_list<1>(p);
}

extern "C" __global__ void __cluster_dims__(kClusterCtas) __launch_bounds__(kClusterThreads, 1)
jagtile_build_work_list_cluster(const __grid_constant__ Params p) {
  build_query_list<kClusterCtas>(p);
}
