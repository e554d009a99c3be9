// The forward's work list: blocks of query rows, with the key blocks that they visit.
#pragma once

#include "cuda/include/params.cuh"
#include "cuda/include/work_list.cuh"

struct QueryBlocks {
  const Params& p;

  __device__ __forceinline__ int count(int seq) const {
    const int length =
        offset_at(p.cu_seqlens_q, seq + 1, p.wide_offsets & 1) - offset_at(p.cu_seqlens_q, seq, p.wide_offsets & 1);
    return (max(length, 0) + p.block_m - 1) / p.block_m;
  }

  __device__ __forceinline__ WorkItem item(int seq, int block) const {
    WorkItem item = {};
    item.q_begin = offset_at(p.cu_seqlens_q, seq, p.wide_offsets & 1);
    item.q_length = offset_at(p.cu_seqlens_q, seq + 1, p.wide_offsets & 1) - item.q_begin;
    item.k_begin = offset_at(p.cu_seqlens_k, seq, p.wide_offsets & 2);
    item.k_length = offset_at(p.cu_seqlens_k, seq + 1, p.wide_offsets & 2) - item.k_begin;
    item.row = block * p.block_m;
    int visible = item.k_length;
    if (p.causal) {
      const int last_row = min(item.row + p.block_m, item.q_length) - 1;
      const int shift = p.bottom_right ? item.k_length - item.q_length : 0;
      visible = min(visible, max(last_row + shift + 1, 0));
    }
    item.kv_blocks = (visible + p.block_n - 1) / p.block_n;
    return item;
  }

  __device__ __forceinline__ int cost(const WorkItem& item) const { return item.kv_blocks; }
};

extern "C" __global__ void __launch_bounds__(1024, 1) jagtile_build_work_list(const __grid_constant__ Params p) {
  build_work_list(QueryBlocks{p});
}
