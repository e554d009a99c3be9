// The passes over rows (backward_rows.cuh) beside the tiles: a warpgroup of its own, or one warp, prepares rows of tiles that come
// later, and finishes those to whose dQ all has been added, while the math warps multiply: sums are mostly read while they are in
// L2. A slice has as many rows of a sequence and kv head as there are slices of it, one a tile, and goes by its tile's number in
// the order of work. The thread that claims tiles also claims slices, and copies their rows to shared memory, a unit at a time.
// What is left to finish when a math warpgroup has no more tiles it finishes itself.
//
// Who prepares is ahead of who multiplies by two slices a CTA, or by as much as it takes: a tile's delta is read when all
// slices of its sequence and kv head are prepared, and until then its CTA prepares what is next. Nothing waits for ever: to
// prepare waits for nothing, so a tile's rows become prepared; the thread that claims looks at what a slice to finish waits for
// and goes on; and a math warpgroup waits for that when every tile is claimed, by CTAs that run.
#pragma once
#include <cstdint>

#include "cuda/include/backward_params.cuh"
#include "cuda/include/backward_rows.cuh"
#include "cuda/include/key_tiles.cuh"
#include "cuda/include/pipeline.cuh"
#include "cuda/include/ptx.cuh"
#include "cuda/include/row_units.cuh"

// How far a launch has come, from BackwardParams.progress on; zeros at first.
struct Progress {
  struct Pair {  // of a sequence and a kv head
    int prepared;  // slices, counted by each warp that works on rows
    int added;     // tiles, all of them to dQ
  };
  int next_to_prepare;  // slices
  int next_to_finish;

  // Numbered by the sequence's first item.
  __device__ __forceinline__ Pair& pair(int number) { return reinterpret_cast<Pair*>(this + 1)[number]; }
};

// Rows that are in no unit yet, those of every head that shares the kv head: all heads of a block of tokens before the next.
struct alignas(16) RowSlice {
  int row, end;  // within the sequence
  int head, end_head;
  RowTask task;
  int q_begin;
  int pair;
  bool summed;  // else dQ is complete in one tile
  int tiles;    // of the pair

  __device__ __forceinline__ bool ended() const { return row >= end; }

  // The next rows, where there are any.
  __device__ __forceinline__ RowUnit unit(int tokens) const {
    const bool last = task == kPrepareRows && head + 1 == end_head && row + tokens >= end;
    return {task, head, q_begin + row, min(end - row, tokens), last ? pair : -1};
  }

  // Past them.
  __device__ __forceinline__ void advance(const BackwardParams& p, int tokens) {
    const bool last_head = head + 1 == end_head;
    head += last_head ? 1 - p.gqa_ratio : 1;
    row += last_head ? tokens : 0;
  }
};

// What one thread claims by; in shared memory, since it has few registers.
template <int kBlockN, typename Units>
struct RowTasks {
  static constexpr int kMostWarpgroups = 3;

  Progress* progress;
  Tile tile;       // that of a slice which is claimed
  RowSlice slice;  // to work on
  RowSlice to_finish;
  RowUnit units[Units::kBuffers];  // that are copied
  alignas(16) int awaited;  // slices that the last tile begun waits for, or 0
  int awaited_pair;
  int begun;     // tiles
  int prepared;  // slices claimed
  bool no_tiles, none_to_prepare, none_to_finish;  // left to claim
  // Of others, apart: what is read together with more than is wanted looks like a race.
  alignas(16) int adding;  // the pair to whose dQ the CTA adds
  uint32_t worked;         // units, where one warp works on rows
  int rest[kMostWarpgroups][2];  // slices that math warpgroups finish

  // A tile's pair, numbered by its first item.
  __device__ __forceinline__ static int pair_number(const BackwardParams& p, const WorkItem& item, int kv_head) {
    return kv_head * p.max_items + item.turn - item.row / kBlockN;  // below the limit of tiles
  }

  // How many tiles a pair has: fewer than its keys have blocks where the list was cut off.
  __device__ __forceinline__ static int pair_tiles(const Claims& claims, const WorkItem& item) {
    return min((item.k_length + kBlockN - 1) / kBlockN, claims.list->items - (item.turn - item.row / kBlockN));
  }

  // The rows that go with a tile.
  __device__ __forceinline__ static RowSlice slice_of(const BackwardParams& p, const Claims& claims, const Tile& tile,
                                                      RowTask task) {
    const WorkItem& item = tile.item;
    const int slices = pair_tiles(claims, item);
    const int each = ((item.q_length + slices - 1) / slices + Units::kTokens - 1) / Units::kTokens * Units::kTokens;
    const int first = item.row / kBlockN * each;
    RowSlice slice;
    slice.task = task;
    slice.row = max(first, -item.q_begin);  // offsets may promise more tokens than there are
    slice.end = min(min(first + each, item.q_length), p.total_q - item.q_begin);
    slice.head = tile.head * p.gqa_ratio;
    slice.end_head = slice.head + p.gqa_ratio;
    slice.q_begin = item.q_begin;
    slice.pair = pair_number(p, item, tile.head);
    slice.tiles = slices;
    slice.summed = item.k_length > kBlockN;
    return slice;
  }

  __device__ __forceinline__ void begin(const BackwardParams& p) {
    progress = reinterpret_cast<Progress*>(p.progress);
    slice.row = slice.end = to_finish.row = to_finish.end = 0;
    awaited = begun = prepared = 0;
    if constexpr (Units::kWarps == 1) worked = 0;
    no_tiles = none_to_prepare = none_to_finish = false;
  }

  // Before a tile's first addition to dQ, and when all are complete, in the thread that makes them.
  __device__ __forceinline__ void begin_adding(const BackwardParams& p, const WorkItem& item, int kv_head) {
    adding = pair_number(p, item, kv_head);
  }
  __device__ __forceinline__ void end_adding() { add_release(&progress->pair(adding).added, 1); }

  __device__ __forceinline__ void tell_prepared(int pair, int warps) { add_release(&progress->pair(pair).prepared, warps); }

  // Passes the next tile on when the last queries of the one before are on their way (as claim_key_tiles), and says when its
  // rows are prepared. Whether it waits for rows.
  template <typename Control>
  __device__ __forceinline__ bool pass_tile(const BackwardParams& p, Control& control) {
    constexpr int kSlots = sizeof(control.tiles) / sizeof(Tile);
    const auto at = RingPosition<kSlots>::after(begun);
    if (awaited == 0 && is_tile_due(control) && control.tile.is_empty(at)) {
      auto& claims = control.claims;
      Tile& next = control.tiles[at.slot];
      const int index = atomicAdd(&claims.list->next_tile, 1);
      if (index >= claims.count()) {
        no_tiles = true;
        next.head = -1;
        control.tile.arrive_full(at);
        control.prepared.arrive_full(at);
      } else if (claims.claim(next, index)) {
        awaited = Units::kWarps * pair_tiles(claims, next.item);
        awaited_pair = pair_number(p, next.item, next.head);
        control.tile.arrive_full(at);
        ++begun;
      }
    }
    if (awaited == 0) return false;
    if (load_acquire(&progress->pair(awaited_pair).prepared) < awaited) return true;
    control.prepared.arrive_full(RingPosition<kSlots>::after(begun - 1));
    awaited = 0;
    return false;
  }

  template <typename Control>
  __device__ __forceinline__ bool is_tile_due(Control& control) const {
    return !no_tiles && (begun == 0 || control.loaded.is_full(RingPosition<1>::after(begun - 1)));
  }

  // The next slice to work on, if there is one.
  __device__ __forceinline__ void find_slice(const BackwardParams& p, const Claims& claims, bool tile_waits) {
    if (!none_to_prepare && (tile_waits || prepared < begun + 2)) {
      const int index = atomicAdd(&progress->next_to_prepare, 1);
      none_to_prepare = index >= claims.tiles;
      if (!none_to_prepare) {
        claim_key_tile<kBlockN>(tile, claims, index);
        slice = slice_of(p, claims, tile, kPrepareRows);
        ++prepared;
        if (slice.ended()) tell_prepared(slice.pair, Units::kWarps);
        return;
      }
    }
    if (to_finish.ended() && !none_to_finish) {
      const int index = atomicAdd(&progress->next_to_finish, 1);
      none_to_finish = index >= claims.tiles;
      if (none_to_finish) return;
      claim_key_tile<kBlockN>(tile, claims, index);
      to_finish = slice_of(p, claims, tile, kFinishRows);
      if (!to_finish.summed) to_finish.row = to_finish.end;
    }
    if (to_finish.ended() || load_acquire(&progress->pair(to_finish.pair).added) < to_finish.tiles) return;
    fence_async_proxy_global();  // its sums are read by copies
    slice = to_finish;
    to_finish.row = to_finish.end;
  }

  __device__ __forceinline__ bool done() const { return no_tiles && slice.ended() && to_finish.ended() && none_to_finish; }
};

// The tiles of `control` for for_each_tile, each when its rows are prepared.
template <typename Control>
struct PreparedTiles {
  struct Ring {
    Control& control;
    template <typename At>
    __device__ __forceinline__ void wait_full(const At& at) {
      control.prepared.wait_full(at);
    }
    template <typename At>
    __device__ __forceinline__ void arrive_empty(const At& at) {
      control.tile.arrive_empty(at);
    }
  };

  decltype(Control::tiles)& tiles;
  Ring tile;

  __device__ __forceinline__ explicit PreparedTiles(Control& control) : tiles(control.tiles), tile{control} {}
};

// Fills the ring of `control` as claim_key_tiles does, where another warp loads all of a tile, and begins to copy units of rows
// meanwhile. One thread.
template <typename Units, typename Control>
__device__ __forceinline__ void claim_tiles_and_rows(const BackwardParams& p, Control& control, uint32_t buffers) {
  auto& rows = control.rows;
  RingPosition<Units::kBuffers> at;
  while (!rows.done()) {
    const bool tile_waits = rows.pass_tile(p, control);
    if (rows.slice.ended()) rows.find_slice(p, control.claims, tile_waits);
    if (rows.slice.ended() || !control.row_units.is_empty(at)) {
      __nanosleep(50);
      continue;
    }
    RowUnit& next = rows.units[at.slot];
    next = rows.slice.unit(Units::kTokens);
    rows.slice.advance(p, Units::kTokens);
    Units::copy(p, next, buffers + at.slot * Units::kBytes, smem_address(&control.row_units.full[at.slot]));
    at.advance();
  }
  control.row_units.wait_empty(at);
  rows.units[at.slot].task = kNoRows;
  control.row_units.arrive_full(at);
  rewind_work_list(control.claims.list);
}

// Works on the units that are copied, in every warp that works on rows.
template <typename Units, Unpack kUnpack, Pack kPack, typename Control>
__device__ __forceinline__ void work_on_rows(const BackwardParams& p, Control& control, uint32_t buffers, int warp) {
  constexpr bool kAlone = Units::kWarps == 1;  // it has no register for their number
  for (uint32_t count = 0;; ++count) {
    const uint32_t& units = kAlone ? control.rows.worked : count;
    const auto at = RingPosition<Units::kBuffers>::after(computed_here(units));  // one register through a unit's work
    control.row_units.wait_full(at);
    const RowUnit& unit = control.rows.units[at.slot];
    if (unit.task == kNoRows) break;
    const uint32_t buffer = buffers + at.slot * Units::kBytes;
    const int own = computed_here(warp);  // or what follows from it takes registers all the time
    if (unit.task == kPrepareRows) {
      Units::for_each_eight(unit, own, [&](int eight) { Units::template prepare<kUnpack>(p, unit, buffer, eight); });
    } else {
      Units::for_each_eight(unit, own, [&](int eight) { Units::template finish<kPack>(p, unit, buffer, eight); });
    }
    __syncwarp();
    if (lane_here() == 0 && unit.ends >= 0) control.rows.tell_prepared(unit.ends, 1);
    control.row_units.arrive_empty(RingPosition<Units::kBuffers>::after(computed_here(units)));
    if constexpr (kAlone) {
      __syncwarp();
      if (lane_here() == 0) ++control.rows.worked;
      __syncwarp();
    }
  }
}

// A warpgroup that has no tiles any more finishes slices that are left, each warp some of their rows and heads. Sums come
// straight to registers, of which it has enough. `barrier` is one of its own.
template <typename Rows, typename Sums, int kBlockN, Pack kPack, typename Control>
__device__ __forceinline__ void finish_rest(const BackwardParams& p, Control& control, int warpgroup, int barrier) {
  const Claims& claims = control.claims;
  Progress* const progress = control.rows.progress;
  const int thread = computed_here(threadIdx.x) % 128;  // not a register through the tiles
  for (int turn = 0;; turn ^= 1) {
    int& claimed = control.rows.rest[warpgroup][turn];  // the other one may still be read
    if (thread == 0) claimed = atomicAdd(&progress->next_to_finish, 1);
    named_barrier_sync(barrier, 128);
    const int index = claimed;
    if (index >= claims.tiles) break;
    Tile tile;
    claim_key_tile<kBlockN>(tile, claims, index);
    const RowSlice slice = Rows::slice_of(p, claims, tile, kFinishRows);
    if (!slice.summed || slice.ended()) continue;
    while (load_acquire(&progress->pair(slice.pair).added) < slice.tiles) __nanosleep(100);
    __syncwarp();
    const int parts = (slice.end - slice.row + kRowTokens - 1) / kRowTokens * p.gqa_ratio;  // of a head each
#pragma unroll 1
    for (int part = thread / 32; part < parts; part += 4) {
      const int row = slice.row + part / p.gqa_ratio * kRowTokens, count = min(slice.end - row, kRowTokens);
      const RowBlock rows = {slice.head + part % p.gqa_ratio, slice.q_begin + row, count, 0, (1u << count) - 1};
      finish_panels<Sums, kPack, /*kAtOnce=*/8>(p, rows);
    }
  }
}

// In place of `prepare`: zeroes progress, turns, and dq of queries that see no key, which no tile has.
template <int kHeadDim>
__device__ __forceinline__ void begin_tasks(const BackwardParams& p) {
  zero_counters(p.progress, p.progress_count);
  zero_counters(p.turns, p.turn_count);
  const int lane = threadIdx.x % 32, warps = gridDim.x * (kRowThreads / 32);
  for (int word = (blockIdx.x * kRowThreads + threadIdx.x) / 32; 32 * word < p.total_q; word += warps) {
    for (unsigned unseen = ~(p.direct[word] | p.summed[word]); unseen != 0; unseen &= unseen - 1) {
      const int token = 32 * word + __ffs(unseen) - 1;
      if (token >= p.total_q) break;
      for (int head = 0; head < p.heads; ++head) {
        uint16_t* dq = static_cast<uint16_t*>(p.dq) + token * p.dq_token + head * p.dq_head;
        for (int column = 8 * lane; column < kHeadDim; column += 8 * 32) *reinterpret_cast<uint4*>(dq + column) = {};
      }
    }
  }
}
