// One thin wrapper an instruction: mbarriers, TMA, wgmma ordering, register reallocation, conversions.
#pragma once
#include <cstdint>

// ---- shared memory, threads -----------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t smem_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// True in one lane of a converged warp. Unlike a lane comparison it keeps TMA issue free of uniformisation loops.
__device__ __forceinline__ bool elect_one() {
  uint32_t elected;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}\n"
      : "=r"(elected));
  return elected != 0;
}

__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// All threads of a cluster of CTAs arrive, and wait for each other. What was written before is seen behind.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// A variable in shared memory, as another CTA of the cluster has it.
template <typename T>
__device__ __forceinline__ const T* variable_of(const T* variable, int cta) {
  const T* found;
  asm("mapa.u64 %0, %1, %2;" : "=l"(found) : "l"(variable), "r"(cta));
  return found;
}

// Whether `value` is true in any thread of a warpgroup; the same in all, and known to the compiler to be.
__device__ __forceinline__ bool any_of_warpgroup(int barrier, bool value) {
  uint32_t any;
  asm volatile(
      "{\n"
      ".reg .pred mine, any;\n"
      "setp.ne.u32 mine, %2, 0;\n"
      "barrier.cta.red.or.pred any, %1, 128, mine;\n"
      "selp.u32 %0, 1, 0, any;\n"
      "}\n"
      : "=r"(any)
      : "r"(barrier), "r"(static_cast<uint32_t>(value))
      : "memory");
  return __any_sync(0xffffffff, any);
}

template <int kRegisters>
__device__ __forceinline__ void grow_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void shrink_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- mbarriers ------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to the copy engine.
__device__ __forceinline__ void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void mbarrier_expect_bytes(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "wait_%=:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1, 0x989680;\n"
      "@done bra.uni ready_%=;\n"
      "bra.uni wait_%=;\n"
      "ready_%=:\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Whether a wait would end at once.
__device__ __forceinline__ bool mbarrier_test(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n"
      "selp.u32 %0, 1, 0, done;\n"
      "}\n"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done != 0;
}

// ---- TMA ------------------------------------------------------------------------------------------------------------

constexpr uint64_t kEvictNormal = 0x1000000000000000ull;
constexpr uint64_t kEvictFirst = 0x12F0000000000000ull;
constexpr uint64_t kEvictLast = 0x14F0000000000000ull;

__device__ __forceinline__ void tma_prefetch_map(const void* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Ragged map of a packed (tokens, heads, dim) tensor, see runtime/cuda/tensor_map.py: `row` counts from the sequence's
// first token, rows >= length are out of bounds (zeros on load, dropped on store).
constexpr int kRaggedExtent = 1 << 30;

__device__ __forceinline__ void tma_load_ragged(uint32_t smem, const void* map, uint32_t barrier, int column, int row,
                                                int head, int begin, int length, uint64_t cache_hint) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(smem),
      "l"(map), "r"(barrier), "r"(column), "r"(kRaggedExtent - length + row), "r"(head), "r"(kRaggedExtent),
      "r"(begin + length), "l"(cache_hint)
      : "memory");
}

// Likewise into L2.
__device__ __forceinline__ void tma_prefetch_ragged(const void* map, int column, int row, int head, int begin, int length) {
  asm volatile("cp.async.bulk.prefetch.tensor.5d.L2.global.tile [%0, {%1, %2, %3, %4, %5}];" ::"l"(map), "r"(column),
               "r"(kRaggedExtent - length + row), "r"(head), "r"(kRaggedExtent), "r"(begin + length)
               : "memory");
}

__device__ __forceinline__ void tma_store_ragged(const void* map, uint32_t smem, int column, int row, int head,
                                                 int begin, int length) {
  asm volatile(
      "cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(map),
      "r"(smem), "r"(column), "r"(kRaggedExtent - length + row), "r"(head), "r"(kRaggedExtent), "r"(begin + length)
      : "memory");
}

// `bytes` of global memory into shared memory; both addresses and `bytes` in steps of 16.
__device__ __forceinline__ void bulk_load(uint32_t smem, const void* from, uint32_t bytes, uint32_t barrier, uint64_t cache_hint) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(smem),
      "l"(from), "r"(bytes), "r"(barrier), "l"(cache_hint)
      : "memory");
}

// `bytes` of shared memory into global memory, likewise.
__device__ __forceinline__ void bulk_store(void* to, uint32_t smem, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(smem), "r"(bytes) : "memory");
}

// Adds `bytes` / 4 float32 numbers in shared memory to those in global memory; both addresses and `bytes` in steps of 16.
__device__ __forceinline__ void bulk_add(float* sums, uint32_t smem, uint32_t bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(sums), "r"(smem),
               "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// The sources of committed stores may be overwritten, those of the last `kPending` groups excepted.
template <int kPending = 0>
__device__ __forceinline__ void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// Every committed store has been made.
__device__ __forceinline__ void tma_store_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// Ordinary shared-memory writes, the thread's own and those that it has learnt of, become visible to the copy engine and the
// tensor cores.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Ordinary global-memory writes and those of the copy engine become visible to each other.
__device__ __forceinline__ void fence_async_proxy_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// ---- cp.async -------------------------------------------------------------------------------------------------------

// Copies 4, 8 or 16 bytes, of which those from `source_bytes` on are zeros and not read.
template <int kBytes>
__device__ __forceinline__ void copy_async(uint32_t smem, const void* from, int source_bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(smem), "l"(from), "n"(kBytes), "r"(source_bytes)
               : "memory");
}

// This thread's copies have landed.
__device__ __forceinline__ void copy_async_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// ---- global memory --------------------------------------------------------------------------------------------------

// 16 bytes that no thread of this launch writes or reads again.
__device__ __forceinline__ uint4 load_x4(const void* from, uint64_t cache_hint) {
  uint4 x;
  asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.b32 {%0, %1, %2, %3}, [%4], %5;"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(from), "l"(cache_hint));
  return x;
}

// Likewise, of bytes that this launch has written.
__device__ __forceinline__ uint4 load_written_x4(const void* from, uint64_t cache_hint) {
  uint4 x;
  asm volatile("ld.global.L1::no_allocate.L2::cache_hint.v4.b32 {%0, %1, %2, %3}, [%4], %5;"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(from), "l"(cache_hint)
               : "memory");
  return x;
}

__device__ __forceinline__ void add_x4(float* sums, float a, float b, float c, float d) {
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(sums), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
}

__device__ __forceinline__ void add_x2(float* sums, float a, float b) {
  asm volatile("red.global.add.v2.f32 [%0], {%1, %2};" ::"l"(sums), "f"(a), "f"(b) : "memory");
}

__device__ __forceinline__ int load_acquire(const int* from) {
  int value;
  asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}

__device__ __forceinline__ void add_release(int* to, int value) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}

// ---- wgmma ----------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Holds a wgmma_wait that follows back until `value` is computed. ptxas hoists the wait over arithmetic, and so undoes their
// overlap, but keeps it behind a memory access: here a load that happens for huge values only, and is ignored.
__device__ __forceinline__ void hold_until_computed(float value, uint32_t smem) {
  asm volatile(
      "{\n"
      ".reg .pred huge;\n"
      ".reg .b32 ignored;\n"
      "setp.gt.f32 huge, %0, 0f7F000000;\n"
      "@huge ld.volatile.shared.b32 ignored, [%1];\n"
      "}\n" ::"f"(value),
      "r"(smem)
      : "memory");
}

// Keeps the compiler from moving uses of registers that an asynchronous wgmma reads or writes.
template <int kCount>
__device__ __forceinline__ void pin_registers(float (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(values[i])::"memory");
}

template <int kCount>
__device__ __forceinline__ void pin_registers(uint32_t (&values)[kCount][4]) {
#pragma unroll
  for (int i = 0; i < kCount * 4; ++i) asm volatile("" : "+r"(values[i / 4][i % 4])::"memory");
}

// The same value, which what is computed from it may not be computed earlier than, or kept in registers across loops.
__device__ __forceinline__ uint32_t computed_here(uint32_t value) {
  asm volatile("" : "+r"(value));
  return value;
}

// Likewise, the lane: read anew wherever it is used.
__device__ __forceinline__ unsigned lane_here() {
  unsigned lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

// Shared-memory matrix descriptor, 128-byte swizzle; offsets in bytes.
__device__ __forceinline__ uint64_t wgmma_descriptor(uint32_t address, uint32_t leading_offset, uint32_t stride_offset) {
  return (uint64_t{1} << 62) | (uint64_t{stride_offset >> 4} << 32) | (uint64_t{leading_offset >> 4} << 16) |
         ((address & 0x3FFFF) >> 4);
}

// ---- registers ------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

__device__ __forceinline__ uint32_t pack_fp16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

__device__ __forceinline__ float2 unpack_bf16(uint32_t packed) {
  return {__uint_as_float(packed << 16), __uint_as_float(packed & 0xFFFF0000)};
}

__device__ __forceinline__ float2 unpack_fp16(uint32_t packed) {
  float2 values;
  asm("{\n"
      ".reg .b16 low, high;\n"
      "mov.b32 {low, high}, %2;\n"
      "cvt.f32.f16 %0, low;\n"
      "cvt.f32.f16 %1, high;\n"
      "}\n"
      : "=f"(values.x), "=f"(values.y)
      : "r"(packed));
  return values;
}

// Of both halves; NaN wins.
__device__ __forceinline__ uint32_t max_fp16x2(uint32_t a, uint32_t b) {
  uint32_t larger;
  asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
  return larger;
}

// Whether a half is not below that of `bound`: NaN is not.
__device__ __forceinline__ bool any_at_least_fp16x2(uint32_t values, uint32_t bound) {
  uint32_t any;
  asm("{\n"
      ".reg .pred low, high;\n"
      "setp.geu.f16x2 low|high, %1, %2;\n"
      "or.pred low, low, high;\n"
      "selp.u32 %0, 1, 0, low;\n"
      "}\n"
      : "=r"(any)
      : "r"(values), "r"(bound));
  return any != 0;
}

__device__ __forceinline__ uint32_t load_shared(uint32_t smem) {
  uint32_t word;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(word) : "r"(smem) : "memory");
  return word;
}

// Four words at a multiple of 16 bytes.
template <int kCount>
__device__ __forceinline__ void load_shared_x4(uint32_t (&words)[kCount], uint32_t smem) {
  static_assert(kCount >= 4);
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(smem)
               : "memory");
}

template <int kCount>
__device__ __forceinline__ void store_shared_x4(uint32_t smem, const uint32_t (&words)[kCount]) {
  static_assert(kCount >= 4);
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(smem), "r"(words[0]), "r"(words[1]), "r"(words[2]),
               "r"(words[3])
               : "memory");
}

__device__ __forceinline__ void store_matrix_x4(uint32_t smem, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(smem), "r"(r0), "r"(r1), "r"(r2),
               "r"(r3)
               : "memory");
}

__device__ __forceinline__ void store_matrix_x2(uint32_t smem, uint32_t r0, uint32_t r1) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(smem), "r"(r0), "r"(r1) : "memory");
}

// Each 8 x 8 matrix is stored transposed.
__device__ __forceinline__ void store_transposed_x4(uint32_t smem, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(smem), "r"(r0), "r"(r1),
               "r"(r2), "r"(r3)
               : "memory");
}

// The transpose of an 8 x 8 matrix of 16-bit numbers, two of a row a lane. All lanes of a warp.
__device__ __forceinline__ uint32_t transposed_matrix(uint32_t pair) {
  uint32_t transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(pair));
  return transposed;
}

__device__ __forceinline__ void load_matrix_x4(uint32_t (&r)[4], uint32_t smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem)
               : "memory");
}
