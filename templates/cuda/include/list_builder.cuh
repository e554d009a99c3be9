// What the kernels that build work lists share. One CTA builds a short list, a cluster of them a long one: each CTA has its
// share of the sequences. Offsets are read once, into shared memory; CTAs read each other's counts there. The host chooses
// how many threads a CTA has (runtime/cuda/list_builder.py).
#pragma once
#include <cstdint>

#include "cuda/include/offsets.cuh"
#include "cuda/include/ptx.cuh"
#include "cuda/include/sequence_packs.cuh"
#include "cuda/include/work_list.cuh"

// Threads of a CTA at most, where it is alone and in a cluster; a power of two. Few, as all have much to do in common.
constexpr int kAloneThreads = 512, kClusterThreads = 1024;
constexpr int kPerThread = 2;     // sequences, at a time
constexpr int kClusterCtas = 8;   // the largest cluster that is portable
constexpr int kWorkBuckets = 512;

// A divisor that is the same for all threads, and its reciprocal in 32 bits, computed once.
struct Divisor {
  unsigned value, reciprocal;

  Divisor() = default;
  __device__ __forceinline__ explicit Divisor(unsigned value) : value(value), reciprocal(0xffffffffu / value) {}

  __device__ __forceinline__ unsigned quotient(unsigned x) const {
    const unsigned estimate = __umulhi(x, reciprocal);  // too small by one at most
    return estimate + (x - estimate * value >= value);
  }

  __device__ __forceinline__ unsigned long long quotient(unsigned long long x) const {
    return x >> 32 ? x / value : quotient(static_cast<unsigned>(x));
  }

  // Blocks of so many tokens that there are in `tokens`.
  __device__ __forceinline__ int blocks(int tokens) const { return quotient(tokens + value - 1); }
};

// Costs fall into buckets of at most 1/16 relative width (float exponent and four mantissa bits), dearest first.
__device__ __forceinline__ int work_bucket(int cost) {
  const int bits = __float_as_int(static_cast<float>(cost + 1)) >> 19;
  return kWorkBuckets - 1 - min(bits - (127 << 4), kWorkBuckets - 1);
}

// The smallest cost of a bucket.
__device__ __forceinline__ float bucket_cost(int bucket) {
  return __int_as_float((kWorkBuckets - 1 - bucket + (127 << 4)) << 19) - 1.0f;
}

// The next place in a bucket, in the order of lanes, for each lane of the warp; none where the bucket is -1.
__device__ __forceinline__ int place_in_bucket(int* bucket_begin, int bucket) {
  const unsigned peers = __match_any_sync(0xffffffff, bucket);
  const int leader = __ffs(peers) - 1, lane = threadIdx.x & 31;
  int position = 0;
  if (lane == leader && bucket >= 0) position = atomicAdd(&bucket_begin[bucket], __popc(peers));
  return __shfl_sync(0xffffffff, position, leader) + __popc(peers & ((1u << lane) - 1));
}

// Stores each lane's item at its place, none where that is negative. Two lanes write an item together, its two halves by one
// instruction, so that memory gets whole sectors.
__device__ __forceinline__ void store_items(WorkItem* items, int place, const WorkItem& item) {
  const bool odd = threadIdx.x & 1;
  const int place_of_other = __shfl_xor_sync(0xffffffff, place, 1);
  const int* words = reinterpret_cast<const int*>(&item);
  uint32_t first[4], second[4];  // this lane's halves of the even lane's item, and of the odd one's
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int received = __shfl_xor_sync(0xffffffff, odd ? words[i] : words[4 + i], 1);
    first[i] = computed_here(odd ? received : words[i]);  // or both are stored, under opposite predicates
    second[i] = computed_here(odd ? words[4 + i] : received);
  }
  auto store = [&](int place, const uint32_t(&half)[4]) {
    if (place >= 0) reinterpret_cast<uint4*>(items + place)[odd] = {half[0], half[1], half[2], half[3]};
  };
  store(odd ? place_of_other : place, first);
  store(odd ? place : place_of_other, second);
}

template <int kValues>
struct Values {
  int of[kValues];
};

template <int kValues>
struct PrefixSums {
  Values<kValues> before, all;
};

// Prefix sums over the threads of a builder CTA. Another barrier of the CTA comes between two calls. Not inlined, as a
// builder's time is to a good part that of its code's first way into the caches.
template <int kValues>
__device__ __noinline__ PrefixSums<kValues> sum_over_threads(Values<kValues> values) {
  __shared__ int warp_sums[kValues][32];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  Values<kValues> inclusive = values;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      const int other = __shfl_up_sync(0xffffffff, inclusive.of[i], step);
      if (lane >= step) inclusive.of[i] += other;
    }
  }
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    if (lane == 31) warp_sums[i][warp] = inclusive.of[i];
  }
  __syncthreads();
  PrefixSums<kValues> sums;
#pragma unroll
  for (int i = 0; i < kValues; ++i) {  // each warp for itself, which takes no second barrier
    const unsigned sum = lane < blockDim.x / 32 ? warp_sums[i][lane] : 0;
    sums.all.of[i] = __reduce_add_sync(0xffffffff, sum);
    sums.before.of[i] = __reduce_add_sync(0xffffffff, lane < warp ? sum : 0) + inclusive.of[i] - values.of[i];
  }
  return sums;
}

struct Sequence {
  int q_begin, q_length, k_begin, k_length;
};

// Of the tiles of one CTA, or of all.
struct Totals {
  int items;
  int slots;  // of pieces, where keys are split
  int longest;
  int longest_of_few_rows;  // where keys are split
  unsigned cost_low, cost_high;  // 20 bits and the rest: shared memory adds no 64 bits at once

  __device__ __forceinline__ unsigned long long cost() const {
    return (static_cast<unsigned long long>(cost_high) << 20) + cost_low;
  }

  // Adds up all threads' values.
  __device__ __forceinline__ void add(int own_items, int own_slots) {
    const int all_items = __reduce_add_sync(0xffffffff, own_items), all_slots = __reduce_add_sync(0xffffffff, own_slots);
    if (threadIdx.x % 32 != 0 || all_items == 0) return;
    atomicAdd(&items, all_items);
    atomicAdd(&slots, all_slots);
  }

  __device__ __forceinline__ void add_costs(unsigned long long own_cost, int own_longest, int own_longest_of_few_rows = 0) {
    const unsigned low = __reduce_add_sync(0xffffffff, static_cast<unsigned>(own_cost) & 0xfffff);
    const unsigned high = __reduce_add_sync(0xffffffff, static_cast<unsigned>(own_cost >> 20));
    const int most = __reduce_max_sync(0xffffffff, own_longest);
    const int most_of_few_rows = __reduce_max_sync(0xffffffff, own_longest_of_few_rows);
    if (threadIdx.x % 32 != 0 || most == 0) return;
    atomicAdd(&cost_low, low);
    atomicAdd(&cost_high, high);
    atomicMax(&longest, most);
    if (most_of_few_rows > 0) atomicMax(&longest_of_few_rows, most_of_few_rows);
  }
};

// Adds up what the CTAs of a cluster have in `own`, and what those before this one have. One warp.
template <int kCtas>
__device__ __noinline__ void sum_over_ctas(const Totals& own, Totals& all, Totals& before) {
  const int lane = threadIdx.x;
  Totals part = {};
  if (lane < kCtas) part = *variable_of(&own, lane);
  auto sum = [](unsigned value) { return __reduce_add_sync(0xffffffff, value); };
  auto sum_of = [&](const Totals& part) {
    return Totals{static_cast<int>(sum(part.items)), static_cast<int>(sum(part.slots)),
                  __reduce_max_sync(0xffffffff, part.longest), __reduce_max_sync(0xffffffff, part.longest_of_few_rows),
                  sum(part.cost_low & 0xfffff), sum(part.cost_high + (part.cost_low >> 20))};
  };
  const Totals of_all = sum_of(part), of_those_before = sum_of(lane < blockIdx.x ? part : Totals{});
  if (lane != 0) return;
  all = of_all;
  before = of_those_before;
}

// Sequences whose offsets are in shared memory, and their tiles.
template <int kMostThreads, bool kPacks>
struct Chunk {
  static constexpr int kSequences = kPerThread * kMostThreads;
  static constexpr int kHeldTiles = 2 * kMostThreads + 1024;  // whose sequences are found once
  int q[kSequences + 1], k[kSequences + 1];  // offsets
  int first_tile[kSequences + 1];            // of each sequence
  int owners[kHeldTiles];                    // of tiles: their sequences
  uint8_t packed[kPacks ? kSequences : 1];   // how many sequences the tile of each has

  __device__ __forceinline__ Sequence sequence(int index) const { return sequences(index, 1); }

  // Some that follow each other, as one.
  __device__ __forceinline__ Sequence sequences(int index, int count) const {
    return {q[index], max(q[index + count] - q[index], 0), k[index], max(k[index + count] - k[index], 0)};
  }

  // The sequence that a tile belongs to: first_tile[found] <= tile < first_tile[found + 1].
  __device__ __forceinline__ int search(int tile, int sequences) const {
    int low = 0, high = sequences;
#pragma unroll 1
    while (high - low > 1) {
      const int middle = (low + high) >> 1;
      (first_tile[middle] <= tile ? low : high) = middle;
    }
    return low;
  }

  // Says of a lane's tiles, from `begin` to before `end`, that they belong to `sequence`. A lane does it for a few tiles, all
  // of the warp for many.
  __device__ __forceinline__ void own(int begin, int end, int sequence) {
    constexpr int kFew = 32;
    const bool few = end - begin <= kFew;
#pragma unroll 1
    for (int tile = begin; few && tile < end; ++tile) owners[tile] = sequence;
#pragma unroll 1
    for (unsigned left = __ballot_sync(0xffffffff, !few); left != 0; left &= left - 1) {
      const int lane = __ffs(left) - 1;
      const int last = __shfl_sync(0xffffffff, end, lane), owner = __shfl_sync(0xffffffff, sequence, lane);
#pragma unroll 1
      for (int tile = __shfl_sync(0xffffffff, begin, lane) + threadIdx.x % 32; tile < last; tile += 32) owners[tile] = owner;
    }
  }
};

// Of a thread's sequences, and what ends the last of them.
struct Offsets {
  int q[kPerThread + 1], k[kPerThread + 1];

  // Of a chunk of so many sequences, `from` and following.
  __device__ __forceinline__ Offsets(const void* of_q, const void* of_k, int wide, int from, int sequences) {
#pragma unroll
    for (int i = 0; i <= kPerThread; ++i) {  // all on their way at once
      const int index = from + min(kPerThread * static_cast<int>(threadIdx.x) + i, sequences);
      q[i] = offset_at(of_q, index, wide & 1);
      k[i] = offset_at(of_k, index, wide & 2);
    }
  }
};

// Cuts the queries or the keys of a chunk's sequences into tiles of a block, and returns how many these are. All threads of a
// builder CTA.
template <int kMostThreads, bool kPacks>
__device__ __forceinline__ int cut_chunk(Chunk<kMostThreads, kPacks>& chunk, const Offsets& offsets, int sequences, bool of_keys,
                                         int block, int pack_keys, int most_tiles) {
  const Divisor block_tokens(block);  // while the offsets are on their way
  int tiles[kPerThread], own = 0;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int length = of_keys ? offsets.k[i + 1] - offsets.k[i] : offsets.q[i + 1] - offsets.q[i];
    tiles[i] = min(block_tokens.blocks(max(length, 0)), most_tiles);
  }
  if constexpr (kPacks) {
    int packed[kPerThread];
    const int first = kPerThread * threadIdx.x;
    pack_sequences(offsets.q, offsets.k, sequences - first, block, pack_keys, tiles, packed);
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) chunk.packed[first + i] = packed[i];
  }
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) own += tiles[i];
  const auto sums = sum_over_threads<1>({own});
  int begin = sums.before.of[0];
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int index = kPerThread * threadIdx.x + i, end = begin + tiles[i];
    chunk.q[index] = offsets.q[i];
    chunk.k[index] = offsets.k[i];
    chunk.first_tile[index] = begin;
    chunk.own(min(begin, chunk.kHeldTiles), min(end, chunk.kHeldTiles), index);
    begin = end;
  }
  if (threadIdx.x == blockDim.x - 1) {
    const int end = kPerThread * blockDim.x;
    chunk.q[end] = offsets.q[kPerThread];
    chunk.k[end] = offsets.k[kPerThread];
    chunk.first_tile[end] = begin;
  }
  __syncthreads();
  return sums.all.of[0];
}

// The same of another chunk than the first: rare code, kept together. Parameters are values, as these are at hand.
template <int kMostThreads, bool kPacks>
__device__ __noinline__ int next_chunk(Chunk<kMostThreads, kPacks>& chunk, const void* of_q, const void* of_k, int wide, int from,
                                       int sequences, bool of_keys, int block, int pack_keys, int most_tiles) {
  __syncthreads();  // the chunk before is done with
  const Offsets offsets(of_q, of_k, wide, from, sequences);
  return cut_chunk(chunk, offsets, sequences, of_keys, block, pack_keys, most_tiles);
}

// A builder CTA's shared memory.
template <int kCtas, int kBuckets, bool kPacks>
struct BuilderMemory {
  Chunk<kCtas == 1 ? kAloneThreads : kClusterThreads, kPacks> chunk;
  int counts[kBuckets];  // of this CTA's items
  int begins[kBuckets];  // places of the next ones in the list
  Totals totals[3];      // of this CTA's tiles, counted up to three times
  Totals all, before;    // of all CTAs, and of those before this one
};

// CTA blockIdx.x of kCtas that build a list together; one that is alone has them all at a time. `Blocks` has the
// parameters `p`, and says what is cut into blocks, and how large these are.
template <int kCtas, int kBuckets, typename Blocks>
struct ListBuilder {
  static constexpr bool kPacks = Blocks::kPacks;
  static constexpr int kAtOnce = kPacks ? kPackedSequences : 1;  // sequences that one CTA has all of
  using Memory = BuilderMemory<kCtas, kBuckets, kPacks>;

  Memory& memory;
  const int begin, end;   // its sequences
  const Offsets offsets;  // of the first chunk: on their way while all else is made ready
  const Blocks blocks;
  int loaded, tiles;      // the first sequence of the chunk in shared memory, and that chunk's tiles

  // Calls meanwhile() while offsets are on their way.
  template <typename P, typename Meanwhile>
  __device__ __forceinline__ ListBuilder(const P& p, Memory& memory, Meanwhile meanwhile)
      : ListBuilder(p, memory, meanwhile, ((p.batch + kCtas - 1) / kCtas + kAtOnce - 1) / kAtOnce * kAtOnce) {}

  template <typename P, typename Meanwhile>
  __device__ __forceinline__ ListBuilder(const P& p, Memory& memory, Meanwhile meanwhile, int share)
      : memory(memory),
        begin(min(share * static_cast<int>(blockIdx.x), p.batch)),
        end(min(begin + share, p.batch)),
        offsets(p.cu_seqlens_q, p.cu_seqlens_k, p.wide_offsets, begin, min(end - begin, chunk_size())),
        blocks(p),
        loaded(begin) {
    meanwhile();
    clear_counts();
    if (threadIdx.x < 3) memory.totals[threadIdx.x] = {};
    tiles = cut_chunk(memory.chunk, offsets, min(end - begin, chunk_size()), Blocks::kOfKeys, blocks.size(), p.block_n, p.max_items);
  }

  static __device__ __forceinline__ int threads() { return blockDim.x; }
  static __device__ __forceinline__ int chunk_size() { return kPerThread * blockDim.x; }
  // How many of `count` a thread has, at most.
  static __device__ __forceinline__ int share(int count) { return (count + threads() - 1) >> (31 - __clz(threads())); }

  __device__ __forceinline__ void clear_counts() {
#pragma unroll 1
    for (int bucket = threadIdx.x; bucket < kBuckets; bucket += threads()) memory.counts[bucket] = 0;
  }

  // The sequence in the chunk that a tile belongs to.
  __device__ __forceinline__ int owner(int tile) const {
    const auto& chunk = memory.chunk;
    return tile < chunk.kHeldTiles ? chunk.owners[tile] : chunk.search(tile, min(end - loaded, chunk_size()));
  }

  // Calls work(how many sequences it has) with each chunk of this CTA's sequences in shared memory.
  template <typename Work>
  __device__ __forceinline__ void for_each_chunk(Work work) {
    if constexpr (kCtas == 1) {
      work(end);
    } else {
      const auto& p = blocks.p;
#pragma unroll 1
      for (int from = begin; from < end; from += chunk_size()) {
        const int sequences = min(end - from, chunk_size());
        if (from != loaded) {
          tiles = next_chunk(memory.chunk, p.cu_seqlens_q, p.cu_seqlens_k, p.wide_offsets, from, sequences, Blocks::kOfKeys,
                             blocks.size(), p.block_n, p.max_items);
          loaded = from;
        }
        work(sequences);
      }
    }
  }

  // Calls work(number of the chunk's first tile among this CTA's, tile in the chunk) in all threads, also those that are
  // left over at the end of a chunk. Returns how many tiles this CTA has.
  template <typename Work>
  __device__ __forceinline__ int for_each_tile(Work work) {
    int before = 0;
    for_each_chunk([&](int) {
#pragma unroll 1
      for (int base = 0; base < tiles; base += threads()) work(before, base + static_cast<int>(threadIdx.x));
      before += tiles;
    });
    return before;
  }

  template <typename T>
  __device__ __forceinline__ const T& of(const T& variable, int cta) const {
    return kCtas == 1 ? variable : *variable_of(&variable, cta);
  }

  __device__ __forceinline__ void await_others() const {
    if (kCtas == 1) {
      __syncthreads();
    } else {
      __syncwarp();
      cluster_arrive();
      cluster_wait();
    }
  }

  // What all CTAs have in `own`, which is complete, in all; in `before` that of the CTAs before this one.
  __device__ __forceinline__ Totals over_all(const Totals& own, Totals& before) {
    await_others();
    if (kCtas == 1) {
      before = {};
      return own;
    }
    if (threadIdx.x < 32) sum_over_ctas<kCtas>(own, memory.all, memory.before);
    __syncthreads();
    before = memory.before;
    return memory.all;
  }

  // From the complete counts of all CTAs, of which none is before bucket `dearest` of its kind, the place in the list of each
  // other bucket's first item of this CTA, for all threads after their next barrier. Calls each(bucket, where it begins, of
  // all CTAs) in one thread. Where `alike` the first kind's items have the second's buckets, whatever they were counted as.
  template <typename Each>
  __device__ __forceinline__ void begin_buckets(int dearest, bool alike, Each each) {
    const int live = kWorkBuckets - dearest;  // of a kind
    const int each_has = share(kBuckets / kWorkBuckets * live), first = each_has * threadIdx.x;
    const int last = min(first + each_has, kBuckets / kWorkBuckets * live);
    auto bucket_of = [&](int number) { return number < live ? dearest + number : kWorkBuckets + dearest + number - live; };
    auto count = [&](int bucket, int& before) {
      int all = 0;
#pragma unroll
      for (int cta = 0; cta < kCtas; ++cta) {
        if (cta == blockIdx.x) before = all;
        const bool is_first = kBuckets > kWorkBuckets && bucket < kWorkBuckets;
        if (!alike || !is_first) all += of(memory.counts[bucket], cta);
        if (alike && kBuckets > kWorkBuckets && !is_first) all += of(memory.counts[bucket - kWorkBuckets], cta);
      }
      return all;
    };
    int before = 0, all = 0;
#pragma unroll 1
    for (int number = first; number < last; ++number) all += count(bucket_of(number), before);
    int begin = sum_over_threads<1>({all}).before.of[0];
#pragma unroll 1
    for (int number = first; number < last; ++number) {
      const int bucket = bucket_of(number);
      if (each_has > 1) all = count(bucket, before);
      memory.begins[bucket] = begin + before;
      each(bucket, begin);
      begin += all;
    }
  }

  // Before all rounds of a pass but the first, where they come one after the other: tiles of a sequence then stay neighbours,
  // and share in L2.
  __device__ __forceinline__ void begin_round(int tile) const {
    if (tile >= threads()) __syncthreads();
  }

  // After the last look at other CTAs' shared memory, and before the end: it stays until all have looked.
  __device__ __forceinline__ void leave() const {
    __syncwarp();
    if (kCtas > 1) cluster_arrive();
  }
  __device__ __forceinline__ void await_leave() const {
    __syncwarp();
    if (kCtas > 1) cluster_wait();
  }
};
