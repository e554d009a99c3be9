// The backward's work list: blocks of keys, with the query blocks that see them.
//
// Sequences with the longest tiles come first, so that none of them is left to end alone. Some pairs of a sequence and a kv
// head go side by side, key block by key block: a few heads of a long sequence, or all heads of a few short ones. The fewer
// they are, the sooner a pair's next key block reads what this one read, from L2. Where additions to dQ have an order, a
// tile that starts too soon after the key block before waits for it: the more pairs there are, the later it starts.
#pragma once

#include "cuda/include/backward_params.cuh"
#include "cuda/include/work_list.cuh"

struct KeyBlocks {
  const BackwardParams& p;

  __device__ __forceinline__ int count(int seq) const {
    const int length =
        offset_at(p.cu_seqlens_k, seq + 1, p.wide_offsets & 2) - offset_at(p.cu_seqlens_k, seq, p.wide_offsets & 2);
    return (max(length, 0) + p.block_n - 1) / p.block_n;
  }

  // Queries that see no key are left out: the sequence begins with the first that does.
  __device__ __forceinline__ WorkItem item(int seq, int block) const {
    WorkItem item = {};
    item.q_begin = offset_at(p.cu_seqlens_q, seq, p.wide_offsets & 1);
    item.q_length = max(offset_at(p.cu_seqlens_q, seq + 1, p.wide_offsets & 1) - item.q_begin, 0);
    item.k_begin = offset_at(p.cu_seqlens_k, seq, p.wide_offsets & 2);
    item.k_length = offset_at(p.cu_seqlens_k, seq + 1, p.wide_offsets & 2) - item.k_begin;
    item.row = block * p.block_n;
    item.turn = item.k_begin / p.block_n + seq + block;
    int first_row = 0;
    if (p.causal) {
      if (p.bottom_right && item.q_length > item.k_length) {
        item.q_begin += item.q_length - item.k_length;
        item.q_length = item.k_length;
      }
      const int shift = p.bottom_right ? item.k_length - item.q_length : 0;
      const bool seen = item.row < item.q_length + shift;
      first_row = seen ? max(item.row - shift, 0) / p.block_m * p.block_m : item.q_length;
    }
    item.q_blocks = (item.q_length - first_row + p.block_m - 1) / p.block_m;
    return item;
  }

  // Steps of a sequence's longest tile, its first.
  __device__ __forceinline__ int longest(int seq) const { return item(seq, 0).q_blocks * p.gqa_ratio; }

  // Pairs side by side, of tiles of `steps` steps: all SMs together make pairs x steps of them from a key block of a pair to
  // its next. Each pair gets on by pairs x steps / SMs meanwhile, so what all of them read anew goes by the square of pairs:
  // 8 blocks of queries on 132 SMs, or 124 where additions have an order (8 MB of Q, dO and sums at D 128). Then tiles of
  // less than 16 steps come by so soon after each other that they would wait, and have more pairs.
  __device__ __forceinline__ float pairs(float steps) const {
    const float per_step = 1.0f / fmaxf(steps, 1.0f);
    return p.turns == nullptr ? sqrtf(1024.0f * per_step) : fmaxf(sqrtf(16384.0f * per_step), 512.0f * per_step);
  }
};

// The sequences in the order of work.
struct SortedKeyBlocks {
  const BackwardParams& p;
  const int* sequences;

  __device__ __forceinline__ int count(int place) const { return KeyBlocks{p}.count(sequences[place]); }
};

// Sets a bit for each query that sees a key: whether its dQ is complete in one block of keys or summed up. All 1024 threads.
__device__ __forceinline__ void mark_queries(const KeyBlocks& blocks) {
  const BackwardParams& p = blocks.p;
  const int lane = threadIdx.x % 32;
  for (int word = threadIdx.x; word < (p.total_q + 31) / 32; word += 1024) p.direct[word] = p.summed[word] = 0;
  __syncthreads();
  // A lane looks at a sequence, all of a warp mark its queries.
  for (int base = threadIdx.x - lane; base < p.batch; base += 1024) {
    WorkItem item = {};
    if (base + lane < p.batch) item = blocks.item(base + lane, 0);
    for (int i = 0; i < min(p.batch - base, 32); ++i) {
      // Offsets may promise more tokens than there are.
      const int begin = max(__shfl_sync(0xffffffff, item.q_begin, i), 0);
      const int end = min(begin + __shfl_sync(0xffffffff, item.q_length, i), p.total_q);
      const int keys = __shfl_sync(0xffffffff, item.k_length, i);
      if (begin >= end || keys <= 0) continue;
      unsigned* const marks = keys <= p.block_n ? p.direct : p.summed;
      for (int word = begin / 32 + lane; 32 * word < end; word += 32) {
        const int first = max(begin - 32 * word, 0), last = min(end - 32 * word, 32);
        atomicOr(&marks[word], 0xffffffffu >> (32 - (last - first)) << first);
      }
    }
  }
}

// One CTA of 1024 threads, any batch size: counting sort of sequences by their longest tile, then the place of each item.
extern "C" __global__ void __launch_bounds__(1024, 1) jagtile_build_work_list(const __grid_constant__ BackwardParams p) {
  __shared__ int warp_sums[32];
  __shared__ int bucket_begin[kWorkBuckets];
  __shared__ int bucket_end[kWorkBuckets];
  const KeyBlocks blocks = {p};
  WorkListHeader* header = static_cast<WorkListHeader*>(p.work_list);
  WorkItem* items = work_items(p.work_list);
  int* sequences = reinterpret_cast<int*>(items + p.max_items);  // in place of a second order of items
  int* first_item = reinterpret_cast<int*>(items + 2 * p.max_items);
  mark_queries(blocks);

  if (threadIdx.x < kWorkBuckets) bucket_end[threadIdx.x] = 0;
  __syncthreads();
  for (int seq = threadIdx.x; seq < p.batch; seq += 1024) atomicAdd(&bucket_end[work_bucket(blocks.longest(seq))], 1);
  __syncthreads();
  int begin;
  block_exclusive_scan(threadIdx.x < kWorkBuckets ? bucket_end[threadIdx.x] : 0, begin, warp_sums);
  if (threadIdx.x < kWorkBuckets) bucket_begin[threadIdx.x] = bucket_end[threadIdx.x] = begin;
  __syncthreads();
  for (int base = 0; base < p.batch; base += 1024) {
    const int seq = base + threadIdx.x;
    const unsigned lanes = __ballot_sync(0xffffffff, seq < p.batch);
    if (seq < p.batch) sequences[place_in_bucket(bucket_end, work_bucket(blocks.longest(seq)), lanes)] = seq;
  }
  __syncthreads();

  const int count = min(count_tiles(SortedKeyBlocks{p, sequences}, first_item, warp_sums), p.max_items);
  if (threadIdx.x == 0) first_item[p.batch] = count;
  __syncthreads();
  const int heads = p.heads / p.gqa_ratio;
  for (int index = threadIdx.x; index < count; index += 1024) {
    const int rank = sequence_of(first_item, p.batch, index), block = index - first_item[rank];
    const int bucket = work_bucket(blocks.longest(sequences[rank]));
    WorkItem item = blocks.item(sequences[rank], block);
    const float pairs = blocks.pairs(bucket_cost(bucket));  // the same for all of a bucket, whose sequences share places
    int place = index;
    if (pairs < heads) {
      const int groups = static_cast<int>(ceilf(heads / pairs));
      item.heads = (heads + groups - 1) / groups;
    } else {
      // All heads, and the key blocks of a few sequences in turn.
      item.heads = heads;
      const int members = static_cast<int>(pairs / heads + 0.5f);
      const int first = rank - (rank - bucket_begin[bucket]) % members, end = min(first + members, bucket_end[bucket]);
      place = first_item[first];
      for (int other = first; other < end; ++other) {
        place += min(first_item[other + 1] - first_item[other], other < rank ? block + 1 : block);
      }
    }
    if (place < p.max_items) items[place] = item;
  }
  if (threadIdx.x == 0) {
    header->items = count;
    header->next_tile = 0;
    header->finished_ctas = 0;
  }
}
