// The last tiles of a launch, in pieces. A few more tiles than fill all CTAs once more take as long as if every CTA had one; and
// CTAs of a long launch drift apart, so that they end as far from each other as a tile takes. The queries of such a tile are dealt
// out in pieces, each a tile by itself with all of the keys and some of the blocks of queries, down from the sequence's last as in
// a whole tile. Their dK and dV are added up in memory; the last piece to come there hands the sums over. Not where additions have
// an order.
#pragma once

#include "cuda/include/backward_params.cuh"
#include "cuda/include/key_tiles.cuh"
#include "cuda/include/pipeline.cuh"
#include "cuda/include/ptx.cuh"
#include "cuda/include/work_list.cuh"

constexpr int kTailPieces = 32;  // of a tile, at most
constexpr int kPieceBlocks = 4;  // of queries in a piece, at least: its keys are loaded and its sums added beside
constexpr int kLongLaunch = 10;  // tiles for each CTA, from which on CTAs have drifted apart

// A piece's place, in the item of its tile: whoever claims has no more use for `heads` there.
struct TailPiece {
  int pieces;        // of the tile; 0: it is whole
  int tile;          // number among the tail's
  int blocks_before; // of queries, those of the pieces before it

  __device__ __forceinline__ static TailPiece of(const WorkItem& item) {
    return {item.heads & 63, item.heads >> 6 & 63, item.heads >> 12};
  }
  __device__ __forceinline__ int packed() const { return pieces | tile << 6 | blocks_before << 12; }
};

// Float sums of a tile's gradients, four of a math thread at a time, and how far its pieces have come; zeros at first.
template <int kNumbers, int kThreadsOfPart, int kPartsOfTile = 1>
struct alignas(16) TailSums {
  static constexpr int kThreads = kThreadsOfPart, kParts = kPartsOfTile;
  float4 numbers[kNumbers / 4][kThreads];
  int multiplied[kParts];  // pieces, of gradients whose threads tell of them by themselves
  int added;               // pieces, all of them to dQ
};

// Behind the launch's Progress.
template <typename Sums>
__device__ __forceinline__ Sums* tail_sums(const BackwardParams& p) {
  const unsigned long long end = reinterpret_cast<unsigned long long>(p.progress + p.progress_count);
  return reinterpret_cast<Sums*>((end + 15) / 16 * 16);
}

// What claims of tiles and of their pieces go by.
template <int kBlockM, int kBlockN, int kTailTiles>
struct TailClaims : Claims {
  int tail;    // tiles, up to kTailTiles
  int pieces;  // of each, at most

  __device__ __forceinline__ void begin(const BackwardParams& p) {
    const int ctas = gridDim.x, left = tiles % ctas;
    if (tiles >= kLongLaunch * ctas) {  // two pieces a CTA
      tail = min(kTailTiles, ctas / 4);
      pieces = tail == 0 ? 0 : min(2 * ctas / tail, kTailPieces);
    } else {
      tail = left <= kTailTiles && 2 * left <= ctas ? left : 0;
      pieces = tail == 0 ? 0 : min(ctas / tail, kTailPieces);
    }
    if (p.in_order) tail = pieces = 0;
  }

  __device__ __forceinline__ int count() const { return tiles + tail * (pieces - 1); }

  // Number `index` in the order of work; false if it is a piece that its tile has too few queries for.
  __device__ __forceinline__ bool claim(Tile& tile, int index) {
    piece = 0;
    number = index - (tiles - tail);
    if (number >= 0) {
      piece = number / tail;
      number -= piece * tail;
      index = tiles - tail + number;
    }
    claim_key_tile<kBlockN>(tile, *this, index);
    tile.item.heads = 0;
    return number < 0 || cut(tile.item);
  }

 private:
  int number, piece;  // among the tail's tiles, and of the tile, of the claim at hand: not registers

  __device__ __forceinline__ bool cut(WorkItem& item) const {
    // Others go by how many steps a sequence's first tile has stored.
    const bool is_followed = item.row == 0 && item.k_length > kBlockN;
    const int blocks = item.q_blocks, own = is_followed ? 1 : min(pieces, blocks / kPieceBlocks);
    if (own <= 1) return piece == 0;
    if (piece >= own) return false;
    const int first = blocks * piece / own;
    item.q_blocks = blocks * (piece + 1) / own - first;
    if (piece > 0) item.q_length = ((item.q_length - 1) / kBlockM - first + 1) * kBlockM;
    item.heads = TailPiece{own, number, first}.packed();
    return true;
  }
};

// Zeros. All threads of a launch before that with the tiles.
template <typename Sums, int kTailTiles, int kThreads>
__device__ __forceinline__ void zero_tail_sums(const BackwardParams& p) {
  constexpr int kWords = sizeof(Sums) / sizeof(float4);
  float4* const words = reinterpret_cast<float4*>(tail_sums<Sums>(p));
  const int count = min(p.max_items * (p.heads / p.gqa_ratio), kTailTiles) * kWords;
  for (int i = blockIdx.x * kThreads + threadIdx.x; i < count; i += gridDim.x * kThreads) words[i] = {};
}

template <int kThreads, int kRegisters>
__device__ __forceinline__ float4* add_numbers(float4* at, const float (&numbers)[kRegisters]) {
#pragma unroll
  for (int i = 0; i < kRegisters; i += 4, at += kThreads) {
    add_x4(reinterpret_cast<float*>(at), numbers[i], numbers[i + 1], numbers[i + 2], numbers[i + 3]);
  }
  return at;
}
template <int kThreads, int kPanels, int kRegisters>
__device__ __forceinline__ float4* add_numbers(float4* at, const float (&panels)[kPanels][kRegisters]) {
#pragma unroll
  for (int panel = 0; panel < kPanels; ++panel) at = add_numbers<kThreads>(at, panels[panel]);
  return at;
}

template <int kThreads, int kRegisters>
__device__ __forceinline__ const float4* read_numbers(const float4* at, float (&numbers)[kRegisters]) {
#pragma unroll
  for (int i = 0; i < kRegisters; i += 4, at += kThreads) {
    const float4 four = __ldcg(at);
    numbers[i] = four.x, numbers[i + 1] = four.y, numbers[i + 2] = four.z, numbers[i + 3] = four.w;
  }
  return at;
}
template <int kThreads, int kPanels, int kRegisters>
__device__ __forceinline__ const float4* read_numbers(const float4* at, float (&panels)[kPanels][kRegisters]) {
#pragma unroll
  for (int panel = 0; panel < kPanels; ++panel) at = read_numbers<kThreads>(at, panels[panel]);
  return at;
}

// Adds a piece's gradients, of part `kPart` of the tile's, whose threads are the CTA's last but for those of the parts behind
// it, to the tile's. Whether it is the last one to do so: it has those of all then. `kFirst`: where the part's numbers begin.
template <typename Sums, int kPart = 0, int kFirst = 0, typename... Gradients>
__device__ __forceinline__ bool add_piece(const BackwardParams& p, const TailPiece& piece, int barrier, bool& is_last,
                                          Gradients&... gradients) {
  constexpr int kThreads = Sums::kThreads;
  const int thread = computed_here(threadIdx.x) - (blockDim.x - (Sums::kParts - kPart) * kThreads);  // not a register through the loop
  Sums& sums = tail_sums<Sums>(p)[piece.tile];
  float4* const own = &sums.numbers[kFirst / 4][thread];
  float4* add_at = own;
  ((add_at = add_numbers<kThreads>(add_at, gradients)), ...);
  named_barrier_sync(barrier, kThreads);
  if (thread == 0) {
    __threadfence();
    is_last = atomicAdd(&sums.multiplied[kPart], 1) == piece.pieces - 1;
    __threadfence();
  }
  named_barrier_sync(barrier, kThreads);
  if (!is_last) return false;
  const float4* read_at = own;
  ((read_at = read_numbers<kThreads>(read_at, gradients)), ...);
  return true;
}

// A piece has added to dQ. Whether it is the tile's last one: all of the tile's additions are complete.
template <typename Sums>
__device__ __forceinline__ bool is_last_to_add(const BackwardParams& p, const TailPiece& piece) {
  __threadfence();
  const bool last = atomicAdd(&tail_sums<Sums>(p)[piece.tile].added, 1) == piece.pieces - 1;
  __threadfence();
  return last;
}
