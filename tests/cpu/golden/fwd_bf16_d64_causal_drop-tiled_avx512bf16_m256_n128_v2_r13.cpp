// jagtile_fwd_bf16_d64_causal_drop_tiled_avx512bf16_m256_n128_v2_r13
//
// Forward attention over a jagged batch, one kernel for one case:
//   target      cpu
//   dtype       bf16
//   head_dim    64 (queries and keys), 64 (values)
//   mask        causal, top-left or bottom-right at run time
//   dropout     of the weights; rate and random numbers at run time
// Template: templates/cpu/forward.cpp.j2, algorithm tiled, with
//   isa                 avx512bf16
//   block_m             256
//   block_n             128
//   vectors             2
//   rows                13
// Generated; edit the template, not this text. To see it again:
//   jagtile generate cpu/fwd_bf16_d64_causal_drop/tiled_avx512bf16_m256_n128_v2_r13
//
// A work item is up to 256 query rows of one sequence for one kv head (rows of all heads that share it, interleaved).
// Scores are kept transposed, a row a key and a lane a query: nothing is reduced across lanes, a key needs no padding
// or mask at a sequence's end, and K and V enter the products as broadcast scalars, so that neither is transposed.
//   for each 128 keys:             copy K and V into scratch, V as pairs of keys
//     for each 32 query rows:      S = K Q^T, weights = online softmax, some dropped, O^T = factor O^T + V^T weights
//
// Scratch a thread      bytes
//   Q^T                 32768
//   O^T                 66560   fp32
//   K                   16640
//   V                   16640
//   scores              16640   fp32, then weights
#include "cpu/include/avx512bf16.h"

#include <algorithm>
#include <new>

#include "cpu/include/dropout.h"
#include "cpu/include/gemm.h"
#include "cpu/include/operand.h"
#include "cpu/include/softmax.h"
#include "cpu/include/work.h"

namespace {

using Element = Bf16;
using Scalar = uint32_t;  // two bf16 numbers: neighbours in a row of Q or K, keys 2n and 2n + 1 of V
using Operand = WordVec;

constexpr int kHeadDim = 64;
constexpr int kHeadDimV = 64;
constexpr int kBlockRows = 256;
constexpr int kBlockVectors = 16;
constexpr int kBlockKeys = 128;
constexpr int kVectors = 2;  // of 16 query rows in a tile
constexpr int kTileRows = 32;
constexpr int kDepth = 32;  // scalars in a row of Q or K
constexpr int kPitchK = 32;  // scalars from row to row of the K scratch
constexpr int kPitchV = 65;
constexpr int kKeysAtOnce = 13;  // rows of S in registers
constexpr int kScoreRows = 130;  // 10 times 13 cover 128
constexpr int kColumnsAtOnce = 13;  // rows of O^T in registers
constexpr int kOutRows = 65;  // 5 times 13 cover 64
constexpr int kDegree = 4;  // of the polynomial in exp2

struct alignas(64) Scratch {
  Operand q[kBlockVectors * kDepth];  // tile by tile: [kDepth][kVectors]
  Vec out[kBlockVectors * kOutRows];  // tile by tile: [kOutRows][kVectors]
  Vec scores[kScoreRows * kVectors];
  Vec peak[kBlockVectors], total[kBlockVectors];
  IntVec last_visible[kBlockVectors];  // the last key of the sequence that a row sees, -1 for none
  QueryCounters counters[kBlockVectors];
  Scalar k[kScoreRows * kPitchK];
  Scalar v[kBlockKeys / 2 * kPitchV];
  Element nothing[kHeadDim];   // zeros: what lanes behind an item's last row read
  Element nowhere[kHeadDimV];  // where they write
};
thread_local Scratch scratch;

// Lanes behind the item's last row see what it sees.
void set_last_visible(const Params& p, const WorkItem& item, int vector) {
  int last = -1;
  int visible[kLanes];
  for_each_row<kLanes>(p, item, vector, [&](int lane, int64_t token, int) {
    visible[lane] = last = int(std::max<int64_t>(token + item.diagonal, -1));
  });
  std::fill(visible + std::min(kLanes, item.rows - vector * kLanes), visible + kLanes, last);
  scratch.last_visible[vector] = load<IntVec>(visible);
}

// Q of one vector of rows, transposed, its sign the scale's.
void load_queries(const Params& p, const WorkItem& item, int kv_head, int vector, int tile_vectors) {
  const Element* from[kLanes];
  for (auto& row : from) row = scratch.nothing;
  for_each_row<kLanes>(p, item, vector, [&](int lane, int64_t token, int head) {
    from[lane] = at(static_cast<const Element*>(p.q), p.q_strides, item.q_begin + token, kv_head * p.gqa_ratio + head);
  });
  Operand* to = scratch.q + vector / kVectors * kVectors * kDepth + vector % kVectors;
  load_transposed<kHeadDim>(to, tile_vectors, from, p.scale < 0 ? 0x80008000 : 0);
}

// Weights to bf16, keys 2n and 2n + 1 as pairs, in place.
template <int kTileVectors>
inline Operand* pack_weights(Vec* weights, int keys) {
  Operand* packed = reinterpret_cast<Operand*>(weights);
  if (keys % 2) std::fill_n(weights + keys * kTileVectors, kTileVectors, Vec{});
  for (int key = 0; key < keys; key += 2) {
    for (int j = 0; j < kTileVectors; ++j) {
      const Vec* at = weights + key * kTileVectors + j;
      packed[key / 2 * kTileVectors + j] = pack_pairs(at[0], at[kTileVectors]);
    }
  }
  return packed;
}

// One block of keys, in scratch, for one tile of kTileVectors * kLanes rows.
template <int kTileVectors>
void attend(int vector, int first_key, int keys, float scale_log2, const Params& p, int64_t k_begin) {
  const IntVec* last_visible = scratch.last_visible + vector;
  keys = std::min(keys, last_visible[kTileVectors - 1][kLanes - 1] + 1 - first_key);
  if (keys <= 0) return;
  Vec* scores = scratch.scores;
  for (int key = 0; key < keys; key += kKeysAtOnce) {
    multiply<kKeysAtOnce, kTileVectors, kPitchK, 1>(scores + key * kTileVectors, nullptr, scratch.k + key * kPitchK,
                                                    scratch.q + vector * kDepth, kDepth);
  }
  if (last_visible[0][0] < first_key + keys - 1) mask_behind<kTileVectors>(scores, first_key, keys, last_visible);
  Vec factor[kTileVectors];
  softmax_step<kTileVectors, kDegree>(scores, keys, scale_log2, scratch.peak + vector, scratch.total + vector, factor);
  drop_weights<kTileVectors>(scores, p, scratch.counters + vector, k_begin + first_key, keys);
  const Operand* weights = pack_weights<kTileVectors>(scores, keys);
  for (int column = 0; column < kHeadDimV; column += kColumnsAtOnce) {
    multiply<kColumnsAtOnce, kTileVectors, 1, kPitchV>(scratch.out + vector * kOutRows + column * kTileVectors,
                                                       first_key ? factor : nullptr, scratch.v + column, weights,
                                                       (keys + 1) / 2);
  }
}

// O and lse of one vector of rows. A row that saw no key gets 0 and -inf.
void store_rows(const Params& p, const WorkItem& item, int kv_head, int vector, int tile_vectors) {
  const Vec peak = scratch.peak[vector], total = scratch.total[vector];
  const IntVec blind = (peak == -INFINITY) & (total == total);  // NaN is no answer of 0
  const Vec inverse = kept_scale(p) / total;
  Element* to[kLanes];
  for (auto& row : to) row = scratch.nowhere;
  for_each_row<kLanes>(p, item, vector, [&](int lane, int64_t token, int head) {
    token += item.q_begin;
    head += kv_head * p.gqa_ratio;
    to[lane] = at(static_cast<Element*>(p.out), p.out_strides, token, head);
    if (p.lse) {
      *at(p.lse, p.lse_strides, token, head) =
          blind[lane] ? -INFINITY : peak[lane] * std::fabs(p.scale) + std::log(total[lane]);
    }
  });
  const Vec* out = scratch.out + vector / kVectors * kVectors * kOutRows + vector % kVectors;
  store_transposed<kHeadDimV>(to, [&](int i) { return select(blind, Vec{}, out[i * tile_vectors] * inverse); });
}

void process(const Params& p, const WorkItem& item, int kv_head) {
  const float scale_log2 = std::max(std::fabs(p.scale), 1e-30f) * kLog2E;
  const int vectors = (item.rows + kLanes - 1) / kLanes;
  const auto tile_vectors = [&](int vector) { return std::min(kVectors, vectors - vector / kVectors * kVectors); };
  for (int vector = 0; vector < vectors; ++vector) {
    load_queries(p, item, kv_head, vector, tile_vectors(vector));
    scratch.peak[vector] = broadcast(-INFINITY);
    scratch.total[vector] = Vec{};
    set_last_visible(p, item, vector);
    scratch.counters[vector] = count_queries(p, item, kv_head, vector);
  }
  const Element* k = at(static_cast<const Element*>(p.k), p.k_strides, item.k_begin, kv_head);
  const Element* v = at(static_cast<const Element*>(p.v), p.v_strides, item.k_begin, kv_head);
  for (int key = 0; key < item.keys; key += kBlockKeys) {
    const int keys = std::min(kBlockKeys, item.keys - key);
    load_rows<kHeadDim, kPitchK, Operand>(scratch.k, k + key * p.k_strides.token, p.k_strides.token, keys);
    load_row_pairs<kHeadDimV, kPitchV>(scratch.v, v + key * p.v_strides.token, p.v_strides.token, keys);
    for (int vector = 0; vector < vectors; vector += kVectors) {
      switch (tile_vectors(vector)) {
        case 1: attend<1>(vector, key, keys, scale_log2, p, item.k_begin); break;
        case 2: attend<2>(vector, key, keys, scale_log2, p, item.k_begin); break;
      }
    }
  }
  for (int vector = 0; vector < vectors; ++vector) store_rows(p, item, kv_head, vector, tile_vectors(vector));
}

}  // namespace

extern "C" __attribute__((visibility("default")))
int32_t jagtile_fwd_bf16_d64_causal_drop_tiled_avx512bf16_m256_n128_v2_r13(const Params* params) {
  const Params& p = *params;
  try {
    std::vector<WorkItem> items;
    if (!list_work<kBlockRows, kTileRows, true>(items, p)) return kBadOffsets;
    const int64_t count = int64_t(items.size()) * p.heads_kv;
    const int threads = int(std::clamp<int64_t>(count, 1, p.threads));
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t i = 0; i < count; ++i) process(p, items[i / p.heads_kv], int(i % p.heads_kv));
    return kDone;
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
}
