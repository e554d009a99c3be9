// jagtile_fwd_bf16_d128_causal_persistent_m128_n128_s2_q1_c1_x2
//
// Forward attention over a jagged batch, one kernel for one case:
//   target      sm_90a
//   dtype       bf16
//   head_dim    128 (queries and keys), 128 (values)
//   mask        causal, top-left or bottom-right at run time
// Template: templates/cuda/sm90/forward.cu.j2, algorithm persistent, with
//   block_m             128
//   block_n             128
//   num_stages          2
//   q_stages            1
//   ctas_per_sm         1
//   cluster             2
// Generated; edit the template, not this text. To see it again:
//   jagtile generate sm_90a/fwd_bf16_d128_causal/persistent_m128_n128_s2_q1_c1_x2
//
// One persistent CTA an SM: 2 math warpgroups of 64 query rows each, one warpgroup that feeds them.
// Two CTAs are a pair, a cluster: they share the groups of 64 rows of a tile, and each loads half of the rows of every K and V
// block for both, so that L2 is read once.
//   warp 0      copies K tiles into shared memory (TMA, clipped at the sequence's end)
//   warp 1      claims tiles from the work list, longest first; the first CTA's for the pair
//   warp 2      copies V tiles
//   warp 3      copies Q tiles
//   warps 4...  S = Q K^T, online softmax, O += P V (wgmma); O leaves through the Q buffer (TMA)
// The softmax of a block runs while the tensor cores multiply the P and V of the block before it. It skips the block's
// maximum: probabilities are relative to the row's maximum in earlier blocks, and the few blocks in which some row outgrew
// that too far are computed again.
//
// Shared memory          bytes
//   Q [3]                  49152   2 panels of 64 rows x 128 B each; O on its way out
//   K [2]                  65536   2 panels of 128 rows x 128 B
//   V [2]                  65536   2 panels of 128 rows x 128 B
//   tiles, barriers         1024
#include "cuda/include/fragments.cuh"
#include "cuda/include/pair_claims.cuh"
#include "cuda/include/params.cuh"
#include "cuda/include/pipeline.cuh"
#include "cuda/include/ptx.cuh"
#include "cuda/include/query_work_list.cuh"
#include "cuda/include/softmax.cuh"
#include "cuda/include/work_list.cuh"

namespace {

constexpr int kBlockN = 128;
constexpr int kWarpgroups = 2;
constexpr int kStages = 2;
constexpr int kQBuffers = 3;  // of a warpgroup's 64 rows each; they take turns
constexpr int kTileSlots = 2;
// Key blocks of a tile that are left to load when the next one is claimed. Fewer, and its first loads wait for the claim; more,
// and a CTA that ends late has claimed what another could have begun.
constexpr int kClaimAhead = 4;
constexpr int kPanels = 2;         // 64-column panels of Q and K
constexpr int kPanelsV = 2;        // of V and O
constexpr int kColumnsV = 128;
constexpr int kStepsPV = 8;        // over the keys of a block
constexpr int kOutRegisters = 64;  // accumulators a thread of 64 x 128

constexpr int kPairRows = kBlockN / 2;  // of a block of keys or values that a CTA loads, for both
constexpr uint16_t kBothCtas = 0b11;
constexpr int kHalf = kBlockN / 4 / 4 * 4;  // scores a thread of a block's first columns, in whole groups

constexpr int kQPanelBytes = 64 * 128;
constexpr int kKVPanelBytes = kBlockN * 128;
constexpr int kQBytes = 2 * kQPanelBytes;  // one warpgroup's rows, room for its O included
constexpr int kKBytes = kPanels * kKVPanelBytes;
constexpr int kVBytes = kPanelsV * kKVPanelBytes;
constexpr int kHeadroom = 16;  // probabilities are computed 2^-kHeadroom of what they are

// The group of a pair's rows that a warpgroup takes. Lower rows see more keys: each CTA has some of both ends. The CTAs change
// places from tile to tile.
__device__ __forceinline__ int rows_of(int warpgroup, bool reversed) {
  return 2 * warpgroup + ((warpgroup ^ cluster_rank() ^ reversed) & 1);
}

struct Control {
  Tile tiles[kTileSlots];
  RingBarriers<kTileSlots> tile;
  RingBarriers<1> loaded;  // the tile's keys are on their way, but for kClaimAhead blocks
  RingBarriers<kQBuffers> q;
  RingBarriers<kStages> k, v;
  PairClaims<kTileSlots> claims;
  uint32_t never_written;
};
static_assert(sizeof(Control) <= 1024);

// d (64 x 128) {+}= A (64 x 16) B^T (128 x 16), both K-major in shared memory.
__device__ __forceinline__ void multiply_qk(float (&d)[64], uint64_t a, uint64_t b, int accumulate) {
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

// d (64 x 128) += A (64 x 16, registers) B (16 x 128, shared memory, its columns contiguous).
__device__ __forceinline__ void multiply_pv(float (&d)[64], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "{%64, %65, %66, %67}, %68, 1, 1, 1, 1;\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
        "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
        "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
        "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]),
        "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]),
        "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]),
        "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),
        "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// d (64 x 128) = A B^T, asynchronously; 64 rows of A and 128 rows of B, 128 columns each.
__device__ __forceinline__ void issue_scores(float (&d)[64], uint32_t a, uint32_t b) {
  const uint64_t a_descriptor = wgmma_descriptor(a, 16, 1024);
  const uint64_t b_descriptor = wgmma_descriptor(b, 16, 1024);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < 8; ++step) {
    const int inside = step % 4 * 32;
    multiply_qk(d, a_descriptor + ((step / 4 * kQPanelBytes + inside) >> 4),
                b_descriptor + ((step / 4 * kKVPanelBytes + inside) >> 4), step > 0);
  }
  wgmma_commit();
}

// d (64 x 128) += A B, asynchronously; A's fragments in registers, 128 rows of B.
__device__ __forceinline__ void issue_output(float (&d)[64], const uint32_t (&a)[8][4], uint32_t b) {
  const uint64_t b_descriptor = wgmma_descriptor(b, kKVPanelBytes, 1024);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < 8; ++step) {
    multiply_pv(d, a[step], b_descriptor + (step * 16 * 128 >> 4));
  }
  wgmma_commit();
}

// Streams the key or value blocks of every tile through a ring. Calls nearly_loaded() once a tile: when kClaimAhead blocks are
// left, or at once where it has fewer.
template <int kTilePanels, typename NearlyLoaded>
__device__ __forceinline__ void load_blocks(Control& control, RingBarriers<kStages>& ring, uint32_t smem,
                                            const TensorMap& map, int gqa_ratio, NearlyLoaded nearly_loaded) {
  tma_prefetch_map(&map);
  RingPosition<kStages> at;
  const int first = cluster_rank() * kPairRows;
  for_each_tile(control, [&](const WorkItem& item, int head) {
    const int kv_head = head / gqa_ratio;
    int left = item.kv_blocks;
    if (left < kClaimAhead) nearly_loaded();
    for (int row = 0; row < item.kv_blocks * kBlockN; row += kBlockN) {
      if (left-- == kClaimAhead) nearly_loaded();
      const uint32_t full = smem_address(&ring.full[at.slot]);
      const uint32_t buffer = smem + at.slot * kTilePanels * kKVPanelBytes + first * 128;
      ring.wait_empty(at);
      mbarrier_expect_bytes(full, kTilePanels * kKVPanelBytes);  // the other CTA's half included
#pragma unroll
      for (int panel = 0; panel < kTilePanels; ++panel) {
        tma_multicast_ragged(buffer + panel * kKVPanelBytes, &map, full, kBothCtas, 64 * panel, row + first, kv_head,
                             item.k_begin, item.k_length, kEvictLast);
      }
      at.advance();
    }
  });
}

}  // namespace

extern "C" __global__ void __cluster_dims__(2) __launch_bounds__(384, 1)
jagtile_fwd_bf16_d128_causal_persistent_m128_n128_s2_q1_c1_x2(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const uint32_t q_tiles = smem_address(shared);
  const uint32_t k_tiles = q_tiles + 49152;
  const uint32_t v_tiles = k_tiles + 65536;
  Control& control = *reinterpret_cast<Control*>(shared + 180224);
  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0);  // uniform, and known to be

  if (threadIdx.x == 0) {
    control.tile.init(1, 3 + 128 * kWarpgroups);  // freed by three loaders and every math thread
    control.loaded.init(1, 1);
    control.q.init(1, 1);
    control.k.init(1, 2 * kWarpgroups);  // freed by both CTAs'
    control.v.init(1, 2 * kWarpgroups);
    control.claims.init();
    mbarrier_init_fence();
  }
  cluster_arrive();
  cluster_wait();

  if (warp < 4) {
    shrink_registers<24>();
    if (warp == 0 && elect_one()) {
      load_blocks<kPanels>(control, control.k, k_tiles, p.map_k, p.gqa_ratio, [&] { control.loaded.arrive_full({}); });
    } else if (warp == 2 && elect_one()) {
      load_blocks<kPanelsV>(control, control.v, v_tiles, p.map_v, p.gqa_ratio, [] {});
    } else if (warp == 3 && elect_one()) {
      tma_prefetch_map(&p.map_q);
      RingPosition<kQBuffers> at;
      bool reversed = false;
      for_each_tile(control, [&](const WorkItem& item, int head) {
        for (int warpgroup = 0; warpgroup < kWarpgroups; ++warpgroup) {
          const int group = rows_of(warpgroup, reversed);
          const uint32_t full = smem_address(&control.q.full[at.slot]);
          const uint32_t buffer = q_tiles + at.slot * kQBytes;
          control.q.wait_empty(at);
          mbarrier_expect_bytes(full, kPanels * kQPanelBytes);
          const int row = max(item.row + 64 * group, 0);  // never before the tensor's first
#pragma unroll
          for (int panel = 0; panel < kPanels; ++panel) {
            tma_load_ragged(buffer + panel * kQPanelBytes, &p.map_q, full, 64 * panel, row,
                            head, item.q_begin, item.q_length, kEvictFirst);
          }
          at.advance();
        }
        reversed = !reversed;
      });
    } else if (warp == 1 && elect_one()) {
      // The first tile goes by the pair's number, the rest by a shared counter: the first CTA claims and tells the second.
      WorkListHeader* list = static_cast<WorkListHeader*>(p.work_list);
      const int balancing = balancing_heads_of_pairs(*list, p);
      const int rank = cluster_rank();
      RingPosition<kTileSlots> at;
      RingPosition<1> loaded_at;
      for (int tile = blockIdx.x / 2;; at.advance()) {
        control.tile.wait_empty(at);
        asm volatile("" : "+l"(list));  // the address of its items is not kept: whoever claims has few registers
        const bool claimed = claim_tile(control.tiles[at.slot], list, p, balancing, tile);
        control.tile.arrive_full(at);
        if (!claimed) break;
        control.loaded.wait_full(loaded_at);
        loaded_at.advance();
        if (rank == 0) {
          tile = gridDim.x / 2 + atomicAdd(&list->next_tile, 1);
          control.claims.tell(at, tile);
        } else {
          tile = control.claims.hear(at);
        }
      }
      rewind_work_list(list);
    }
    __syncwarp();
    cluster_arrive();  // the other CTA may still arrive here
    cluster_wait();
    return;
  }

  grow_registers<240>();
  const int warpgroup = warp / 4 - 1;
  const int lane = threadIdx.x % 32;
  const bool leader = threadIdx.x % 128 == 0;
  const bool frees = threadIdx.x % 128 < 2;  // whether this thread frees blocks of keys and values, in the CTA of its number
  const int row_in_group = 16 * (warp % 4) + lane / 4;  // the upper of two, 8 apart
  const int thread_column = 2 * (lane % 4);
  const float scale_log2 = p.scale_log2;
  RingPosition<kTileSlots> tile_at;
  RingPosition<kQBuffers> q_at = {warpgroup};
  RingPosition<kStages> k_at, v_at;
  uint32_t stored_q = 0;  // the leader's: empty barrier of the Q buffer that the previous tile's O is leaving through
  auto free_stored_q = [&] {
    if (stored_q) {
      tma_store_wait_read();
      mbarrier_arrive(stored_q);
      stored_q = 0;
    }
  };
  for (;; tile_at.advance()) {
    control.tile.wait_full(tile_at);
    const int head = control.tiles[tile_at.slot].head;
    if (head < 0) break;
    const WorkItem& item = control.tiles[tile_at.slot].item;
    const int group = rows_of(warpgroup, tile_at.slot != 0);
    const int thread_row = 64 * group + row_in_group;
    const uint32_t q_tile = q_tiles + q_at.slot * kQBytes;
    float output[kOutRegisters] = {};
    RowState rows;

    control.q.wait_empty(q_at);  // another warpgroup's Q was here, and may even be on its way yet: a parity tells two phases apart
    control.q.wait_full(q_at);
    const int shift = p.bottom_right ? item.k_length - item.q_length : 0;
    // The tile's first key blocks, of which this warpgroup's rows see some key, and those that all of them see whole.
    const int last_row = min(item.row + 64 * group + 63, item.q_length - 1);
    const int keys = max(min(item.k_length, last_row + shift + 1), 0);
    const bool idle = static_cast<unsigned>(item.row + 64 * group) >= item.q_length;  // or come before the first
    const int blocks = idle ? 0 : (keys + kBlockN - 1) / kBlockN;
    const int whole_blocks = max(min(item.k_length, item.row + 64 * group + shift + 1), 0) / kBlockN;
    const int upper_limit = item.row + thread_row + shift + 1;  // keys that the thread's upper row sees

    float inverse[2];
    auto finish_rows = [&] {  // but for O: writes lse, and says what O is multiplied by
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float sum = sum_of_row(rows.sum[h]);
        inverse[h] = inverse_of_sum(sum);
        const int row = item.row + thread_row + 8 * h;
        if (p.lse != nullptr && lane % 4 == 0 && static_cast<unsigned>(row) < item.q_length) {
          p.lse[static_cast<long long>(head) * p.total_q + item.q_begin + row] =
              log_of_sum(probability_offset<kHeadroom>(rows.reference[h], scale_log2), sum);
        }
      }
    };

    if (blocks > 0) {
      float scores[kBlockN / 2];
      uint32_t probabilities[kStepsPV][4];
      auto mask = [&](int block) {
        const int first_column = block * kBlockN + thread_column;
        mask_scores(scores, min(item.k_length, upper_limit) - first_column,
                    min(item.k_length, upper_limit + 8) - first_column);
      };
      int block = 0;
      while (true) {
        // With the rows' maxima: the first block, and where a row outgrew its reference.
        control.k.wait_full(k_at);
        issue_scores(scores, q_tile, k_tiles + k_at.slot * kKBytes);
        free_stored_q();
        wgmma_wait<0>();
        pin_registers(scores);
        if (frees) arrive_empty_of(control.k, k_at, lane);
        k_at.advance();
        if (block >= whole_blocks) mask(block);
        float rescale[2];
        online_softmax<kHeadroom>(scores, rows, rescale, scale_log2);
        if (block > 0) scale_rows(output, rescale);
        pack_fragments<pack_bf16>(probabilities, scores);
        ++block;

        // K stays until none of the warpgroup's rows needs the block again.
        const float offset[2] = {probability_offset<kHeadroom>(rows.reference[0], scale_log2),
                                 probability_offset<kHeadroom>(rows.reference[1], scale_log2)};
        for (; block < blocks; ++block) {
          control.k.wait_full(k_at);
          issue_scores(scores, q_tile, k_tiles + k_at.slot * kKBytes);
          control.v.wait_full(v_at);
          issue_output(output, probabilities, v_tiles + v_at.slot * kVBytes);
          wgmma_wait<1>();
          pin_registers(scores);
          if (block >= whole_blocks) mask(block);
          float sum[2] = {0.0f, 0.0f};
          exponentials<0, kHalf>(scores, offset, sum, scale_log2);
          hold_until_computed(sum[0] + sum[1], smem_address(&control.never_written));
          wgmma_wait<0>();
          pin_registers(output);
          pin_registers(probabilities);
          if (frees) arrive_empty_of(control.v, v_at, lane);
          v_at.advance();
          exponentials<kHalf, kBlockN / 2>(scores, offset, sum, scale_log2);
          pack_fragments<pack_bf16>(probabilities, scores);
          pin_registers(sum);
          if (any_of_warpgroup(1 + warpgroup, outgrown_bf16(probabilities))) break;
          rows.sum[0] += sum[0];
          rows.sum[1] += sum[1];
          if (frees) arrive_empty_of(control.k, k_at, lane);
          k_at.advance();
        }
        if (block == blocks) break;
      }
      control.v.wait_full(v_at);
      issue_output(output, probabilities, v_tiles + v_at.slot * kVBytes);
      finish_rows();
      wgmma_wait<0>();
      pin_registers(output);
      if (frees) arrive_empty_of(control.v, v_at, lane);
      v_at.advance();
    } else {
      free_stored_q();
      finish_rows();
    }
    if (blocks < item.kv_blocks) {
      // Blocks that only other warpgroups' rows see are handed back unread.
#pragma unroll 1
      for (int unread = item.kv_blocks - blocks; unread > 0; --unread) {
        if (warp % 4 == 0) {
          control.k.wait_full(k_at);
          if (frees) arrive_empty_of(control.k, k_at, lane);
          control.v.wait_full(v_at);
          if (frees) arrive_empty_of(control.v, v_at, lane);
        }
        k_at.advance();
        v_at.advance();
        __syncwarp();
      }
    }

    scale_rows(output, inverse);
    stage_rows<pack_bf16, kColumnsV, kQPanelBytes>(output, q_tile, warp, lane);
    fence_async_proxy();
    named_barrier_sync(1 + warpgroup, 128);  // O is staged
    if (leader) {
      const int row = item.row + 64 * group;
      if (static_cast<unsigned>(row) < item.q_length) {
#pragma unroll
        for (int panel = 0; panel < kPanelsV; ++panel) {
          tma_store_ragged(&p.map_out, q_tile + panel * kQPanelBytes, 64 * panel, row, head,
                           item.q_begin, item.q_length);
        }
        tma_store_commit();
      }
      stored_q = smem_address(&control.q.empty[q_at.slot]);
    }
    control.tile.arrive_empty(tile_at);
    q_at.advance_by(kWarpgroups);
  }
  free_stored_q();
  cluster_arrive();
  cluster_wait();
}
