// wgmma accumulators on their way to the next product or to memory. The layout: softmax.cuh.
#pragma once
#include <cstdint>

#include "cuda/include/ptx.cuh"

using Pack = uint32_t (*)(float, float);  // pack_bf16 or pack_fp16

// Eight consecutive accumulators, packed, are one 16-deep A fragment.
template <Pack kPack, int kSteps>
__device__ __forceinline__ void pack_fragments(uint32_t (&fragments)[kSteps][4], const float (&values)[8 * kSteps]) {
#pragma unroll
  for (int i = 0; i < 4 * kSteps; ++i) fragments[i / 4][i % 4] = kPack(values[2 * i], values[2 * i + 1]);
}

// The 64 rows of a warpgroup's accumulators, `kColumns` (a multiple of 8) wide, into swizzled 64-column panels of 128-byte
// rows. A lane addresses one row of one of four 8 x 8 matrices.
template <Pack kPack, int kColumns, int kPanelBytes, int kRegisters>
__device__ __forceinline__ void stage_rows(const float (&values)[kRegisters], uint32_t panels, int warp, int lane) {
  const uint32_t row = panels + (16 * (warp % 4) + lane % 16) * 128;
#pragma unroll
  for (int group = 0; group + 1 < kColumns / 8; group += 2) {
    const int columns = group + lane / 16;
    store_matrix_x4(row + columns / 8 * kPanelBytes + (columns % 8 ^ lane % 8) * 16,
                    kPack(values[4 * group], values[4 * group + 1]), kPack(values[4 * group + 2], values[4 * group + 3]),
                    kPack(values[4 * group + 4], values[4 * group + 5]),
                    kPack(values[4 * group + 6], values[4 * group + 7]));
  }
  if constexpr (kColumns % 16 != 0) {
    constexpr int kLast = kColumns / 8 - 1;
    store_matrix_x2(row + kLast / 8 * kPanelBytes + (kLast % 8 ^ lane % 8) * 16,
                    kPack(values[4 * kLast], values[4 * kLast + 1]), kPack(values[4 * kLast + 2], values[4 * kLast + 3]));
  }
}

// What a lane addresses of the first 16 rows of a panel to which a warpgroup's 64 rows go as columns.
__device__ __forceinline__ uint32_t transposed_row(uint32_t panel, int warp, int lane) {
  return panel + (lane / 16 * 8 + lane % 8) * 128 + ((2 * (warp % 4) + lane / 8 % 2) ^ lane % 8) * 16;
}

// As stage_rows, of fragments: 16 columns each.
template <int kPanelBytes, int kSteps>
__device__ __forceinline__ void stage_fragments(const uint32_t (&fragments)[kSteps][4], uint32_t panels, int warp, int lane) {
  const uint32_t row = panels + (16 * (warp % 4) + lane % 16) * 128;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int columns = 2 * step + lane / 16;
    store_matrix_x4(row + columns / 8 * kPanelBytes + (columns % 8 ^ lane % 8) * 16, fragments[step][0],
                    fragments[step][1], fragments[step][2], fragments[step][3]);
  }
}

// The transpose of a warpgroup's 64 rows: 16 rows a step, of one panel.
template <int kSteps>
__device__ __forceinline__ void stage_fragments_transposed(const uint32_t (&fragments)[kSteps][4], uint32_t panel, int warp,
                                                           int lane) {
  const uint32_t row = transposed_row(panel, warp, lane);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    store_transposed_x4(row + step * 16 * 128, fragments[step][0], fragments[step][1], fragments[step][2], fragments[step][3]);
  }
}

// The way back from there: a warpgroup's 64 rows as A fragments.
template <int kPanelBytes, int kSteps>
__device__ __forceinline__ void load_fragments(uint32_t (&fragments)[kSteps][4], uint32_t panels, int warp, int lane) {
  const uint32_t row = panels + (16 * (warp % 4) + lane % 16) * 128;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int columns = 2 * step + lane / 16;
    load_matrix_x4(fragments[step], row + columns / 8 * kPanelBytes + (columns % 8 ^ lane % 8) * 16);
  }
}

// The transpose of a warpgroup's 64 x `kColumns` accumulators (a multiple of 16 columns): `kColumns` rows of one panel.
template <Pack kPack, int kColumns>
__device__ __forceinline__ void stage_columns(const float (&values)[kColumns / 2], uint32_t panel, int warp, int lane) {
  static_assert(kColumns % 16 == 0);
  const uint32_t row = transposed_row(panel, warp, lane);
#pragma unroll
  for (int group = 0; group < kColumns / 8; group += 2) {
    store_transposed_x4(row + group * 8 * 128, kPack(values[4 * group], values[4 * group + 1]),
                        kPack(values[4 * group + 2], values[4 * group + 3]),
                        kPack(values[4 * group + 4], values[4 * group + 5]),
                        kPack(values[4 * group + 6], values[4 * group + 7]));
  }
}

// Four neighbouring columns, packed, of the group that this lane and the one beside it have four each of: the even lane gets
// those of the lower half, the odd one those of the upper half. `low` and `high` are the lane's two pairs. All lanes of a warp.
__device__ __forceinline__ uint2 neighbouring_columns(uint32_t low, uint32_t high, unsigned lane) {
  const bool odd = lane % 2;
  const uint32_t other = __shfl_xor_sync(0xffffffff, odd ? low : high, 1);
  return odd ? uint2{other, high} : uint2{low, other};
}

// The first of them within the group, for the lane whose place in it is `quad` % 4.
__device__ __forceinline__ unsigned first_neighbour(unsigned quad) { return 8 * (quad % 2) + 4 * (quad / 2 % 2); }
