// The one parameter block of every CUDA kernel (ABI_VERSION in runtime/artifact.py; runtime/cuda/params.py packs the same bytes).
#pragma once

struct alignas(64) TensorMap {
  unsigned long long opaque[16];
};

struct RowTensor {  // (tokens, heads, dim), its last dimension contiguous; of any alignment
  void* address;
  long long token_stride;  // bytes
  long long head_stride;
};

struct alignas(64) Params {
  TensorMap map_q;    // ragged maps: rows past a sequence's end read as zeros and are not stored
  TensorMap map_k;
  TensorMap map_v;
  TensorMap map_out;
  const void* cu_seqlens_q;  // (batch + 1) int32 or int64
  const void* cu_seqlens_k;
  void* work_list;           // WorkListHeader, items in two orders, tickets where keys are split
  float* lse;                // (heads, total_q) or null
  int batch;
  int heads;
  int gqa_ratio;             // heads / heads_kv
  int total_q;
  int max_items;             // capacity of the work list
  int wide_offsets;          // bit 0: cu_seqlens_q is int64, bit 1: cu_seqlens_k is
  int bottom_right;          // causal alignment of unequal lengths
  int block_m;               // for the work list builder only; constants in the attention kernels
  int block_n;
  int causal_rows;           // of one warpgroup where masks are causal, else 0
  float scale_log2;          // softmax scale times log2(e), positive
  // Of kernels that split keys (algorithm split), for which `heads` and `gqa_ratio` count packs of heads:
  int packed_heads;          // query heads of one kv head that share a tile
  int extra_items;           // of max_items, those for pieces of keys beyond the first of a row block
  int results;               // of one piece and warpgroup, at most; as many tickets and partials there are
  void* partials;
  // Of kernels that copy rows themselves (cp.async), in place of the maps; `out` of those that store it from registers, too:
  RowTensor q;
  RowTensor k;
  RowTensor v;
  RowTensor out;
};
