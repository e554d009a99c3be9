// jagtile_bwd_bf16_d192_dv128_causal_wide_n112_q2_o2_d0_abulk
//
// Backward of attention over a jagged batch, one kernel for one case:
//   target      sm_90a
//   dtype       bf16
//   head_dim    192 (queries and keys), 128 (values)
//   mask        causal, top-left or bottom-right at run time
// Template: templates/cuda/sm90/backward_wide.cu.j2, algorithm wide, with
//   block_n             112
//   q_stages            2
//   dout_stages         2
//   dq_panels           0
//   dq                  bulk
// Generated; edit the template, not this text. To see it again:
//   jagtile generate sm_90a/bwd_bf16_d192_dv128_causal/wide_n112_q2_o2_d0_abulk
//
// One persistent CTA an SM. K and V of a tile stay; the queries that see its keys go by, 64 at a time, those of every head
// that shares the kv head. Two math warpgroups split the work by result, and hand each other nothing but P:
//   warp 0      claims tiles from the work list and copies their K and V (TMA, clipped at the sequence's end)
//   warp 1      copies Q, block by block
//   warp 2      copies dO
//   warp 3      stores dQ to its sums in global memory or adds it to them (bulk copies)
//   warps 4-7   S = Q K^T, P = exp(S - lse), dV^T += dO^T P (wgmma); dV leaves through V's buffer (TMA)
//   warps 8-11  dP = dO V^T, dS = P (dP - delta), dK^T += Q^T dS; dK leaves through K's buffer
// dQ = dS K, by warps 8-11, goes through shared memory to its sums, or from registers to dq where the tile has all keys.
// So both keep as many accumulators as one gradient of 112 keys has, and run out of step: while one computes P or dS the
// other multiplies.
//
// Shared memory          bytes
//   K                      43008   3 panels of 112 rows x 128 B; dK on its way out
//   V                      28672   2 panels of 112 rows x 128 B; dV on its way out
//   Q [2]                  49152   3 panels of 64 rows x 128 B
//   dO [2]                 32768   2 panels of 64 rows x 128 B
//   P                      16384   2 panels of 64 rows x 128 B
//   dS                     16384   2 panels of 64 rows x 128 B
//   dQ [2]                 32768   64 rows x 64 float32, as in its sums
//   tiles, barriers         1024
#include "cuda/include/backward_params.cuh"
#include "cuda/include/backward_rows.cuh"
#include "cuda/include/dependent_launch.cuh"
#include "cuda/include/dq_sums.cuh"
#include "cuda/include/fragments.cuh"
#include "cuda/include/key_blocks.cuh"
#include "cuda/include/key_tiles.cuh"
#include "cuda/include/pipeline.cuh"
#include "cuda/include/ptx.cuh"
#include "cuda/include/row_gradients.cuh"
#include "cuda/include/work_list.cuh"

namespace {

constexpr int kHeadDim = 192;
constexpr int kHeadDimV = 128;
constexpr int kBlockM = 64;  // queries a step
constexpr int kBlockN = 112;  // keys a tile
constexpr int kQStages = 2;
constexpr int kDoutStages = 2;
constexpr int kTileSlots = 2;
constexpr int kPanels = 3;   // 64-column panels of Q and K
constexpr int kPanelsV = 2;  // of V and dO

constexpr int kQPanelBytes = kBlockM * 128;  // of Q, dO, P and dS
constexpr int kKVPanelBytes = kBlockN * 128;
constexpr int kQBytes = kPanels * kQPanelBytes;
constexpr int kDoutBytes = kPanelsV * kQPanelBytes;
constexpr int kDqBytes = 16384;
constexpr int kDqStages = 2;

using Sums = DqSums<kHeadDim>;
using KeyTile = KeyTiles</*kCausal=*/true, kBlockM, kBlockN, /*kAdders=*/1>;

struct Control {
  Tile tiles[kTileSlots];
  TileClaims<kBlockN> claims;
  RingBarriers<kTileSlots> tile;
  RingBarriers<1> loaded;  // all of the tile is on its way
  RingBarriers<1> k, v, p;
  RingBarriers<kQStages> q;
  RingBarriers<kDoutStages> dout;
  RingBarriers<kDqStages> dq;
  BulkTurns turns;
};
static_assert(sizeof(Control) <= 1024);

struct Buffers {  // shared addresses
  uint32_t k, v, q, dout, p, ds;
  float* dq;
};

// d (64 x 112) {+}= A (64 x 16) B^T (112 x 16), both K-major in shared memory.
__device__ __forceinline__ void multiply_rows(float (&d)[56], uint64_t a, uint64_t b, int accumulate) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %58, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n112k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55}, "
      "%56, %57, p, 1, 1, 0, 0;\n"
      "}\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
        "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
        "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
        "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]),
        "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]),
        "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]),
        "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55])
      : "l"(a), "l"(b), "r"(accumulate));
}

// d (64 x 112) {+}= A^T (16 x 64) B (16 x 112), in shared memory, their columns contiguous.
__device__ __forceinline__ void multiply_columns(float (&d)[56], uint64_t a, uint64_t b, int accumulate) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %58, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n112k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55}, "
      "%56, %57, p, 1, 1, 1, 1;\n"
      "}\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
        "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
        "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
        "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]),
        "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]),
        "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]),
        "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55])
      : "l"(a), "l"(b), "r"(accumulate));
}

// d (64 x 64) {+}= A (64 x 16) B (16 x 64), in shared memory: A K-major, B's columns contiguous.
__device__ __forceinline__ void multiply_dq_64(float (&d)[32], uint64_t a, uint64_t b, int accumulate) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "%32, %33, p, 1, 1, 0, 1;\n"
      "}\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
        "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
        "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
        "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
      : "l"(a), "l"(b), "r"(accumulate));
}

// d (64 x 112) = A B^T, asynchronously; 64 rows of A and 112 rows of B, 192 columns each.
__device__ __forceinline__ void issue_scores(float (&d)[56], uint32_t a, uint32_t b) {
  const uint64_t a_descriptor = wgmma_descriptor(a, 16, 1024);
  const uint64_t b_descriptor = wgmma_descriptor(b, 16, 1024);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < 12; ++step) {
    const int inside = step % 4 * 32;
    multiply_rows(d, a_descriptor + ((step / 4 * kQPanelBytes + inside) >> 4),
                b_descriptor + ((step / 4 * kKVPanelBytes + inside) >> 4), step > 0);
  }
  wgmma_commit();
}

// d (64 x 112) = A B^T, asynchronously; 64 rows of A and 112 rows of B, 128 columns each.
__device__ __forceinline__ void issue_dp(float (&d)[56], uint32_t a, uint32_t b) {
  const uint64_t a_descriptor = wgmma_descriptor(a, 16, 1024);
  const uint64_t b_descriptor = wgmma_descriptor(b, 16, 1024);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < 8; ++step) {
    const int inside = step % 4 * 32;
    multiply_rows(d, a_descriptor + ((step / 4 * kQPanelBytes + inside) >> 4),
                b_descriptor + ((step / 4 * kKVPanelBytes + inside) >> 4), step > 0);
  }
  wgmma_commit();
}

// d (64 x 112) += A^T B, asynchronously; 64 rows of A, 64 columns wide, and of B.
__device__ __forceinline__ void add_product(float (&d)[56], uint32_t a, uint32_t b) {
  const uint64_t a_descriptor = wgmma_descriptor(a, 16, 1024);
  const uint64_t b_descriptor = wgmma_descriptor(b, kQPanelBytes, 1024);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    multiply_columns(d, a_descriptor + (step * 16 * 128 >> 4), b_descriptor + (step * 16 * 128 >> 4), 1);
  }
  wgmma_commit();
}

// d (64 x 64) = A B, asynchronously; 64 rows of A, 112 rows of B, in one panel.
__device__ __forceinline__ void issue_dq(float (&d)[32], uint32_t a, uint32_t b) {
  const uint64_t a_descriptor = wgmma_descriptor(a, 16, 1024);
  const uint64_t b_descriptor = wgmma_descriptor(b, 16, 1024);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < 7; ++step) {
    multiply_dq_64(d, a_descriptor + ((step / 4 * kQPanelBytes + step % 4 * 32) >> 4),
                b_descriptor + (step * 16 * 128 >> 4), step > 0);
  }
  wgmma_commit();
}

// Stores what is handed over of every tile's dQ to its sums, or adds it to them, in one lane of a warp.
__device__ __forceinline__ void put_to_sums(const BackwardParams& p, Control& control, uint32_t dq) {
  RingPosition<kDqStages> at;
  for_each_tile(control, [&](const WorkItem& item, int kv_head) {
    if (KeyTile::has_all_keys(item)) return;
    control.turns.begin<KeyTile>(p, item, kv_head);
    KeyTile::for_each_block(p, item, kv_head, [&](int head, int row) {
      control.turns.await(control.dq.is_full(at));
      const int rows = min(item.q_length - row, kBlockM);
      RingPosition<kDqStages> leaving;
#pragma unroll
      for (int panel = 0; panel < Sums::kPanels; ++panel) {
        control.dq.wait_full(at);
        fence_async_proxy();  // here, or math warps would wait for their stores
        put_sums(Sums::row(p.dq_sums, p.total_q, head, panel, item.q_begin + row), dq + at.slot * kDqBytes,
                 rows * Sums::columns(panel) * 4, item);
        tma_store_commit();
        tma_store_wait_read<1>();
        if (panel > 0) control.dq.arrive_empty(leaving);
        leaving = at;
        at.advance();
      }
      tma_store_wait_read();
      control.dq.arrive_empty(leaving);
    });
    control.turns.pass();
  });
  tma_store_wait();
}

// Streams Q or dO of every tile through a ring, block by block.
template <int kTilePanels, int kSlots>
__device__ __forceinline__ void load_query_blocks(const BackwardParams& p, Control& control, RingBarriers<kSlots>& ring,
                                                  uint32_t smem, const TensorMap& map) {
  tma_prefetch_map(&map);
  RingPosition<kSlots> at;
  for_each_tile(control, [&](const WorkItem& item, int kv_head) {
    KeyTile::for_each_block(p, item, kv_head, [&](int head, int row) {
      ring.wait_empty(at);
      load_tile<kTilePanels, kQPanelBytes>(smem + at.slot * kTilePanels * kQPanelBytes, map, ring.full[at.slot], row, head,
                                           item.q_begin, item.q_length, kEvictLast);
      at.advance();
    });
    control.loaded.arrive_full({});
  });
}

// A warpgroup's way through its CTA's tiles: how many of each it is done with, which is all there is to know of rings.
struct Walk {
  uint32_t tile = 0;
  uint32_t step = 0;
  uint32_t dq_step = 0;  // those whose dQ went to sums

  __device__ __forceinline__ RingPosition<kTileSlots> tile_at() const { return RingPosition<kTileSlots>::after(tile); }
  __device__ __forceinline__ RingPosition<1> kv_at() const { return RingPosition<1>::after(tile); }
  __device__ __forceinline__ RingPosition<1> step_at() const { return RingPosition<1>::after(step); }  // of P
  __device__ __forceinline__ RingPosition<kQStages> q_at() const { return RingPosition<kQStages>::after(step); }
  __device__ __forceinline__ RingPosition<kDoutStages> dout_at() const { return RingPosition<kDoutStages>::after(step); }
};

// A panel of sums of a warpgroup's dQ, for the warp that adds it; `token` is that of the thread's upper row.
template <int kPanel, int kFirst, int kRegisters>
__device__ __forceinline__ void hand_over(const float (&dq)[kRegisters], Control& control, const Buffers& smem, const Walk& at,
                                          int token, int row, int quad) {
  const RingPosition<kDqStages> dq_at = RingPosition<kDqStages>::after(at.dq_step * Sums::kPanels + kPanel);
  control.dq.wait_empty(dq_at);
  stage_sums<Sums, kPanel, kFirst>(dq, smem.dq + dq_at.slot * (kDqBytes / 4), row, quad, token);
  __syncwarp();
  if (elect_one()) control.dq.arrive_full(dq_at);
}

// A gradient's transposed accumulators leave through a buffer that nothing reads any more, each panel by a warp: the first
// lane of each may give its part of the buffer back.
template <int kTilePanels>
__device__ __forceinline__ void store_gradient(const float (&gradient)[kTilePanels][kBlockN / 2], uint32_t buffer,
                                               const TensorMap& map, const WorkItem& item, int kv_head, int barrier,
                                               int warp) {
  static_assert(kTilePanels <= 4);
  const int lane = lane_here();  // no addresses of this are kept through the steps
#pragma unroll
  for (int panel = 0; panel < kTilePanels; ++panel) {
    stage_columns<pack_bf16, kBlockN>(gradient[panel], buffer + panel * kKVPanelBytes, warp, lane);
  }
  named_barrier_sync(barrier, 128);  // it is staged
  if (lane == 0) {
    fence_async_proxy();
    const int panel = warp % 4;
    if (panel < kTilePanels) {
      tma_store_ragged(&map, buffer + panel * kKVPanelBytes, 64 * panel, item.row, kv_head, item.k_begin, item.k_length);
    }
    tma_store_commit();
    tma_store_wait_read();
  }
}

__device__ __forceinline__ void make_dv(const BackwardParams& p, Control& control, const Buffers& smem, int warp, int lane) {
  constexpr int kBarrier = 1;
  const int quad = lane % 4;
  const bool leader = threadIdx.x % 128 == 0;
  const int thread_row = 16 * (warp % 4) + lane / 4;  // the upper of two, 8 apart
  const float scale_log2 = p.scale_log2;
  for (Walk at;; ++at.tile) {
    control.tile.wait_full(at.tile_at());
    const int kv_head = control.tiles[at.tile_at().slot].head;
    if (kv_head < 0) break;
    const WorkItem& item = control.tiles[at.tile_at().slot].item;
    float dv[kPanelsV][kBlockN / 2] = {};
    bool multiplying = false;  // dV, with dO of the step before

    // Blocks from mask_end on see the tile's keys whole. Limits count from the thread's first key.
    const int shift = KeyTile::causal_shift(p, item);
    const int keys = item.k_length - item.row - 2 * quad;
    const int mask_end = item.row + kBlockN > item.k_length ? kNoQuery : item.row + kBlockN - 1 - shift;

    control.k.wait_full(at.kv_at());
    if (lane == 0) control.k.arrive_empty(at.kv_at());  // a warp that is late does not miss this K for the next one
    KeyTile::for_each_block(p, item, kv_head, [&](int head, int row) {
      float lse[2];
      read_rows(lse, p.lse, p.total_q, head, item.q_begin, item.q_length, row + thread_row, -INFINITY);
      float scores[kBlockN / 2];
      control.q.wait_full(at.q_at());
      issue_scores(scores, smem.q + at.q_at().slot * kQBytes, smem.k);
      wgmma_wait<1>();
      if (leader && multiplying) control.dout.arrive_empty(RingPosition<kDoutStages>::after(at.step - 1));
      multiplying = true;
      wgmma_wait<0>();
#pragma unroll
      for (int panel = 0; panel < kPanelsV; ++panel) pin_registers(dv[panel]);
      pin_registers(scores);
      if (leader) control.q.arrive_empty(at.q_at());

      lse[0] = lse_offset(lse[0]);
      lse[1] = lse_offset(lse[1]);
      probabilities_of_rows(scores, lse, scale_log2);
      if (row < mask_end) {
        const int seen = row + thread_row + shift + 1 - item.row - 2 * quad;  // by the upper row
        mask_keys(scores, min(keys, seen), min(keys, seen + 8));
      }
      control.p.wait_empty(at.step_at());
      stage_rows<pack_bf16, kBlockN, kQPanelBytes>(scores, smem.p, warp, lane);
      control.p.arrive_full(at.step_at());
      named_barrier_sync(kBarrier, 128);
      control.dout.wait_full(at.dout_at());
      fence_async_proxy();
#pragma unroll
      for (int panel = 0; panel < kPanelsV; ++panel) {
        add_product(dv[panel], smem.dout + at.dout_at().slot * kDoutBytes + panel * kQPanelBytes, smem.p);
      }
      ++at.step;
    });
    wgmma_wait<0>();
#pragma unroll
    for (int panel = 0; panel < kPanelsV; ++panel) pin_registers(dv[panel]);
    if (leader && multiplying) control.dout.arrive_empty(RingPosition<kDoutStages>::after(at.step - 1));

    control.v.wait_full(at.kv_at());
    control.p.wait_empty(at.step_at());  // the other warpgroup has its last dP, and V has been read
    store_gradient(dv, smem.v, p.map_dv, item, kv_head, kBarrier, warp);
    if (lane == 0) control.v.arrive_empty(at.kv_at());
    control.tile.arrive_empty(at.tile_at());
  }
}

__device__ __forceinline__ void make_dk_and_dq(const BackwardParams& p, Control& control, const Buffers& smem, int warp,
                                               int lane) {
  constexpr int kBarrier = 2;
  const int quad = lane % 4;
  const bool leader = threadIdx.x % 128 == 0;
  const int thread_row = 16 * (warp % 4) + lane / 4;  // the upper of two, 8 apart
  for (Walk at;; ++at.tile) {
    control.tile.wait_full(at.tile_at());
    const int kv_head = control.tiles[at.tile_at().slot].head;
    if (kv_head < 0) break;
    const WorkItem& item = control.tiles[at.tile_at().slot].item;
    float dk[kPanels][kBlockN / 2] = {};
    bool multiplying = false;  // dK, with Q of the step before

    control.v.wait_full(at.kv_at());
    if (lane == 0) control.v.arrive_empty(at.kv_at());  // likewise
    control.k.wait_full(at.kv_at());
    KeyTile::for_each_block(p, item, kv_head, [&](int head, int row) {
      float delta[2];
      read_rows(delta, p.delta, p.total_q, head, item.q_begin, item.q_length, row + thread_row, 0.0f);
      float dp[kBlockN / 2];
      control.dout.wait_full(at.dout_at());
      issue_dp(dp, smem.dout + at.dout_at().slot * kDoutBytes, smem.v);
      wgmma_wait<1>();
      if (leader && multiplying) control.q.arrive_empty(RingPosition<kQStages>::after(at.step - 1));
      multiplying = true;
      wgmma_wait<0>();
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel) pin_registers(dk[panel]);
      pin_registers(dp);
      if (leader) control.dout.arrive_empty(at.dout_at());

      control.p.wait_full(at.step_at());
      gradients_of_rows<unpack_bf16, kQPanelBytes>(dp, smem.p, delta, warp, lane);
      control.p.arrive_empty(at.step_at());
      control.q.wait_full(at.q_at());
      const uint32_t q_tile = smem.q + at.q_at().slot * kQBytes;
      stage_rows<pack_bf16, kBlockN, kQPanelBytes>(dp, smem.ds, warp, lane);
      named_barrier_sync(kBarrier, 128);  // dS is there
      fence_async_proxy();

      // A panel of dQ is handed over while the same panel of dK is multiplied.
      {
        float dq[32];
        issue_dq(dq, smem.ds, smem.k);
        add_product(dk[0], q_tile, smem.ds);
        wgmma_wait<1>();
        pin_registers(dq);
        if (KeyTile::has_all_keys(item)) {
          write_panel<Sums, pack_bf16, 0, 0>(dq, p, head, item.q_begin, item.q_length, row + thread_row, quad);
        } else {
          hand_over<0, 0>(dq, control, smem, at, item.q_begin + thread_row, thread_row, quad);
        }
      }
      {
        float dq[32];
        issue_dq(dq, smem.ds, smem.k + kKVPanelBytes);
        add_product(dk[1], q_tile + kQPanelBytes, smem.ds);
        wgmma_wait<1>();
        pin_registers(dq);
        if (KeyTile::has_all_keys(item)) {
          write_panel<Sums, pack_bf16, 1, 0>(dq, p, head, item.q_begin, item.q_length, row + thread_row, quad);
        } else {
          hand_over<1, 0>(dq, control, smem, at, item.q_begin + thread_row, thread_row, quad);
        }
      }
      {
        float dq[32];
        issue_dq(dq, smem.ds, smem.k + 2 * kKVPanelBytes);
        add_product(dk[2], q_tile + 2 * kQPanelBytes, smem.ds);
        wgmma_wait<1>();
        pin_registers(dq);
        if (KeyTile::has_all_keys(item)) {
          write_panel<Sums, pack_bf16, 2, 0>(dq, p, head, item.q_begin, item.q_length, row + thread_row, quad);
        } else {
          hand_over<2, 0>(dq, control, smem, at, item.q_begin + thread_row, thread_row, quad);
        }
      }
      if (!KeyTile::has_all_keys(item)) ++at.dq_step;
      ++at.step;
    });
    wgmma_wait<0>();
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) pin_registers(dk[panel]);
    if (leader && multiplying) control.q.arrive_empty(RingPosition<kQStages>::after(at.step - 1));

    // The other warpgroup had its last S before its last P: K has been read.
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
#pragma unroll
      for (int i = 0; i < kBlockN / 2; ++i) dk[panel][i] *= p.scale;
    }
    store_gradient(dk, smem.k, p.map_dk, item, kv_head, kBarrier, warp);
    if (lane == 0) control.k.arrive_empty(at.kv_at());
    control.tile.arrive_empty(at.tile_at());
  }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kRowThreads) jagtile_backward_prepare(const __grid_constant__ BackwardParams p) {
  launch_dependents();
  await_previous_kernels();
  prepare_rows<Sums, kHeadDimV, unpack_bf16, /*kStored=*/true>(p);
}

extern "C" __global__ void __launch_bounds__(kRowThreads) jagtile_backward_finish(const __grid_constant__ BackwardParams p) {
  await_previous_kernels();
  finish_rows<Sums, pack_bf16>(p);
}

extern "C" __global__ void __launch_bounds__(384, 1)
jagtile_bwd_bf16_d192_dv128_causal_wide_n112_q2_o2_d0_abulk(const __grid_constant__ BackwardParams p) {
  extern __shared__ __align__(1024) unsigned char shared[];
  Buffers smem;
  smem.k = smem_address(shared);
  smem.v = smem.k + 43008;
  smem.q = smem.v + 28672;
  smem.dout = smem.q + 49152;
  smem.p = smem.dout + 32768;
  smem.ds = smem.p + 16384;
  smem.dq = reinterpret_cast<float*>(shared + 186368);
  Control& control = *reinterpret_cast<Control*>(shared + 219136);
  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0);  // uniform, and known to be
  const int lane = threadIdx.x % 32;

  launch_dependents();  // whose CTAs find room where those of this one have ended
  if (threadIdx.x == 0) {
    // Freed by the warps of Q and dO, the adder of dQ and every math thread.
    control.tile.init(1, 3 + 256);
    control.loaded.init(2, 1);
    control.k.init(1, 8);  // freed by the warps whose gradient leaves through it, and by those of the other, which have seen it
    control.v.init(1, 8);
    control.p.init(128, 128);
    control.q.init(1, 2);
    control.dout.init(1, 2);
    control.dq.init(4, 1);
    mbarrier_init_fence();
  }
  await_previous_kernels();
  if (threadIdx.x == 0) {
    set_claims(control.claims, p);
  }
  __syncthreads();

  if (warp < 4) {
    shrink_registers<40>();
    if (warp == 0 && elect_one()) {
      tma_prefetch_map(&p.map_v);
      tma_prefetch_map(&p.map_k);
      RingPosition<1> at;
      claim_key_tiles(control, [&](const WorkItem& item, int kv_head) {
        prefetch_tile<kPanels>(p.map_k, item.row, kv_head, item.k_begin, item.k_length);
        prefetch_tile<kPanelsV>(p.map_v, item.row, kv_head, item.k_begin, item.k_length);
        control.v.wait_empty(at);  // dV leaves first
        load_tile<kPanelsV, kKVPanelBytes>(smem.v, p.map_v, control.v.full[0], item.row, kv_head, item.k_begin,
                                           item.k_length, kEvictFirst);
        control.k.wait_empty(at);
        load_tile<kPanels, kKVPanelBytes>(smem.k, p.map_k, control.k.full[0], item.row, kv_head, item.k_begin,
                                          item.k_length, kEvictFirst);
        at.advance();
      });
    } else if (warp == 1 && elect_one()) {
      load_query_blocks<kPanels>(p, control, control.q, smem.q, p.map_q);
    } else if (warp == 2 && elect_one()) {
      load_query_blocks<kPanelsV>(p, control, control.dout, smem.dout, p.map_dout);
    } else if (warp == 3 && elect_one()) {
      put_to_sums(p, control, smem_address(smem.dq));
    }
  } else if (warp < 8) {
    grow_registers<208>();
    make_dv(p, control, smem, warp, lane);
  } else {
    grow_registers<256>();
    make_dk_and_dq(p, control, smem, warp, lane);
  }
}
