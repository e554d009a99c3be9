// Rows of tokens without TMA. Tiles of head dims whose rows do not begin at multiples of 16 bytes: whole warps copy rows by
// cp.async into the panels that TMA would have filled, 64 columns of 128-byte rows, swizzled. What follows a row's last
// column is never written: it stays as clear_tiles left it. And O, from registers.
#pragma once
#include <cstdint>

#include "cuda/include/fragments.cuh"
#include "cuda/include/params.cuh"
#include "cuda/include/ptx.cuh"

constexpr int kRowLanes = 8;               // lanes of a warp that share a row ...
constexpr int kWarpRows = 32 / kRowLanes;  // ... and rows that they copy at a time

__device__ __forceinline__ char* row_address(const RowTensor& tensor, int token, int head) {
  return static_cast<char*>(tensor.address) + token * tensor.token_stride + head * tensor.head_stride;
}

// Zeros in a CTA's tiles, `bytes` of them, for the columns between a head dim and a product's depth. All threads.
__device__ __forceinline__ void clear_tiles(unsigned char* tiles, int bytes) {
  for (int at = threadIdx.x * 16; at < bytes; at += blockDim.x * 16) *reinterpret_cast<uint4*>(tiles + at) = {};
  fence_async_proxy();
}

// Begins to copy `kRows` rows of `kColumns`, in pieces of `kPiece` bytes; those from `rows` on become zeros. In pieces of 4
// bytes rows may begin in the middle of a word: they are copied with what is before them, one column too far to the right.
template <int kPiece, int kRows, int kColumns, int kPanelBytes>
__device__ __forceinline__ void begin_copy(uint32_t tile, const char* from, long long stride, int rows) {
  constexpr int kPieces = (2 * kColumns + kPiece - 1) / kPiece, kStep = kRowLanes * kPiece;
  const int lane = computed_here(threadIdx.x) % 32;  // each time: loading warps have few registers
  const int place = lane % kRowLanes, first_row = lane / kRowLanes;
  from += first_row * stride + place * kPiece;
  uint32_t to = tile + first_row * 128 + ((place * kPiece) ^ (first_row * 16));
#pragma unroll 1
  for (int row = first_row; row < kRows; row += kWarpRows) {
    const int skew = kPiece == 4 ? reinterpret_cast<uintptr_t>(from) & 2 : 0;
    const int bytes = row < rows ? 2 * kColumns + skew - place * kPiece : 0;  // from the lane's first piece on
#pragma unroll
    for (int i = 0; i < kPieces; i += kRowLanes) {
      const int at = i * kPiece;
      if (i + kRowLanes > kPieces && place >= kPieces - i) break;
      const bool whole = at + kStep <= 2 * kColumns;  // in all lanes
      copy_async<kPiece>((to ^ at % 128) + at / 128 * kPanelBytes, from - skew + at,
                         whole ? row < rows ? kPiece : 0 : min(max(bytes - at, 0), kPiece));
    }
    from += kWarpRows * stride;
    to = (to ^ kWarpRows * 16) + kWarpRows * 128;
  }
}

// Moves the rows that begin in the middle of a word one column to the left, once they have landed.
template <int kRows, int kColumns, int kPanelBytes>
__device__ __forceinline__ void shift_skewed_rows(uint32_t tile, const char* from, long long stride, int rows) {
  constexpr int kChunks = (kColumns + 7) / 8;  // of 16 bytes
  constexpr int kAhead = kChunks > kRowLanes ? 2 : 1;  // chunks a lane reads before it writes any
  const int lane = computed_here(threadIdx.x) % 32;  // each time: loading warps have few registers
  const int place = lane % kRowLanes, first_row = lane / kRowLanes;
  from += first_row * stride;
#pragma unroll 1
  for (int row = first_row; row < kRows; row += kWarpRows, from += kWarpRows * stride) {
    const bool skewed = row < rows && reinterpret_cast<uintptr_t>(from) & 2;
    const auto chunk_address = [&](int chunk) {
      return tile + chunk / 8 * kPanelBytes + row * 128 + (chunk % 8 ^ row % 8) * 16;
    };
#pragma unroll
    for (int i = 0; i < kChunks; i += kAhead * kRowLanes) {
      uint32_t words[kAhead][5];
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        const int chunk = i + j * kRowLanes + place;
        if (!skewed || chunk >= kChunks) break;
        load_shared_x4(words[j], chunk_address(chunk));
        words[j][4] = chunk + 1 < kChunks ? load_shared(chunk_address(chunk + 1)) : 0;
        if (kColumns % 2 == 0 && chunk == kChunks - 1) {  // the last column is in a word that was not copied
          words[j][kColumns % 8 / 2 == 0 ? 4 : kColumns % 8 / 2] =
              *reinterpret_cast<const uint16_t*>(from + 2 * (kColumns - 1));
        }
      }
      __syncwarp();  // a lane's last word comes from the next one's chunk
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        const int chunk = i + j * kRowLanes + place;
        if (!skewed || chunk >= kChunks) break;
#pragma unroll
        for (int word = 0; word < 4; ++word) words[j][word] = __byte_perm(words[j][word], words[j][word + 1], 0x5432);
        store_shared_x4(chunk_address(chunk), words[j]);
      }
      __syncwarp();
    }
  }
}

// Fills a tile of `kRows` rows of `kColumns` from a token on, of which the first `rows` are the sequence's and the others
// become zeros, for a product to read. A whole warp.
template <int kRows, int kColumns, int kPanelBytes>
__device__ __forceinline__ void load_rows(uint32_t tile, const RowTensor& tensor, int token, int head, int rows) {
  constexpr int kPiece = kColumns % 8 == 0 ? 16 : kColumns % 4 == 0 ? 8 : 4;  // as packed rows allow
  const uint32_t alignment = computed_here(static_cast<uint32_t>(reinterpret_cast<uintptr_t>(tensor.address))) |
                             static_cast<uint32_t>(tensor.token_stride) | static_cast<uint32_t>(tensor.head_stride);
  const char* from = row_address(tensor, computed_here(token), head);
  if (kPiece > 4 && alignment % kPiece == 0) {
    begin_copy<kPiece, kRows, kColumns, kPanelBytes>(tile, from, tensor.token_stride, rows);
  } else {
    begin_copy<4, kRows, kColumns, kPanelBytes>(tile, from, tensor.token_stride, rows);
  }
  copy_async_wait();
  if (alignment & 2) {
    __syncwarp();
    shift_skewed_rows<kRows, kColumns, kPanelBytes>(tile, from, tensor.token_stride, rows);
  }
  fence_async_proxy();
  __syncwarp();
}

// A thread's part of a warpgroup's accumulators: its row at `token` and the one 8 below, if they are among `rows` from
// `token` on. The layout: softmax.cuh.
template <Pack kPack, int kColumns, int kRegisters>
__device__ __forceinline__ void store_rows(const float (&values)[kRegisters], const RowTensor& tensor, int token, int head,
                                           int rows, int thread_column) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if (8 * h >= rows) break;
    uint16_t* row = reinterpret_cast<uint16_t*>(row_address(tensor, token + 8 * h, head)) + thread_column;
    const bool whole_words = reinterpret_cast<uintptr_t>(row) % 4 == 0;
#pragma unroll
    for (int group = 0; group < kRegisters / 4; ++group) {
      const uint32_t pair = kPack(values[4 * group + 2 * h], values[4 * group + 2 * h + 1]);
      const int columns = kColumns - 8 * group - thread_column;  // that are left
      if (columns >= 2 && whole_words) {
        *reinterpret_cast<uint32_t*>(row + 8 * group) = pair;
      } else {
        if (columns >= 1) row[8 * group] = static_cast<uint16_t>(pair);
        if (columns >= 2) row[8 * group + 1] = static_cast<uint16_t>(pair >> 16);
      }
    }
  }
}

// As store_rows, of rows at multiples of 8 bytes: four lanes write 32 of them, a whole sector. All lanes of a warp.
template <Pack kPack, int kColumns, int kRegisters>
__device__ __forceinline__ void store_aligned_rows(const float (&values)[kRegisters], const RowTensor& tensor, int token,
                                                   int head, int rows, int lane) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const bool exists = 8 * h < rows;
    uint16_t* row = reinterpret_cast<uint16_t*>(row_address(tensor, token + 8 * h, head));
#pragma unroll
    for (int group = 0; group < kColumns / 16; ++group) {
      const int i = 8 * group + 2 * h;
      const uint2 words = neighbouring_columns(kPack(values[i], values[i + 1]), kPack(values[i + 4], values[i + 5]), lane);
      if (exists) *reinterpret_cast<uint2*>(row + first_neighbour(lane) + 16 * group) = words;
    }
    if constexpr (kColumns % 16 != 0) {
      constexpr int kLast = kColumns - 8;
      if (exists) {
        *reinterpret_cast<uint32_t*>(row + kLast + 2 * (lane % 4)) =
            kPack(values[kLast / 2 + 2 * h], values[kLast / 2 + 2 * h + 1]);
      }
    }
  }
}
