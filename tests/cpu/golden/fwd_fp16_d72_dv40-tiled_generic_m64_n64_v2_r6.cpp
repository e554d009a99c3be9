// jagtile_fwd_fp16_d72_dv40_tiled_generic_m64_n64_v2_r6
//
// Forward attention over a jagged batch, one kernel for one case:
//   target      cpu
//   dtype       fp16
//   head_dim    72 (queries and keys), 40 (values)
//   mask        none
// Template: templates/cpu/forward.cpp.j2, algorithm tiled, with
//   isa                 generic
//   block_m             64
//   block_n             64
//   vectors             2
//   rows                6
// Generated; edit the template, not this text. To see it again:
//   jagtile generate cpu/fwd_fp16_d72_dv40/tiled_generic_m64_n64_v2_r6
//
// A work item is up to 64 query rows of one sequence for one kv head (rows of all heads that share it, interleaved).
// Scores are kept transposed, a row a key and a lane a query: nothing is reduced across lanes, a key needs no padding
// or mask at a sequence's end, and K and V enter the products as broadcast scalars, so that neither is transposed.
//   for each 64 keys:              copy K and V into scratch as fp32
//     for each 8 query rows:       S = K Q^T, weights = online softmax, O^T = factor O^T + V^T weights
//
// Scratch a thread      bytes
//   Q^T                 18432
//   O^T                 10752   fp32
//   K                   19008
//   V                   10752
//   scores               2112   fp32, then weights
#include "cpu/include/generic.h"

#include <algorithm>
#include <new>

#include "cpu/include/gemm.h"
#include "cpu/include/operand.h"
#include "cpu/include/softmax.h"
#include "cpu/include/work.h"

namespace {

using Element = Fp16;
using Scalar = float;
using Operand = Vec;

constexpr int kHeadDim = 72;
constexpr int kHeadDimV = 40;
constexpr int kBlockRows = 64;
constexpr int kBlockVectors = 16;
constexpr int kBlockKeys = 64;
constexpr int kVectors = 2;  // of 4 query rows in a tile
constexpr int kTileRows = 8;
constexpr int kDepth = 72;  // scalars in a row of Q or K
constexpr int kPitchK = 72;  // scalars from row to row of the K scratch
constexpr int kPitchV = 42;
constexpr int kKeysAtOnce = 6;  // rows of S in registers
constexpr int kScoreRows = 66;  // 11 times 6 cover 64
constexpr int kColumnsAtOnce = 6;  // rows of O^T in registers
constexpr int kOutRows = 42;  // 7 times 6 cover 40
constexpr int kDegree = 4;  // of the polynomial in exp2

struct alignas(64) Scratch {
  Operand q[kBlockVectors * kDepth];  // tile by tile: [kDepth][kVectors]
  Vec out[kBlockVectors * kOutRows];  // tile by tile: [kOutRows][kVectors]
  Vec scores[kScoreRows * kVectors];
  Vec peak[kBlockVectors], total[kBlockVectors];
  Scalar k[kScoreRows * kPitchK];
  Scalar v[kBlockKeys * kPitchV];
  Element nothing[kHeadDim];   // zeros: what lanes behind an item's last row read
  Element nowhere[kHeadDimV];  // where they write
};
thread_local Scratch scratch;

// Q of one vector of rows, transposed, its sign the scale's.
void load_queries(const Params& p, const WorkItem& item, int kv_head, int vector, int tile_vectors) {
  const Element* from[kLanes];
  for (auto& row : from) row = scratch.nothing;
  for_each_row<kLanes>(p, item, vector, [&](int lane, int64_t token, int head) {
    from[lane] = at(static_cast<const Element*>(p.q), p.q_strides, item.q_begin + token, kv_head * p.gqa_ratio + head);
  });
  Operand* to = scratch.q + vector / kVectors * kVectors * kDepth + vector % kVectors;
  load_transposed<kHeadDim>(to, tile_vectors, from, p.scale < 0 ? 0x80000000 : 0);
}

// One block of keys, in scratch, for one tile of kTileVectors * kLanes rows.
template <int kTileVectors>
void attend(int vector, int first_key, int keys, float scale_log2) {
  Vec* scores = scratch.scores;
  for (int key = 0; key < keys; key += kKeysAtOnce) {
    multiply<kKeysAtOnce, kTileVectors, kPitchK, 1>(scores + key * kTileVectors, nullptr, scratch.k + key * kPitchK,
                                                    scratch.q + vector * kDepth, kDepth);
  }
  Vec factor[kTileVectors];
  softmax_step<kTileVectors, kDegree>(scores, keys, scale_log2, scratch.peak + vector, scratch.total + vector, factor);
  const Operand* weights = scores;
  for (int column = 0; column < kHeadDimV; column += kColumnsAtOnce) {
    multiply<kColumnsAtOnce, kTileVectors, 1, kPitchV>(scratch.out + vector * kOutRows + column * kTileVectors,
                                                       first_key ? factor : nullptr, scratch.v + column, weights,
                                                       keys);
  }
}

// O and lse of one vector of rows. A row that saw no key gets 0 and -inf.
void store_rows(const Params& p, const WorkItem& item, int kv_head, int vector, int tile_vectors) {
  const Vec peak = scratch.peak[vector], total = scratch.total[vector];
  const IntVec blind = (peak == -INFINITY) & (total == total);  // NaN is no answer of 0
  const Vec inverse = 1.0f / total;
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
  }
  const Element* k = at(static_cast<const Element*>(p.k), p.k_strides, item.k_begin, kv_head);
  const Element* v = at(static_cast<const Element*>(p.v), p.v_strides, item.k_begin, kv_head);
  for (int key = 0; key < item.keys; key += kBlockKeys) {
    const int keys = std::min(kBlockKeys, item.keys - key);
    load_rows<kHeadDim, kPitchK, Operand>(scratch.k, k + key * p.k_strides.token, p.k_strides.token, keys);
    load_rows<kHeadDimV, kPitchV, Operand>(scratch.v, v + key * p.v_strides.token, p.v_strides.token, keys);
    for (int vector = 0; vector < vectors; vector += kVectors) {
      switch (tile_vectors(vector)) {
        case 1: attend<1>(vector, key, keys, scale_log2); break;
        case 2: attend<2>(vector, key, keys, scale_log2); break;
      }
    }
  }
  for (int vector = 0; vector < vectors; ++vector) store_rows(p, item, kv_head, vector, tile_vectors(vector));
}

}  // namespace

extern "C" __attribute__((visibility("default")))
int32_t jagtile_fwd_fp16_d72_dv40_tiled_generic_m64_n64_v2_r6(const Params* params) {
  const Params& p = *params;
  try {
    std::vector<WorkItem> items;
    if (!list_work<kBlockRows, kTileRows, false>(items, p)) return kBadOffsets;
    const int64_t count = int64_t(items.size()) * p.heads_kv;
    const int threads = int(std::clamp<int64_t>(count, 1, p.threads));
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t i = 0; i < count; ++i) process(p, items[i / p.heads_kv], int(i % p.heads_kv));
    return kDone;
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
}
