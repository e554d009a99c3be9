// The device-built work list: an item is a block of rows of a sequence (queries in a forward, keys in a backward), a tile is
// an item and a head. In a forward most heads are worked off one after the other, sequence by sequence: what runs at a time
// shares what it visits, which stays in L2. The last heads go together, dearest items first, so that no long tile is left to
// end alone. Where sequences have a block or two, which share little, all heads go together: a token's heads are neighbours in
// memory.
// key_blocks.cuh has the backward's order, list_builder.cuh what all builders share.
#pragma once
#include <cstdint>

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
  int heads_together;  // of queries: whether a sequence has two blocks at most, on average
  int next_tile;      // tiles claimed from the counter
  int finished_ctas;  // the last one to finish rewinds the counters for the next launch
};

// Dearest first, then, from max_items on, sequence by sequence and the dearest of each first, unless all heads go together.
__device__ __forceinline__ WorkItem* work_items(void* work_list) {
  return reinterpret_cast<WorkItem*>(static_cast<char*>(work_list) + sizeof(WorkListHeader));
}

// Heads that go together at the end: enough that every CTA has the longest tile's work before it, and no more, since their
// keys are in flight all at once. `P` has the heads, how many of them share what they visit (gqa_ratio), and the list's
// capacity (max_items).
template <typename P>
__device__ __forceinline__ int balancing_heads(const WorkListHeader& list, const P& p) {
  if (list.heads_together) return p.heads;
  const float needed = static_cast<float>(list.longest) * gridDim.x / fmaxf(list.total, 1.0f);
  const int heads = static_cast<int>(fminf(needed, p.heads)) + p.gqa_ratio;
  return min(heads - heads % p.gqa_ratio, p.heads);
}

// Of a list of so many blocks of rows.
__device__ __forceinline__ int go_heads_together(int row_blocks, int batch) { return row_blocks <= 2 * batch; }

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
