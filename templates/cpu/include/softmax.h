// Online softmax over a tile of scores: a row a key, a lane a query, so that nothing is reduced across lanes.
#pragma once

#include <cmath>

#include "cpu/include/vector.h"

constexpr float kLog2E = 1.4426950408889634f;

// Scores of keys behind a query's last visible one become -inf.
template <int kVectors>
static inline void mask_behind(Vec* scores, int first_key, int keys, const IntVec* last_visible) {
  for (int key = 0; key < keys; ++key) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      Vec& score = scores[key * kVectors + j];
      score = select(last_visible[j] >= first_key + key, score, broadcast(-INFINITY));
    }
  }
}

// Replaces scores by weights 2^(scale_log2 * (score - peak)) and brings each query's peak score and total weight up to
// date. factor is by how much what was summed before shrinks.
template <int kVectors, int kDegree>
static inline void softmax_step(Vec* scores, int keys, float scale_log2, Vec* peak, Vec* total, Vec* factor) {
  Vec origin[kVectors], sum[kVectors];
#pragma GCC unroll 8
  for (int j = 0; j < kVectors; ++j) {
    Vec highest = peak[j], other = peak[j];
    int key = 0;
    for (; key + 4 <= keys; key += 4) {
      const Vec* at = scores + key * kVectors + j;
      highest = maximum(highest, maximum(at[0], at[kVectors]));
      other = maximum(other, maximum(at[2 * kVectors], at[3 * kVectors]));
    }
    for (; key < keys; ++key) highest = maximum(highest, scores[key * kVectors + j]);
    highest = maximum(highest, other);
    // A query that has seen no key yet gets weights of about 0, not NaN.
    origin[j] = select(highest == -INFINITY, Vec{}, highest) * scale_log2;
    factor[j] = exp2_negative<kDegree>(peak[j] * scale_log2 - origin[j]);
    peak[j] = highest;
    sum[j] = total[j] * factor[j];
  }
  for (int key = 0; key < keys; ++key) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      Vec& score = scores[key * kVectors + j];
      score = exp2_negative<kDegree>(score * scale_log2 - origin[j]);
      sum[j] += score;
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < kVectors; ++j) total[j] = sum[j];
}

// The weight 2^(scale_log2 * score - lse); 0 where kMasked and the key is behind the query's last visible one.
template <int kDegree, bool kMasked>
static inline Vec weight_again(Vec score, float scale_log2, Vec lse, const IntVec* last_visible, int key) {
  Vec exponent = score * scale_log2 - lse;
  if constexpr (kMasked) exponent = select(*last_visible >= key, exponent, broadcast(-INFINITY));
  return exp2_negative<kDegree>(exponent);
}

// From scores and the gradients of the weights, weights 2^(scale_log2 * score - lse) and the gradients of the scaled scores,
// weight * (gradient - delta), both handed to put(index, weight, gradient) for every vector of the tile. Where kMasked,
// keys behind a query's last visible one weigh 0.
template <int kVectors, int kDegree, bool kMasked, typename Put>
static inline void softmax_gradient(const Vec* scores, const Vec* gradients, int first_key, int keys, float scale_log2,
                                    const Vec* lse, const Vec* delta, const IntVec* last_visible, Put put) {
  for (int key = 0; key < keys; ++key) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      const int at = key * kVectors + j;
      const Vec weight =
          weight_again<kDegree, kMasked>(scores[at], scale_log2, lse[j], last_visible + j, first_key + key);
      put(at, weight, weight * (gradients[at] - delta[j]));
    }
  }
}
