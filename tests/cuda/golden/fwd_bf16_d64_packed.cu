// jagtile_fwd_bf16_d64_packed_n96_s2_c3
//
// Forward attention over a jagged batch, one kernel for one case:
//   target      sm_90a
//   dtype       bf16
//   head_dim    64 (queries and keys), 64 (values)
//   mask        none
// Template: templates/cuda/sm90/packed.cu.j2, algorithm packed, with
//   block_n             96
//   num_stages          2
//   ctas_per_sm         3
// Generated; edit the template, not this text. To see it again:
//   jagtile generate sm_90a/fwd_bf16_d64/packed_n96_s2_c3
//
// For many short sequences: a tile is 64 consecutive rows of the packed queries, whichever sequences they belong to.
// Each row has its own range of keys, masked in the scores; a tile visits the keys of all its rows. No work list, one
// launch; 3 CTAs an SM, each with a run of pairs of a tile and a head.
//   warps 0 to 3  S = Q K^T, online softmax, O += P V (wgmma); O leaves through the Q buffer (TMA)
//   warp 4        finds each row's keys in the offsets and copies Q, K and V into shared memory (TMA)
// What a row does not see must not reach it, NaN and infinity included: a product that holds NaN is computed again,
// over the keys that are seen. So a block's product is kept apart from O, 64 columns at a time.
//
// Shared memory          bytes
//   Q [2]                  16384   1 panel of 64 rows x 128 B each; O on its way out
//   K [2]                  24576   1 panel of 96 rows x 128 B
//   V [2]                  24576   1 panel of 96 rows x 128 B
//   tiles, barriers         1152
#include "cuda/include/fragments.cuh"
#include "cuda/include/packed_tile.cuh"
#include "cuda/include/params.cuh"
#include "cuda/include/pipeline.cuh"
#include "cuda/include/ptx.cuh"
#include "cuda/include/range_softmax.cuh"
#include "cuda/include/softmax.cuh"
#include "cuda/include/visible_product.cuh"

namespace {

constexpr int kBlockM = 64;
constexpr int kBlockN = 96;
constexpr int kStages = 2;
constexpr int kPanels = 1;         // 64-column panels of Q and K
constexpr int kPanelsV = 1;        // of V and O
constexpr int kStepsPV = 6;        // over the keys of a block
constexpr int kOutRegisters = 32;  // accumulators a thread of 64 x 64

constexpr int kQPanelBytes = kBlockM * 128;
constexpr int kKVPanelBytes = kBlockN * 128;
constexpr int kQBytes = 1 * kQPanelBytes;  // room for O included
constexpr int kKBytes = kPanels * kKVPanelBytes;
constexpr int kVBytes = kPanelsV * kKVPanelBytes;

struct Control {
  PackedTile<kBlockM> tiles[kStages];  // come and go with Q
  RingBarriers<kStages> q, k, v;
};
static_assert(sizeof(Control) <= 1152);

// d (64 x 96) {+}= A (64 x 16) B^T (96 x 16), both K-major in shared memory.
__device__ __forceinline__ void multiply_qk(float (&d)[48], uint64_t a, uint64_t b, int accumulate) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %50, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n96k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47}, "
      "%48, %49, p, 1, 1, 0, 0;\n"
      "}\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
        "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
        "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
        "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]),
        "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]),
        "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47])
      : "l"(a), "l"(b), "r"(accumulate));
}

// d (64 x 64) += A (64 x 16, registers) B (16 x 64, shared memory, its columns contiguous).
__device__ __forceinline__ void multiply_pv(float (&d)[32], const uint32_t (&a)[4], uint64_t b) {
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

// d (64 x 96) = A B^T, asynchronously; 64 rows of A and 96 rows of B, 64 columns each.
__device__ __forceinline__ void issue_scores(float (&d)[48], uint32_t a, uint32_t b) {
  const uint64_t a_descriptor = wgmma_descriptor(a, 16, 1024);
  const uint64_t b_descriptor = wgmma_descriptor(b, 16, 1024);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    const int inside = step % 4 * 32;
    multiply_qk(d, a_descriptor + ((step / 4 * kQPanelBytes + inside) >> 4),
                b_descriptor + ((step / 4 * kKVPanelBytes + inside) >> 4), step > 0);
  }
  wgmma_commit();
}

// d (64 x 64) += A B, asynchronously; A's fragments in registers, 96 rows of B.
__device__ __forceinline__ void issue_product(float (&d)[32], const uint32_t (&a)[6][4], uint32_t b) {
  const uint64_t b_descriptor = wgmma_descriptor(b, kKVPanelBytes, 1024);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < 6; ++step) {
    multiply_pv(d, a[step], b_descriptor + (step * 16 * 128 >> 4));
  }
  wgmma_commit();
}

// A block's P V, of one panel of V, is added to the panel's columns of the rescaled O.
template <int kPanel, int kColumns>
__device__ __forceinline__ void add_product(float (&output)[kOutRegisters], uint32_t (&probabilities)[kStepsPV][4],
                                            uint32_t v_tile, const PackedTile<kBlockM>& in, int first_key,
                                            const float (&rescale)[2]) {
  const uint32_t panel = v_tile + kPanel * kKVPanelBytes;
  float product[kColumns / 2] = {};
  issue_product(product, probabilities, panel);
  wgmma_wait<0>();
  pin_registers(product);
  pin_registers(probabilities);
  if (__any_sync(0xffffffff, any_nan(product))) {
    const ThreadRows own(in, first_key);
    multiply_seen<unpack_bf16>(product, probabilities, panel, own.seen);
  }
#pragma unroll
  for (int i = 0; i < kColumns / 2; ++i) {
    float& sum = output[32 * kPanel + i];
    sum = fmaf(sum, rescale[(i >> 1) & 1], product[i]);
  }
}

// One block of keys or values, by a warp: rows `row` to `row` + kBlockN - 1 of the tile's, zeros behind its last.
template <int kTilePanels>
__device__ __forceinline__ void load_block(RingBarriers<kStages>& ring, const RingPosition<kStages>& at, uint32_t smem,
                                           const TensorMap& map, int row, int kv_head, int begin, int length) {
  ring.wait_empty(at);
  if (elect_one()) {
    const uint32_t full = smem_address(&ring.full[at.slot]);
    const uint32_t buffer = smem + at.slot * kTilePanels * kKVPanelBytes;
    mbarrier_expect_bytes(full, kTilePanels * kKVPanelBytes);
#pragma unroll
    for (int panel = 0; panel < kTilePanels; ++panel) {
      tma_load_ragged(buffer + panel * kKVPanelBytes, &map, full, 64 * panel, row, kv_head, begin, length,
                      kEvictNormal);
    }
  }
}

// Hands a buffer back, once for each warp.
__device__ __forceinline__ void release(RingBarriers<kStages>& ring, const RingPosition<kStages>& at) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) ring.arrive_empty(at);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(160, 3)
jagtile_fwd_bf16_d64_packed_n96_s2_c3(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const uint32_t q_tiles = smem_address(shared);
  const uint32_t k_tiles = q_tiles + 16384;
  const uint32_t v_tiles = k_tiles + 24576;
  Control& control = *reinterpret_cast<Control*>(shared + 65536);
  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0);  // uniform, and known to be
  const PairRange pairs = pairs_of_cta((p.total_q + kBlockM - 1) / kBlockM * p.heads);
  int tile = pairs.begin / p.heads, head = pairs.begin % p.heads;
  RingPosition<kStages> q_at, kv_at;

  if (threadIdx.x == 0) {
    control.q.init(32, 1);  // filled by every lane of the loading warp
    control.k.init(1, 4);  // freed by every math warp
    control.v.init(1, 4);
    mbarrier_init_fence();
  }
  __syncthreads();

  if (warp == 4) {
    if (elect_one()) {
      tma_prefetch_map(&p.map_q);
      tma_prefetch_map(&p.map_k);
      tma_prefetch_map(&p.map_v);
      tma_prefetch_map(&p.map_out);
    }
    TileFinder<kBlockM, QueryRows<false>> found;
    for (int pair = pairs.begin; pair < pairs.end; ++pair) {
      if (pair == pairs.begin || head == 0) found.find(p, tile);
      control.q.wait_empty(q_at);
      found.write(control.tiles[q_at.slot]);
      if (elect_one()) {
        const uint32_t full = smem_address(&control.q.full[q_at.slot]);
        const uint32_t buffer = q_tiles + q_at.slot * kQBytes;
        const int row = tile * kBlockM;
        mbarrier_expect_bytes(full, kPanels * kQPanelBytes);
#pragma unroll
        for (int panel = 0; panel < kPanels; ++panel) {
          tma_load_ragged(buffer + panel * kQPanelBytes, &p.map_q, full, 64 * panel, 0, head, row, p.total_q - row,
                          kEvictFirst);
        }
      } else {
        control.q.arrive_full(q_at);
      }
      q_at.advance();
      const int kv_head = head / p.gqa_ratio;
      for (int row = 0; row < found.length(); row += kBlockN, kv_at.advance()) {
        load_block<kPanels>(control.k, kv_at, k_tiles, p.map_k, row, kv_head, found.begin(), found.length());
        load_block<kPanelsV>(control.v, kv_at, v_tiles, p.map_v, row, kv_head, found.begin(), found.length());
      }
      if (++head == p.heads) {
        head = 0;
        ++tile;
      }
    }
    return;
  }

  const int lane = threadIdx.x % 32;
  const bool leader = threadIdx.x == 0;
  const int thread_row = 16 * warp + lane / 4;  // the upper of two, 8 apart
  const float scale_log2 = p.scale_log2;
  uint32_t stored_q = 0;  // the leader's: empty barrier of the Q buffer that the previous pair's O is leaving through
  auto free_stored_q = [&] {
    if (stored_q) {
      tma_store_wait_read();
      mbarrier_arrive(stored_q);
      stored_q = 0;
    }
  };
  for (int pair = pairs.begin; pair < pairs.end; ++pair) {
    const uint32_t q_tile = q_tiles + q_at.slot * kQBytes;
    float output[kOutRegisters] = {};
    RowState rows;

    control.q.wait_full(q_at);
    const PackedTile<kBlockM>& in = control.tiles[q_at.slot];
    for (int first_key = 0; first_key < in.length; first_key += kBlockN, kv_at.advance()) {
      float scores[kBlockN / 2];
      control.k.wait_full(kv_at);
      issue_scores(scores, q_tile, k_tiles + kv_at.slot * kKBytes);
      free_stored_q();
      wgmma_wait<0>();
      pin_registers(scores);
      release(control.k, kv_at);
      float rescale[2];
      uint32_t probabilities[kStepsPV][4];
      const ThreadRows own(in, first_key);
      range_softmax<pack_bf16>(scores, probabilities, own.seen, rows, rescale, scale_log2);

      const uint32_t v_tile = v_tiles + kv_at.slot * kVBytes;
      control.v.wait_full(kv_at);
      add_product<0, 64>(output, probabilities, v_tile, in, first_key, rescale);
      release(control.v, kv_at);
    }

    // Normalise, write lse, send O out through the Q buffer.
    float inverse[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float sum = sum_of_row(rows.sum[h]);
      inverse[h] = inverse_of_sum(sum);
      const int row = tile * kBlockM + thread_row + 8 * h;
      if (p.lse != nullptr && lane % 4 == 0 && row < p.total_q) {
        p.lse[static_cast<long long>(head) * p.total_q + row] = log_of_sum(rows.reference[h] * scale_log2, sum);
      }
    }
    scale_rows(output, inverse);
    free_stored_q();
    stage_rows<pack_bf16, 64, kQPanelBytes>(output, q_tile, warp, lane);
    fence_async_proxy();
    named_barrier_sync(1, 128);
    if (leader) {
      const int row = tile * kBlockM;
#pragma unroll
      for (int panel = 0; panel < kPanelsV; ++panel) {
        tma_store_ragged(&p.map_out, q_tile + panel * kQPanelBytes, 64 * panel, 0, head, row, p.total_q - row);
      }
      tma_store_commit();
      stored_q = smem_address(&control.q.empty[q_at.slot]);
    }
    __syncwarp();
    q_at.advance();
    if (++head == p.heads) {
      head = 0;
      ++tile;
    }
  }
  free_stored_q();
}
