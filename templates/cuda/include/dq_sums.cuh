// Where dQ is summed up: float32, without padding. A head's columns are split into panels of 64, or 32 (the last may be narrower);
// a panel is rows of tokens, so that what a warpgroup has of a query block is one piece of memory. Within a row, groups of
// 16 columns lie so that a thread's four accumulators of a group are neighbours: places 4 q + e of a group hold its columns
// 8 (e >> 1) + 2 q + (e & 1), q = lane % 4. Where sums go through shared memory, rows of odd tokens have their groups swapped in
// pairs, which keeps it free of bank conflicts if a row is a multiple of 128 bytes.
#pragma once
#include <cstdint>

#include "cuda/include/backward_params.cuh"
#include "cuda/include/fragments.cuh"
#include "cuda/include/ptx.cuh"

template <int kHeadDim, int kWidth>
struct DqPanels {
  static constexpr int kColumns = kHeadDim;
  static constexpr int kPanels = (kHeadDim + kWidth - 1) / kWidth;

  __host__ __device__ static constexpr int first_column(int panel) { return kWidth * panel; }
  __host__ __device__ static constexpr int columns(int panel) {
    return kHeadDim - first_column(panel) < kWidth ? kHeadDim - first_column(panel) : kWidth;
  }

  // A token's row of a panel.
  __device__ __forceinline__ static float* row(float* sums, int total_q, int head, int panel, int token) {
    return sums + static_cast<long long>(head) * total_q * kHeadDim + static_cast<long long>(total_q) * first_column(panel) +
           static_cast<long long>(token) * columns(panel);
  }
};

template <int kHeadDim, bool kSwapped = true, int kWidth = 64>
struct DqSums : DqPanels<kHeadDim, kWidth> {
  static constexpr bool kInOrder = false;
  static constexpr int kPeriod = 2;  // tokens, after which quads have the same columns again
  using DqPanels<kHeadDim, kWidth>::columns;

  // Whether a quad of a token's row is of a last group of 8 columns, which are in order.
  __device__ __forceinline__ static bool is_in_order(int panel, unsigned quad) {
    return columns(panel) % 16 != 0 && static_cast<int>(quad) / 4 == columns(panel) / 16;
  }

  // The first of the four columns of dq that the quad's lane writes (neighbouring_columns).
  __device__ __forceinline__ static unsigned column_of(int panel, unsigned quad, int token) {
    return is_in_order(panel, quad) ? 4 * quad : (quad / 4 * 16 ^ group_swap(panel, token)) + first_neighbour(quad);
  }

  // What is added to the place of an even group, and taken from that of an odd one, in this token's row of a panel.
  __device__ __forceinline__ static int group_swap(int panel, int token) {
    return kSwapped && columns(panel) % 32 == 0 ? 16 * (token & 1) : 0;
  }
};

// Where warpgroups multiply dQ^T: columns are in order, but for groups of 8, which a token's number moves about so that a
// thread, which has one column of some tokens, stores them without bank conflicts.
template <int kHeadDim>
struct TransposedDqSums : DqPanels<kHeadDim, 64> {
  static constexpr bool kInOrder = true;
  static constexpr int kPeriod = 8;
  using DqPanels<kHeadDim, 64>::columns;

  __device__ __forceinline__ static unsigned column_of(int panel, unsigned quad, int token) {
    return 4 * quad ^ moved(panel, token);
  }

  // What is exclusively-ored to a column, or its place, in this token's row of a panel.
  __device__ __forceinline__ static unsigned moved(int panel, int token) {
    return columns(panel) % 32 == 0 ? 8 * (token / 2 % 4) : 0;
  }
};

// Calls `put(lane's place, place, values...)`, four or two values, for a thread's accumulators of one row of a panel: `half` 0
// for the upper of its two rows, 1 for the lower; the panel's accumulators begin at `kFirst`. Places are constants, so that
// lane's places, of which there are few, can be base addresses.
template <int kColumns, int kFirst, int kRegisters, typename Put>
__device__ __forceinline__ void for_each_piece(const float (&dq)[kRegisters], int half, int quad, int swap, Put put) {
#pragma unroll
  for (int group = 0; group < kColumns / 16; ++group) {
    const int i = kFirst + 8 * group + 2 * half;
    put(4 * quad + (group % 2 ? -swap : swap), 16 * group, dq[i], dq[i + 1], dq[i + 4], dq[i + 5]);
  }
  if constexpr (kColumns % 16 != 0) {
    constexpr int i = kFirst + kColumns / 16 * 8;
    put(2 * quad, kColumns / 16 * 16, dq[i + 2 * half], dq[i + 2 * half + 1]);
  }
}

// A thread's accumulators of one row, added to the row.
struct AddPieces {
  float* row;
  __device__ __forceinline__ void operator()(int lane_place, int place, float a, float b, float c, float d) const {
    add_x4(based(lane_place) + place, a, b, c, d);
  }
  __device__ __forceinline__ void operator()(int lane_place, int place, float a, float b) const {
    add_x2(based(lane_place) + place, a, b);
  }

 private:
  // Kept apart from the constant places, or the compiler computes an address each.
  __device__ __forceinline__ float* based(int lane_place) const {
    float* base = row + lane_place;
    asm("" : "+l"(base));
    return base;
  }
};

// A panel of a warpgroup's dQ to its sums; `row` is the thread's upper row within the sequence, which begins at token
// `begin` and has `length` rows.
template <typename Sums, int kPanel, int kFirst, int kRegisters>
__device__ __forceinline__ void add_panel(const float (&dq)[kRegisters], float* sums, int total_q, int head, int begin,
                                          int length, int row, int quad) {
  constexpr int kColumns = Sums::columns(kPanel);
  const int swap = Sums::group_swap(kPanel, begin + row);
  float* at = Sums::row(sums, total_q, head, kPanel, begin + row);
  if (row < length) for_each_piece<kColumns, kFirst>(dq, 0, quad, swap, AddPieces{at});
  if (row + 8 < length) for_each_piece<kColumns, kFirst>(dq, 1, quad, swap, AddPieces{at + 8 * kColumns});
}

// A thread's accumulators of one row, stored to the row.
struct StagePieces {
  float* row;
  __device__ __forceinline__ void operator()(int lane_place, int place, float a, float b, float c, float d) const {
    *reinterpret_cast<float4*>(row + lane_place + place) = {a, b, c, d};
  }
  __device__ __forceinline__ void operator()(int lane_place, int place, float a, float b) const {
    *reinterpret_cast<float2*>(row + lane_place + place) = {a, b};
  }
};

// A panel of a warpgroup's dQ into shared memory, as its sums are; `row` is the thread's upper row among the 64, `token` that
// row's token.
template <typename Sums, int kPanel, int kFirst, int kRegisters>
__device__ __forceinline__ void stage_sums(const float (&dq)[kRegisters], float* panel, int row, int quad, int token) {
  constexpr int kColumns = Sums::columns(kPanel);
  const int swap = Sums::group_swap(kPanel, token);
  for_each_piece<kColumns, kFirst>(dq, 0, quad, swap, StagePieces{panel + row * kColumns});
  for_each_piece<kColumns, kFirst>(dq, 1, quad, swap, StagePieces{panel + (row + 8) * kColumns});
}

// A thread's accumulators of one row, scaled and packed, into the row of dq.
template <Pack kPack>
struct WritePieces {
  uint16_t* row;
  float scale;
  int quad;
  bool exists;

  __device__ __forceinline__ void operator()(int, int place, float a, float b, float c, float d) const {
    const uint2 words = neighbouring_columns(kPack(scale * a, scale * b), kPack(scale * c, scale * d), quad);
    if (exists) *reinterpret_cast<uint2*>(row + first_neighbour(quad) + place) = words;
  }
  __device__ __forceinline__ void operator()(int lane_place, int place, float a, float b) const {
    if (exists) *reinterpret_cast<uint32_t*>(row + lane_place + place) = kPack(scale * a, scale * b);
  }
};

// As add_panel, but the panel is complete and goes to dq. All lanes of a warp.
template <typename Sums, Pack kPack, int kPanel, int kFirst, int kRegisters>
__device__ __forceinline__ void write_panel(const float (&dq)[kRegisters], const BackwardParams& p, int head, int begin,
                                            int length, int row, int quad) {
#pragma unroll
  for (int half = 0; half < 2; ++half, row = computed_here(row + 8)) {  // one row's addresses at a time: registers are few
    uint16_t* at = static_cast<uint16_t*>(p.dq) + (begin + row) * p.dq_token + head * p.dq_head + Sums::first_column(kPanel);
    const int place = computed_here(quad);
    const WritePieces<kPack> pieces{at, p.scale, place, row < length};
    for_each_piece<Sums::columns(kPanel), kFirst>(dq, half, place, 0, pieces);
  }
}

// A panel of a warpgroup's dQ^T into shared memory, as its sums are; `column` is the thread's upper row of it, `token` the token
// of its first accumulator.
template <typename Sums, int kPanel, int kRegisters>
__device__ __forceinline__ void stage_transposed_sums(const float (&dq)[kRegisters], float* panel, int column, int quad, int token) {
  constexpr int kColumns = Sums::columns(kPanel);
#pragma unroll
  for (int i = 0; i < 2; ++i) {  // every other token
    const unsigned place = column ^ Sums::moved(kPanel, token + i);
    float* const upper = panel + (2 * quad + i) * kColumns + place;
    float* const lower = panel + (2 * quad + i) * kColumns + (place ^ 8);
    if (column < kColumns) {
#pragma unroll
      for (int j = 0; j < kRegisters; j += 4) upper[2 * j * kColumns] = dq[j + i];
    }
    if (column + 8 < kColumns) {
#pragma unroll
      for (int j = 0; j < kRegisters; j += 4) lower[2 * j * kColumns] = dq[j + i + 2];
    }
  }
}

// As write_panel, of dQ^T: `row` is the block's first, `column` the thread's upper row of dQ^T.
template <typename Sums, Pack kPack, int kPanel, int kRegisters>
__device__ __forceinline__ void write_transposed_panel(const float (&dq)[kRegisters], const BackwardParams& p, int head, int begin,
                                                       int length, int row, int column) {
  const unsigned lane = lane_here();
  const int first = column / 16 * 16 + first_neighbour(lane);
  row += lane / 4;
  uint16_t* to = static_cast<uint16_t*>(p.dq) + (begin + row) * p.dq_token + head * p.dq_head + Sums::first_column(kPanel) + first;
#pragma unroll
  for (int i = 0; i < kRegisters; i += 4, row += 8, to += 8 * p.dq_token) {
    const uint32_t low = transposed_matrix(kPack(p.scale * dq[i], p.scale * dq[i + 1]));
    const uint32_t high = transposed_matrix(kPack(p.scale * dq[i + 2], p.scale * dq[i + 3]));
    const uint2 words = neighbouring_columns(low, high, lane);
    if (row < length && first < Sums::columns(kPanel)) *reinterpret_cast<uint2*>(to) = words;
  }
}
