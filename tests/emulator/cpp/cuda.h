// The CUDA language for a host compiler, as far as the kernels use it.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "ptx.h"

#define __device__
#define __host__
#define __global__
#define __constant__ static const
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __restrict__ __restrict

#define threadIdx (emu::self->thread)
#define blockIdx (emu::self->block)
#define blockDim (emu::block)
#define gridDim (emu::grid)
constexpr int warpSize = 32;

using dim3 = emu::Dim3;
#define EMU_VECTOR(T, name)                                                     \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };                            \
  struct name##3 { T x, y, z; };                                                \
  struct alignas(sizeof(T) < 8 ? 4 * sizeof(T) : 16) name##4 { T x, y, z, w; }; \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                    \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMU_VECTOR(int, int)
EMU_VECTOR(unsigned, uint)
EMU_VECTOR(float, float)
EMU_VECTOR(double, double)
EMU_VECTOR(long long, longlong)
EMU_VECTOR(unsigned long long, ulonglong)
#undef EMU_VECTOR

// ---- arithmetic -----------------------------------------------------------------------------------------------------
#define EMU_MIN_MAX(T)                             \
  inline T min(T a, T b) { return b < a ? b : a; } \
  inline T max(T a, T b) { return a < b ? b : a; }
EMU_MIN_MAX(int)
EMU_MIN_MAX(unsigned)
EMU_MIN_MAX(long)
EMU_MIN_MAX(unsigned long)
EMU_MIN_MAX(long long)
EMU_MIN_MAX(unsigned long long)
#undef EMU_MIN_MAX
inline unsigned min(unsigned a, int b) { return min(a, unsigned(b)); }
inline unsigned min(int a, unsigned b) { return min(unsigned(a), b); }
inline unsigned max(unsigned a, int b) { return max(a, unsigned(b)); }
inline unsigned max(int a, unsigned b) { return max(unsigned(a), b); }
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __float_as_int(float x) { return emu::as<int>(x); }
inline unsigned __float_as_uint(float x) { return emu::as<unsigned>(x); }
inline float __int_as_float(int x) { return emu::as<float>(x); }
inline float __uint_as_float(unsigned x) { return emu::as<float>(x); }
inline float __saturatef(float x) { return x > 0.0f ? fminf(x, 1.0f) : 0.0f; }  // 0 of NaN
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __expf(float a) { return expf(a); }
inline float __logf(float a) { return logf(a); }
inline float __log2f(float a) { return log2f(a); }
inline float rsqrtf(float a) { return 1.0f / sqrtf(a); }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned s) { return emu::permute_bytes(a, b, s); }
template <typename T>
inline T __ldg(const T* pointer) {
  return *pointer;
}
template <typename T>
inline T __ldcg(const T* pointer) {
  return *pointer;
}

// ---- warps ----------------------------------------------------------------------------------------------------------
#define EMU_SHUFFLE(name, mode, Operand)                                                                     \
  template <typename T>                                                                                      \
  inline T name(unsigned mask, T value, Operand operand, int width = 32) {                                   \
    static_assert(sizeof(T) == 4, "shuffles of 32-bit values only");                                         \
    return emu::as<T>(emu::shuffle(mask, emu::as<uint32_t>(value), mode, static_cast<int>(operand), width)); \
  }
EMU_SHUFFLE(__shfl_sync, 0, int)
EMU_SHUFFLE(__shfl_up_sync, 1, unsigned)
EMU_SHUFFLE(__shfl_down_sync, 2, unsigned)
EMU_SHUFFLE(__shfl_xor_sync, 3, int)
#undef EMU_SHUFFLE
inline unsigned __ballot_sync(unsigned mask, int value) { return emu::ballot(mask, value != 0); }
inline int __any_sync(unsigned mask, int value) { return emu::ballot(mask, value != 0) != 0; }
inline int __all_sync(unsigned mask, int value) { return emu::ballot(mask, value == 0) == 0; }
template <typename T>
inline unsigned __match_any_sync(unsigned mask, T value) {
  return emu::match_any(mask, static_cast<uint64_t>(value));
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
  return emu::reduce_sync(mask, value, [](unsigned a, unsigned b) { return a + b; });
}
inline int __reduce_max_sync(unsigned mask, int value) {
  return emu::reduce_sync(mask, value, [](int a, int b) { return a < b ? b : a; });
}
inline int __reduce_min_sync(unsigned mask, int value) {
  return emu::reduce_sync(mask, value, [](int a, int b) { return b < a ? b : a; });
}
inline void __syncwarp(unsigned mask = 0xffffffff) { emu::sync_warp(mask); }
inline void __syncthreads() { emu::barrier(0, emu::kAllThreads, true, true, emu::Reduce::kNone, false); }
inline int __syncthreads_or(int value) {
  return emu::barrier(0, emu::kAllThreads, true, true, emu::Reduce::kOr, value);
}
inline int __syncthreads_and(int value) {
  return emu::barrier(0, emu::kAllThreads, true, true, emu::Reduce::kAnd, value);
}
inline void __threadfence() { emu::global_fence(); }
inline void __threadfence_block() {}
inline void __threadfence_system() { emu::global_fence(); }
inline void __nanosleep(unsigned) { emu::poll(); }
inline void __trap() { emu::fail("__trap()"); }
inline size_t __cvta_generic_to_shared(const void* pointer) {
  return emu::address_in_cluster(emu::shared_address(pointer), emu::cluster_rank());
}

// ---- atomics --------------------------------------------------------------------------------------------------------
#define EMU_ATOMIC(name, expression)                                        \
  template <typename T, typename U>                                         \
  inline T name(T* pointer, U operand) {                                    \
    const T value = static_cast<T>(operand);                                \
    T old;                                                                  \
    emu::strong_access(pointer, sizeof old, emu::Strong::kExchange, false); \
    emu::raw_copy(&old, pointer, sizeof old);                               \
    const T changed = (expression);                                         \
    emu::raw_copy(pointer, &changed, sizeof changed);                       \
    emu::progress();                                                        \
    emu::preempt();                                                         \
    return old;                                                             \
  }
EMU_ATOMIC(atomicAdd, old + value)
EMU_ATOMIC(atomicSub, old - value)
EMU_ATOMIC(atomicMax, old < value ? value : old)
EMU_ATOMIC(atomicMin, value < old ? value : old)
EMU_ATOMIC(atomicExch, value)
EMU_ATOMIC(atomicOr, old | value)
EMU_ATOMIC(atomicAnd, old& value)
#undef EMU_ATOMIC
template <typename T>
inline T atomicCAS(T* pointer, T expected, T value) {
  T old;
  emu::strong_access(pointer, sizeof old, emu::Strong::kExchange, false);
  emu::raw_copy(&old, pointer, sizeof old);
  if (old == expected) emu::raw_copy(pointer, &value, sizeof value);
  emu::progress();
  emu::poll();
  return old;
}
