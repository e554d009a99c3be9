// The device-built work list: an item is a block of query rows of a sequence, a tile is an item and a head. Most heads are
// worked off one after the other, sequence by sequence: what runs at a time shares few K and V, which stay in L2. The
// last heads go together, dearest items first, so that no long tile is left to end alone.
#pragma once
#include <cstdint>

#include "cuda/include/params.cuh"
#include "cuda/include/pipeline.cuh"

struct alignas(16) WorkItem {  // 32 bytes, read as two int4
  int q_begin;     // first query token of the sequence in the packed tensor
  int q_length;
  int k_begin;
  int k_length;
  int row;         // first query row of the block, within the sequence
  int kv_blocks;   // key blocks that the block visits (0: no visible key)
  int unused[2];
};

struct alignas(16) Tile {
  WorkItem item;
  int head;  // -1: no work left
};

struct alignas(64) WorkListHeader {
  int items;
  int longest;        // key blocks of the longest item
  float total;        // key blocks of all items
  int next_tile;      // claimed tiles beyond the first of each CTA
  int finished_ctas;  // the last one to finish rewinds the counters for the next launch
};

// Dearest first, then, from max_items on, sequence by sequence and the dearest of each first.
__device__ __forceinline__ WorkItem* work_items(void* work_list) {
  return reinterpret_cast<WorkItem*>(static_cast<char*>(work_list) + sizeof(WorkListHeader));
}

__device__ __forceinline__ int offset_at(const void* offsets, int index, int wide) {
  return wide ? static_cast<int>(static_cast<const long long*>(offsets)[index]) : static_cast<const int*>(offsets)[index];
}

// Exclusive prefix sum over a CTA of 1024 threads; returns the total.
__device__ __forceinline__ int block_exclusive_scan(int value, int& prefix, int* warp_sums) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  int inclusive = value;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(0xffffffff, inclusive, step);
    if (lane >= step) inclusive += other;
  }
  if (lane == 31) warp_sums[warp] = inclusive;
  __syncthreads();
  if (warp == 0) {
    int sum = warp_sums[lane];
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(0xffffffff, sum, step);
      if (lane >= step) sum += other;
    }
    warp_sums[lane] = sum;
  }
  __syncthreads();
  prefix = inclusive - value + (warp ? warp_sums[warp - 1] : 0);
  const int total = warp_sums[31];
  __syncthreads();
  return total;
}

// Query heads that go together at the end: enough that every CTA has twice the work of the longest tile before it.
__device__ __forceinline__ int balancing_heads(const WorkListHeader& list, const Params& p) {
  const float needed = 2.0f * list.longest * gridDim.x / fmaxf(list.total, 1.0f);
  const int heads = static_cast<int>(fminf(needed, p.heads)) + p.gqa_ratio;
  return min(heads - heads % p.gqa_ratio, p.heads);
}

// Tile number `index` in the order of work.
__device__ __forceinline__ void claim_tile(Tile& tile, WorkListHeader* list, const Params& p, int balancing,
                                           uint32_t index) {
  const WorkItem* items = work_items(list);
  const uint32_t count = list->items, front = (p.heads - balancing) * count;
  uint32_t head = 0, together = p.gqa_ratio;  // heads side by side: those of a kv head at least
  if (index < front) {
    items += p.max_items;
  } else {
    head = p.heads - balancing;
    together = balancing;
    index -= front;
  }
  const uint32_t place = index / together;
  tile.head = head + place / count * together + index % together;
  const int4* from = reinterpret_cast<const int4*>(items + place % count);
  reinterpret_cast<int4*>(&tile.item)[0] = from[0];
  reinterpret_cast<int4*>(&tile.item)[1] = from[1];
}

// Runs `load` on every tile of this CTA, in one lane of a loading warp. `Control` has the tiles and their ring.
template <typename Control, typename Load>
__device__ __forceinline__ void for_each_tile(Control& control, Load load) {
  for (RingPosition<sizeof(control.tiles) / sizeof(Tile)> at;; at.advance()) {
    control.tile.wait_full(at);
    const Tile& tile = control.tiles[at.slot];
    if (tile.head < 0) break;
    load(tile.item, tile.head);
    control.tile.arrive_empty(at);
  }
}

// Once per CTA, after its last claim: the last CTA makes the list ready for the next launch.
__device__ __forceinline__ void rewind_work_list(WorkListHeader* list) {
  __threadfence();
  if (atomicAdd(&list->finished_ctas, 1) == static_cast<int>(gridDim.x) - 1) {
    list->next_tile = 0;
    list->finished_ctas = 0;
  }
}

constexpr int kWorkBuckets = 512;

// Costs fall into buckets of at most 1/16 relative width (float exponent and four mantissa bits), dearest first.
__device__ __forceinline__ int work_bucket(int kv_blocks) {
  const int bits = __float_as_int(static_cast<float>(kv_blocks + 1)) >> 19;
  return kWorkBuckets - 1 - min(bits - (127 << 4), kWorkBuckets - 1);
}

// The block of query rows number `tile` in sequence order.
__device__ __forceinline__ WorkItem work_item(const Params& p, const int* first_tile, int tile) {
  int low = 0, high = p.batch;  // first_tile[low] <= tile < first_tile[high]
  while (high - low > 1) {
    const int middle = (low + high) >> 1;
    (first_tile[middle] <= tile ? low : high) = middle;
  }
  WorkItem item = {};
  item.q_begin = offset_at(p.cu_seqlens_q, low, p.wide_offsets & 1);
  item.q_length = offset_at(p.cu_seqlens_q, low + 1, p.wide_offsets & 1) - item.q_begin;
  item.k_begin = offset_at(p.cu_seqlens_k, low, p.wide_offsets & 2);
  item.k_length = offset_at(p.cu_seqlens_k, low + 1, p.wide_offsets & 2) - item.k_begin;
  item.row = (tile - first_tile[low]) * p.block_m;
  int visible = item.k_length;
  if (p.causal) {
    const int last_row = min(item.row + p.block_m, item.q_length) - 1;
    const int shift = p.bottom_right ? item.k_length - item.q_length : 0;
    visible = min(visible, max(last_row + shift + 1, 0));
  }
  item.kv_blocks = (visible + p.block_n - 1) / p.block_n;
  return item;
}

// One CTA of 1024 threads, any batch size: count, counting sort by cost, write.
extern "C" __global__ void __launch_bounds__(1024, 1) jagtile_build_work_list(const __grid_constant__ Params p) {
  __shared__ int warp_sums[32];
  __shared__ int bucket_begin[kWorkBuckets];
  __shared__ int longest;
  __shared__ unsigned long long total;
  WorkListHeader* header = static_cast<WorkListHeader*>(p.work_list);
  WorkItem* items = work_items(p.work_list);
  WorkItem* items_by_sequence = items + p.max_items;
  int* first_tile = reinterpret_cast<int*>(items + 2 * p.max_items);

  int tiles = 0;
  for (int base = 0; base < p.batch; base += 1024) {
    const int seq = base + threadIdx.x;
    int blocks = 0;
    if (seq < p.batch) {
      const int length =
          offset_at(p.cu_seqlens_q, seq + 1, p.wide_offsets & 1) - offset_at(p.cu_seqlens_q, seq, p.wide_offsets & 1);
      blocks = (max(length, 0) + p.block_m - 1) / p.block_m;
    }
    int prefix;
    const int found = block_exclusive_scan(blocks, prefix, warp_sums);
    if (seq < p.batch) first_tile[seq] = tiles + prefix;
    tiles += found;
  }
  tiles = min(tiles, p.max_items);
  if (threadIdx.x < kWorkBuckets) bucket_begin[threadIdx.x] = 0;
  if (threadIdx.x == 0) {
    longest = 0;
    total = 0;
  }
  __syncthreads();

  int own_longest = 0;
  unsigned long long own_total = 0;
  for (int tile = threadIdx.x; tile < tiles; tile += 1024) {
    const int kv_blocks = work_item(p, first_tile, tile).kv_blocks;
    atomicAdd(&bucket_begin[work_bucket(kv_blocks)], 1);
    own_longest = max(own_longest, kv_blocks);
    own_total += kv_blocks;
  }
  atomicMax(&longest, own_longest);
  atomicAdd(&total, own_total);
  __syncthreads();
  int begin;
  block_exclusive_scan(threadIdx.x < kWorkBuckets ? bucket_begin[threadIdx.x] : 0, begin, warp_sums);
  if (threadIdx.x < kWorkBuckets) bucket_begin[threadIdx.x] = begin;
  __syncthreads();

  // Chunk by chunk and warp by warp, so that blocks of one sequence stay neighbours: they share K and V in L2.
  for (int base = 0; base < tiles; base += 1024) {
    const int tile = base + threadIdx.x;
    const bool active = tile < tiles;
    const unsigned lanes = __ballot_sync(0xffffffff, active);
    if (active) {
      const WorkItem item = work_item(p, first_tile, tile);
      const int bucket = work_bucket(item.kv_blocks);
      const unsigned peers = __match_any_sync(lanes, bucket);
      const int leader = __ffs(peers) - 1, lane = threadIdx.x & 31;
      int position = 0;
      if (lane == leader) position = atomicAdd(&bucket_begin[bucket], __popc(peers));
      position = __shfl_sync(peers, position, leader) + __popc(peers & ((1u << lane) - 1));
      items[position] = item;
      const int first = tile - item.row / p.block_m;
      const int end = min(first + (item.q_length + p.block_m - 1) / p.block_m, tiles);
      items_by_sequence[first + end - 1 - tile] = item;
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    header->items = tiles;
    header->longest = longest;
    header->total = static_cast<float>(total);
    header->next_tile = 0;
    header->finished_ctas = 0;
  }
}
