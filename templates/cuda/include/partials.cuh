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
    for (int i = 2 * h; i < kColumns / 2; i += 4) {
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

// A lane's columns of a row of O, and the row's state, as its pieces are added up.
template <int kChunks>
struct RowSum {
  float4 output[kChunks] = {};
  float offset = -INFINITY, sum = 0.0f;

  __device__ __forceinline__ void add(float piece_offset, float piece_sum, const float4 (&piece)[kChunks]) {
    if (piece_sum == 0.0f) return;  // no key seen, or no such piece
    const float reference = fmaxf(offset, piece_offset);
    const float kept = exp2_approx(offset - reference), factor = exp2_approx(piece_offset - reference);
    offset = reference;
    sum = fmaf(sum, kept, factor * piece_sum);
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const float4 scaled = {factor * piece[i].x, factor * piece[i].y, factor * piece[i].z, factor * piece[i].w};
      output[i] = {fmaf(output[i].x, kept, scaled.x), fmaf(output[i].y, kept, scaled.y),
                   fmaf(output[i].z, kept, scaled.z), fmaf(output[i].w, kept, scaled.w)};
    }
  }
};

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
// 64-column panels of 128-byte rows. A warp takes a few rows at a time, a lane four columns of each, and has several pieces
// on their way at once: one by one, a tile's rows would wait for memory longer than its products take. `store_lse` takes a
// row, what its probabilities are relative to, and their sum.
template <Pack kPack, int kColumns, int kPanelBytes, typename StoreLse>
__device__ __forceinline__ void combine_partials(const PartialRows<kColumns>& partials, unsigned char* panels, int warp,
                                                 int lane, StoreLse store_lse) {
  constexpr int kChunks = (kColumns + 127) / 128;
  constexpr int kRows = kChunks == 1 ? 2 : 1, kPieces = 4;  // at a time
  auto has_token = [&](int row) {
    return packed_row(row, partials.tokens, partials.heads).token < partials.valid_tokens;
  };
#pragma unroll 1
  for (int first = warp % 4; first < 64; first += 4 * kRows) {
    bool wanted[kRows], any = false;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      wanted[r] = has_token(first + 4 * r);
      any |= wanted[r];
    }
    if (!any) continue;

    // A lane loads the offset or the sum of one row's piece.
    const int own_row = first + lane / (2 * kPieces) * 4, own_piece = lane / 2 % kPieces;
    const int own_pieces = lane < 2 * kPieces * kRows && has_token(own_row) ? partials.pieces : 0;
    RowSum<kChunks> sums[kRows];
#pragma unroll 1
    for (int begin = 0; begin < partials.pieces; begin += kPieces) {
      const Partial<kColumns>* piece = partials.first + begin * partials.stride;
      float state = 0.0f;
      if (begin + own_piece < own_pieces) {
        state = __ldcg(reinterpret_cast<const float*>(&piece[own_piece * partials.stride].state[own_row]) + lane % 2);
      }
      float4 outputs[kRows][kPieces][kChunks] = {};
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          if (begin + i >= partials.pieces || !wanted[r]) continue;
#pragma unroll
          for (int chunk = 0; chunk < kChunks; ++chunk) {
            const int column = 128 * chunk + 4 * lane;
            const float* output = &piece[i * partials.stride].output[first + 4 * r][column];
            if (column < kColumns) outputs[r][i][chunk] = __ldcg(reinterpret_cast<const float4*>(output));
          }
        }
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
          const int owner = 2 * (r * kPieces + i);
          sums[r].add(__shfl_sync(0xffffffff, state, owner), __shfl_sync(0xffffffff, state, owner + 1), outputs[r][i]);
        }
      }
    }

#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (!wanted[r]) continue;
      const int row = first + 4 * r;
      const float inverse = inverse_of_sum(sums[r].sum);
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        const int column = 128 * chunk + 4 * lane;
        const float4& sum = sums[r].output[chunk];
        if (column < kColumns) {
          unsigned char* group = panels + column / 64 * kPanelBytes + row * 128 + (column % 64 / 8 ^ row % 8) * 16;
          *reinterpret_cast<uint2*>(group + column % 8 * 2) =
              make_uint2(kPack(sum.x * inverse, sum.y * inverse), kPack(sum.z * inverse, sum.w * inverse));
        }
      }
      if (lane == 0) store_lse(packed_row(row, partials.tokens, partials.heads), sums[r].offset, sums[r].sum);
    }
  }
}
