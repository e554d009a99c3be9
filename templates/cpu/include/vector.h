// Vectors of kVectorBytes bytes, a number that the instruction set's header gives. Arithmetic is the compiler's own.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

constexpr int kLanes = kVectorBytes / 4;

typedef float Vec __attribute__((vector_size(kVectorBytes), may_alias));
typedef int32_t IntVec __attribute__((vector_size(kVectorBytes), may_alias));
typedef uint32_t WordVec __attribute__((vector_size(kVectorBytes), may_alias));
typedef uint64_t LongVec __attribute__((vector_size(kVectorBytes), may_alias));
typedef uint16_t HalfVec __attribute__((vector_size(kVectorBytes / 2), may_alias));

static inline Vec broadcast(float value) { return value - Vec{}; }
static inline WordVec broadcast(uint32_t value) { return value + WordVec{}; }

static inline Vec select(IntVec where, Vec yes, Vec no) { return where ? yes : no; }
static inline WordVec select(IntVec where, WordVec yes, WordVec no) {
  return ((WordVec)where & yes) | (~(WordVec)where & no);
}

// NaN where b is NaN.
static inline Vec maximum(Vec a, Vec b) { return a > b ? a : b; }

// kBytes from an address of any alignment, zeros behind them.
template <typename V, int kBytes = sizeof(V)>
static inline V load(const void* from) {
  V value = {};
  memcpy(&value, from, kBytes);
  return value;
}

template <int kBytes, typename V>
static inline void store(void* to, V value) {
  memcpy(to, &value, kBytes);
}

// Calls visit(first, count) for every kStep of kCount elements; count is a constant, less than kStep at the end.
template <int kCount, int kStep, typename Visit>
static inline void for_each_chunk(Visit visit) {
  for (int first = 0; first + kStep <= kCount; first += kStep) visit(first, std::integral_constant<int, kStep>());
  if constexpr (kCount % kStep) {
    visit(kCount - kCount % kStep, std::integral_constant<int, kCount % kStep>());
  }
}

// The lanes of a and b in turn: kHalf 0 takes the lower halves, 1 the upper ones.
template <int kHalf, typename V, size_t... kLane>
static inline V zip(V a, V b, std::index_sequence<kLane...>) {
  constexpr int kFirst = kHalf * kLanes / 2;
#ifdef __clang__
  return __builtin_shufflevector(a, b, (kFirst + kLane / 2 + kLane % 2 * kLanes)...);
#else
  return __builtin_shuffle(a, b, IntVec{int32_t(kFirst + kLane / 2 + kLane % 2 * kLanes)...});
#endif
}

// Transposes kLanes x kLanes elements: log2(kLanes) rounds of zipping row i with row i + kLanes / 2.
template <typename V>
static inline void transpose(V (&rows)[kLanes]) {
  constexpr auto kAll = std::make_index_sequence<kLanes>();
#pragma GCC unroll 4
  for (int round = 1; round < kLanes; round *= 2) {
    V zipped[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      zipped[2 * i] = zip<0>(rows[i], rows[i + kLanes / 2], kAll);
      zipped[2 * i + 1] = zip<1>(rows[i], rows[i + kLanes / 2], kAll);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) rows[i] = zipped[i];
  }
}

// c + a b, rounded once where the instruction set can (-ffp-contract=fast).
static inline Vec multiply_add(Vec c, Vec a, Vec b) { return c + a * b; }

// 2^f for |f| <= 1/2. Relative error of degree 5: 1.1e-7, of degree 4: 2.9e-6.
template <int kDegree>
static inline Vec exp2_fraction(Vec f) {
  Vec p;
  if constexpr (kDegree == 5) {
    p = multiply_add(broadcast(0x1.3cea88p-7f), broadcast(0x1.5bba14p-10f), f);
    p = multiply_add(broadcast(0x1.c6b752p-5f), p, f);
    p = multiply_add(broadcast(0x1.ebf9bcp-3f), p, f);
    p = multiply_add(broadcast(0x1.62e42ap-1f), p, f);
  } else {
    p = multiply_add(broadcast(0x1.c9fc46p-5f), broadcast(0x1.3a02ccp-7f), f);
    p = multiply_add(broadcast(0x1.ec0378p-3f), p, f);
    p = multiply_add(broadcast(0x1.62e12cp-1f), p, f);
  }
  return multiply_add(broadcast(1.0f), p, f);
}
