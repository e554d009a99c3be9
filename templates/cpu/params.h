// The parameter blocks of the CPU kernels (runtime/cpu/params.py packs the same bytes).
#pragma once

#include <cstdint>

struct Strides {  // in elements; the last stride is 1
  int64_t token, head;
};

struct Params {  // of a forward
  const void* q;    // (total_q, heads, head_dim)
  const void* k;    // (total_k, heads_kv, head_dim)
  const void* v;    // (total_k, heads_kv, head_dim_v)
  void* out;        // (total_q, heads, head_dim_v)
  float* lse;       // (heads, total_q), natural logarithm, or null
  const void* cu_seqlens_q;  // (batch + 1) int32 or int64
  const void* cu_seqlens_k;
  Strides q_strides, k_strides, v_strides, out_strides, lse_strides;
  int64_t total_q, total_k;
  int32_t batch;
  int32_t heads_kv;
  int32_t gqa_ratio;     // heads / heads_kv
  int32_t wide_offsets;  // bit 0: cu_seqlens_q is int64, bit 1: cu_seqlens_k is
  int32_t bottom_right;  // causal alignment of unequal lengths
  int32_t threads;       // at most so many
  float scale;           // of the softmax, any sign
  uint32_t kept;         // dropout: so many of 65536 weights are kept
  uint64_t seed;         // of its random numbers
  uint64_t offset;       // into their stream; the lower 32 bits count
};

struct GradientParams {  // of a backward, which reads out and lse
  Params forward;
  const void* dout;   // as out
  const float* dlse;  // as lse, or null for zeros
  void* dq;           // as q
  void* dk;           // as k
  void* dv;           // as v
  Strides dout_strides, dlse_strides, dq_strides, dk_strides, dv_strides;
};

// What a kernel returns.
enum Status : int32_t { kDone = 0, kBadOffsets = 1, kNoMemory = 2 };
