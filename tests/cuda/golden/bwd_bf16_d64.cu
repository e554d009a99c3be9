// jagtile_bwd_bf16_d64_keyblocks_m128_n128_s2_c1_dbulk_o0_k1_hnone_l1_e0_f1
//
// Backward of attention over a jagged batch, one kernel for one case:
//   target      sm_90a
//   dtype       bf16
//   head_dim    64 (queries and keys), 64 (values)
//   mask        none
// Template: templates/cuda/sm90/backward.cu.j2, algorithm keyblocks, with
//   block_m             128
//   block_n             128
//   num_stages          2
//   ctas_per_sm         1
//   dq                  bulk
//   overlap             false
//   kv_stages           1
//   held                none
//   late_dq             true
//   early_dv            false
//   fused               true
// Generated; edit the template, not this text. To see it again:
//   jagtile generate sm_90a/bwd_bf16_d64/keyblocks_m128_n128_s2_c1_dbulk_o0_k1_hnone_l1_e0_f1
//
// One persistent CTA an SM: 2 math warpgroups of 64 keys each, one that feeds them, one with rows. K and V of a tile
// stay; the queries that see its keys go by from the last, those of every head that shares the kv head.
//   warp 0      copies K and V, then Q and dO block by block (TMA, clipped at the sequence's end)
//   warp 1      claims tiles from the work list; copies rows to be prepared or finished
//   warp 2      copies lse and delta of every block
//   warp 3      stores dQ to its sums in global memory or adds it to them (bulk copies)
//   warps 4-7   prepare rows and finish dQ
//   warps 8...  S^T = K Q^T, dP^T = V dO^T, P and dS in registers, dV += P^T dO, dK += dS^T Q, dQ = dS K (wgmma);
//               dK and dV leave through dS^T's and dQ's buffers (TMA), dQ from registers where the tile has all keys
// P and dS are packed when both are there, so that P is never in registers twice.
// dQ of a block is multiplied behind dV of the next block: warpgroups need not be at the same block.
//
// Shared memory          bytes
//   K                      16384   1 panel of 128 rows x 128 B
//   V                      16384   1 panel of 128 rows x 128 B
//   Q [2]                  32768   1 panel of 128 rows x 128 B
//   dO [2]                 32768   1 panel of 128 rows x 128 B
//   dS^T [2]               65536   2 panels of 128 rows x 128 B; dK on its way out
//   dQ                     32768   float32, as in its sums; dV on its way out
//   rows [2]               16384   O and dO, or dQ's sums, of rows to prepare or to finish
//   lse, delta [2]          2048   2 x 128 float32
//   tiles, barriers         1024
#include "cuda/include/backward_params.cuh"
#include "cuda/include/backward_rows.cuh"
#include "cuda/include/dependent_launch.cuh"
#include "cuda/include/dq_sums.cuh"
#include "cuda/include/fragments.cuh"
#include "cuda/include/gradients.cuh"
#include "cuda/include/key_blocks.cuh"
#include "cuda/include/key_tiles.cuh"
#include "cuda/include/pipeline.cuh"
#include "cuda/include/ptx.cuh"
#include "cuda/include/row_tasks.cuh"
#include "cuda/include/work_list.cuh"

namespace {

constexpr int kHeadDim = 64;
constexpr int kHeadDimV = 64;
constexpr int kBlockM = 128;  // queries a step
constexpr int kBlockN = 128;  // keys a tile
constexpr int kWarpgroups = 2;
constexpr int kStages = 2;
constexpr int kKVStages = 1;
constexpr int kTileSlots = 2;
constexpr int kPanels = 1;   // 64-column panels of Q and K
constexpr int kPanelsV = 1;  // of V and dO
constexpr int kStepsM = kBlockM / 16;
constexpr int kStatsOfLane = 4;  // of a warp that has a step's lse and delta

constexpr int kQPanelBytes = kBlockM * 128;
constexpr int kKVPanelBytes = kBlockN * 128;
constexpr int kQBytes = kPanels * kQPanelBytes;
constexpr int kDoutBytes = kPanelsV * kQPanelBytes;
constexpr int kKBytes = kPanels * kKVPanelBytes;
constexpr int kVBytes = kPanelsV * kKVPanelBytes;
constexpr int kDsBytes = 2 * kKVPanelBytes;
constexpr int kRowsBytes = 64 * 128;  // a warpgroup's rows of a panel
constexpr int kMathBarrier = kWarpgroups + 1;

// dQ of a block is made in parts, each by one warpgroup: 64 queries.
constexpr int kParts = 2;
constexpr int kPartBytes = 16384;
constexpr int kDqStages = 1;
using Stats = StatsInRegisters<kBlockM>;
using Sums = DqSums<kHeadDim>;
using KeyTile = KeyTiles</*kCausal=*/false, kBlockM, kBlockN, /*kAdders=*/1>;

using Units = RowUnits<Sums, kHeadDimV, 32, 8192, 2, 4>;
using Rows = RowTasks<kBlockN, Units>;
static_assert(kWarpgroups <= Rows::kMostWarpgroups);

struct Control {
  Tile tiles[kTileSlots];
  TileClaims<kBlockN> claims;
  Rows rows;
  RingBarriers<kTileSlots> tile;
  RingBarriers<kTileSlots> prepared;  // rows of the tile
  RingBarriers<Units::kBuffers> row_units;
  RingBarriers<1> loaded;  // all of the tile is on its way
  RingBarriers<kKVStages> k, v;
  RingBarriers<kStages> q, dout, stats;
  RingBarriers<2> ds;
  RingBarriers<kDqStages> dq[kParts];
  BulkTurns turns;
};
static_assert(sizeof(Control) <= 1024);

// d (64 x 128) {+}= A (64 x 16) B^T (128 x 16), both K-major in shared memory.
__device__ __forceinline__ void multiply_rows(float (&d)[64], uint64_t a, uint64_t b, int accumulate) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "%64, %65, p, 1, 1, 0, 0;\n"
      "}\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
        "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
        "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
        "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]),
        "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]),
        "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]),
        "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),
        "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
      : "l"(a), "l"(b), "r"(accumulate));
}

// d (64 x 64) += A (64 x 16, registers) B (16 x 64, shared memory, its columns contiguous).
__device__ __forceinline__ void multiply_dv(float (&d)[32], const uint32_t (&a)[4], uint64_t b) {
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

// d (64 x 64) {+}= A^T (16 x 64) B (16 x 64), in shared memory, their columns contiguous.
__device__ __forceinline__ void multiply_dq(float (&d)[32], uint64_t a, uint64_t b, int accumulate) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "%32, %33, p, 1, 1, 1, 1;\n"
      "}\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
        "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
        "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
        "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
      : "l"(a), "l"(b), "r"(accumulate));
}

// d (64 x 128) = A B^T, asynchronously; 64 rows of A and 128 rows of B, 64 columns each.
__device__ __forceinline__ void issue_scores(float (&d)[64], uint32_t a, uint32_t b) {
  const uint64_t a_descriptor = wgmma_descriptor(a, 16, 1024);
  const uint64_t b_descriptor = wgmma_descriptor(b, 16, 1024);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    const int inside = step % 4 * 32;
    multiply_rows(d, a_descriptor + ((step / 4 * kKVPanelBytes + inside) >> 4),
                b_descriptor + ((step / 4 * kQPanelBytes + inside) >> 4), step > 0);
  }
  wgmma_commit();
}

// d (64 x 128) = A B^T, asynchronously; 64 rows of A and 128 rows of B, 64 columns each.
__device__ __forceinline__ void issue_dp(float (&d)[64], uint32_t a, uint32_t b) {
  const uint64_t a_descriptor = wgmma_descriptor(a, 16, 1024);
  const uint64_t b_descriptor = wgmma_descriptor(b, 16, 1024);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    const int inside = step % 4 * 32;
    multiply_rows(d, a_descriptor + ((step / 4 * kKVPanelBytes + inside) >> 4),
                b_descriptor + ((step / 4 * kQPanelBytes + inside) >> 4), step > 0);
  }
  wgmma_commit();
}

// d (64 x 64) += A B, asynchronously; A's fragments in registers, 128 rows of B.
__device__ __forceinline__ void issue_dv(float (&d)[32], const uint32_t (&a)[8][4], uint32_t b) {
  const uint64_t b_descriptor = wgmma_descriptor(b, kQPanelBytes, 1024);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < 8; ++step) {
    multiply_dv(d, a[step], b_descriptor + (step * 16 * 128 >> 4));
  }
  wgmma_commit();
}

// d (64 x 64) += A B, asynchronously; A's fragments in registers, 128 rows of B.
__device__ __forceinline__ void issue_dk(float (&d)[32], const uint32_t (&a)[8][4], uint32_t b) {
  const uint64_t b_descriptor = wgmma_descriptor(b, kQPanelBytes, 1024);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < 8; ++step) {
    multiply_dv(d, a[step], b_descriptor + (step * 16 * 128 >> 4));
  }
  wgmma_commit();
}

// d (64 x 64) = A^T B, asynchronously; 128 rows of A, 64 columns wide, and of B.
__device__ __forceinline__ void issue_dq(float (&d)[32], uint32_t a, uint32_t b) {
  const uint64_t a_descriptor = wgmma_descriptor(a, 16, 1024);
  const uint64_t b_descriptor = wgmma_descriptor(b, kKVPanelBytes, 1024);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < 8; ++step) {
    multiply_dq(d, a_descriptor + (step * 16 * 128 >> 4), b_descriptor + (step * 16 * 128 >> 4), step > 0);
  }
  wgmma_commit();
}

// A part from its buffer to its sums, stored or added, in one thread; committed.
__device__ __forceinline__ void put_part(const BackwardParams& p, const WorkItem& item, int head, int row, int part,
                                         uint32_t buffer) {
  const int first = row + 64 * part;
  const int rows = min(item.q_length - first, 64);
  if (rows > 0) {
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
      put_sums(Sums::row(p.dq_sums, p.total_q, head, panel, item.q_begin + first), buffer + panel * 64 * 64 * 4,
               rows * Sums::columns(panel) * 4, item);
    }
  }
  tma_store_commit();
}

// This warpgroup's part of dQ into its buffer.
template <int kRegisters>
__device__ __forceinline__ void stage_part(const float (&dq)[kRegisters], float* part, int warpgroup, int row, int quad,
                                           int token) {
  stage_sums<Sums, 0, 0>(dq, part, row, quad, token);
}

// This warpgroup's part of a dQ that is complete.
template <int kRegisters>
__device__ __forceinline__ void write_part(const float (&dq)[kRegisters], const BackwardParams& p, const WorkItem& item,
                                           int head, int warpgroup, int row, int quad) {
  write_panel<Sums, pack_bf16, 0, 0>(dq, p, head, item.q_begin, item.q_length, row, quad);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kRowThreads) jagtile_backward_prepare(const __grid_constant__ BackwardParams p) {
  launch_dependents();
  await_previous_kernels();
  begin_tasks<kHeadDim>(p);
}

extern "C" __global__ void __launch_bounds__(512, 1)
jagtile_bwd_bf16_d64_keyblocks_m128_n128_s2_c1_dbulk_o0_k1_hnone_l1_e0_f1(const __grid_constant__ BackwardParams p) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const uint32_t k_tile = smem_address(shared);
  const uint32_t v_tile = k_tile + 16384;
  const uint32_t q_tiles = v_tile + 16384;
  const uint32_t dout_tiles = q_tiles + 32768;
  const uint32_t ds_tiles = dout_tiles + 32768;
  float* const dq_parts = reinterpret_cast<float*>(shared + 163840);
  float* const stats = reinterpret_cast<float*>(shared + 212992);  // [stage][lse, delta][query]
  Control& control = *reinterpret_cast<Control*>(shared + 215040);
  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0);  // uniform, and known to be

  if (threadIdx.x == 0) {
    // Freed by the loader, every lane of the warp of lse and delta, the adder of dQ and every math thread.
    control.tile.init(1, 34 + 128 * kWarpgroups);
    control.loaded.init(1, 1);
    control.k.init(1, kWarpgroups);
    control.v.init(1, kWarpgroups);
    control.q.init(1, kWarpgroups);
    control.dout.init(1, kWarpgroups);
    control.stats.init(32, 128 * kWarpgroups);
    control.ds.init(4 * kWarpgroups, kWarpgroups);
    for (int part = 0; part < kParts; ++part) control.dq[part].init(4, 1);
    control.prepared.init(1, 1);
    control.row_units.init(1, Units::kReaders);
    control.rows.begin(p);
    mbarrier_init_fence();
  }
  await_previous_kernels();
  if (threadIdx.x == 0) {
    set_claims(control.claims, p);
  }
  __syncthreads();

  if (warp < 8) {
    shrink_registers<24>();
    if (warp == 0 && elect_one()) {
      tma_prefetch_map(&p.map_k);
      tma_prefetch_map(&p.map_q);
      tma_prefetch_map(&p.map_v);
      tma_prefetch_map(&p.map_dout);
      RingPosition<kKVStages> kv_at;
      RingPosition<kStages> at;
      for_each_tile(control, [&](const WorkItem& item, int kv_head) {
        const int keys = KeyTile::keys_seen(item, KeyTile::causal_shift(p, item));
        control.k.wait_empty(kv_at);
        load_tile<kPanels, kKVPanelBytes>(k_tile, p.map_k, control.k.full[0], item.row, kv_head,
                                          item.k_begin, keys, kEvictFirst);
        control.v.wait_empty(kv_at);
        load_tile<kPanelsV, kKVPanelBytes>(v_tile, p.map_v, control.v.full[0], item.row, kv_head,
                                           item.k_begin, keys, kEvictFirst);
        KeyTile::for_each_block(p, item, kv_head, [&](int head, int row) {
          control.q.wait_empty(at);
          load_tile<kPanels, kQPanelBytes>(q_tiles + at.slot * kQBytes, p.map_q, control.q.full[at.slot], row, head,
                                           item.q_begin, item.q_length, kEvictLast);
          control.dout.wait_empty(at);
          load_tile<kPanelsV, kQPanelBytes>(dout_tiles + at.slot * kDoutBytes, p.map_dout, control.dout.full[at.slot], row,
                                            head, item.q_begin, item.q_length, kEvictLast);
          at.advance();
        });
        control.loaded.arrive_full({});
        kv_at.advance();
      });
    } else if (warp == 1 && elect_one()) {
      claim_tiles_and_rows<Units>(p, control, smem_address(shared) + 196608);
    } else if (warp == 2) {
      const int lane = threadIdx.x % 32;
      RingPosition<kStages> at;
      PreparedTiles<Control> tiles(control);
      for_each_tile(tiles, [&](const WorkItem& item, int kv_head) {
        KeyTile::for_each_block(p, item, kv_head, [&](int head, int row) {
          const int rows = item.q_length - row - lane;  // the lane's first one included
          const long long first = static_cast<long long>(head) * p.total_q + item.q_begin + row + lane;
          float lse[kStatsOfLane], delta[kStatsOfLane];
          for (int i = 0; i < kStatsOfLane; ++i) {
            const float natural = 32 * i < rows ? p.lse[first + 32 * i] : -INFINITY;
            const bool sees_keys = natural != -INFINITY;  // else P = exp2(S - inf) = 0
            lse[i] = sees_keys ? natural * 1.44269504088896f : INFINITY;
            delta[i] = sees_keys ? p.delta[first + 32 * i] : 0.0f;
          }
          control.stats.wait_empty(at);
          float* slot = stats + at.slot * 2 * kBlockM + Stats::place(lane);
          for (int i = 0; i < kStatsOfLane; ++i) {
            slot[32 * i] = lse[i];
            slot[kBlockM + 32 * i] = delta[i];
          }
          control.stats.arrive_full(at);
          at.advance();
        });
      });
    } else if (warp == 3 && elect_one()) {
      RingPosition<1> at;
      for_each_tile(control, [&](const WorkItem& item, int kv_head) {
        if (KeyTile::has_all_keys(item)) return;
        control.rows.begin_adding(p, item, kv_head);
        control.turns.begin<KeyTile>(p, item, kv_head);
        KeyTile::for_each_block(p, item, kv_head, [&](int head, int row) {
          control.turns.await(control.dq[0].is_full(at));
#pragma unroll
          for (int part = 0; part < kParts; ++part) {
            control.dq[part].wait_full(at);
            fence_async_proxy();  // here, or math warps would wait for their stores
            put_part(p, item, head, row, part, smem_address(dq_parts) + part * kPartBytes);
          }
          tma_store_wait_read<1>();
          control.dq[0].arrive_empty(at);
          tma_store_wait_read<0>();
          control.dq[1].arrive_empty(at);
          at.advance();
        });
        control.turns.pass();
        tma_store_wait();
        fence_async_proxy_global();
        control.rows.end_adding();
      });
      tma_store_wait();
    } else if (warp >= 4) {
      work_on_rows<Units, unpack_bf16, pack_bf16>(p, control, smem_address(shared) + 196608, warp - 4);
    }
    return;
  }

  grow_registers<232>();
  const int warpgroup = warp / 4 - 2;
  const unsigned thread = computed_here(threadIdx.x);  // or it is read anew in every step
  const int lane = thread % 32, quad = lane % 4;
  const bool leader = thread % 128 == 0;
  const int thread_row = 16 * (warp % 4) + lane / 4;  // the upper of two, 8 apart, among the warpgroup's 64
  const uint32_t k_rows = k_tile + warpgroup * kRowsBytes;
  const uint32_t v_rows = v_tile + warpgroup * kRowsBytes;
  RingPosition<kStages> at;  // in the rings of Q, of dO, and of lse and delta
  uint32_t step = 0;  // of all tiles
  RingPosition<kDqStages> dq_at;
  const int part = warpgroup;  // of dQ, this warpgroup's
  bool leaving = false;  // dK and dV of the previous tile, through dS^T's and dQ's buffers
  auto await_stores = [&] {
    if (leaving) {
      if (lane == 0) tma_store_wait_read();
      named_barrier_sync(1 + warpgroup, 128);
      leaving = false;
    }
  };

  for (uint32_t tile = 0;; ++tile) {
    const RingPosition<kTileSlots> tile_at = {static_cast<int>(tile % kTileSlots), tile / kTileSlots % 2};
    const RingPosition<1> kv_at = {0, tile % 2};
    control.tile.wait_full(tile_at);
    const int kv_head = control.tiles[tile_at.slot].head;
    if (kv_head < 0) break;
    const WorkItem& item = control.tiles[tile_at.slot].item;
    const bool has_all_keys = KeyTile::has_all_keys(item);
    float dk[kHeadDim / 2] = {}, dv[kHeadDimV / 2] = {};

    // Blocks of queries from mask_end on are seen whole by the warpgroup's keys, all of which are seen.
    const int first_key = item.row + 64 * warpgroup;
    const int shift = KeyTile::causal_shift(p, item);
    const int mask_end = first_key + 64 > KeyTile::keys_seen(item, shift) ? kNoQuery : 0;

    control.k.wait_full(kv_at);
    control.v.wait_full(kv_at);
    const auto free_keys = [&] {  // before copies of the last dQ are in the way of the next tile's K and V
      control.k.arrive_empty(kv_at);
      control.v.arrive_empty(kv_at);
    };
    const int steps = item.q_blocks * p.gqa_ratio;
    int row = KeyTile::last_row(item);  // of the block's queries, within the sequence
    int head = kv_head * p.gqa_ratio;
#pragma unroll 1
    for (int left = steps; left > 0; --left) {
      const uint32_t q_tile = q_tiles + at.slot * kQBytes;
      float scores[kBlockM / 2];
      control.q.wait_full(at);
      issue_scores(scores, k_rows, q_tile);
      const uint32_t dout_tile = dout_tiles + at.slot * kDoutBytes;
      const RingPosition<2> ds_at = {static_cast<int>(step % 2), step / 2 % 2};
      const uint32_t ds_tile = ds_tiles + ds_at.slot * kDsBytes;
      const float* step_stats = stats + at.slot * 2 * kBlockM;
      float dp[kBlockM / 2];
      control.dout.wait_full(at);
      issue_dp(dp, v_rows, dout_tile);
      await_stores();
      control.stats.wait_full(at);
      wgmma_wait<1>();
      pin_registers(scores);
      const Stats lse(step_stats, quad);
      probabilities_of_scores(scores, lse, p.scale_log2);
      if (row < mask_end) {
        const int key = item.row + 64 * warpgroup + thread_row;
        mask_queries(scores, KeyTile::first_query(p, item, key) - row - 2 * quad,
                     KeyTile::first_query(p, item, key + 8) - row - 2 * quad);
      }
      uint32_t probabilities[kStepsM][4], ds[kStepsM][4];
      wgmma_wait<0>();
      pin_registers(dp);
      pack_gradients<pack_bf16>(probabilities, ds, scores, dp, Stats(step_stats + kBlockM, quad));
      control.stats.arrive_empty(at);
      control.ds.wait_empty(ds_at);
      stage_fragments<kKVPanelBytes>(ds, ds_tile + warpgroup * kRowsBytes, warp, lane);
      issue_dv(dv, probabilities, dout_tile);  // no sooner: P would be packed while registers still have dP
      __syncwarp();
      if (lane == 0) control.ds.arrive_full(ds_at);
      // dQ of the block before, with every warpgroup's dS^T.
      const RingPosition<2> ds_before = {static_cast<int>((step - 1) % 2), (step - 1) / 2 % 2};
      const bool add_before = left < steps;
      if (add_before) {
        float dq[32];
        control.ds.wait_full(ds_before);
        fence_async_proxy();  // what all warps wrote
        issue_dq(dq, ds_tiles + ds_before.slot * kDsBytes + warpgroup * kKVPanelBytes, k_tile);
        issue_dk(dk, ds, q_tile);
        wgmma_wait<1>();
        pin_registers(dv);
        pin_registers(probabilities);
        pin_registers(dq);
        if (leader) control.dout.arrive_empty(at);
        if (leader) control.ds.arrive_empty(ds_before);

        if (has_all_keys) {
          const bool row_begins = head == kv_head * p.gqa_ratio;
          const int dq_head = row_begins ? head + p.gqa_ratio - 1 : head - 1;  // of the step before
          const int dq_row = row_begins ? row + kBlockM : row;
          write_part(dq, p, item, dq_head, warpgroup, dq_row + 64 * warpgroup + thread_row, quad);
        } else {
          control.dq[part].wait_empty(dq_at);
          const int token = item.q_begin + thread_row;  // odd or even as in all blocks
          stage_part(dq, dq_parts + part * (kPartBytes / 4), warpgroup, thread_row, quad, token);
          __syncwarp();
          if (lane == 0) control.dq[part].arrive_full(dq_at);
          dq_at.parity ^= 1;
        }
      } else {
        issue_dk(dk, ds, q_tile);
        wgmma_wait<1>();
        pin_registers(dv);
        pin_registers(probabilities);
        if (leader) control.dout.arrive_empty(at);
      }
      if (++head == (kv_head + 1) * p.gqa_ratio) {
        head = kv_head * p.gqa_ratio;
        row -= kBlockM;
      }
      wgmma_wait<0>();
      pin_registers(dk);
      pin_registers(ds);
      if (leader) control.q.arrive_empty(at);
      at.advance();
      ++step;
    }
    if (steps > 0) {
      const RingPosition<2> ds_before = {static_cast<int>((step - 1) % 2), (step - 1) / 2 % 2};
      float dq[32];
      control.ds.wait_full(ds_before);
      fence_async_proxy();  // what all warps wrote
      issue_dq(dq, ds_tiles + ds_before.slot * kDsBytes + warpgroup * kKVPanelBytes, k_tile);
      wgmma_wait<0>();
      pin_registers(dq);
      if (leader) {
        control.ds.arrive_empty(ds_before);
        free_keys();
      }
      if (has_all_keys) {
        const bool row_begins = head == kv_head * p.gqa_ratio;
        const int dq_head = row_begins ? head + p.gqa_ratio - 1 : head - 1;  // of the step before
        const int dq_row = row_begins ? row + kBlockM : row;
        write_part(dq, p, item, dq_head, warpgroup, dq_row + 64 * warpgroup + thread_row, quad);
      } else {
        control.dq[part].wait_empty(dq_at);
        const int token = item.q_begin + thread_row;  // odd or even as in all blocks
        stage_part(dq, dq_parts + part * (kPartBytes / 4), warpgroup, thread_row, quad, token);
        __syncwarp();
        if (lane == 0) control.dq[part].arrive_full(dq_at);
        dq_at.parity ^= 1;
      }
    }

    await_stores();  // where no query sees this tile

    // K and V of the next tile arrive while dV leaves through this warpgroup's part of dQ, which is on its way or gone, and dK
    // through its rows of dS^T, when every warpgroup has read them.
    const uint32_t dv_rows = smem_address(dq_parts) + warpgroup * kPartBytes;
    const uint32_t dk_rows = ds_tiles + computed_here(warpgroup) * kRowsBytes;  // not a register through the loop
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) dk[i] *= p.scale;
    named_barrier_sync(kMathBarrier, 128 * kWarpgroups);
    if (leader && steps == 0) free_keys();
    stage_rows<pack_bf16, kHeadDim, kKVPanelBytes>(dk, dk_rows, warp, lane_here());
    control.dq[part].wait_empty(dq_at);
    stage_rows<pack_bf16, kHeadDimV, kRowsBytes>(dv, dv_rows, warp, lane_here());
    named_barrier_sync(1 + warpgroup, 128);  // dK and dV are staged
    if (lane == 0) {
      fence_async_proxy();
      if (first_key < item.k_length) {
        const int panel = warp % 4;  // each warp stores one of up to four
        if (panel < kPanelsV) {
          tma_store_ragged(&p.map_dv, dv_rows + panel * kRowsBytes, 64 * panel, first_key, kv_head, item.k_begin,
                           item.k_length);
        } else if (panel < kPanelsV + kPanels) {
          tma_store_ragged(&p.map_dk, dk_rows + (panel - kPanelsV) * kKVPanelBytes, 64 * (panel - kPanelsV), first_key,
                           kv_head, item.k_begin, item.k_length);
        }
        tma_store_commit();
      }
    }
    leaving = true;

    control.tile.arrive_empty(tile_at);
  }
  if (lane == 0) tma_store_wait_read();
  finish_rest<Rows, Sums, kBlockN, pack_bf16>(p, control, warpgroup, 1 + warpgroup);
}
