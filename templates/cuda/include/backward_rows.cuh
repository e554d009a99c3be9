// The backward's two passes over rows, before and after the attention kernel. A row is a query and head; some lanes of a
// warp work on one, 16 bytes a lane.
#pragma once
#include <cstdint>

#include "cuda/include/backward_params.cuh"
#include "cuda/include/dq_sums.cuh"
#include "cuda/include/ptx.cuh"

using Unpack = float2 (*)(uint32_t);
using PackPair = uint32_t (*)(float, float);

// The smallest power of two, up to a warp, that is not below `count`.
__host__ __device__ constexpr int lanes_for(int count) { return count <= 1 ? 1 : 2 * lanes_for((count + 1) / 2); }

// Calls work(token, head, lane of the row, whether there is such a row) with whole warps, `kLanes` lanes a row.
template <int kLanes, typename Work>
__device__ __forceinline__ void for_each_row(const BackwardParams& p, Work work) {
  const unsigned rows = static_cast<unsigned>(p.heads) * p.total_q;
  const unsigned step = gridDim.x * blockDim.x / kLanes;
  const unsigned first = (blockIdx.x * blockDim.x + threadIdx.x) / 32 * 32 / kLanes;
  const unsigned inside = threadIdx.x % 32 / kLanes;
  for (unsigned base = first; base < rows; base += step) {
    const unsigned row = base + inside;
    const unsigned token = row / p.heads;
    work(token, row - token * p.heads, threadIdx.x % kLanes, row < rows);
  }
}

template <Unpack kUnpack>
__device__ __forceinline__ float dot_x2(uint32_t a, uint32_t b) {
  const float2 left = kUnpack(a), right = kUnpack(b);
  return fmaf(left.x, right.x, left.y * right.y);
}

// delta = rowsum(dO * O) - dlse; sums and turns become zero.
template <int kHeadDim, int kHeadDimV, Unpack kUnpack>
__device__ __forceinline__ void prepare_rows(const BackwardParams& p) {
  constexpr int kLanes = lanes_for(kHeadDimV / 8);
  for_each_row<kLanes>(p, [&](int token, int head, int lane, bool exists) {
    float delta = 0.0f;
    if (exists && 8 * lane < kHeadDimV) {
      const uint16_t* out = static_cast<const uint16_t*>(p.out) + token * p.out_token + head * p.out_head;
      const uint16_t* dout = static_cast<const uint16_t*>(p.dout) + token * p.dout_token + head * p.dout_head;
      const uint4 a = reinterpret_cast<const uint4*>(out)[lane], b = reinterpret_cast<const uint4*>(dout)[lane];
      delta = dot_x2<kUnpack>(a.x, b.x) + dot_x2<kUnpack>(a.y, b.y) + dot_x2<kUnpack>(a.z, b.z) + dot_x2<kUnpack>(a.w, b.w);
    }
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2) delta += __shfl_xor_sync(0xffffffff, delta, distance);
    if (exists && lane == 0) {
      const long long at = static_cast<long long>(head) * p.total_q + token;
      p.delta[at] = delta - (p.dlse == nullptr ? 0.0f : p.dlse[at]);
    }
  });
  const long long thread = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
  const long long threads = static_cast<long long>(gridDim.x) * blockDim.x;
  const long long pieces = static_cast<long long>(p.heads) * p.total_q * (kHeadDim / 4);
  for (long long i = thread; i < pieces; i += threads) reinterpret_cast<float4*>(p.dq_sums)[i] = {0.0f, 0.0f, 0.0f, 0.0f};
  if (p.turns != nullptr) {
    for (long long i = thread; i < p.turn_count; i += threads) p.turns[i] = 0;
  }
}

// dq = scale * sums, 16 columns a lane.
template <typename Sums, PackPair kPackPair>
__device__ __forceinline__ void finish_rows(const BackwardParams& p) {
  constexpr int kHeadDim = Sums::kColumns;
  constexpr int kLanes = lanes_for((kHeadDim + 15) / 16);
  for_each_row<kLanes>(p, [&](int token, int head, int lane, bool exists) {
    if (!exists || 16 * lane >= kHeadDim) return;
    const int panel = lane / 4, group = lane % 4, columns = Sums::columns(panel);
    const float* sums = Sums::row(p.dq_sums, p.total_q, head, panel, token);
    uint16_t* dq = static_cast<uint16_t*>(p.dq) + token * p.dq_token + head * p.dq_head + 16 * lane;
    if (columns - 16 * group >= 16) {
      const float4* quads = reinterpret_cast<const float4*>(sums + (16 * group ^ Sums::group_swap(panel, token)));
      uint32_t low[4], high[4];
#pragma unroll
      for (int quad = 0; quad < 4; ++quad) {
        const float4 values = quads[quad];
        low[quad] = kPackPair(p.scale * values.x, p.scale * values.y);
        high[quad] = kPackPair(p.scale * values.z, p.scale * values.w);
      }
      reinterpret_cast<uint4*>(dq)[0] = {low[0], low[1], low[2], low[3]};
      reinterpret_cast<uint4*>(dq)[1] = {high[0], high[1], high[2], high[3]};
    } else {
      const float4* values = reinterpret_cast<const float4*>(sums + 16 * group);
      const float4 a = values[0], b = values[1];
      reinterpret_cast<uint4*>(dq)[0] = {kPackPair(p.scale * a.x, p.scale * a.y), kPackPair(p.scale * a.z, p.scale * a.w),
                                         kPackPair(p.scale * b.x, p.scale * b.y), kPackPair(p.scale * b.z, p.scale * b.w)};
    }
  });
}
