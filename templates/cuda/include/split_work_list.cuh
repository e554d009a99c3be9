// The device-built work list of kernels that split keys: an item is a block of query rows and a piece of the keys that it
// visits. Keys are split where a block of rows is dear beside what a CTA has to do in all: pieces have to be left in memory
// and added up.
#pragma once
#include <cstdint>

#include "cuda/include/query_blocks.cuh"
#include "cuda/include/work_list.cuh"

constexpr int kMaxPieces = 127;   // of a block of rows
constexpr int kPiecesPerCta = 4;  // of all work: what there is room for (runtime/cuda/head_packs.py)
constexpr int kFewRows = 4;       // a part of a tile: 1/4 of its rows

// In keys. A piece of a whole tile's rows costs what some 400 keys take: a tile's begin and end, its rows written, and read
// by the one that adds up. With few rows it costs little more than the begin and end.
constexpr unsigned kSmallestPiece = 512, kSmallestOfFewRows = 256;
constexpr unsigned kWorthCutting = 1024;  // more than twice a CTA's share

// Which piece of a row block's keys an item is. Slots count the pieces of all that is split; this is the first piece's. Of a
// pack of sequences the count is negative: it is one piece.
struct Piece {
  int slot, index, count;

  __device__ __forceinline__ explicit Piece(const WorkItem& item)
      : slot(item.piece & 0xffff), index(item.piece >> 16 & 0xff), count(item.piece >> 24) {}
};

__device__ __forceinline__ int packed_piece(int slot, int index, int count) { return slot | index << 16 | count << 24; }

// Counters of finished pieces, one a warpgroup of (slot of the first piece, head): behind the items, zero between launches.
__device__ __forceinline__ int* piece_tickets(const Params& p) {
  return reinterpret_cast<int*>(work_items(p.work_list) + 2 * p.max_items);
}

// The key blocks of a row block cut into pieces as equal as can be: the first `longer` have one block more than `blocks`.
struct Cut {
  int pieces, blocks, longer;

  __device__ __forceinline__ explicit Cut(int kv_blocks) : pieces(1), blocks(kv_blocks), longer(0) {}

  __device__ __forceinline__ Cut(int kv_blocks, int longest_piece) {
    pieces = max((kv_blocks + longest_piece - 1) / longest_piece, 1);
    blocks = kv_blocks / pieces;
    longer = kv_blocks % pieces;
  }
};

__device__ __forceinline__ bool has_few_rows(const Params& p, const WorkItem& item) {
  return kFewRows * item.q_length <= p.block_m;
}

// How far the keys of row blocks are cut, in key blocks. Few rows in pieces of 1/4 of a CTA's share of the work: many even
// ones. Others only where they are so far above a share that cutting them pays, in pieces that leave room for what is not cut.
struct Limits {
  int few_rows, piece, whole, share;

  // `keys`: of a block; `extra_items`: as in the parameters, if there are any. Divided by while offsets are on their way.
  __device__ __forceinline__ Limits(const Params& p, const Divisor& keys, const Divisor& extra_items, unsigned long long total,
                                    int longest) {
    few_rows = piece = whole = max(longest, 1);
    share = 0;
    if (p.extra_items == 0) return;
    const int fewest = (longest + kMaxPieces - 1) / kMaxPieces;
    const long long part = extra_items.quotient(total + p.extra_items - 1);  // kPiecesPerCta of these are a share
    auto at_least = [&](long long limit, unsigned smallest) {  // parts of a great total are more than 32 bits hold
      return max(max(static_cast<int>(min(limit, 1LL * longest)), fewest), max(static_cast<int>(keys.quotient(smallest)), 1));
    };
    few_rows = at_least(part, kSmallestOfFewRows);
    piece = at_least((kPiecesPerCta - 1) * part, kSmallestPiece);
    share = static_cast<int>(min(kPiecesPerCta * part, 1LL << 28));
    whole = min(2 * share + static_cast<int>(keys.quotient(kWorthCutting)), max(longest, 1));
  }

  // Whether any of the row blocks is cut.
  __device__ __forceinline__ bool cut_any(const Totals& all) const {
    return all.longest_of_few_rows > few_rows || all.longest > whole;
  }

  // Whether the kinds of row blocks are sorted as one, if the longest item is so long: a long one that comes late is left to
  // end alone.
  __device__ __forceinline__ bool are_alike(int longest) const { return 8 * longest > share; }

  __device__ __forceinline__ int longest_piece(const Params& p, const WorkItem& item) const {
    if (has_few_rows(p, item)) return few_rows;
    return item.kv_blocks > whole ? piece : whole;
  }
};

// Two kinds of row blocks, each sorted by cost: first those that have their sequence's keys to themselves and are bound by
// memory, then those that share them.
__device__ __forceinline__ int kind_of(const Params& p, const WorkItem& item) {
  return item.q_length > p.block_m ? kWorkBuckets : 0;
}

__device__ __forceinline__ int bucket_of(const Params& p, const WorkItem& item, int kv_blocks) {
  return kind_of(p, item) + work_bucket(kv_blocks);
}

// The places in the order of work of items that are sorted by kind and cost: both kinds at even distances, so that memory and
// tensor cores are busy at the same time.
struct Interleaving {
  unsigned alone, others;  // how many are of the first kind, and of the second
  Divisor by_alone, by_others;

  // Of what is number `sorted` of all.
  __device__ __forceinline__ int place(unsigned sorted) const {
    if (alone == 0 || others == 0) return sorted;
    const bool is_alone = sorted < alone;
    const unsigned number = is_alone ? sorted : sorted - alone;
    const unsigned long long scaled = is_alone ? 1ull * number * others : (number + 1ull) * alone + others - 1;
    const unsigned of_others = (is_alone ? by_alone : by_others).quotient(scaled);
    return number + (is_alone ? of_others : min(of_others, alone));
  }
};

// All CTAs of a list: count, counting sort by kind and cost, write. Where keys are cut, which the work in all decides, pieces
// are counted anew.
template <int kCtas, bool kPackSequences>
__device__ __forceinline__ void build_split_list(const Params& p) {
  using Builder = ListBuilder<kCtas, 2 * kWorkBuckets, QueryBlocks<kPackSequences>>;
  __shared__ typename Builder::Memory memory;
  __shared__ Interleaving order;
  __shared__ Divisor extra_items;
  Builder builder(p, memory, [&] {
    if (threadIdx.x == 0) extra_items = Divisor(max(p.extra_items, 1));
    int* tickets = piece_tickets(p);
    const int threads = Builder::threads();
#pragma unroll 1
    for (int i = blockIdx.x * threads + threadIdx.x; i < p.results; i += kCtas * threads) tickets[i] = 0;
  });
  WorkItem* items = work_items(p.work_list);

  Totals before;
  int own_most;
  WorkItem first = {};
  const Totals all = count_query_blocks(builder, p.max_items - p.extra_items, before, own_most, first,
                                        [&](const WorkItem& item) { return bucket_of(p, item, item.kv_blocks); },
                                        [&](const WorkItem& item) { return has_few_rows(p, item); });
  const Limits limits(p, builder.blocks.keys, extra_items, all.cost(), all.longest);
  const bool cuts = limits.cut_any(all);
  int together = go_heads_together(all.items, p.batch, p.causal_rows > 0);
  // Packs leave fewer tiles to a sequence on average, but as many to a long one, which share what they read.
  if (kPackSequences && p.causal_rows > 0 && together == kDearestFirst) together = kBySequence;
  WorkListHeader* const header = blockIdx.x == 0 && threadIdx.x == 0 ? static_cast<WorkListHeader*>(p.work_list) : nullptr;
  if (header != nullptr) *header = {all.items, all.longest, static_cast<float>(all.cost()), together};

  int count = all.items, longest = all.longest;
  if (cuts) {
    builder.clear_counts();
    __syncthreads();
    int pieces = 0, slots = 0, own_longest = 0;
    builder.for_each_tile([&](int before_chunk, int tile) {
      if (tile >= builder.tiles || before_chunk + tile >= own_most) return;
      const WorkItem item = query_item(builder, tile);
      const Cut cut(item.kv_blocks, limits.longest_piece(p, item));
      if (cut.longer > 0) atomicAdd(&memory.counts[bucket_of(p, item, cut.blocks + 1)], cut.longer);
      atomicAdd(&memory.counts[bucket_of(p, item, cut.blocks)], cut.pieces - cut.longer);
      pieces += cut.pieces;
      if (cut.pieces > 1) slots += cut.pieces;
      own_longest = max(own_longest, cut.blocks + (cut.longer > 0));
    });
    Totals& totals = memory.totals[2];
    totals.add(pieces, slots);
    totals.add_costs(0, own_longest);
    const Totals cut = builder.over_all(totals, before);
    count = cut.items;
    longest = cut.longest;
    if (header != nullptr) {
      header->items = count;
      header->longest = longest;
    }
  }
  const int dearest = work_bucket(longest);
  const bool alike = limits.are_alike(longest);
  builder.begin_buckets(dearest, alike, [&](int bucket, unsigned begin) {
    if (bucket == kWorkBuckets + dearest) order = {begin, count - begin, Divisor(max(begin, 1)), Divisor(max(count - begin, 1))};
  });
  builder.leave();
  __syncthreads();

  // In the order of sequences from the last to the first, so that of each its last rows, the dearest, come first.
  WorkItem* items_by_sequence = items + p.max_items;
  const int last = count - 1 - before.items;  // the place of this CTA's first
  int pieces = 0, slots = before.slots;  // of the tiles before
  builder.for_each_tile([&](int before_chunk, int tile) {
    builder.begin_round(tile);
    int place = before_chunk + tile, slot = 0;
    const bool active = tile < builder.tiles && place < own_most;
    const bool is_first = kCtas == 1 && place == threadIdx.x;  // threads of a cluster's CTAs have fewer registers
    WorkItem item = {};
    if (active) item = is_first ? first : query_item(builder, tile);
    Cut cut(item.kv_blocks);
    if (cuts) {
      cut = Cut(item.kv_blocks, limits.longest_piece(p, item));
      const auto sums = sum_over_threads<2>({active ? cut.pieces : 0, active && cut.pieces > 1 ? cut.pieces : 0});
      place = pieces + sums.before.of[0];
      slot = slots + sums.before.of[1];
      pieces += sums.all.of[0];
      slots += sums.all.of[1];
    }
    const bool whole = active && cut.pieces == 1;
    auto own_bucket = [&](int kv_blocks) { return (alike ? kWorkBuckets : kind_of(p, item)) + work_bucket(kv_blocks); };
    const int sorted = place_in_bucket(memory.begins, whole ? own_bucket(cut.blocks) : -1);
    store_items(items, whole ? order.place(sorted) : -1, item);
    if (together != kDearestFirst) store_items(items_by_sequence, whole ? last - place : -1, item);
    if (active && !whole) {
      int longer = 0;
      if (cut.longer > 0) longer = atomicAdd(&memory.begins[own_bucket(cut.blocks + 1)], cut.longer);
      int others = atomicAdd(&memory.begins[own_bucket(cut.blocks)], cut.pieces - cut.longer);
      item.kv_blocks = 0;
#pragma unroll 1
      for (int piece = 0; piece < cut.pieces; ++piece) {
        item.piece = packed_piece(slot, piece, cut.pieces);
        item.first_block = item.kv_blocks;
        item.kv_blocks += cut.blocks + (piece < cut.longer);
        items[order.place(piece < cut.longer ? longer++ : others++)] = item;
        if (together != kDearestFirst) items_by_sequence[last - place - piece] = item;
      }
    }
  });
  builder.await_leave();
}
