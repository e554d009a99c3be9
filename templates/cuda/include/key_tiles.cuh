// Tiles of the backward, a block of keys and a kv head each: who works on which, what is loaded of them, and the order in which
// they add to dQ.
#pragma once
#include <cstdint>

#include "cuda/include/backward_params.cuh"
#include "cuda/include/gradients.cuh"
#include "cuda/include/pipeline.cuh"
#include "cuda/include/ptx.cuh"
#include "cuda/include/work_list.cuh"

// What claims of tiles go by; in shared memory because the warps that feed have few registers.
struct Claims {
  WorkListHeader* list;
  int heads;      // of keys
  int gqa_ratio;  // of those: 1
  int max_items;
  int balancing;
  int tiles;
  int first;      // tiles that are taken without the counter: one a CTA, or none where additions have an order
};

__device__ __forceinline__ void set_claims(Claims& claims, const BackwardParams& p) {
  claims = {static_cast<WorkListHeader*>(p.work_list), p.heads / p.gqa_ratio, 1, p.max_items};
  claims.tiles = claims.list->items * claims.heads;
  claims.balancing = p.turns == nullptr ? balancing_heads(*claims.list, claims) : 0;
  claims.first = p.turns == nullptr ? gridDim.x : 0;
}

// Fills the ring of `control` with this CTA's tiles, in one lane of a warp.
template <typename Control>
__device__ __forceinline__ void claim_key_tiles(Control& control) {
  const Claims& claims = control.claims;
  RingPosition<sizeof(control.tiles) / sizeof(Tile)> at;
  for (int tile = claims.first ? blockIdx.x : atomicAdd(&claims.list->next_tile, 1);;
       tile = claims.first + atomicAdd(&claims.list->next_tile, 1), at.advance()) {
    Tile& claimed = control.tiles[at.slot];
    control.tile.wait_empty(at);
    if (tile >= claims.tiles) {
      claimed.head = -1;
      control.tile.arrive_full(at);
      break;
    }
    claim_tile(claimed, claims.list, claims, claims.balancing, tile);
    control.tile.arrive_full(at);
  }
  rewind_work_list(claims.list);
}

template <int kTilePanels, int kPanelBytes>
__device__ __forceinline__ void load_tile(uint32_t buffer, const TensorMap& map, uint64_t& full, int row, int head,
                                          int begin, int length, uint64_t hint) {
  mbarrier_expect_bytes(smem_address(&full), kTilePanels * kPanelBytes);
#pragma unroll
  for (int panel = 0; panel < kTilePanels; ++panel) {
    tma_load_ragged(buffer + panel * kPanelBytes, &map, smem_address(&full), 64 * panel, row, head, begin, length, hint);
  }
}

// A tile's mask, its blocks of queries, and its turns to add to their dQ, which `kAdders` do, each to a part of it.
template <bool kCausal, int kBlockM, int kBlockN, int kAdders>
struct KeyTiles {
  // How many keys more than queries there are before a query's last one.
  __device__ __forceinline__ static int causal_shift(const BackwardParams& p, const WorkItem& item) {
    return kCausal && p.bottom_right ? item.k_length - item.q_length : 0;
  }

  // Keys from here on see no query: they are past the sequence's end, or, where the mask is causal, past the last query's.
  __device__ __forceinline__ static int keys_seen(const WorkItem& item, int shift) {
    return kCausal ? min(item.k_length, item.q_length + shift) : item.k_length;
  }

  // The first query that sees a key.
  __device__ __forceinline__ static int first_query(const BackwardParams& p, const WorkItem& item, int key) {
    const int shift = causal_shift(p, item);
    return key >= keys_seen(item, shift) ? kNoQuery : kCausal ? key - shift : 0;
  }

  // Calls work(head, first row) for the blocks of queries that a tile visits, head by head.
  template <typename Work>
  __device__ __forceinline__ static void for_each_block(const BackwardParams& p, const WorkItem& item, int kv_head, Work work) {
    int head = kv_head * p.gqa_ratio, row = item.first_row;
#pragma unroll 1
    for (int left = item.q_blocks * p.gqa_ratio; left > 0; --left) {
      work(head, row);
      row += kBlockM;
      if (row >= item.q_length) {
        row = item.first_row;
        ++head;
      }
    }
  }

  // Where additions have an order, those to a block's dQ happen in the order in which the sequence's key blocks are in the
  // work list: the k-th waits until k have been made. It does not wait for ever. Tiles are claimed from a counter, in the order
  // of the list; each CTA works off its claims in that order; and what a tile waits for comes before it in the list. So
  // everything that the first of the tiles that are not done waits for is done.
  __device__ __forceinline__ static int turn_of(const BackwardParams& p, const WorkItem& item, int row) {
    if (!kCausal) return item.row / kBlockN;
    const int shift = causal_shift(p, item);
    const int last_key = min(keys_seen(item, shift), row + kBlockM + shift) - 1;
    return last_key / kBlockN - item.row / kBlockN;
  }

  __device__ __forceinline__ static int* turn_counter(const BackwardParams& p, const WorkItem& item, int head, int row) {
    return p.turns + static_cast<long long>(head) * p.turn_slots + item.turn + row / kBlockM;
  }

  __device__ __forceinline__ static void await_turn(const BackwardParams& p, const WorkItem& item, int head, int row) {
    const int* counter = turn_counter(p, item, head, row);
    const int before = turn_of(p, item, row) * kAdders;
    while (load_acquire(counter) < before) {}
  }

  // What this thread has added, or knows to have been added, is there before the next one's turn.
  __device__ __forceinline__ static void pass_turn(const BackwardParams& p, const WorkItem& item, int head, int row) {
    __threadfence();
    add_release(turn_counter(p, item, head, row), 1);
  }
};
