// The backward's work list: blocks of keys, with the query blocks that see them.
//
// Sequences with the longest tiles come first, so that none of them is left to end alone. Some pairs of a sequence and a kv
// head go side by side, key block by key block: a few heads of a long sequence, or all heads of a few short ones. The fewer
// they are, the sooner a pair's next key block reads what this one read, from L2. Where additions to dQ have an order, a
// tile that starts too soon after the key block before waits for it: the more pairs there are, the later it starts.
// Causal tiles get shorter from a sequence's first to its last, but each group of pairs begins with long ones: so that the last
// group has short ones enough to fill up with, the last long sequence may have more heads side by side, and short sequences
// that end the list go all in turn.
#pragma once

#include "cuda/include/backward_params.cuh"
#include "cuda/include/list_builder.cuh"
#include "cuda/include/work_list.cuh"

struct KeyBlocks {
  static constexpr bool kOfKeys = true, kPacks = false;
  const BackwardParams& p;
  Divisor rows;  // of a block

  __device__ __forceinline__ explicit KeyBlocks(const BackwardParams& p) : p(p), rows(p.block_m) {}

  __device__ __forceinline__ int size() const { return p.block_n; }

  // Block number `block` of a sequence. Queries that see no key are left out: the sequence begins with the first that does.
  __device__ __forceinline__ WorkItem item(const Sequence& sequence, int block) const {
    WorkItem item = {sequence.q_begin, sequence.q_length, sequence.k_begin, sequence.k_length, block * p.block_n};
    int first_row = 0;
    if (p.causal) {
      if (p.bottom_right && item.q_length > item.k_length) {
        item.q_begin += item.q_length - item.k_length;
        item.q_length = item.k_length;
      }
      const int shift = p.bottom_right ? item.k_length - item.q_length : 0;
      const bool seen = item.row < item.q_length + shift;
      first_row = seen ? rows.quotient(static_cast<unsigned>(max(item.row - shift, 0))) * rows.value : item.q_length;
    }
    item.q_blocks = rows.blocks(item.q_length - first_row);
    return item;
  }

  // Tiles that the last group of a causal list should have, some two for each of 132 SMs: as long as an SM works on its
  // longest, others do on several short ones.
  static constexpr int kLastTiles = 256;
  static constexpr int kLastSequences = 16;  // at most, as each of their tiles counts them

  // Heads of the last of so many groups.
  __device__ __forceinline__ static int last_group(int heads, int groups) {
    const int together = (heads + groups - 1) / groups;
    return heads - (heads - 1) / together * together;
  }

  // Steps of a sequence's longest tile, its first.
  __device__ __forceinline__ int longest(const Sequence& sequence) const {
    return item(sequence, 0).q_blocks * p.gqa_ratio;
  }

  // Pairs side by side, of tiles of `steps` steps: all SMs together make pairs x steps of them from a key block of a pair to
  // its next. Each pair gets on by pairs x steps / SMs meanwhile, so what all of them read anew goes by the square of pairs:
  // 8 blocks of queries on 132 SMs, or 124 where additions have an order (8 MB of Q, dO and sums at D 128). Then tiles of
  // less than 16 steps come by so soon after each other that they would wait, and have more pairs.
  __device__ __forceinline__ float pairs(float steps) const {
    const float root = rsqrtf(fmaxf(steps, 1.0f));
    return !p.in_order ? 32.0f * root : fmaxf(128.0f * root, 512.0f * root * root);
  }
};

// Sets a bit for each token from `begin` to before `end`, which is greater; of the words every `step`th from number `lane` on.
__device__ __forceinline__ void mark_tokens(unsigned* marks, int begin, int end, int lane, int step) {
#pragma unroll 1
  for (int word = begin / 32 + lane; 32 * word < end; word += step) {
    const int first = max(begin - 32 * word, 0), last = min(end - 32 * word, 32);
    atomicOr(&marks[word], 0xffffffffu >> (32 - (last - first)) << first);
  }
}

// Sets a bit for each query of a lane's sequence that sees a key: whether its dQ is complete in one block of keys or summed up.
// A lane marks a short sequence, all of the warp a long one.
__device__ __forceinline__ void mark_queries(const BackwardParams& p, const WorkItem& item) {
  constexpr int kShort = 256;
  // Offsets may promise more tokens than there are.
  const int begin = max(item.q_begin, 0), end = item.k_length > 0 ? min(begin + item.q_length, p.total_q) : 0;
  unsigned* const marks = item.k_length <= p.block_n ? p.direct : p.summed;
  if (begin < end && end - begin <= kShort) mark_tokens(marks, begin, end, 0, 1);
  for (unsigned left = __ballot_sync(0xffffffff, end - begin > kShort); left != 0; left &= left - 1) {
    const int lane = __ffs(left) - 1;
    const int keys = __shfl_sync(0xffffffff, item.k_length, lane);
    mark_tokens(keys <= p.block_n ? p.direct : p.summed, __shfl_sync(0xffffffff, begin, lane),
                __shfl_sync(0xffffffff, end, lane), threadIdx.x % 32, 32);
  }
}

struct alignas(8) ItemsBefore {  // of the sequences of lower rank, or of one
  int all;
  int of_two;  // no more than two of a sequence
};

// All CTAs of a list: counting sort of sequences by their longest tile, then the place of each item. Sequences without keys
// have no rank.
template <int kCtas>
__device__ __forceinline__ void build_key_list(const BackwardParams& p) {
  using Builder = ListBuilder<kCtas, kWorkBuckets, KeyBlocks>;
  __shared__ typename Builder::Memory memory;
  __shared__ int bucket_begin[kWorkBuckets + 1];
  // One CTA has ranks and what comes before them in its shared memory, a cluster in the list's buffer.
  constexpr int kHeld = kCtas == 1 ? kPerThread * kAloneThreads : 0;
  __shared__ int held_ranks[kHeld + 1];
  __shared__ ItemsBefore held_before[kHeld + 1];
  const int thread = threadIdx.x, threads = Builder::threads();
  Builder builder(p, memory, [&] {
#pragma unroll 1
    for (int word = blockIdx.x * threads + thread; word < (p.total_q + 31) / 32; word += kCtas * threads) {
      p.direct[word] = p.summed[word] = 0;
    }
  });
  WorkItem* items = work_items(p.work_list);
  // Of sequences, in place of a second order of items.
  int* const ranks = kHeld ? held_ranks : reinterpret_cast<int*>(items + p.max_items);
  // By rank.
  ItemsBefore* const items_before = kHeld ? held_before : reinterpret_cast<ItemsBefore*>(items + 2 * p.max_items);
  const KeyBlocks& blocks = builder.blocks;
  const auto& chunk = memory.chunk;

  int longest = 0, with_keys = 0;
  builder.for_each_chunk([&](int sequences) {
#pragma unroll 1
    for (int i = thread; i < sequences; i += threads) {
      if (chunk.first_tile[i] == chunk.first_tile[i + 1]) continue;
      const int steps = blocks.longest(chunk.sequence(i));
      atomicAdd(&memory.counts[work_bucket(steps)], 1);
      longest = max(longest, steps);
      ++with_keys;
    }
  });
  memory.totals[0].add_costs(0, longest);
  memory.totals[0].add(with_keys, 0);
  Totals before;
  const Totals all = builder.over_all(memory.totals[0], before);
  const int ranked = all.items;
  builder.begin_buckets(work_bucket(all.longest), false, [&](int bucket, int begin) { bucket_begin[bucket] = begin; });
  if (thread == 0) bucket_begin[kWorkBuckets] = ranked;
  __syncthreads();

  builder.for_each_chunk([&](int sequences) {
#pragma unroll 1
    for (int i = thread; i - thread < sequences; i += threads) {
      builder.begin_round(i);  // sequences that are sorted alike stay in order
      const int count = i < sequences ? chunk.first_tile[i + 1] - chunk.first_tile[i] : 0;
      const int bucket = count > 0 ? work_bucket(blocks.longest(chunk.sequence(i))) : -1;
      const int rank = place_in_bucket(memory.begins, bucket);
      if (count > 0) {
        ranks[builder.loaded + i] = rank;
        items_before[rank] = {count, min(count, 2)};
      }
    }
  });
  builder.await_others();

  // From the items of each rank those before it, a share of the ranks a CTA, and of that a share a thread.
  const int each = builder.share(builder.end - builder.begin);
  const int first_rank = builder.begin + each * thread, end_rank = min(min(first_rank + each, builder.end), ranked);
  ItemsBefore own = {};
#pragma unroll 1
  for (int rank = first_rank; rank < end_rank; ++rank) {
    const ItemsBefore here = items_before[rank];
    own = {own.all + here.all, own.of_two + here.of_two};
  }
  const auto sums = sum_over_threads<2>({own.all, own.of_two});
  if (thread == 0) memory.totals[1] = {sums.all.of[0], sums.all.of[1]};
  const int wanted = builder.over_all(memory.totals[1], before).items;
  const int count = min(wanted, p.max_items);  // offsets may promise more tokens than there are
  ItemsBefore next = {before.items + sums.before.of[0], before.slots + sums.before.of[1]};
#pragma unroll 1
  for (int rank = first_rank; rank < end_rank; ++rank) {
    const ItemsBefore here = items_before[rank];
    items_before[rank] = next;
    next = {next.all + here.all, next.of_two + here.of_two};
  }
  if (blockIdx.x == 0 && thread == 0) {
    items_before[ranked].all = count;
    *static_cast<WorkListHeader*>(p.work_list) = {count};
  }
  builder.await_others();

  const int heads = p.heads / p.gqa_ratio;
  const int last_items = p.causal ? (KeyBlocks::kLastTiles + heads - 1) / heads : 0;
  auto items_of = [&](int rank) { return items_before[rank + 1].all - items_before[rank].all; };
  auto is_one_of_last = [&](int rank) {
    return rank >= ranked - KeyBlocks::kLastSequences && count - items_before[rank + 1].all < last_items;
  };
  auto place_of = [&](int tile, WorkItem& item) {
    if (tile >= builder.tiles) return -1;
    const int owner = builder.owner(tile), block = tile - chunk.first_tile[owner];
    const int rank = ranks[builder.loaded + owner];
    const ItemsBefore before = items_before[rank];
    int place = before.all + block;
    if (place >= count) return -1;
    const Sequence sequence = chunk.sequence(owner);
    const int bucket = work_bucket(blocks.longest(sequence));
    item = blocks.item(sequence, block);
    item.turn = place;
    item.heads = heads;
    if (count < wanted) return place;  // one after the other: sequences that are cut off leave no places empty

    const float pairs = blocks.pairs(bucket_cost(bucket));  // the same for all of a bucket, whose sequences share places
    int first = rank, end = rank + 1;  // the ranks whose key blocks go in turn
    int groups = pairs < heads ? static_cast<int>(ceilf(__fdividef(heads, pairs))) : 1;  // of heads
    if (is_one_of_last(rank)) {
      const int tiles = items_of(rank);  // of a head
      if (tiles >= last_items) {
        while (groups > 1 && KeyBlocks::last_group(heads, groups) * tiles < KeyBlocks::kLastTiles) --groups;
      } else {
        while (first > 0 && is_one_of_last(first - 1) && items_of(first - 1) < last_items) --first;
        end = ranked;
        groups = 1;
      }
    } else if (groups == 1) {
      const unsigned members = max(static_cast<unsigned>(__fdividef(pairs, heads) + 0.5f), 1u);
      first = rank - static_cast<unsigned>(rank - bucket_begin[bucket]) % members;
      end = min(first + static_cast<int>(members), bucket_begin[bucket + 1]);
      while (is_one_of_last(end - 1)) --end;
    }
    item.heads = (heads + groups - 1) / groups;
    if (end - first > 1) {
      // All heads, and the key blocks of a few sequences in turn. Each of these has a block.
      const ItemsBefore of_first = items_before[first];
      place = of_first.all;
      if (block == 0) {
        place += rank - first;
      } else if (block == 1) {
        place += before.of_two - of_first.of_two + end - rank;
      } else {
        for (int other = first, begin = place; other < end; ++other) {
          const int next = items_before[other + 1].all;
          place += min(next - begin, other < rank ? block + 1 : block);
          begin = next;
        }
      }
    }
    return place;
  };
  builder.for_each_chunk([&](int sequences) {
#pragma unroll 1
    for (int tile = thread; tile - thread < builder.tiles; tile += threads) {
      WorkItem item = {};
      const int place = place_of(tile, item);
      store_items(items, place, item);
    }
    // Last, as nobody waits for these bits.
#pragma unroll 1
    for (int i = thread; i - thread < sequences; i += threads) {
      const bool has_keys = i < sequences && chunk.first_tile[i] < chunk.first_tile[i + 1];
      const bool listed = has_keys && items_before[ranks[builder.loaded + i]].all < count;  // not cut off
      mark_queries(p, listed ? blocks.item(chunk.sequence(i), 0) : WorkItem{});
    }
  });
}

extern "C" __global__ void __launch_bounds__(kAloneThreads, 1)
jagtile_build_work_list(const __grid_constant__ BackwardParams p) {
  build_key_list<1>(p);
}

extern "C" __global__ void __cluster_dims__(kClusterCtas) __launch_bounds__(kClusterThreads, 1)
jagtile_build_work_list_cluster(const __grid_constant__ BackwardParams p) {
  build_key_list<kClusterCtas>(p);
}
