// Kernels of a few lines for test_emulator.py: one instruction, or one mistake, each.
#include "cuda/include/pair_claims.cuh"
#include "cuda/include/params.cuh"
#include "cuda/include/pipeline.cuh"
#include "cuda/include/ptx.cuh"

namespace {

__device__ __forceinline__ void tma_load_2d(uint32_t smem, const void* map, uint32_t barrier, int column, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::
          "r"(smem),
      "l"(map), "r"(barrier), "r"(column), "r"(row)
      : "memory");
}

// Loads a box to the beginning of shared memory; all threads wait for it.
__device__ __forceinline__ void load_box(const TensorMap& map, uint32_t smem, uint64_t& barrier, uint32_t bytes,
                                         int column, int row, bool init) {
  if (threadIdx.x == 0) {
    if (init) mbarrier_init(smem_address(&barrier), 1);
    mbarrier_init_fence();
    mbarrier_expect_bytes(smem_address(&barrier), bytes);
    tma_load_2d(smem, &map, smem_address(&barrier), column, row);
  }
  __syncthreads();
}

}  // namespace

// The bytes of shared memory after a box was loaded.
extern "C" __global__ void __launch_bounds__(32)
    loaded_bytes(const __grid_constant__ TensorMap map, unsigned char* out, int bytes, int column, int row) {
  extern __shared__ __align__(1024) unsigned char shared[];
  __shared__ uint64_t barrier;
  load_box(map, smem_address(shared), barrier, bytes, column, row, true);
  mbarrier_wait(smem_address(&barrier), 0);
  for (int i = threadIdx.x; i < bytes; i += 32) out[i] = shared[i];
}

// From one map to another, by way of shared memory; `add`: adds.
extern "C" __global__ void __launch_bounds__(32)
    box_to_box(const __grid_constant__ TensorMap from, const __grid_constant__ TensorMap to, int bytes, int column,
               int row, int add) {
  extern __shared__ __align__(1024) unsigned char shared[];
  __shared__ uint64_t barrier;
  load_box(from, smem_address(shared), barrier, bytes, 0, 0, true);
  mbarrier_wait(smem_address(&barrier), 0);
  if (threadIdx.x == 0) {
    if (add) {
      asm volatile(
          "cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&to),
          "r"(smem_address(shared)), "r"(column), "r"(row)
          : "memory");
    } else {
      asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&to),
                   "r"(smem_address(shared)), "r"(column), "r"(row)
                   : "memory");
    }
    tma_store_commit();
    tma_store_wait_read();
  }
}

// D (64 x 64) = A B, 64 deep. Both operands come by TMA in rows of `row_bytes`, K-major or MN-major. Columns of a box
// beyond one panel come as further boxes, `panel` bytes apart.
template <int kTransposeA, int kTransposeB>
__device__ __forceinline__ void product(const TensorMap& a, const TensorMap& b, float* out, int row_bytes,
                                        int swizzle) {
  extern __shared__ __align__(1024) unsigned char shared[];
  __shared__ uint64_t barrier;
  const uint32_t a_tile = smem_address(shared), b_tile = a_tile + 64 * 128;
  const int columns = row_bytes / 2, panels = 64 / columns, panel_bytes = 64 * row_bytes;
  if (threadIdx.x == 0) {
    mbarrier_init(smem_address(&barrier), 1);
    mbarrier_init_fence();
    mbarrier_expect_bytes(smem_address(&barrier), 2 * 64 * 128);
    for (int panel = 0; panel < panels; ++panel) {
      tma_load_2d(a_tile + panel * panel_bytes, &a, smem_address(&barrier), panel * columns, 0);
      tma_load_2d(b_tile + panel * panel_bytes, &b, smem_address(&barrier), panel * columns, 0);
    }
  }
  __syncthreads();
  mbarrier_wait(smem_address(&barrier), 0);
  float d[32];
  const uint64_t mode = uint64_t(swizzle) << 62;
  const auto descriptor = [&](uint32_t tile, bool transposed, int step) {
    // K-major: a step is 32 bytes of a row; MN-major: 16 rows.
    const uint32_t panel = transposed ? 0 : step * 16 / columns;
    const uint32_t inside = transposed ? step * 16 * row_bytes : step * 16 % columns * 2;
    const uint64_t leading = panel_bytes >> 4, stride = 8 * row_bytes >> 4;
    return mode | stride << 32 | leading << 16 | ((tile + panel * panel_bytes + inside) >> 4);
  };
  wgmma_fence();
  for (int step = 0; step < 4; ++step) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, "
        "%13, "
        "%14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, p, 1, "
        "-1, %35, %36;\n"
        "}\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
          "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),
          "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),
          "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
        : "l"(descriptor(a_tile, kTransposeA, step)), "l"(descriptor(b_tile, kTransposeB, step)), "r"(step),
          "n"(kTransposeA), "n"(kTransposeB));
  }
  wgmma_commit();
  wgmma_wait<0>();
  pin_registers(d);
  for (int i = 0; i < 32; ++i) {
    const int row = 16 * (threadIdx.x / 32) + threadIdx.x % 32 / 4 + 8 * (i >> 1 & 1);
    out[row * 64 + 8 * (i >> 2) + 2 * (threadIdx.x % 4) + (i & 1)] = d[i];
  }
}

extern "C" __global__ void __launch_bounds__(128)
    products(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, float* out, int row_bytes,
             int swizzle, int transposed) {
  if (transposed == 0) product<0, 0>(a, b, out, row_bytes, swizzle);
  if (transposed == 1) product<0, 1>(a, b, out, row_bytes, swizzle);
  if (transposed == 2) product<1, 0>(a, b, out, row_bytes, swizzle);
  if (transposed == 3) product<1, 1>(a, b, out, row_bytes, swizzle);
}

// Through stmatrix and ldmatrix, each transposing or not: 32 x 8 values.
extern "C" __global__ void __launch_bounds__(32)
    matrices(const uint32_t* from, uint32_t* to, int store_transposed, int load_transposed) {
  __shared__ __align__(16) unsigned char tile[512];
  const uint32_t row = smem_address(tile) + threadIdx.x * 16;
  uint32_t r[4];
  for (int i = 0; i < 4; ++i) r[i] = from[i * 32 + threadIdx.x];
  if (store_transposed) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(r[0]),
                 "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
  } else {
    store_matrix_x4(row, r[0], r[1], r[2], r[3]);
  }
  __syncwarp();
  if (load_transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
  }
  for (int i = 0; i < 4; ++i) to[i * 32 + threadIdx.x] = r[i];
}

// 256 floats a CTA added to `to`: by a bulk reduction, by vector reductions, by atomics; the copies in by cp.async.bulk
// and by cp.async, of which the latter clips.
extern "C" __global__ void __launch_bounds__(64) additions(const float* from, float* to, int* votes) {
  __shared__ __align__(128) float bulk[256];
  __shared__ __align__(128) float clipped[64][4];
  __shared__ uint64_t full, ready;
  const int thread = threadIdx.x;
  if (thread == 0) {
    mbarrier_init(smem_address(&full), 1);
    mbarrier_init(smem_address(&ready), 64);
    mbarrier_init_fence();
    mbarrier_expect_bytes(smem_address(&full), 1024);
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     smem_address(bulk)),
                 "l"(from), "r"(1024), "r"(smem_address(&full))
                 : "memory");
  }
  __syncthreads();
  const uint32_t mine = smem_address(clipped[thread]);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(mine), "l"(from + 4 * thread), "r"(thread % 2 * 8)
               : "memory");
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(smem_address(&ready)) : "memory");
  mbarrier_wait(smem_address(&full), 0);
  mbarrier_wait(smem_address(&ready), 0);
  const float* other = clipped[thread ^ 32];
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to + 4 * thread), "f"(other[0]), "f"(other[1]),
               "f"(other[2]), "f"(other[3])
               : "memory");
  atomicAdd(to + thread, 1.0f);
  fence_async_proxy();
  __syncthreads();
  if (thread == 32) {
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to),
                 "r"(smem_address(bulk)), "r"(1024)
                 : "memory");
    tma_store_commit();
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  }
  const int any = __syncthreads_or(thread == 17), all = __syncthreads_and(thread < 64);
  uint32_t count;
  asm volatile(
      "{\n"
      ".reg .pred odd;\n"
      "setp.ne.u32 odd, %1, 0;\n"
      "barrier.cta.red.popc.u32 %0, 3, 64, odd;\n"
      "}\n"
      : "=r"(count)
      : "r"(thread % 2));
  if (thread == 0) atomicAdd(votes, any + 10 * all + 100 * static_cast<int>(count));
}

// Lane exchanges and the integer instructions that have no operator.
extern "C" __global__ void __launch_bounds__(32) lanes(int* out) {
  const int lane = threadIdx.x;
  int value = __shfl_xor_sync(0xffffffff, lane, 5) + 100 * __shfl_up_sync(0xffffffff, lane, 3, 8);
  value += 10000 * __popc(__match_any_sync(0xffffffff, lane / 12));
  uint32_t permuted, table;
  asm("prmt.b32 %0, %1, %2, 0x6420;" : "=r"(permuted) : "r"(0x33221100 + lane), "r"(0x77665544));
  asm("lop3.b32 %0, %1, %2, %3, 0xE8;" : "=r"(table) : "r"(lane), "r"(lane >> 1), "r"(lane >> 2));  // majority
  out[3 * lane] = value;
  out[3 * lane + 1] = permuted;
  out[3 * lane + 2] = table;
}

// Producer and consumer by bar.arrive and bar.sync, as many times as asked. mistake 1: the producer does not wait to be
// answered; 2: plain stores that a bulk store reads without a proxy fence; 3: a write beyond the tensor; 4: an arrival
// too many; 5: a phase that nobody completes; 6: one lane leaves while its warp votes; 7: beyond shared memory; 8: plain stores
// that a bulk load overwrites without a proxy fence.
extern "C" __global__ void __launch_bounds__(64) mistakes(float* out, int times, int mistake) {
  __shared__ __align__(128) float values[32];
  __shared__ uint64_t barrier;
  const int lane = threadIdx.x % 32;
  if (threadIdx.x == 0) mbarrier_init(smem_address(&barrier), 1);
  __syncthreads();
  for (int time = 0; time < times; ++time) {
    if (threadIdx.x < 32) {
      values[lane] = time + lane;
      asm volatile("bar.arrive 1, 64;" ::: "memory");
      if (mistake != 1) named_barrier_sync(2, 64);
    } else {
      named_barrier_sync(1, 64);
      out[32 * time + lane] = values[lane];
      if (mistake != 1) asm volatile("bar.arrive 2, 64;" ::: "memory");
    }
  }
  if (mistake == 2) {
    if (threadIdx.x < 32) values[lane] = 1.0f;
    __syncthreads();
    if (threadIdx.x == 0) {
      asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(out), "r"(smem_address(values)),
                   "r"(128)
                   : "memory");
      tma_store_commit();
      tma_store_wait_read();
    }
  }
  if (mistake == 3) out[32 * times + lane] = 0.0f;
  if (mistake == 4 && threadIdx.x == 0) mbarrier_expect_bytes(smem_address(&barrier), 16);
  if (mistake == 4 && threadIdx.x < 2) mbarrier_arrive(smem_address(&barrier));
  if (mistake == 5 && threadIdx.x == 40) mbarrier_wait(smem_address(&barrier), 0);
  if (mistake == 6 && threadIdx.x != 7) out[lane] = __any_sync(0xffffffff, lane == 3);
  if (mistake == 7) (values + 100 * mistake)[lane] = 0.0f;
  if (mistake == 8) {
    if (threadIdx.x < 32) values[lane] = 1.0f;
    __syncthreads();
    if (threadIdx.x == 0) {
      mbarrier_init_fence();
      mbarrier_expect_bytes(smem_address(&barrier), 128);
      bulk_load(smem_address(values), out, 128, smem_address(&barrier), kEvictFirst);
      mbarrier_wait(smem_address(&barrier), 0);
    }
  }
}

// CTA 0 hands 32 floats to CTA 1 by way of global memory, by ordinary stores or a bulk store (2: whose source is waited
// for first). mistake 1: no fence before the flag; 2: the flag is raised when the bulk store has read its source; 3: nobody
// looks at the flag.
extern "C" __global__ void __launch_bounds__(32)
    handed_on(float* between, int* flag, float* out, int bulk, int mistake) {
  __shared__ __align__(128) float values[32];
  const int lane = threadIdx.x;
  if (blockIdx.x == 0) {
    (bulk ? values : between)[lane] = 2.0f * lane;
    fence_async_proxy();
    __syncwarp();
    if (lane == 0) {
      if (bulk) {
        asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(between),
                     "r"(smem_address(values)), "r"(128)
                     : "memory");
        tma_store_commit();
        tma_store_commit();  // a group without stores
        if (bulk == 2 || mistake == 2) tma_store_wait_read();
        if (mistake != 2) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
      }
      if (mistake != 1) __threadfence();
      atomicAdd(flag, 1);
      tma_store_wait_read();
    }
  } else {
    int raised = mistake == 3;
    while (raised == 0) asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(raised) : "l"(flag) : "memory");
    out[lane] = between[lane];
  }
}

// Each of two CTAs writes every other element, CTA 1 `overlap` of CTA 0's too.
extern "C" __global__ void __launch_bounds__(32) neighbours(unsigned short* out, int overlap) {
  const int lane = threadIdx.x;
  out[2 * lane + blockIdx.x] = blockIdx.x + 1;
  if (blockIdx.x == 1 && lane < overlap) out[2 * lane] = 0;
}

// Every CTA of a cluster has 64 floats and puts out those of the next. mistake 1: it changes its own while they are read; 2: it
// may end before; 3: it reads what another writes; 4: it reads beyond shared memory.
extern "C" __global__ void __cluster_dims__(4) __launch_bounds__(64) around(float* out, int mistake) {
  __shared__ float values[64];
  const int thread = threadIdx.x, next = (blockIdx.x + 1) % 4;
  if (mistake != 3) values[thread] = 64.0f * blockIdx.x + thread;
  cluster_arrive();
  cluster_wait();
  if (mistake == 3) values[thread] = 64.0f * blockIdx.x + thread;
  out[64 * blockIdx.x + thread] = variable_of(values, next)[thread];
  if (mistake == 1) values[thread] = 0.0f;
  if (mistake == 2) return;
  cluster_arrive();
  if (mistake == 4) out[thread] = variable_of(values, next)[thread + 64];
  cluster_wait();
}

// Reads of another CTA that may not have begun.
extern "C" __global__ void __cluster_dims__(2) __launch_bounds__(32) too_soon(float* out) {
  __shared__ float values[32];
  values[threadIdx.x] = 0.0f;
  out[32 * blockIdx.x + threadIdx.x] = variable_of(values, 1 - blockIdx.x)[threadIdx.x];
}

// Puts out a shared variable's address in the CTA itself and in the other of a pair. With `strays` it reads at the latter, as if
// that were an address of its own.
extern "C" __global__ void __cluster_dims__(2) __launch_bounds__(32) addresses_in_a_pair(uint32_t* out, int strays) {
  __shared__ uint32_t word;
  const int rank = cluster_rank();
  const uint32_t own = smem_address(&word), other = address_of(own, 1 - rank);
  word = 0;
  if (strays) word = load_shared(other);
  out[2 * rank] = own;
  out[2 * rank + 1] = other;
}

// Two CTAs load each half of a box of 16 rows for both, time and again to the same place, and put out what has come. The second
// is told by the first which rounds there are. mistake 1: a reader says so twice to its own CTA, never to the other; 2: a CTA may
// end before arrivals; 3: it may not have begun; 4: only half of the bytes are expected; 5: nobody waits until a round was heard.
extern "C" __global__ void __cluster_dims__(2) __launch_bounds__(96)
    pair_of_loaders(const __grid_constant__ TensorMap map, unsigned short* out, int rounds, int mistake) {
  constexpr uint32_t kHalfBytes = 8 * 128;
  extern __shared__ __align__(1024) unsigned char shared[];
  __shared__ RingBarriers<1> box;
  __shared__ PairClaims<1> told;
  const int warp = threadIdx.x / 32, rank = cluster_rank(), other = 1 - rank;
  const uint32_t tile = smem_address(shared);
  if (threadIdx.x == 0) {
    box.init(1, 2);
    told.init();
    mbarrier_init_fence();
  }
  __syncthreads();
  if (mistake != 3) {
    cluster_arrive();
    cluster_wait();
  }
  RingPosition<1> at;
  if (warp == 0 && elect_one()) {
    const uint32_t full = smem_address(&box.full[0]);
    for (int round = 0; round < rounds; ++round, at.advance()) {
      box.wait_empty(at);
      mbarrier_expect_bytes(full, mistake == 4 ? kHalfBytes : 2 * kHalfBytes);
      asm volatile(
          "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
          " [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(tile + rank * kHalfBytes),
          "l"(&map), "r"(full), "r"(0), "r"(16 * round + 8 * rank), "h"(static_cast<uint16_t>(3))
          : "memory");
    }
  } else if (warp == 1) {
    for (int round = 0; round < rounds; ++round, at.advance()) {
      box.wait_full(at);
      const unsigned short* words = reinterpret_cast<const unsigned short*>(shared);
      for (int i = threadIdx.x % 32; i < 1024; i += 32) out[1024 * (2 * round + rank) + i] = words[i];
      __syncwarp();
      if (elect_one()) {
        box.arrive_empty(at);
        if (mistake == 1) {
          box.arrive_empty(at);
        } else {
          arrive_empty_of(box, at, other);
        }
      }
    }
  } else if (warp == 2 && elect_one()) {
    for (int round = 0; round < rounds; ++round, at.advance()) {
      if (rank == 0) {
        if (mistake != 5) {
          told.tell(at, round);
        } else {
          *const_cast<int*>(variable_of(&told.tiles[0], 1)) = round;
          mbarrier_release_cluster(address_of(smem_address(&told.told[0]), 1));
        }
      } else {
        out[1024 * 2 * rounds + round] = told.hear(at);
      }
    }
  }
  if (mistake == 2) return;
  __syncwarp();
  cluster_arrive();
  cluster_wait();
}
