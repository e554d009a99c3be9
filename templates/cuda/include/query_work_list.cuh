// The forward's work list: blocks of query rows, each with all key blocks that it visits.
#pragma once

#include "cuda/include/query_blocks.cuh"
#include "cuda/include/work_list.cuh"

// All CTAs of a list: count, counting sort by cost, write.
template <int kCtas>
__device__ __forceinline__ void build_query_list(const Params& p) {
  using Builder = ListBuilder<kCtas, kWorkBuckets, QueryBlocks>;
  __shared__ typename Builder::Memory memory;
  WorkItem* items = work_items(p.work_list);
  const QueryBlocks blocks{p};
  Builder builder(blocks, memory);

  Totals before;
  int own_most;
  const Totals all = count_query_blocks(builder, p.max_items, before, own_most,
                                        [](const WorkItem& item) { return work_bucket(item.kv_blocks); });
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    *static_cast<WorkListHeader*>(p.work_list) = {all.items, all.longest, static_cast<float>(all.cost()),
                                                  go_heads_together(all.items, p.batch, p.causal)};
  }
  builder.begin_buckets(work_bucket(all.longest));
  builder.leave();
  __syncthreads();

  WorkItem* items_by_sequence = items + p.max_items + before.items;  // of this CTA
  builder.for_each_tile([&](int before_chunk, int tile) {
    const bool active = tile < builder.tiles && before_chunk + tile < own_most;
    WorkItem item = {};
    if (active) item = query_item(builder, tile);
    const int place = place_in_bucket(memory.begins, active ? work_bucket(item.kv_blocks) : -1);
    if (active) {
      items[place] = item;
      // Of a sequence the last rows, which see the most keys, come first.
      const int* first_tile = &memory.chunk.first_tile[builder.owner(tile)];
      const int end = min(first_tile[1], own_most - before_chunk);
      items_by_sequence[before_chunk + first_tile[0] + end - 1 - tile] = item;
    }
    __syncthreads();  // blocks of one sequence stay neighbours: they share in L2
  });
  builder.await_leave();
}

extern "C" __global__ void __launch_bounds__(kBuilderThreads, 1)
jagtile_build_work_list(const __grid_constant__ Params p) {
  build_query_list<1>(p);
}

extern "C" __global__ void __cluster_dims__(kClusterCtas) __launch_bounds__(kBuilderThreads, 1)
jagtile_build_work_list_cluster(const __grid_constant__ Params p) {
  build_query_list<kClusterCtas>(p);
}
