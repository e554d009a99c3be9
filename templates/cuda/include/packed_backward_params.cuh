// The parameter block of the backward for short sequences (runtime/cuda/packed_backward_params.py packs the same bytes).
// Its cubin has two kernels that take it, launched in this order on one stream:
//   jagtile_backward_prepare    delta = rowsum(dO * O) - dlse
//   <the variant's symbol>      dQ, dK and dV
#pragma once

#include "cuda/include/params.cuh"

struct alignas(64) PackedBackwardParams {
  TensorMap map_q;     // ragged maps; boxes of box_rows rows (launch facts of the variant)
  TensorMap map_dout;
  TensorMap map_k;
  TensorMap map_v;
  TensorMap map_dq;
  TensorMap map_dk;
  TensorMap map_dv;
  const void* cu_seqlens_q;  // (batch + 1) int32 or int64
  const void* cu_seqlens_k;
  const float* lse;          // (heads, total_q), natural log
  const float* dlse;         // (heads, total_q) or null
  const void* out;           // (total_q, heads, head_dim_v), rows of 16-byte pieces
  const void* dout;
  float* delta;              // (heads, total_q)
  long long out_token;       // strides, in elements
  long long out_head;
  long long dout_token;
  long long dout_head;
  int batch;
  int heads;
  int gqa_ratio;             // heads / heads_kv
  int total_q;
  int total_k;
  int wide_offsets;          // bit 0: cu_seqlens_q is int64, bit 1: cu_seqlens_k is
  int bottom_right;          // causal alignment of unequal lengths
  float scale;               // of any sign
  float scale_log2;          // times log2(e)
};
