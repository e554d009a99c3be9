// The device-built work list: an item is a block of rows of a sequence (queries in a forward, keys in a backward), a tile is
// an item and a head. In a forward most heads are worked off one after the other, sequence by sequence: what runs at a time
// shares what it visits, which stays in L2. The last heads go together, dearest items first, so that no long tile is left to
// end alone. Where sequences have a block or two, which share little, all heads go together: a token's heads are neighbours in
// memory; dearest items first, unless that takes a sequence's blocks apart.
// key_blocks.cuh has the backward's order, list_builder.cuh what all builders share.
#pragma once
#include <cstdint>

#include "cuda/include/pipeline.cuh"

struct alignas(16) WorkItem {  // 32 bytes, read as two int4
  int q_begin;     // first query token of the sequence in the packed tensor
  int q_length;
  int k_begin;
  int k_length;
  int row;         // first row of the block, within the sequence; of causal queries it may come before the sequence's first
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
    int piece;  // of queries, where keys are split: which piece it is, packed (Piece); negative: several sequences (SequencePack)
  };
};

struct alignas(16) Tile {
  WorkItem item;
  int head;  // -1: no work left
};

enum HeadsTogether { kNotTogether, kDearestFirst, kBySequence };

struct alignas(64) WorkListHeader {
  int items;
  int longest;        // of queries: blocks that the longest item visits
  float total;        // ... all items
  int heads_together;  // of queries: whether heads go together, and in which order of items (HeadsTogether)
  int next_tile;      // tiles claimed from the counter
  int finished_ctas;  // the last one to finish rewinds the counters for the next launch
};

// Dearest first, then, from max_items on, sequence by sequence and the dearest of each first, unless kDearestFirst.
__device__ __forceinline__ WorkItem* work_items(void* work_list) {
  return reinterpret_cast<WorkItem*>(static_cast<char*>(work_list) + sizeof(WorkListHeader));
}

// Heads that go together, dearest items first: the last ones, enough that every CTA has the longest tile's work before it, and
// no more, since their keys are in flight all at once. 0: all go together, sequence by sequence, which the longest tile, at
// most 1/8 of a CTA's work, can't hold up much. `P` has the heads, how many of them share what they visit (gqa_ratio), and
// the list's capacity (max_items).
template <typename P>
__device__ __forceinline__ int balancing_heads(const WorkListHeader& list, const P& p) {
  const float needed = static_cast<float>(list.longest) * gridDim.x / fmaxf(list.total, 1.0f);
  if (list.heads_together != kNotTogether) {
    return list.heads_together == kBySequence && 8.0f * needed <= p.heads ? 0 : p.heads;
  }
  const int heads = static_cast<int>(fminf(needed, p.heads)) + p.gqa_ratio;
  return min(heads - heads % p.gqa_ratio, p.heads);
}

// How heads go together in a list of so many blocks of rows. Causal blocks of a sequence are unequally dear: in the order of cost
// the second would read again from memory what was in L2 for the first.
__device__ __forceinline__ int go_heads_together(int row_blocks, int batch, bool causal) {
  if (row_blocks > 2 * batch) return kNotTogether;
  return causal && 2 * row_blocks > 3 * batch ? kBySequence : kDearestFirst;
}

// Tile number `index` in the order of work; false, and a tile without a head, if there is none.
template <typename P>
__device__ __forceinline__ bool claim_tile(Tile& tile, WorkListHeader* list, const P& p, int balancing, uint32_t index) {
  const uint32_t count = list->items;
  if (index >= count * p.heads) {
    tile.head = -1;
    return false;
  }
  const uint32_t front = (p.heads - balancing) * count;
  uint32_t item = 0, head = 0, together;  // heads side by side
  if (index < front) {
    item = p.max_items;
    together = balancing ? p.gqa_ratio : p.heads;  // those of a kv head at least
  } else {
    head = p.heads - balancing;
    together = balancing;
    index -= front;
  }
  const uint32_t place = index / together, round = place / count;
  tile.head = head + round * together + index - place * together;
  item += place - round * count;
  const int4* from = reinterpret_cast<const int4*>(work_items(list) + item);
  reinterpret_cast<int4*>(&tile.item)[0] = from[0];
  asm volatile("" ::: "memory");  // one after the other: whoever claims has few registers
  reinterpret_cast<int4*>(&tile.item)[1] = from[1];
  return true;
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
