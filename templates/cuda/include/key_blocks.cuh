// The backward's work list: blocks of keys, with the query blocks that see them.
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
    item.turn = item.q_begin / p.block_m + seq;
    if (p.causal) {
      if (p.bottom_right && item.q_length > item.k_length) {
        item.q_begin += item.q_length - item.k_length;
        item.q_length = item.k_length;
      }
      const int shift = p.bottom_right ? item.k_length - item.q_length : 0;
      const bool seen = item.row < item.q_length + shift;
      item.first_row = seen ? max(item.row - shift, 0) / p.block_m * p.block_m : item.q_length;
    }
    item.q_blocks = (item.q_length - item.first_row + p.block_m - 1) / p.block_m;
    return item;
  }

  __device__ __forceinline__ int cost(const WorkItem& item) const { return item.q_blocks; }

  // The first keys are seen by the most queries. Where additions to dQ have an order, key blocks add in the order of the
  // list, and the last is the first to be done with a query block that all of them see.
  __device__ __forceinline__ bool last_first() const { return p.causal && p.turns != nullptr; }
};

extern "C" __global__ void __launch_bounds__(1024, 1) jagtile_build_work_list(const __grid_constant__ BackwardParams p) {
  build_work_list(KeyBlocks{p});
}
