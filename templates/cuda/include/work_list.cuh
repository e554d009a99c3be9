// The device-built work list: an item is a block of rows of a sequence (queries in a forward, keys in a backward), a tile is
// an item and a head. In a forward most heads are worked off one after the other, sequence by sequence: what runs at a time
// shares what it visits, which stays in L2. The last heads go together, dearest items first, so that no long tile is left to
// end alone. key_blocks.cuh has the backward's order.
#pragma once
#include <cstdint>

#include "cuda/include/offsets.cuh"
#include "cuda/include/pipeline.cuh"

struct alignas(16) WorkItem {  // 32 bytes, read as two int4
  int q_begin;     // first query token of the sequence in the packed tensor
  int q_length;
  int k_begin;
  int k_length;
  int row;         // first row of the block, within the sequence
  union {
    int kv_blocks;  // of queries: key blocks that the block visits (0: no visible key)
    int q_blocks;   // of keys: query blocks in which some row sees one of them
  };
  union {
    int heads;        // of keys: kv heads of the sequence whose tiles go side by side (key_blocks.cuh)
    int first_block;  // of queries, where keys are split (split_work_list.cuh): the item's piece of them begins here
  };
  union {
    int turn;   // of keys: a number below max_items; key blocks of a sequence have consecutive ones
    int piece;  // of queries, where keys are split: which piece it is, packed
  };
};

struct alignas(16) Tile {
  WorkItem item;
  int head;  // -1: no work left
};

struct alignas(64) WorkListHeader {
  int items;
  int longest;        // of queries: blocks that the longest item visits
  float total;        // ... all items
  int next_tile;      // tiles claimed from the counter
  int finished_ctas;  // the last one to finish rewinds the counters for the next launch
};

// Dearest first, then, from max_items on, sequence by sequence and the dearest of each first.
__device__ __forceinline__ WorkItem* work_items(void* work_list) {
  return reinterpret_cast<WorkItem*>(static_cast<char*>(work_list) + sizeof(WorkListHeader));
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

// Heads that go together at the end: enough that every CTA has `shares` times the work of the longest tile before it. `P`
// has the heads, how many of them share what they visit (gqa_ratio), and the list's capacity (max_items).
template <typename P>
__device__ __forceinline__ int balancing_heads(const WorkListHeader& list, const P& p, float shares = 2.0f) {
  const float needed = shares * list.longest * gridDim.x / fmaxf(list.total, 1.0f);
  const int heads = static_cast<int>(fminf(needed, p.heads)) + p.gqa_ratio;
  return min(heads - heads % p.gqa_ratio, p.heads);
}

// Tile number `index` in the order of work.
template <typename P>
__device__ __forceinline__ void claim_tile(Tile& tile, WorkListHeader* list, const P& p, int balancing, uint32_t index) {
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
  asm volatile("" ::: "memory");  // one after the other: whoever claims has few registers
  reinterpret_cast<int4*>(&tile.item)[1] = from[1];
}

// Runs `load` on every tile of this CTA, in one lane of a loading warp or in all of them, each of which hands the tile back.
// `Control` has the tiles and their ring.
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
__device__ __forceinline__ int work_bucket(int cost) {
  const int bits = __float_as_int(static_cast<float>(cost + 1)) >> 19;
  return kWorkBuckets - 1 - min(bits - (127 << 4), kWorkBuckets - 1);
}

// The smallest cost of a bucket.
__device__ __forceinline__ float bucket_cost(int bucket) {
  return __int_as_float((kWorkBuckets - 1 - bucket + (127 << 4)) << 19) - 1.0f;
}

// The sequence that block number `tile` belongs to: first_tile[found] <= tile < first_tile[found + 1].
__device__ __forceinline__ int sequence_of(const int* first_tile, int batch, int tile) {
  int low = 0, high = batch;
  while (high - low > 1) {
    const int middle = (low + high) >> 1;
    (first_tile[middle] <= tile ? low : high) = middle;
  }
  return low;
}

// Blocks of all sequences; the number of the first of each goes to `first_tile`. All 1024 threads.
template <typename Blocks>
__device__ __forceinline__ int count_tiles(const Blocks& blocks, int* first_tile, int* warp_sums) {
  int tiles = 0;
  for (int base = 0; base < blocks.p.batch; base += 1024) {
    const int seq = base + threadIdx.x;
    int prefix;
    const int found = block_exclusive_scan(seq < blocks.p.batch ? blocks.count(seq) : 0, prefix, warp_sums);
    if (seq < blocks.p.batch) first_tile[seq] = tiles + prefix;
    tiles += found;
  }
  return tiles;
}

// The next place in a bucket, in the order of lanes, for each of these lanes of the warp.
__device__ __forceinline__ int place_in_bucket(int* bucket_begin, int bucket, unsigned lanes) {
  const unsigned peers = __match_any_sync(lanes, bucket);
  const int leader = __ffs(peers) - 1, lane = threadIdx.x & 31;
  int position = 0;
  if (lane == leader) position = atomicAdd(&bucket_begin[bucket], __popc(peers));
  return __shfl_sync(peers, position, leader) + __popc(peers & ((1u << lane) - 1));
}

// One CTA of 1024 threads, any batch size: count, counting sort by cost, write. `Blocks` has the parameters `p`, and says
// how many blocks a sequence has, what one of them is and costs.
template <typename Blocks>
__device__ __forceinline__ void build_work_list(const Blocks& blocks) {
  const auto& p = blocks.p;
  __shared__ int warp_sums[32];
  __shared__ int bucket_begin[kWorkBuckets];
  __shared__ int longest;
  __shared__ unsigned long long total;
  WorkListHeader* header = static_cast<WorkListHeader*>(p.work_list);
  WorkItem* items = work_items(p.work_list);
  WorkItem* items_by_sequence = items + p.max_items;
  int* first_tile = reinterpret_cast<int*>(items + 2 * p.max_items);

  const int tiles = min(count_tiles(blocks, first_tile, warp_sums), p.max_items);
  if (threadIdx.x < kWorkBuckets) bucket_begin[threadIdx.x] = 0;
  if (threadIdx.x == 0) {
    longest = 0;
    total = 0;
  }
  __syncthreads();

  int own_longest = 0;
  unsigned long long own_total = 0;
  for (int tile = threadIdx.x; tile < tiles; tile += 1024) {
    const int seq = sequence_of(first_tile, p.batch, tile);
    const int cost = blocks.cost(blocks.item(seq, tile - first_tile[seq]));
    atomicAdd(&bucket_begin[work_bucket(cost)], 1);
    own_longest = max(own_longest, cost);
    own_total += cost;
  }
  atomicMax(&longest, own_longest);
  atomicAdd(&total, own_total);
  __syncthreads();
  int begin;
  block_exclusive_scan(threadIdx.x < kWorkBuckets ? bucket_begin[threadIdx.x] : 0, begin, warp_sums);
  if (threadIdx.x < kWorkBuckets) bucket_begin[threadIdx.x] = begin;
  __syncthreads();

  // Chunk by chunk and warp by warp, so that blocks of one sequence stay neighbours: they share in L2.
  for (int base = 0; base < tiles; base += 1024) {
    const int tile = base + threadIdx.x;
    const bool active = tile < tiles;
    const unsigned lanes = __ballot_sync(0xffffffff, active);
    if (active) {
      const int seq = sequence_of(first_tile, p.batch, tile), first = first_tile[seq];
      const WorkItem item = blocks.item(seq, tile - first);
      items[place_in_bucket(bucket_begin, work_bucket(blocks.cost(item)), lanes)] = item;
      const int end = min(first + blocks.count(seq), tiles);
      items_by_sequence[first + end - 1 - tile] = item;  // the last rows, which see the most keys, come first
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
