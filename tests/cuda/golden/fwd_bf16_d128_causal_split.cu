// jagtile_fwd_bf16_d128_causal_split_m128_n128_s3_q1_c1
//
// Forward attention over a jagged batch, one kernel for one case:
//   target      sm_90a
//   dtype       bf16
//   head_dim    128 (queries and keys), 128 (values)
//   mask        causal, top-left or bottom-right at run time
// Template: templates/cuda/sm90/forward.cu.j2, algorithm split, with
//   block_m             128
//   block_n             128
//   num_stages          3
//   q_stages            1
//   ctas_per_sm         1
// Generated; edit the template, not this text. To see it again:
//   jagtile generate sm_90a/fwd_bf16_d128_causal/split_m128_n128_s3_q1_c1
//
// One persistent CTA an SM: 2 math warpgroups of 64 query rows each, one warpgroup that feeds them.
//   warp 0      copies K tiles into shared memory (TMA, clipped at the sequence's end)
//   warp 1      claims tiles from the work list, longest first
//   warp 2      copies V tiles
//   warp 3      copies Q tiles
//   warps 4...  S = Q K^T, online softmax, O += P V (wgmma); O leaves through the Q buffer (TMA)
// The softmax of a block runs while the tensor cores multiply the P and V of the block before it. It skips the block's
// maximum: probabilities are relative to the row's maximum in earlier blocks, and the few blocks in which some row outgrew
// that too far are computed again.
// A tile's rows are tokens of all the query heads of a kv head, as far as they fit. Long keys are split: each piece of them
// leaves its result in memory, and the last adds all up.
//
// Shared memory          bytes
//   Q [2]                  32768   2 panels of 64 rows x 128 B each; O on its way out
//   K [3]                  98304   2 panels of 128 rows x 128 B
//   V [3]                  98304   2 panels of 128 rows x 128 B
//   tiles, barriers         1024
#include "cuda/include/fragments.cuh"
#include "cuda/include/packed_heads.cuh"
#include "cuda/include/params.cuh"
#include "cuda/include/partials.cuh"
#include "cuda/include/pipeline.cuh"
#include "cuda/include/ptx.cuh"
#include "cuda/include/softmax.cuh"
#include "cuda/include/split_work_list.cuh"

namespace {

constexpr int kBlockN = 128;
constexpr int kWarpgroups = 2;
constexpr int kStages = 3;
constexpr int kQBuffers = 2;  // of a warpgroup's 64 rows each; they take turns
constexpr int kTileSlots = 2;
// Key blocks of a tile that are left to load when the next one is claimed. Fewer, and its first loads wait for the claim; more,
// and a CTA that ends late has claimed what another could have begun.
constexpr int kClaimAhead = 4;
constexpr int kPanels = 2;         // 64-column panels of Q and K
constexpr int kPanelsV = 2;        // of V and O
constexpr int kColumnsV = 128;
constexpr int kStepsPV = 8;        // over the keys of a block
constexpr int kOutRegisters = 64;  // accumulators a thread of 64 x 128

constexpr int kHalf = kBlockN / 4 / 4 * 4;  // scores a thread of a block's first columns, in whole groups

constexpr int kQPanelBytes = 64 * 128;
constexpr int kKVPanelBytes = kBlockN * 128;
constexpr int kQBytes = 2 * kQPanelBytes;  // one warpgroup's rows, room for its O included
constexpr int kKBytes = kPanels * kKVPanelBytes;
constexpr int kVBytes = kPanelsV * kKVPanelBytes;
constexpr int kHeadroom = 16;  // probabilities are computed 2^-kHeadroom of what they are

struct Control {
  Tile tiles[kTileSlots];
  RingBarriers<kTileSlots> tile;
  RingBarriers<1> loaded;  // the tile's keys are on their way, but for kClaimAhead blocks
  RingBarriers<kQBuffers> q;
  RingBarriers<kStages> k, v;
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
  for_each_tile(control, [&](const WorkItem& item, int head) {
    const int kv_head = head / gqa_ratio;
    int left = item.kv_blocks - item.first_block;
    if (left < kClaimAhead) nearly_loaded();
    for (int row = item.first_block * kBlockN; row < item.kv_blocks * kBlockN; row += kBlockN) {
      if (left-- == kClaimAhead) nearly_loaded();
      const uint32_t full = smem_address(&ring.full[at.slot]);
      const uint32_t buffer = smem + at.slot * kTilePanels * kKVPanelBytes;
      ring.wait_empty(at);
      mbarrier_expect_bytes(full, kTilePanels * kKVPanelBytes);
#pragma unroll
      for (int panel = 0; panel < kTilePanels; ++panel) {
        tma_load_ragged(buffer + panel * kKVPanelBytes, &map, full, 64 * panel, row, kv_head, item.k_begin,
                        item.k_length, kEvictLast);
      }
      at.advance();
    }
  });
}

}  // namespace

extern "C" __global__ void __launch_bounds__(384, 1)
jagtile_fwd_bf16_d128_causal_split_m128_n128_s3_q1_c1(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const uint32_t q_tiles = smem_address(shared);
  const uint32_t k_tiles = q_tiles + 32768;
  const uint32_t v_tiles = k_tiles + 98304;
  Control& control = *reinterpret_cast<Control*>(shared + 229376);
  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0);  // uniform, and known to be

  if (threadIdx.x == 0) {
    control.tile.init(1, 3 + 128 * kWarpgroups);  // freed by three loaders and every math thread
    control.loaded.init(1, 1);
    control.q.init(1, 1);
    control.k.init(1, kWarpgroups);
    control.v.init(1, kWarpgroups);
    mbarrier_init_fence();
  }
  clear_left_over_rows(shared, 32768, p.packed_heads);
  const int tokens = 64 / p.packed_heads;  // of a warpgroup's rows
  __syncthreads();

  if (warp < 4) {
    shrink_registers<24>();
    if (warp == 0 && elect_one()) {
      load_blocks<kPanels>(control, control.k, k_tiles, p.map_k, p.gqa_ratio, [&] { control.loaded.arrive_full({}); });
    } else if (warp == 2 && elect_one()) {
      load_blocks<kPanelsV>(control, control.v, v_tiles, p.map_v, p.gqa_ratio, [] {});
    } else if (warp == 3 && elect_one()) {
      tma_prefetch_map(&p.map_q);
      RingPosition<kQBuffers> at;
      for_each_tile(control, [&](const WorkItem& item, int head) {
        for (int warpgroup = 0; warpgroup < kWarpgroups; ++warpgroup) {
          const uint32_t full = smem_address(&control.q.full[at.slot]);
          const uint32_t buffer = q_tiles + at.slot * kQBytes;
          control.q.wait_empty(at);
          mbarrier_expect_bytes(full, kPanels * tokens * p.packed_heads * 128);
          const int row = max(item.row + tokens * warpgroup, 0);  // never before the tensor's first
#pragma unroll
          for (int panel = 0; panel < kPanels; ++panel) {
            tma_load_ragged(buffer + panel * kQPanelBytes, &p.map_q, full, 64 * panel, row,
                            head * p.packed_heads, item.q_begin, item.q_length, kEvictFirst);
          }
          at.advance();
        }
      });
    } else if (warp == 1 && elect_one()) {
      // The first tile goes by CTA number, the rest by a shared counter.
      WorkListHeader* list = static_cast<WorkListHeader*>(p.work_list);
      const int balancing = balancing_heads(*list, p);
      RingPosition<kTileSlots> at;
      RingPosition<1> loaded_at;
      for (int tile = blockIdx.x;; tile = gridDim.x + atomicAdd(&list->next_tile, 1), at.advance()) {
        control.tile.wait_empty(at);
        const bool claimed = claim_tile(control.tiles[at.slot], list, p, balancing, tile);
        control.tile.arrive_full(at);
        if (!claimed) break;
        control.loaded.wait_full(loaded_at);
        loaded_at.advance();
      }
      rewind_work_list(list);
    }
    return;
  }

  grow_registers<240>();
  const int warpgroup = warp / 4 - 1;
  const int lane = threadIdx.x % 32;
  const bool leader = threadIdx.x % 128 == 0;
  const int thread_row = 16 * (warp % 4) + lane / 4;  // the upper of two, 8 apart
  const ThreadRows thread_rows(packed_row(thread_row, tokens, p.packed_heads),
                               packed_row(thread_row + 8, tokens, p.packed_heads));
  const int thread_column = 2 * (lane % 4);
  const float scale_log2 = p.scale_log2;
  RingPosition<kTileSlots> tile_at;
  RingPosition<kQBuffers> q_at = {warpgroup};
  RingPosition<kStages> k_at, v_at;
  for (;; tile_at.advance()) {
    control.tile.wait_full(tile_at);
    const int head = control.tiles[tile_at.slot].head;
    if (head < 0) break;
    const WorkItem& item = control.tiles[tile_at.slot].item;
    const uint32_t q_tile = q_tiles + q_at.slot * kQBytes;
    float output[kOutRegisters] = {};
    RowState rows;

    control.q.wait_full(q_at);
    const int shift = p.bottom_right ? item.k_length - item.q_length : 0;
    const int begin = item.first_block;
    const int first_token = item.row + tokens * warpgroup;
    // The piece's first key blocks, of which this warpgroup's rows see some key.
    const int last_row = min(first_token + tokens - 1, item.q_length - 1);
    const int keys = max(min(item.k_length, last_row + shift + 1), 0);
    const bool idle = static_cast<unsigned>(first_token) >= item.q_length;  // or come before the first
    const int blocks = idle ? begin : max(min((keys + kBlockN - 1) / kBlockN, item.kv_blocks), begin);
    if (blocks > begin) {
      float scores[kBlockN / 2];
      uint32_t probabilities[kStepsPV][4];
      const int seen_by_first = first_token + shift + 1;  // keys that the first token sees
      const int whole_blocks = max(max(min(item.k_length, seen_by_first), 0) / kBlockN, begin);  // that all rows see
      auto mask = [&](int block) {
        const int first_column = block * kBlockN + thread_column;
        mask_scores(scores, min(item.k_length, seen_by_first + thread_rows[0].token) - first_column,
                    min(item.k_length, seen_by_first + thread_rows[1].token) - first_column);
      };
      int block = begin;
      while (true) {
        // With the rows' maxima: the first block, and where a row outgrew its reference.
        control.k.wait_full(k_at);
        issue_scores(scores, q_tile, k_tiles + k_at.slot * kKBytes);
        wgmma_wait<0>();
        pin_registers(scores);
        if (leader) control.k.arrive_empty(k_at);
        k_at.advance();
        if (block >= whole_blocks) mask(block);
        float rescale[2];
        online_softmax<kHeadroom>(scores, rows, rescale, scale_log2);
        if (block > begin) scale_rows(output, rescale);
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
          if (leader) control.v.arrive_empty(v_at);
          v_at.advance();
          exponentials<kHalf, kBlockN / 2>(scores, offset, sum, scale_log2);
          pack_fragments<pack_bf16>(probabilities, scores);
          pin_registers(sum);
          if (any_of_warpgroup(1 + warpgroup, outgrown_bf16(probabilities))) break;
          rows.sum[0] += sum[0];
          rows.sum[1] += sum[1];
          if (leader) control.k.arrive_empty(k_at);
          k_at.advance();
        }
        if (block == blocks) break;
      }
      control.v.wait_full(v_at);
      issue_output(output, probabilities, v_tiles + v_at.slot * kVBytes);
      wgmma_wait<0>();
      pin_registers(output);
      if (leader) control.v.arrive_empty(v_at);
      v_at.advance();
    }
    if (blocks < item.kv_blocks) {
      // Blocks that only other warpgroups' rows see are handed back unread.
#pragma unroll 1
      for (int unread = item.kv_blocks - blocks; unread > 0; --unread) {
        if (warp % 4 == 0) {
          control.k.wait_full(k_at);
          if (leader) control.k.arrive_empty(k_at);
          control.v.wait_full(v_at);
          if (leader) control.v.arrive_empty(v_at);
        }
        k_at.advance();
        v_at.advance();
        __syncwarp();
      }
    }

    const int valid_tokens = first_token < 0 ? 0 : min(item.q_length - first_token, tokens);
    auto store_lse = [&](const PackedRow& row, float offset, float sum) {
      if (p.lse != nullptr && row.token < valid_tokens) {
        const long long first = static_cast<long long>(head * p.packed_heads + row.head) * p.total_q;
        p.lse[first + item.q_begin + first_token + row.token] = log_of_sum(offset, sum);
      }
    };
    bool complete = true;
    if (const Piece piece(item); piece.count > 1) {
      // Leave the result; the last to do so adds all of them up.
      const int stride = p.heads * kWarpgroups;  // from piece to piece
      const int first = (piece.slot * p.heads + head) * kWarpgroups + warpgroup;
      Partial<kColumnsV>* partials = static_cast<Partial<kColumnsV>*>(p.partials) + first;
      const bool wanted[2] = {thread_rows[0].token < valid_tokens, thread_rows[1].token < valid_tokens};
      leave_partial<kHeadroom>(partials[piece.index * stride], output, rows, wanted, warp, lane, scale_log2);
      complete = is_last_piece(piece_tickets(p) + first, piece.count, 1 + warpgroup, leader);
      if (complete) {
        const PartialRows<kColumnsV> left = {partials, piece.count, stride, tokens, p.packed_heads, valid_tokens};
        combine_partials<pack_bf16, kColumnsV, kQPanelBytes>(left, shared + (q_tile - q_tiles), warp, lane, store_lse);
      }
    } else {
      // Normalise, write lse, send O out through the Q buffer.
      float inverse[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float sum = sum_of_row(rows.sum[h]);
        inverse[h] = inverse_of_sum(sum);
        if (lane % 4 == 0) {
          store_lse(thread_rows[h], probability_offset<kHeadroom>(rows.reference[h], scale_log2), sum);
        }
      }
      scale_rows(output, inverse);
      stage_rows<pack_bf16, kColumnsV, kQPanelBytes>(output, q_tile, warp, lane);
    }
    fence_async_proxy();
    named_barrier_sync(1 + warpgroup, 128);  // O is staged
    if (leader) {
      const int row = first_token;
      if (complete && static_cast<unsigned>(row) < item.q_length) {
#pragma unroll
        for (int panel = 0; panel < kPanelsV; ++panel) {
          tma_store_ragged(&p.map_out, q_tile + panel * kQPanelBytes, 64 * panel, row, head * p.packed_heads,
                           item.q_begin, item.q_length);
        }
        tma_store_commit();
      }
      tma_store_wait_read();
      control.q.arrive_empty(q_at);
    }
    control.tile.arrive_empty(tile_at);
    q_at.advance_by(kWarpgroups);
  }
}

extern "C" __global__ void __launch_bounds__(kAloneThreads, 1)
jagtile_build_split_work_list(const __grid_constant__ Params p) {
  build_split_list<1, /*kPackSequences=*/false>(p);
}

extern "C" __global__ void __cluster_dims__(kClusterCtas) __launch_bounds__(kClusterThreads, 1)
jagtile_build_split_work_list_cluster(const __grid_constant__ Params p) {
  build_split_list<kClusterCtas, /*kPackSequences=*/false>(p);
}
