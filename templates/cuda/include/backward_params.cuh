// The parameter block of the CUDA backwards whose tiles are of one sequence (runtime/cuda/backward_params.py packs the
// same bytes; that of short sequences: packed_backward_params.cuh). A backward's cubin has four kernels that take it,
// launched in this order on one stream:
//   jagtile_build_work_list     once a batch: the list of key blocks, `direct` and `summed`
//   jagtile_backward_prepare    delta = rowsum(dO * O) - dlse; zeroes turns and, where the variant adds to dq_sums from
//                               registers, those of `summed` queries; or, where the variant computes delta itself
//                               (row_tasks.cuh), zeroes progress, turns, and dq of queries that are neither
//   <the variant's symbol>      dK, dV and dq of `direct` queries, which it writes whole; stores and adds dQ / scale of
//                               `summed` ones to dq_sums
//   jagtile_backward_finish     dq = scale * dq_sums, or 0, of queries that are not `direct`; not of such a variant
// dq_sums has no padding: head_dim floats a query and head, in an order that is between main kernel and finish. Only those
// of `summed` queries are used.
#pragma once

#include "cuda/include/params.cuh"

struct alignas(64) BackwardParams {
  TensorMap map_q;     // ragged maps; boxes of block_m rows
  TensorMap map_dout;  // block_m rows
  TensorMap map_k;     // block_n rows
  TensorMap map_v;     // block_n rows
  TensorMap map_dk;    // store_rows rows (launch facts of the variant)
  TensorMap map_dv;    // store_rows rows
  TensorMap map_rows_out;   // 32 rows (row_units.cuh)
  TensorMap map_rows_dout;  // 32 rows
  const void* cu_seqlens_q;  // (batch + 1) int32 or int64
  const void* cu_seqlens_k;
  void* work_list;           // WorkListHeader, items, room for as many, 2 * (batch + 1) scratch ints
  const float* lse;          // (heads, total_q), natural log
  const float* dlse;         // (heads, total_q) or null
  const void* out;           // (total_q, heads, head_dim_v), rows of 16-byte pieces
  const void* dout;
  void* dq;                  // (total_q, heads, head_dim), rows of 16-byte pieces
  float* delta;              // (heads, total_q)
  float* dq_sums;            // heads * total_q * head_dim
  int* turns;                // (heads_kv, max_items, adders), steps that a tile has added to the sums; null where none waits
  int* progress;             // of a launch's tasks over rows (row_tasks.cuh); behind it the sums of tiles in pieces; or null
  unsigned* direct;          // a bit a query: dQ is complete in one block of keys
  unsigned* summed;          // a bit a query: dQ has sums; of queries with neither bit it is zero
  long long out_token;       // strides, in elements
  long long out_head;
  long long dout_token;
  long long dout_head;
  long long dq_token;
  long long dq_head;
  int batch;
  int heads;
  int gqa_ratio;             // heads / heads_kv
  int total_q;               // heads * total_q < 2^31
  int max_items;             // capacity of the work list
  int wide_offsets;          // bit 0: cu_seqlens_q is int64, bit 1: cu_seqlens_k is
  int bottom_right;          // causal alignment of unequal lengths
  int block_m;               // for the work list builder only; constants in the attention kernels
  int block_n;
  int causal;
  int turn_count;            // ints of turns
  int progress_count;        // ints of progress
  int in_order;              // deterministic: additions to the sums have the order of the key blocks
  float scale;               // of any sign
  float scale_log2;          // times log2(e)
};
