// delta = rowsum(dO * O) - dlse, before a backward's attention kernel. A row is a query and head. A warp has the rows of one
// head and 16 tokens, and the warps beside it the other heads of these tokens: loads and stores are whole lines, several a
// thread are in flight, and nothing is divided row by row.
#pragma once
#include <cstdint>

#include "cuda/include/ptx.cuh"

using Unpack = float2 (*)(uint32_t);  // unpack_bf16 or unpack_fp16

constexpr int kRowThreads = 256;
constexpr int kRowTokens = 16;  // a warp

// The smallest power of two, up to a warp, that is not below `count`.
__host__ __device__ constexpr int lanes_for(int count) { return count <= 1 ? 1 : 2 * lanes_for((count + 1) / 2); }

// A warp's rows.
struct TokenRows {
  int head;
  int token;  // the first
  int count;  // of tokens; 0 or less where there are none left
};

// From the last tokens on: those that the launch before wrote last are in L2.
template <typename P>
__device__ __forceinline__ TokenRows token_rows(const P& p) {
  const unsigned warp = __shfl_sync(0xffffffff, blockIdx.x * (kRowThreads / 32) + threadIdx.x / 32, 0);  // known to be uniform
  const unsigned block = warp / p.heads, blocks = (p.total_q + kRowTokens - 1) / kRowTokens;
  TokenRows rows;
  rows.head = warp - block * p.heads;
  rows.token = block < blocks ? kRowTokens * (blocks - 1 - block) : p.total_q;
  rows.count = min(p.total_q - rows.token, kRowTokens);
  return rows;
}

template <Unpack kUnpack>
__device__ __forceinline__ float dot_x2(uint32_t a, uint32_t b) {
  const float2 left = kUnpack(a), right = kUnpack(b);
  return fmaf(left.x, right.x, left.y * right.y);
}

// delta = rowsum(dO * O) - dlse, 16 bytes a lane.
template <int kHeadDimV, Unpack kUnpack, typename P>
__device__ __forceinline__ void write_delta(const P& p, const TokenRows& rows) {
  constexpr int kLanes = lanes_for(kHeadDimV / 8) == 1 ? 32 / kRowTokens : lanes_for(kHeadDimV / 8);  // a row
  constexpr int kStep = 32 / kLanes;                                                                  // rows a load
  constexpr int kLoads = kRowTokens / kStep;
  constexpr int kInFlight = kLoads < 4 ? kLoads : 4;
  const int piece = threadIdx.x % kLanes;
  const int first = threadIdx.x % 32 / kLanes;
  const long long token = rows.token + first;
  const uint16_t* out = static_cast<const uint16_t*>(p.out) + token * p.out_token + rows.head * p.out_head + 8 * piece;
  const uint16_t* dout = static_cast<const uint16_t*>(p.dout) + token * p.dout_token + rows.head * p.dout_head + 8 * piece;
  const long long at = static_cast<long long>(rows.head) * p.total_q + token;
#pragma unroll 1
  for (int load = 0; load < kLoads; load += kInFlight) {
    uint4 a[kInFlight], b[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int row = (load + i) * kStep;
      a[i] = b[i] = {};
      if (first + row < rows.count && 8 * piece < kHeadDimV) {
        a[i] = load_x4(out + row * p.out_token, kEvictFirst);
        b[i] = load_x4(dout + row * p.dout_token, kEvictNormal);  // the attention kernel reads it next
      }
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int row = (load + i) * kStep;
      float delta = dot_x2<kUnpack>(a[i].x, b[i].x) + dot_x2<kUnpack>(a[i].y, b[i].y) + dot_x2<kUnpack>(a[i].z, b[i].z) +
                    dot_x2<kUnpack>(a[i].w, b[i].w);
#pragma unroll
      for (int distance = kLanes / 2; distance > 0; distance /= 2) delta += __shfl_xor_sync(0xffffffff, delta, distance);
      if (first + row < rows.count && piece == 0) p.delta[at + row] = delta - (p.dlse == nullptr ? 0.0f : p.dlse[at + row]);
    }
  }
}
