// Dropout of a tile of weights: which are kept follows from where they are, so that nothing is stored and every kernel
// keeps the same ones.
//   key      the seed
//   counter  query row, key row / 8, head, offset; rows of the packed tensors
//   bits     word i decides for the keys 8 n + 2 i (its lower half) and 8 n + 2 i + 1 (its upper half): a weight is kept
//            where the half is below ``kept``
#pragma once

#include "cpu/include/philox.h"
#include "cpu/include/softmax.h"
#include "cpu/include/work.h"

constexpr int kKeysACounter = 8;

// By what the kept weights are multiplied, so that their expectation is the weight.
static inline float kept_scale(const Params& p) { return p.kept ? 65536.0f / float(p.kept) : 0.0f; }

// Of each lane's query row the part of the counter that does not depend on the key.
struct QueryCounters {
  WordVec row, head;
};

// Lanes behind the item's last row get some row's numbers.
static inline QueryCounters count_queries(const Params& p, const WorkItem& item, int kv_head, int vector) {
  QueryCounters counters = {};
  for_each_row<kLanes>(p, item, vector, [&](int lane, int64_t token, int head) {
    counters.row[lane] = uint32_t(item.q_begin + token);
    counters.head[lane] = uint32_t(kv_head * p.gqa_ratio + head);
  });
  return counters;
}

// The four words of bits for a vector of queries and eight keys.
static inline void random_words(WordVec (&bits)[4], const Params& p, const QueryCounters& queries, uint32_t eight_keys) {
  LongVec even[4] = {(LongVec)queries.row, eight_keys + LongVec{}, (LongVec)queries.head, p.offset + LongVec{}};
  LongVec odd[4] = {even[0] >> 32, even[1], even[2] >> 32, even[3]};
  philox(even, p.seed);
  philox(odd, p.seed);
  for (int i = 0; i < 4; ++i) bits[i] = (WordVec)((even[i] & 0xffffffff) | odd[i] << 32);
}

// Calls visit(key, j, kept) for every key of a tile, the first of which is row first_row of K, and every vector j of its
// queries, in the order in which a tile is stored; kept is a mask over lanes.
template <int kVectors, typename Visit>
static inline void for_each_decision(const Params& p, const QueryCounters* queries, int64_t first_row, int keys,
                                     Visit visit) {
  const int32_t kept = int32_t(p.kept);
  for (int first = -int(first_row % kKeysACounter); first < keys; first += kKeysACounter) {
    WordVec bits[kVectors][4];
    for (int j = 0; j < kVectors; ++j) {
      random_words(bits[j], p, queries[j], uint32_t((first_row + first) / kKeysACounter));
    }
    for (int key = std::max(first, 0); key < std::min(first + kKeysACounter, keys); ++key) {
      const int word = (key - first) / 2, shift = (key - first) % 2 * 16;
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) visit(key, j, (IntVec)(bits[j][word] >> shift & 0xffff) < kept);
    }
  }
}

// Weights that are not kept become 0.
template <int kVectors>
static inline void drop_weights(Vec* weights, const Params& p, const QueryCounters* queries, int64_t first_row, int keys) {
  for_each_decision<kVectors>(p, queries, first_row, keys, [&](int key, int j, IntVec kept) {
    Vec& weight = weights[key * kVectors + j];
    weight = select(kept, weight, Vec{});
  });
}

// As softmax_gradient, where the forward dropped weights: put gets the weights that were kept, not multiplied yet.
template <int kVectors, int kDegree, bool kMasked, typename Put>
static inline void dropped_gradient(const Vec* scores, const Vec* gradients, int first_key, int keys, float scale_log2,
                                    const Vec* lse, const Vec* delta, const IntVec* last_visible, Put put,
                                    const Params& p, const QueryCounters* queries, int64_t first_row) {
  const Vec scale = broadcast(kept_scale(p));
  for_each_decision<kVectors>(p, queries, first_row, keys, [&](int key, int j, IntVec kept) {
    const int at = key * kVectors + j;
    const Vec weight = weight_again<kDegree, kMasked>(scores[at], scale_log2, lse[j], last_visible + j, first_key + key);
    const Vec gradient = select(kept, gradients[at] * scale, Vec{});
    put(at, select(kept, weight, Vec{}), weight * (gradient - delta[j]));
  });
}
