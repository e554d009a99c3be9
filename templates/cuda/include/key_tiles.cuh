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
  int heads;  // of keys
  int tiles;
  int first;  // tiles that are taken without the counter: one a CTA, or none where tiles wait for others
};

__device__ __forceinline__ void set_claims(Claims& claims, const BackwardParams& p) {
  claims = {static_cast<WorkListHeader*>(p.work_list), p.heads / p.gqa_ratio};
  claims.tiles = claims.list->items * claims.heads;
  claims.first = p.turns == nullptr ? gridDim.x : 0;
}

// Tile number `index` in the order of work: a sequence's heads go in groups of item.heads. A last group may have fewer.
template <int kBlockN>
__device__ __forceinline__ void claim_key_tile(Tile& tile, const Claims& claims, int index) {
  const WorkItem* item = work_items(claims.list) + index / claims.heads;
  tile.head = index % claims.heads;
  const int together = item->heads;
  if (together < claims.heads) {  // the sequence's items lie side by side
    const int blocks = (item->k_length + kBlockN - 1) / kBlockN;
    item -= item->row / kBlockN;
    index -= (item - work_items(claims.list)) * claims.heads;
    const int head = index / (blocks * together) * together;
    const int heads = min(together, claims.heads - head);
    index -= head * blocks;
    tile.head = head + index % heads;
    item += index / heads;
  }
  const int4* from = reinterpret_cast<const int4*>(item);
  reinterpret_cast<int4*>(&tile.item)[0] = from[0];
  asm volatile("" ::: "memory");  // one after the other: whoever claims has few registers
  reinterpret_cast<int4*>(&tile.item)[1] = from[1];
}

// Claims of whole tiles; TailClaims (tail_pieces.cuh) are of pieces too.
template <int kBlockN>
struct TileClaims : Claims {
  __device__ __forceinline__ int count() const { return tiles; }
  __device__ __forceinline__ bool claim(Tile& tile, int index) const {
    claim_key_tile<kBlockN>(tile, *this, index);
    return true;
  }
};

// Fills the ring of `control` with this CTA's tiles, in one lane of a warp, and calls load(item, kv head) for each. Each is
// claimed when the last queries of the one before are on their way, or a few steps sooner, as whoever loads them says by
// `loaded`; not much sooner: tiles that are neighbours in the order of work read the same from L2 only if they start together,
// and where tiles wait for others these would wait for a tile that nobody works on.
template <typename Control, typename Load>
__device__ __forceinline__ void claim_key_tiles(Control& control, Load load) {
  auto& claims = control.claims;
  RingPosition<sizeof(control.tiles) / sizeof(Tile)> at;
  RingPosition<1> loaded_at;
  for (int index = claims.first ? blockIdx.x : atomicAdd(&claims.list->next_tile, 1);;
       index = claims.first + atomicAdd(&claims.list->next_tile, 1)) {
    Tile& claimed = control.tiles[at.slot];
    control.tile.wait_empty(at);
    if (index >= claims.count()) {
      claimed.head = -1;
      control.tile.arrive_full(at);
      break;
    }
    if (!claims.claim(claimed, index)) continue;
    control.tile.arrive_full(at);
    load(claimed.item, claimed.head);
    control.loaded.wait_full(loaded_at);
    loaded_at.advance();
    at.advance();
  }
  rewind_work_list(claims.list);
}

// Likewise, where another warp loads all of the tile.
template <typename Control>
__device__ __forceinline__ void claim_key_tiles(Control& control) {
  claim_key_tiles(control, [](const WorkItem&, int) {});
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

// What load_tile will load, into L2 while its buffer is in use.
template <int kTilePanels>
__device__ __forceinline__ void prefetch_tile(const TensorMap& map, int row, int head, int begin, int length) {
#pragma unroll
  for (int panel = 0; panel < kTilePanels; ++panel) tma_prefetch_ragged(&map, 64 * panel, row, head, begin, length);
}

// A tile's mask, its blocks of queries, and the order of additions to their dQ, which `kAdders` make, each to a part of it.
template <bool kCausal, int kBlockM, int kBlockN, int kAdders>
struct KeyTiles {
  static constexpr int kKeys = kBlockN;
  static constexpr int kCounters = kAdders;  // of a tile's steps

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

  // Whether the tile has all keys of its sequence: its dQ is not added up, but written at once.
  __device__ __forceinline__ static bool has_all_keys(const WorkItem& item) { return item.k_length <= kBlockN; }

  // A tile's first block of queries is its sequence's last, which every tile visits that visits any; then one after the
  // other down to the first that sees its keys, each of them for all heads that share the kv head. So tiles that start
  // together read the same, and step k is the same block and head in all tiles of a sequence and kv head.
  __device__ __forceinline__ static int last_row(const WorkItem& item) { return (item.q_length - 1) / kBlockM * kBlockM; }

  // Calls work(head, first row) for each step.
  template <typename Work>
  __device__ __forceinline__ static void for_each_block(const BackwardParams& p, const WorkItem& item, int kv_head, Work work) {
    const int end = (kv_head + 1) * p.gqa_ratio;
    int head = end - p.gqa_ratio, row = last_row(item);
#pragma unroll 1
    for (int left = item.q_blocks * p.gqa_ratio; left > 0; --left) {
      work(head, row);
      if (++head == end) {
        head -= p.gqa_ratio;
        row -= kBlockM;
      }
    }
  }

  // Where additions have an order, the key blocks of a sequence add to a block's dQ one after the other; else, where they are
  // bulk copies, all after the first one, which stores instead: sums need no zeros. A tile says how many steps it has added,
  // each of its adders for itself, and goes no further than the tile that it follows has come.
  // It does not wait for ever: tiles are claimed from a counter, in the order of the list; each CTA works off its claims in
  // that order; and the key blocks before a tile's come before it in the list. So what the first of the tiles that are not done
  // waits for is done, and a tile that is done has told of all its steps.
  __device__ __forceinline__ static int* turn(const BackwardParams& p, const WorkItem& item, int kv_head, int adder) {
    return p.turns + (static_cast<long long>(kv_head) * p.max_items + item.turn) * kAdders + adder;
  }

  __device__ __forceinline__ static void await_turn(const BackwardParams& p, const WorkItem& item, int head, int row,
                                                    int adder) {
    if (item.row == 0) return;
    const int kv_head = head / p.gqa_ratio;
    const int step = (last_row(item) - row) / kBlockM * p.gqa_ratio + head - kv_head * p.gqa_ratio;
    const int* before = turn(p, item, kv_head, adder) - kAdders;
    while (load_acquire(before) <= step) {}
  }

  // What the warpgroup of this thread added before its last barrier is there before the step counts. `steps`: how far it is
  // from this adder's step to its next one.
  __device__ __forceinline__ static void pass_turn(const BackwardParams& p, const WorkItem& item, int head, int adder,
                                                   int steps = 1) {
    add_release(turn(p, item, head / p.gqa_ratio, adder), steps);
  }
};

// The turns of one thread that stores or adds all of a tile's dQ by bulk copies. To say that an addition is complete takes
// about as long as a step: it is said of several at once when there is nothing to add, or before waiting. In shared memory, as
// claims.
struct BulkTurns {
  static constexpr int kMostUnknown = 4;

  int* own;      // counts the tile's steps
  int distance;  // to the counter of the tile that it follows
  bool told;     // whether others follow
  int before;    // steps that the tile it follows is known to have added
  int added;     // steps that this one has stored or added ...
  int passed;    // ... and those of them that others know of

  template <typename KeyTile>
  __device__ __forceinline__ void begin(const BackwardParams& p, const WorkItem& item, int kv_head) {
    static_assert(KeyTile::kCounters == 1);
    own = KeyTile::turn(p, item, kv_head, 0);
    distance = p.in_order ? 1 : item.row / KeyTile::kKeys;
    told = p.in_order || item.row == 0;
    before = item.row == 0 ? 0x7fffffff : 0;
    added = passed = 0;
  }

  // `ready`: the next addition could be made at once.
  __device__ __forceinline__ void await(bool ready) {
    const bool unknown = before <= added;
    if (unknown) before = load_acquire(own - distance);
    if (before <= added || !ready || added - passed == kMostUnknown) pass();
    while (before <= added) before = load_acquire(own - distance);
    if (unknown) fence_async_proxy_global();  // this one's copies come after the other's
    ++added;
  }

  __device__ __forceinline__ void pass() {
    if (passed == added || !told) return;
    tma_store_wait();
    add_release(own, added - passed);
    passed = added;
  }
};

// Numbers of a tile's dQ to their sums: the first tile's are stored, the others' added.
__device__ __forceinline__ void put_sums(float* sums, uint32_t from, uint32_t bytes, const WorkItem& item) {
  if (item.row == 0) {
    bulk_store(sums, from, bytes);
  } else {
    bulk_add(sums, from, bytes);
  }
}
