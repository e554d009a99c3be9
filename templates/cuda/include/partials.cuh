// Results of a piece of the keys, left in memory by the CTA that visited it, and their sum by the last one to come.
#pragma once
#include <cmath>
#include <cstdint>

#include "cuda/include/fragments.cuh"
#include "cuda/include/packed_heads.cuh"
#include "cuda/include/ptx.cuh"
#include "cuda/include/softmax.cuh"

// Of one warpgroup's 64 rows over one piece. Rows without a token are neither written nor read.
template <int kColumns>
struct alignas(16) Partial {
  float output[64][kColumns];  // not normalised
  float2 state[64];            // what probabilities are relative to (base 2; -inf: no key seen), their sum
};

// `wanted`: whether the thread's two rows have a token.
template <int kHeadroom, int kColumns, int kRegisters>
__device__ __forceinline__ void leave_partial(Partial<kColumns>& partial, const float (&output)[kRegisters],
                                              const RowState& rows, const bool (&wanted)[2], int warp, int lane,
                                              float scale_log2) {
  const int column = 2 * (lane % 4);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = 16 * (warp % 4) + lane / 4 + 8 * h;
    const float sum = sum_of_row(rows.sum[h]);
    if (!wanted[h]) continue;
    if (column == 0) {
      const float offset = sum == 0.0f ? -INFINITY : probability_offset<kHeadroom>(rows.reference[h], scale_log2);
      partial.state[row] = make_float2(offset, sum);
    }
#pragma unroll
    for (int i = 2 * h; i < kRegisters; i += 4) {
      *reinterpret_cast<float2*>(&partial.output[row][2 * i - 4 * h + column]) = make_float2(output[i], output[i + 1]);
    }
  }
}

// Whether this warpgroup is the last of `pieces` to leave its partial: it sees those of all others then.
__device__ __forceinline__ bool is_last_piece(int* ticket, int pieces, int barrier, bool leader) {
  named_barrier_sync(barrier, 128);
  bool last = false;
  if (leader) {
    __threadfence();
    last = atomicAdd(ticket, 1) == pieces - 1;
    if (last) *ticket = 0;  // for the next launch
    __threadfence();
  }
  return any_of_warpgroup(barrier, last);
}

__device__ __forceinline__ float max_of_warp(float value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value = fmaxf(value, __shfl_xor_sync(0xffffffff, value, step));
  return value;
}

__device__ __forceinline__ float sum_of_warp(float value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffff, value, step);
  return value;
}

__device__ __forceinline__ void add_scaled(float4& sum, float factor, const float4& value) {
  sum = make_float4(fmaf(factor, value.x, sum.x), fmaf(factor, value.y, sum.y), fmaf(factor, value.z, sum.z),
                    fmaf(factor, value.w, sum.w));
}

// Where a warpgroup's pieces are, and what its rows are.
template <int kColumns>
struct PartialRows {
  const Partial<kColumns>* first;
  int pieces;
  long long stride;   // from piece to piece
  int tokens;         // of a head among the 64 rows
  int heads;          // packed
  int valid_tokens;   // of `tokens`, before the sequence ends
};

// Adds up the pieces in their order, whoever left them when, and writes the normalised rows, packed, into swizzled
// 64-column panels of 128-byte rows. A warp takes a row at a time, a lane four columns. `store_lse` takes a row, what its
// probabilities are relative to, and their sum.
template <Pack kPack, int kColumns, int kPanelBytes, typename StoreLse>
__device__ __forceinline__ void combine_partials(const PartialRows<kColumns>& partials, unsigned char* panels, int warp,
                                                 int lane, StoreLse store_lse) {
  constexpr int kChunks = (kColumns + 127) / 128;
  for (int row = warp % 4; row < 64; row += 4) {
    const PackedRow packed = packed_row(row, partials.tokens, partials.heads);
    if (packed.token >= partials.valid_tokens) continue;

    float maximum = -INFINITY;
    for (int piece = lane; piece < partials.pieces; piece += 32) {
      maximum = fmaxf(maximum, __ldcg(&partials.first[piece * partials.stride].state[row]).x);
    }
    maximum = max_of_warp(maximum);
    float total = 0.0f;
    float4 sums[kChunks] = {};
    for (int begin = 0; begin < partials.pieces; begin += 32) {
      float weight = 0.0f;  // of the piece that is this lane's
      if (begin + lane < partials.pieces && maximum != -INFINITY) {
        const float2 state = __ldcg(&partials.first[(begin + lane) * partials.stride].state[row]);
        weight = exp2_approx(state.x - maximum);
        total = fmaf(weight, state.y, total);
      }
      const int count = min(32, partials.pieces - begin);
#pragma unroll 8
      for (int piece = 0; piece < count; ++piece) {
        const float factor = __shfl_sync(0xffffffff, weight, piece);
        const float* output = partials.first[(begin + piece) * partials.stride].output[row];
#pragma unroll
        for (int chunk = 0; chunk < kChunks; ++chunk) {
          const int column = 128 * chunk + 4 * lane;
          if (column < kColumns) add_scaled(sums[chunk], factor, __ldcg(reinterpret_cast<const float4*>(output + column)));
        }
      }
    }
    total = sum_of_warp(total);
    const float inverse = inverse_of_sum(total);
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const int column = 128 * chunk + 4 * lane;
      if (column < kColumns) {
        unsigned char* group = panels + column / 64 * kPanelBytes + row * 128 + (column % 64 / 8 ^ row % 8) * 16;
        *reinterpret_cast<uint2*>(group + column % 8 * 2) =
            make_uint2(kPack(sums[chunk].x * inverse, sums[chunk].y * inverse),
                       kPack(sums[chunk].z * inverse, sums[chunk].w * inverse));
      }
    }
    if (lane == 0) store_lse(packed, maximum, total);
  }
}
