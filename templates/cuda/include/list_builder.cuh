// What the kernels that build work lists share. One CTA builds a short list, a cluster of them a long one: each CTA has its
// share of the sequences. Offsets are read once, into shared memory; CTAs read each other's counts there.
#pragma once
#include <cstdint>

#include "cuda/include/offsets.cuh"
#include "cuda/include/ptx.cuh"
#include "cuda/include/work_list.cuh"

constexpr int kBuilderThreads = 1024;
constexpr int kClusterCtas = 8;              // the largest cluster that is portable
constexpr int kChunk = 2 * kBuilderThreads;  // sequences in shared memory at a time
constexpr int kHeldTiles = 4096;             // of a chunk, whose sequences are found once
constexpr int kWorkBuckets = 512;

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

struct Sum {
  int before, all;
};

// Prefix sum over the threads of a builder CTA. Not inlined, as a builder's time is to a good part that of its code's first
// way into the caches.
__device__ __noinline__ Sum sum_over_threads(int value, int* warp_sums) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  int inclusive = value;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(0xffffffff, inclusive, step);
    if (lane >= step) inclusive += other;
  }
  if (lane == 31) warp_sums[warp] = inclusive;
  __syncthreads();
  if (warp == 0) {
    int sum = warp_sums[lane];
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(0xffffffff, sum, step);
      if (lane >= step) sum += other;
    }
    warp_sums[lane] = sum;
  }
  __syncthreads();
  const Sum sum = {inclusive - value + (warp ? warp_sums[warp - 1] : 0), warp_sums[31]};
  __syncthreads();
  return sum;
}

struct Sequence {
  int q_begin, q_length, k_begin, k_length;
};

// Of the tiles of one CTA, or of all.
struct Totals {
  int items;
  int slots;  // of pieces, where keys are split
  int longest;
  unsigned cost_low, cost_high;  // 20 bits and the rest: shared memory adds no 64 bits at once

  __device__ __forceinline__ unsigned long long cost() const {
    return (static_cast<unsigned long long>(cost_high) << 20) + cost_low;
  }

  // Adds up all threads' values.
  __device__ __forceinline__ void add(int own_items, int own_slots) {
    const int all_items = __reduce_add_sync(0xffffffff, own_items), all_slots = __reduce_add_sync(0xffffffff, own_slots);
    if (threadIdx.x % 32 != 0) return;
    atomicAdd(&items, all_items);
    atomicAdd(&slots, all_slots);
  }

  __device__ __forceinline__ void add_costs(unsigned long long own_cost, int own_longest) {
    const unsigned low = __reduce_add_sync(0xffffffff, static_cast<unsigned>(own_cost) & 0xfffff);
    const unsigned high = __reduce_add_sync(0xffffffff, static_cast<unsigned>(own_cost >> 20));
    const int most = __reduce_max_sync(0xffffffff, own_longest);
    if (threadIdx.x % 32 != 0) return;
    atomicAdd(&cost_low, low);
    atomicAdd(&cost_high, high);
    atomicMax(&longest, most);
  }
};

// Sequences whose offsets are in shared memory, and their tiles.
struct Chunk {
  int q[kChunk + 1], k[kChunk + 1];  // offsets
  int first_tile[kChunk + 1];        // of each sequence
  uint16_t owners[kHeldTiles];       // of tiles: their sequences

  __device__ __forceinline__ Sequence sequence(int index) const {
    return {q[index], max(q[index + 1] - q[index], 0), k[index], max(k[index + 1] - k[index], 0)};
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
};

// Takes sequences `from` and following, as many as given, from `q` and `k`, and cuts the former or the latter into tiles of
// `block` tokens. Returns how many these are. All threads of a builder CTA. Parameters are values, as these are at hand.
__device__ __noinline__ int load_chunk(Chunk& chunk, const void* q, const void* k, int wide_offsets, int from,
                                       int sequences, bool of_keys, int block, int most_tiles, int* warp_sums) {
  // All on their way at once: two a thread, and what ends the last sequence.
  constexpr int kPerThread = kChunk / kBuilderThreads + 1;
  int q_offsets[kPerThread], k_offsets[kPerThread];
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int index = from + min(i * kBuilderThreads + static_cast<int>(threadIdx.x), sequences);
    q_offsets[i] = offset_at(q, index, wide_offsets & 1);
    k_offsets[i] = offset_at(k, index, wide_offsets & 2);
  }
  __syncthreads();  // the chunk before is done with
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int index = i * kBuilderThreads + threadIdx.x;
    if (index > sequences) break;
    chunk.q[index] = q_offsets[i];
    chunk.k[index] = k_offsets[i];
  }
  __syncthreads();
  const int* cut = of_keys ? chunk.k : chunk.q;
  auto count = [&](int i) {
    return i < sequences ? min((max(cut[i + 1] - cut[i], 0) + block - 1) / block, most_tiles) : 0;
  };
  const int first = 2 * threadIdx.x, here = count(first), next = count(first + 1);
  const Sum tiles = sum_over_threads(here + next, warp_sums);
  chunk.first_tile[first] = tiles.before;
  chunk.first_tile[first + 1] = tiles.before + here;
  if (threadIdx.x == 0) chunk.first_tile[kChunk] = tiles.all;
  __syncthreads();
#pragma unroll 1
  for (int tile = threadIdx.x; tile < min(tiles.all, kHeldTiles); tile += kBuilderThreads) {
    chunk.owners[tile] = chunk.search(tile, sequences);
  }
  return tiles.all;
}

// A builder CTA's shared memory.
template <int kBuckets>
struct BuilderMemory {
  Chunk chunk;
  int counts[kBuckets];  // of this CTA's items
  int begins[kBuckets];  // places of the next ones in the list
  int warp_sums[32];
  Totals totals[3];      // of this CTA's tiles, counted up to three times
  Totals parts[kClusterCtas];
};

// CTA blockIdx.x of kCtas that build a list together. `Blocks` has the parameters `p`, and says what is cut into blocks, and how
// large these are.
template <int kCtas, int kBuckets, typename Blocks>
struct ListBuilder {
  using Memory = BuilderMemory<kBuckets>;

  const Blocks& blocks;
  Memory& memory;
  int begin, end;        // its sequences
  int loaded, tiles = 0;  // the first sequence of the chunk in shared memory, and that chunk's tiles

  __device__ __forceinline__ ListBuilder(const Blocks& blocks, Memory& memory) : blocks(blocks), memory(memory) {
    const int share = (blocks.p.batch + kCtas - 1) / kCtas;
    begin = min(share * static_cast<int>(blockIdx.x), blocks.p.batch);
    end = min(begin + share, blocks.p.batch);
    loaded = -1;
    clear_counts();
    if (threadIdx.x < 3) memory.totals[threadIdx.x] = {};
    if (begin == end) __syncthreads();  // others have barriers as they take their first chunk
  }

  __device__ __forceinline__ void clear_counts() {
    if (threadIdx.x < kBuckets) memory.counts[threadIdx.x] = 0;
  }

  // The sequence in the chunk that a tile belongs to. A tile's thread is always the same.
  __device__ __forceinline__ int owner(int tile) const {
    return tile < kHeldTiles ? memory.chunk.owners[tile] : memory.chunk.search(tile, min(end - loaded, kChunk));
  }

  // Calls work(how many sequences it has) with each chunk of this CTA's sequences in shared memory.
  template <typename Work>
  __device__ __forceinline__ void for_each_chunk(Work work) {
    const auto& p = blocks.p;
#pragma unroll 1
    for (int from = begin; from < end; from += kChunk) {
      const int sequences = min(end - from, kChunk);
      if (from != loaded) {
        tiles = load_chunk(memory.chunk, p.cu_seqlens_q, p.cu_seqlens_k, p.wide_offsets, from, sequences, Blocks::kOfKeys,
                           blocks.size(), p.max_items, memory.warp_sums);
        loaded = from;
      }
      work(sequences);
    }
  }

  // Calls work(number of the chunk's first tile among this CTA's, tile in the chunk) in all threads, also those that are
  // left over at the end of a chunk. Returns how many tiles this CTA has.
  template <typename Work>
  __device__ __forceinline__ int for_each_tile(Work work) {
    int before = 0;
    for_each_chunk([&](int) {
#pragma unroll 1
      for (int base = 0; base < tiles; base += kBuilderThreads) work(before, base + static_cast<int>(threadIdx.x));
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
    if (threadIdx.x < kCtas) memory.parts[threadIdx.x] = of(own, threadIdx.x);
    __syncthreads();
    Totals all = {};
    before = {};
#pragma unroll
    for (int cta = 0; cta < kCtas; ++cta) {
      const Totals part = memory.parts[cta];
      if (cta == blockIdx.x) before = all;
      all = {all.items + part.items, all.slots + part.slots, max(all.longest, part.longest),
             all.cost_low + (part.cost_low & 0xfffff), all.cost_high + part.cost_high + (part.cost_low >> 20)};
    }
    return all;
  }

  // From the complete counts of all CTAs, of which none is before bucket `dearest` of its kind, the place in the list of each
  // bucket's first item of this CTA, for all threads after their next barrier. Returns where this thread's bucket begins, of
  // all CTAs.
  __device__ __forceinline__ int begin_buckets(int dearest) {
    const int bucket = threadIdx.x;
    int all = 0, before = 0;
    if (bucket < kBuckets && bucket % kWorkBuckets >= dearest) {
#pragma unroll
      for (int cta = 0; cta < kCtas; ++cta) {
        const int count = of(memory.counts[bucket], cta);
        if (cta < blockIdx.x) before += count;
        all += count;
      }
    }
    const int begin_of_all = sum_over_threads(all, memory.warp_sums).before;
    if (bucket < kBuckets) memory.begins[bucket] = begin_of_all + before;
    return begin_of_all;
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
