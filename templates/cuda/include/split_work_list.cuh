// The device-built work list of kernels that split keys: an item is a block of query rows and a piece of the keys that it
// visits. Keys are split where a block of rows is dear beside what a CTA has to do in all.
#pragma once
#include <cstdint>

#include "cuda/include/query_blocks.cuh"
#include "cuda/include/work_list.cuh"

constexpr int kMaxPieces = 127;      // of a block of rows
constexpr int kSmallestPiece = 256;  // keys

// Which piece of a row block's keys an item is. Slots count the pieces of all that is split; this is the first piece's.
struct Piece {
  int slot, index, count;

  __device__ __forceinline__ explicit Piece(const WorkItem& item)
      : slot(item.piece & 0xffff), index(item.piece >> 16 & 0xff), count(item.piece >> 24) {}
};

__device__ __forceinline__ int packed_piece(int slot, int index, int count) { return slot | index << 16 | count << 24; }

// Counters of finished pieces, one a warpgroup of (slot of the first piece, head): behind the builder's scratch, zero between
// launches.
__device__ __forceinline__ int* piece_tickets(const Params& p) {
  return reinterpret_cast<int*>(work_items(p.work_list) + 2 * p.max_items) + p.batch + 1;
}

// The key blocks of a row block cut into pieces as equal as can be: the first `longer` have one block more than `blocks`.
struct Cut {
  int pieces, blocks, longer;

  __device__ __forceinline__ Cut(int kv_blocks, int longest_piece) {
    pieces = max((kv_blocks + longest_piece - 1) / longest_piece, 1);
    blocks = kv_blocks / pieces;
    longer = kv_blocks % pieces;
  }
};

// Key blocks of a piece at most: as many pieces as there is room for, which is a few a CTA, but no tiny ones.
__device__ __forceinline__ int longest_piece(const Params& p, unsigned long long total, int longest) {
  if (p.extra_items == 0) return max(longest, 1);
  const int room = static_cast<int>((total + p.extra_items - 1) / p.extra_items);
  return max(max(room, (longest + kMaxPieces - 1) / kMaxPieces), max(kSmallestPiece / p.block_n, 1));
}

// Two kinds of row blocks, each sorted by cost: first those that have their sequence's keys to themselves and are bound by
// memory, then those that share them.
__device__ __forceinline__ int bucket_of(const Params& p, const WorkItem& item, int kv_blocks) {
  return (item.q_length > p.block_m ? kWorkBuckets : 0) + work_bucket(kv_blocks);
}

// The place in the order of work of what is number `sorted` of `all`, of which `alone` are of the first kind: both kinds at
// even distances, so that memory and tensor cores are busy at the same time.
__device__ __forceinline__ int interleaved(int sorted, int alone, int all) {
  const long long others = all - alone;
  if (sorted < alone) return sorted + static_cast<int>(sorted * others / alone);
  const int place = sorted - alone;
  return place + static_cast<int>(min(((place + 1LL) * alone + others - 1) / others, static_cast<long long>(alone)));
}

// One CTA of 1024 threads, any batch size: count, cut, counting sort by kind and cost, write.
extern "C" __global__ void __launch_bounds__(1024, 1)
jagtile_build_split_work_list(const __grid_constant__ Params p) {
  __shared__ int warp_sums[32];
  __shared__ int bucket_begin[2 * kWorkBuckets];
  __shared__ int longest;
  __shared__ unsigned long long total;
  WorkListHeader* header = static_cast<WorkListHeader*>(p.work_list);
  WorkItem* items = work_items(p.work_list);
  WorkItem* items_by_sequence = items + p.max_items;
  int* first_tile = reinterpret_cast<int*>(items + 2 * p.max_items);
  int* tickets = piece_tickets(p);

  const QueryBlocks blocks{p};
  auto row_block = [&](int tile) {
    const int seq = sequence_of(first_tile, p.batch, tile);
    return blocks.item(seq, tile - first_tile[seq]);
  };

  const int tiles = min(count_tiles(blocks, first_tile, warp_sums), p.max_items - p.extra_items);
  for (int i = threadIdx.x; i < p.results; i += 1024) tickets[i] = 0;
  bucket_begin[threadIdx.x] = 0;
  if (threadIdx.x == 0) {
    longest = 0;
    total = 0;
  }
  __syncthreads();

  int own_longest = 0;
  unsigned long long own_total = 0;
  for (int tile = threadIdx.x; tile < tiles; tile += 1024) {
    const int kv_blocks = row_block(tile).kv_blocks;
    own_longest = max(own_longest, kv_blocks);
    own_total += kv_blocks;
  }
  atomicMax(&longest, own_longest);
  atomicAdd(&total, own_total);
  __syncthreads();
  const int piece_limit = longest_piece(p, total, longest);

  for (int tile = threadIdx.x; tile < tiles; tile += 1024) {
    const WorkItem item = row_block(tile);
    const Cut cut(item.kv_blocks, piece_limit);
    if (cut.longer > 0) atomicAdd(&bucket_begin[bucket_of(p, item, cut.blocks + 1)], cut.longer);
    atomicAdd(&bucket_begin[bucket_of(p, item, cut.blocks)], cut.pieces - cut.longer);
  }
  __syncthreads();
  int begin;
  const int count = block_exclusive_scan(bucket_begin[threadIdx.x], begin, warp_sums);
  bucket_begin[threadIdx.x] = begin;
  __syncthreads();
  const int alone = bucket_begin[kWorkBuckets];
  __syncthreads();

  // In the order of sequences from the last to the first, so that of each its last rows, the dearest, come first.
  int items_left = count, slots = 0;
  for (int base = 0; base < tiles; base += 1024) {
    const int tile = base + threadIdx.x;
    const bool active = tile < tiles;
    WorkItem item = {};
    if (active) item = row_block(tile);
    const Cut cut(item.kv_blocks, piece_limit);
    int place = threadIdx.x, slot = 0, found = min(tiles - base, 1024), found_slots = 0;
    if (longest > piece_limit) {
      found = block_exclusive_scan(active ? cut.pieces : 0, place, warp_sums);
      found_slots = block_exclusive_scan(active && cut.pieces > 1 ? cut.pieces : 0, slot, warp_sums);
    }
    WorkItem* in_sequence = items_by_sequence + items_left - 1 - place;
    items_left -= found;
    slot += slots;
    slots += found_slots;

    const bool whole = active && cut.pieces == 1;
    const unsigned lanes = __ballot_sync(0xffffffff, whole);
    if (whole) {
      const int sorted = place_in_bucket(bucket_begin, bucket_of(p, item, item.kv_blocks), lanes);
      items[interleaved(sorted, alone, count)] = item;
      *in_sequence = item;
    } else if (active) {
      int* longer_begin = &bucket_begin[bucket_of(p, item, cut.blocks + 1)];
      int longer = cut.longer > 0 ? atomicAdd(longer_begin, cut.longer) : 0;
      int others = atomicAdd(&bucket_begin[bucket_of(p, item, cut.blocks)], cut.pieces - cut.longer);
      item.kv_blocks = 0;
      for (int piece = 0; piece < cut.pieces; ++piece) {
        item.piece = packed_piece(slot, piece, cut.pieces);
        item.first_block = item.kv_blocks;
        item.kv_blocks += cut.blocks + (piece < cut.longer);
        items[interleaved(piece < cut.longer ? longer++ : others++, alone, count)] = item;
        *in_sequence-- = item;
      }
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    header->items = count;
    header->longest = max(min(longest, piece_limit), 0);
    header->total = static_cast<float>(total);
    header->next_tile = 0;
    header->finished_ctas = 0;
  }
}
