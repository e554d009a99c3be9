// The items of a forward's work list: blocks of query rows, with the key blocks that they visit.
#pragma once

#include "cuda/include/list_builder.cuh"
#include "cuda/include/params.cuh"

// kPackSequences: with tiles of several short sequences (sequence_packs.cuh).
template <bool kPackSequences = false>
struct QueryBlocks {
  static constexpr bool kOfKeys = false, kPacks = kPackSequences;
  const Params& p;
  Divisor keys, queries, queries_of_warpgroup;  // of a block

  __device__ __forceinline__ explicit QueryBlocks(const Params& p)
      : p(p), keys(p.block_n), queries(p.block_m), queries_of_warpgroup(max(p.causal_rows, 1)) {}

  __device__ __forceinline__ int size() const { return p.block_m; }

  // Causal blocks end where the sequence's last warpgroup of rows ends. Rows that are left over are those before the sequence's
  // first, in the block that visits the fewest keys; behind its last they would be in the one that visits the most.
  __device__ __forceinline__ WorkItem item(const Sequence& sequence, int block) const {
    WorkItem item = {sequence.q_begin, sequence.q_length, sequence.k_begin, sequence.k_length, block * p.block_m};
    int visible = item.k_length;
    if (p.causal_rows > 0) {
      item.row -= queries.blocks(item.q_length) * p.block_m - queries_of_warpgroup.blocks(item.q_length) * p.causal_rows;
      const int last_row = min(item.row + p.block_m, item.q_length) - 1;
      const int shift = p.bottom_right ? item.k_length - item.q_length : 0;
      visible = min(visible, max(last_row + shift + 1, 0));
    }
    item.kv_blocks = keys.blocks(visible);
    return item;
  }

  // The tile of `count` sequences from number `first` on, together one long.
  __device__ __forceinline__ WorkItem item_of_pack(const Sequence& sequences, int first, int count) const {
    WorkItem item = {sequences.q_begin, sequences.q_length, sequences.k_begin, sequences.k_length};
    item.kv_blocks = keys.blocks(item.k_length);
    item.piece = SequencePack::packed(first, count);
    return item;
  }
};

// Item number `tile` of the chunk that a builder has in shared memory.
template <typename Builder>
__device__ __forceinline__ WorkItem query_item(const Builder& builder, int tile) {
  const int owner = builder.owner(tile);
  if constexpr (Builder::kPacks) {
    const auto& chunk = builder.memory.chunk;
    const int count = chunk.packed[owner];
    if (count > 1) return builder.blocks.item_of_pack(chunk.sequences(owner, count), builder.loaded + owner, count);
  }
  return builder.blocks.item(builder.memory.chunk.sequence(owner), tile - builder.memory.chunk.first_tile[owner]);
}

// Counts the first tiles of all, as many as there is room for, by bucket(item); of those that has_few_rows(item) the longest is
// known apart. `before`: the tiles of the CTAs before; `own_most`: how many of this one's are among those counted; `first`: the
// thread's item of the first round, if it is one of them.
template <typename Builder, typename Bucket, typename HasFewRows>
__device__ __forceinline__ Totals count_query_blocks(Builder& builder, int room, Totals& before, int& own_most,
                                                     WorkItem& first, Bucket bucket, HasFewRows has_few_rows) {
  own_most = room;
#pragma unroll 1
  for (int attempt = 0;; ++attempt) {
    int longest = 0, longest_of_few_rows = 0;
    unsigned long long cost = 0;
    const int tiles = builder.for_each_tile([&](int before_chunk, int tile) {
      if (tile >= builder.tiles || before_chunk + tile >= own_most) return;
      const WorkItem item = query_item(builder, tile);
      if (before_chunk + tile == threadIdx.x) first = item;
      atomicAdd(&builder.memory.counts[bucket(item)], 1);
      longest = max(longest, item.kv_blocks);
      if (has_few_rows(item)) longest_of_few_rows = max(longest_of_few_rows, item.kv_blocks);
      cost += item.kv_blocks;
    });
    Totals& totals = builder.memory.totals[attempt];
    totals.add_costs(cost, longest, longest_of_few_rows);
    if (threadIdx.x == 0) totals.items = max(min(tiles, own_most), 0);
    const Totals all = builder.over_all(totals, before);
    if (all.items <= room) return all;
    own_most = room - before.items;  // offsets promise more tokens than there are: the last tiles are left out
    builder.clear_counts();
    __syncthreads();
  }
}
