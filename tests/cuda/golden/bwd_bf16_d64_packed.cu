// jagtile_bwd_bf16_d64_packedrows_n64_s2_c2
//
// Backward of attention over a jagged batch, one kernel for one case:
//   target      sm_90a
//   dtype       bf16
//   head_dim    64 (queries and keys), 64 (values)
//   mask        none
// Template: templates/cuda/sm90/packed_backward.cu.j2, algorithm packedrows, with
//   block_n             64
//   num_stages          2
//   ctas_per_sm         2
// Generated; edit the template, not this text. To see it again:
//   jagtile generate sm_90a/bwd_bf16_d64/packedrows_n64_s2_c2
//
// Gradients for many short sequences: a tile is 64 consecutive rows of the packed queries, or of the packed keys,
// whichever sequences they belong to. Each row has its own range of the other side's rows, masked in the scores; a tile
// visits all that its rows see, 64 at a time. A tile of queries and a head gives dQ, one of keys and a kv head
// dK and dV: P and dS are computed for both, and nothing is added up in memory. No work list; 2 CTAs an SM,
// each with a run of tiles of either kind, which take turns: they read the same rows.
//   warps 0 to 3  of queries: S = Q K^T, dP = dO V^T, dQ += dS K; of keys: S^T = K Q^T, dP^T = V dO^T, dV += P^T dO,
//                 dK += dS^T Q (wgmma); gradients leave through the tile's buffer (TMA)
//   warp 4        finds what each row sees in the offsets, copies tiles and blocks into shared memory (TMA), and lse
//                 and delta with them
// What a row does not see must not reach it, NaN and infinity included: a product that holds NaN is computed again,
// over what is seen. So a block's product is kept apart from the sums, 64 columns at a time.
//
// Shared memory          bytes
//   tiles [2]              32768   1 + 1 panels of 64 rows x 128 B: Q and dO, or K and V; gradients on their way out
//   blocks [2]             32768   1 + 1 panels of 64 rows: K and V, or Q and dO
//   rows, barriers          3200
#include "cuda/include/delta_rows.cuh"
#include "cuda/include/dependent_launch.cuh"
#include "cuda/include/fragments.cuh"
#include "cuda/include/packed_backward_params.cuh"
#include "cuda/include/packed_gradients.cuh"
#include "cuda/include/packed_tile.cuh"
#include "cuda/include/pipeline.cuh"
#include "cuda/include/ptx.cuh"
#include "cuda/include/visible_product.cuh"

namespace {

constexpr bool kCausal = false;
constexpr int kTileRows = 64;
constexpr int kBlockN = 64;
constexpr int kBoxRows = 64;  // of the tensor maps
constexpr int kStages = 2;
constexpr int kPanels = 1;  // 64-column panels of Q and K
constexpr int kPanelsV = 1;  // of V and dO
constexpr int kSteps = 4;  // over the rows of a block
constexpr int kRegisters = 32;  // accumulators a thread of 64 x 64
constexpr int kRegistersV = 32;  // of 64 x 64

constexpr int kTilePanelBytes = kTileRows * 128;
constexpr int kBlockPanelBytes = kBlockN * 128;
constexpr int kTileBytes = (kPanels + kPanelsV) * kTilePanelBytes;
constexpr int kBlockBytes = (kPanels + kPanelsV) * kBlockPanelBytes;

struct Control {
  PackedTile<kTileRows> tiles[kStages];  // come and go with the tiles
  QueryStats<kTileRows> tile_stats[kStages];
  QueryStats<kBlockN> block_stats[kStages];
  RingBarriers<kStages> tile, block;
};
static_assert(sizeof(Control) <= 3200);

// d (64 x 64) {+}= A (64 x 16) B^T (64 x 16), both K-major in shared memory.
__device__ __forceinline__ void multiply_rows(float (&d)[32], uint64_t a, uint64_t b, int accumulate) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "%32, %33, p, 1, 1, 0, 0;\n"
      "}\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
        "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
        "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
        "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
      : "l"(a), "l"(b), "r"(accumulate));
}

// d (64 x 64) += A (64 x 16, registers) B (16 x 64, shared memory, its columns contiguous).
__device__ __forceinline__ void multiply_block(float (&d)[32], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "{%32, %33, %34, %35}, %36, 1, 1, 1, 1;\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
        "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
        "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
        "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// d (64 x 64) = A B^T, asynchronously; 64 rows of A and 64 rows of B, 64 columns each.
__device__ __forceinline__ void issue_rows(float (&d)[32], uint32_t a, uint32_t b) {
  const uint64_t a_descriptor = wgmma_descriptor(a, 16, 1024);
  const uint64_t b_descriptor = wgmma_descriptor(b, 16, 1024);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    const int inside = step % 4 * 32;
    multiply_rows(d, a_descriptor + ((step / 4 * kTilePanelBytes + inside) >> 4),
                b_descriptor + ((step / 4 * kBlockPanelBytes + inside) >> 4), step > 0);
  }
  wgmma_commit();
}

// d (64 x 64) += A B, asynchronously; A's fragments in registers, 64 rows of B.
__device__ __forceinline__ void issue_product(float (&d)[32], const uint32_t (&a)[4][4], uint32_t b) {
  const uint64_t b_descriptor = wgmma_descriptor(b, kBlockPanelBytes, 1024);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    multiply_block(d, a[step], b_descriptor + (step * 16 * 128 >> 4));
  }
  wgmma_commit();
}

// sums += A B, of one panel of B and its columns of the sums.
template <int kPanel, int kColumns, int kSums>
__device__ __forceinline__ void add_product(float (&sums)[kSums], uint32_t (&a)[kSteps][4], uint32_t b,
                                            const RowRange (&seen)[2]) {
  const uint32_t panel = b + kPanel * kBlockPanelBytes;
  float product[kColumns / 2] = {};
  issue_product(product, a, panel);
  wgmma_wait<0>();
  pin_registers(product);
  pin_registers(a);
  if (__any_sync(0xffffffff, any_nan(product))) multiply_seen<unpack_bf16>(product, a, panel, seen);
#pragma unroll
  for (int i = 0; i < kColumns / 2; ++i) sums[32 * kPanel + i] += product[i];
}

// sums += A B, all panels of a block of K or Q.
__device__ __forceinline__ void add_product_qk(float (&sums)[kRegisters], uint32_t (&a)[kSteps][4], uint32_t b,
                                               const RowRange (&seen)[2]) {
  add_product<0, 64>(sums, a, b, seen);
}

// Likewise of dO.
__device__ __forceinline__ void add_product_dout(float (&sums)[kRegistersV], uint32_t (&a)[kSteps][4], uint32_t b,
                                                 const RowRange (&seen)[2]) {
  add_product<0, 64>(sums, a, b, seen);
}

// Rows `row` to `row` + kRows - 1 of a tensor's `length` from `begin` on, zeros behind the last.
template <int kRows, int kTensorPanels>
__device__ __forceinline__ void load_rows(uint32_t smem, const TensorMap& map, uint32_t full, int row, int head,
                                          int begin, int length) {
#pragma unroll
  for (int panel = 0; panel < kTensorPanels; ++panel) {
#pragma unroll
    for (int box = 0; box < kRows; box += kBoxRows) {
      tma_load_ragged(smem + (panel * kRows + box) * 128, &map, full, 64 * panel, row + box, head, begin, length,
                      kEvictNormal);
    }
  }
}

// A tile of a gradient out of its buffer.
template <int kTensorPanels>
__device__ __forceinline__ void store_rows(const TensorMap& map, uint32_t smem, int head, int begin, int length) {
#pragma unroll
  for (int panel = 0; panel < kTensorPanels; ++panel) {
#pragma unroll
    for (int box = 0; box < kTileRows; box += kBoxRows) {
      tma_store_ragged(&map, smem + (panel * kTileRows + box) * 128, 64 * panel, box, head, begin, length);
    }
  }
}

template <int kSums>
__device__ __forceinline__ void scale_sums(float (&sums)[kSums], float scale) {
#pragma unroll
  for (int i = 0; i < kSums; ++i) sums[i] *= scale;
}

// Warp 4: tiles and their blocks, of both kinds.
class Loader {
 public:
  __device__ __forceinline__ Loader(const PackedBackwardParams& p, Control& control, uint32_t tiles, uint32_t blocks)
      : p_(p), control_(control), tiles_(tiles), blocks_(blocks) {}

  // Q and dO of a tile and head, then K and V of what it sees.
  __device__ __forceinline__ void load_queries(int tile, int head) {
    const int row = tile * kTileRows;
    if (tile != query_tile_) queries_.find(p_, query_tile_ = tile);
    const StatsLoader<kTileRows> stats(p_, head, row, p_.total_q - row);
    control_.tile.wait_empty(tile_at_);
    queries_.write(control_.tiles[tile_at_.slot]);
    stats.write(control_.tile_stats[tile_at_.slot]);
    load_tile(p_.map_q, p_.map_dout, head, row, p_.total_q - row);
    for (int key = 0; key < queries_.length(); key += kBlockN) {
      control_.block.wait_empty(block_at_);
      load_block(p_.map_k, p_.map_v, head / p_.gqa_ratio, key, queries_.begin(), queries_.length());
    }
  }

  // K and V of a tile and kv head, then Q and dO of what sees it, head by head.
  __device__ __forceinline__ void load_keys(int tile, int kv_head) {
    const int row = tile * kTileRows;
    if (tile != key_tile_) keys_.find(p_, key_tile_ = tile);
    control_.tile.wait_empty(tile_at_);
    keys_.write(control_.tiles[tile_at_.slot]);
    load_tile(p_.map_k, p_.map_v, kv_head, row, p_.total_k - row);
    for (int head = kv_head * p_.gqa_ratio; head < (kv_head + 1) * p_.gqa_ratio; ++head) {
      for (int query = 0; query < keys_.length(); query += kBlockN) {
        const StatsLoader<kBlockN> stats(p_, head, keys_.begin() + query, keys_.length() - query);
        control_.block.wait_empty(block_at_);
        stats.write(control_.block_stats[block_at_.slot]);
        load_block(p_.map_q, p_.map_dout, head, query, keys_.begin(), keys_.length());
      }
    }
  }

 private:
  __device__ __forceinline__ void load_tile(const TensorMap& map, const TensorMap& map_v, int head, int begin,
                                            int length) {
    if (elect_one()) {
      const uint32_t full = smem_address(&control_.tile.full[tile_at_.slot]);
      const uint32_t buffer = tiles_ + tile_at_.slot * kTileBytes;
      mbarrier_expect_bytes(full, kTileBytes);
      load_rows<kTileRows, kPanels>(buffer, map, full, 0, head, begin, length);
      load_rows<kTileRows, kPanelsV>(buffer + kPanels * kTilePanelBytes, map_v, full, 0, head, begin, length);
    } else {
      control_.tile.arrive_full(tile_at_);
    }
    tile_at_.advance();
  }

  __device__ __forceinline__ void load_block(const TensorMap& map, const TensorMap& map_v, int head, int row, int begin,
                                             int length) {
    if (elect_one()) {
      const uint32_t full = smem_address(&control_.block.full[block_at_.slot]);
      const uint32_t buffer = blocks_ + block_at_.slot * kBlockBytes;
      mbarrier_expect_bytes(full, kBlockBytes);
      load_rows<kBlockN, kPanels>(buffer, map, full, row, head, begin, length);
      load_rows<kBlockN, kPanelsV>(buffer + kPanels * kBlockPanelBytes, map_v, full, row, head, begin, length);
    } else {
      control_.block.arrive_full(block_at_);
    }
    block_at_.advance();
  }

  const PackedBackwardParams& p_;
  Control& control_;
  const uint32_t tiles_, blocks_;
  RingPosition<kStages> tile_at_, block_at_;
  TileFinder<kTileRows, QueryRows<kCausal>> queries_;
  TileFinder<kTileRows, KeyRows<kCausal>> keys_;
  int query_tile_ = -1, key_tile_ = -1;  // those that were found last
};

// Warps 0 to 3.
class Math {
 public:
  __device__ __forceinline__ Math(const PackedBackwardParams& p, Control& control, uint32_t tiles, uint32_t blocks)
      : p_(p), control_(control), tiles_(tiles), blocks_(blocks) {}

  __device__ __forceinline__ void multiply_queries(int tile, int head) {
    const uint32_t q_tile = tiles_ + tile_at_.slot * kTileBytes;
    float dq[kRegisters] = {};
    control_.tile.wait_full(tile_at_);
    const PackedTile<kTileRows>& in = control_.tiles[tile_at_.slot];
    const StatsOfRows stats(control_.tile_stats[tile_at_.slot]);
    for (int first_key = 0; first_key < in.length; first_key += kBlockN, block_at_.advance()) {
      const uint32_t k_block = blocks_ + block_at_.slot * kBlockBytes;
      float scores[kBlockN / 2], dp[kBlockN / 2];
      multiply_rows_of(scores, dp, q_tile, k_block);
      const ThreadRows own(in, first_key);
      const WarpColumns columns(own.seen);
      uint32_t ds[kSteps][4];
      range_probabilities(scores, own.seen, columns, stats, p_.scale_log2);
      range_gradients<pack_bf16>(ds, scores, dp, columns, stats);
      add_product_qk(dq, ds, k_block, own.seen);
      control_.block.arrive_empty(block_at_);
    }
    scale_sums(dq, p_.scale);
    free_stored();
    stage_rows<pack_bf16, 64, kTilePanelBytes>(dq, q_tile, warp_, lane_);
    hand_over();
    if (threadIdx.x == 0) {
      const int row = tile * kTileRows;
      store_rows<kPanels>(p_.map_dq, q_tile, head, row, p_.total_q - row);
      stored();
    }
    next_tile();
  }

  __device__ __forceinline__ void multiply_keys(int tile, int kv_head) {
    const uint32_t k_tile = tiles_ + tile_at_.slot * kTileBytes, v_tile = k_tile + kPanels * kTilePanelBytes;
    float dk[kRegisters] = {}, dv[kRegistersV] = {};
    control_.tile.wait_full(tile_at_);
    const PackedTile<kTileRows>& in = control_.tiles[tile_at_.slot];
    for (int head = 0; head < p_.gqa_ratio; ++head) {
      for (int first_query = 0; first_query < in.length; first_query += kBlockN, block_at_.advance()) {
        const uint32_t q_block = blocks_ + block_at_.slot * kBlockBytes;
        const uint32_t dout_block = q_block + kPanels * kBlockPanelBytes;
        float scores[kBlockN / 2], dp[kBlockN / 2];
        multiply_rows_of(scores, dp, k_tile, q_block);
        const StatsOfColumns stats(control_.block_stats[block_at_.slot]);
        const ThreadRows own(in, first_query);
        const WarpColumns columns(own.seen);
        uint32_t probabilities[kSteps][4], ds[kSteps][4];
        range_probabilities(scores, own.seen, columns, stats, p_.scale_log2);
        pack_range<pack_bf16>(probabilities, scores, columns);
        range_gradients<pack_bf16>(ds, scores, dp, columns, stats);
        add_product_dout(dv, probabilities, dout_block, own.seen);
        add_product_qk(dk, ds, q_block, own.seen);
        control_.block.arrive_empty(block_at_);
      }
    }
    scale_sums(dk, p_.scale);
    free_stored();
    stage_rows<pack_bf16, 64, kTilePanelBytes>(dk, k_tile, warp_, lane_);
    stage_rows<pack_bf16, 64, kTilePanelBytes>(dv, v_tile, warp_, lane_);
    hand_over();
    if (threadIdx.x == 0) {
      const int row = tile * kTileRows;
      store_rows<kPanels>(p_.map_dk, k_tile, kv_head, row, p_.total_k - row);
      store_rows<kPanelsV>(p_.map_dv, v_tile, kv_head, row, p_.total_k - row);
      stored();
    }
    next_tile();
  }

  // The leader's: the tile that gradients left through last is free, once they have been read.
  __device__ __forceinline__ void free_stored() {
    if (stored_) {
      tma_store_wait_read();
      mbarrier_arrive(stored_);
      stored_ = 0;
    }
  }

 private:
  // S and dP, or their transposes.
  __device__ __forceinline__ void multiply_rows_of(float (&scores)[kBlockN / 2], float (&dp)[kBlockN / 2],
                                                   uint32_t rows, uint32_t block) {
    control_.block.wait_full(block_at_);
    issue_rows(scores, rows, block);
    issue_rows(dp, rows + kPanels * kTilePanelBytes, block + kPanels * kBlockPanelBytes);
    free_stored();
    wgmma_wait<0>();
    pin_registers(scores);
    pin_registers(dp);
  }

  // What all have staged is there for the copy engine.
  __device__ __forceinline__ void hand_over() {
    fence_async_proxy();
    named_barrier_sync(1, 128);
  }

  // The leader has issued a tile's stores.
  __device__ __forceinline__ void stored() {
    tma_store_commit();
    stored_ = smem_address(&control_.tile.empty[tile_at_.slot]);
  }

  // The leader hands the tile back when its stores have read it.
  __device__ __forceinline__ void next_tile() {
    if (threadIdx.x != 0) control_.tile.arrive_empty(tile_at_);
    __syncwarp();
    tile_at_.advance();
  }

  const PackedBackwardParams& p_;
  Control& control_;
  const uint32_t tiles_, blocks_;
  const int warp_ = threadIdx.x / 32, lane_ = threadIdx.x % 32;
  RingPosition<kStages> tile_at_, block_at_;
  uint32_t stored_ = 0;  // the leader's: empty barrier of the tile that gradients are leaving through
};

// A CTA's tiles of queries and of keys, in turns.
template <typename Queries, typename Keys>
__device__ __forceinline__ void for_each_tile(const PackedBackwardParams& p, Queries queries, Keys keys) {
  const int heads_kv = p.heads / p.gqa_ratio;
  const PairRange of_queries = pairs_of_cta((p.total_q + kTileRows - 1) / kTileRows * p.heads);
  const PairRange of_keys = pairs_of_cta<true>((p.total_k + kTileRows - 1) / kTileRows * heads_kv);
  const int turns = max(of_queries.end - of_queries.begin, of_keys.end - of_keys.begin);
  for (int turn = 0; turn < turns; ++turn) {
    const int q_pair = of_queries.begin + turn, k_pair = of_keys.begin + turn;
    if (q_pair < of_queries.end) queries(q_pair / p.heads, q_pair % p.heads);
    if (k_pair < of_keys.end) keys(k_pair / heads_kv, k_pair % heads_kv);
  }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kRowThreads)
jagtile_backward_prepare(const __grid_constant__ PackedBackwardParams p) {
  launch_dependents();
  await_previous_kernels();
  const TokenRows rows = token_rows(p);
  if (rows.count > 0) write_delta<64, unpack_bf16>(p, rows);
}

extern "C" __global__ void __launch_bounds__(160, 2)
jagtile_bwd_bf16_d64_packedrows_n64_s2_c2(const __grid_constant__ PackedBackwardParams p) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const uint32_t tiles = smem_address(shared), blocks = tiles + 32768;
  Control& control = *reinterpret_cast<Control*>(shared + 65536);
  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0);  // uniform, and known to be

  if (threadIdx.x == 0) {
    control.tile.init(32, 128);  // filled by every lane of the loading warp, freed by every math thread
    control.block.init(32, 128);
    mbarrier_init_fence();
  }
  await_previous_kernels();
  __syncthreads();

  if (warp == 4) {
    if (elect_one()) {
      tma_prefetch_map(&p.map_q);
      tma_prefetch_map(&p.map_dout);
      tma_prefetch_map(&p.map_k);
      tma_prefetch_map(&p.map_v);
      tma_prefetch_map(&p.map_dq);
      tma_prefetch_map(&p.map_dk);
      tma_prefetch_map(&p.map_dv);
    }
    Loader loader(p, control, tiles, blocks);
    for_each_tile(p, [&](int tile, int head) { loader.load_queries(tile, head); },
                  [&](int tile, int kv_head) { loader.load_keys(tile, kv_head); });
  } else {
    Math math(p, control, tiles, blocks);
    for_each_tile(p, [&](int tile, int head) { math.multiply_queries(tile, head); },
                  [&](int tile, int kv_head) { math.multiply_keys(tile, kv_head); });
    math.free_stored();
  }
}
