// jagtile_bwd_fp32_d72_dv40_drop_recompute_generic_m64_n48_v2_r6
//
// Backward of attention over a jagged batch, one kernel for one case:
//   target      cpu
//   dtype       fp32
//   head_dim    72 (queries and keys), 40 (values)
//   mask        none
//   dropout     of the weights; rate and random numbers at run time
// Template: templates/cpu/backward.cpp.j2, algorithm recompute, with
//   isa                 generic
//   block_m             64
//   block_n             48
//   vectors             2
//   rows                6
// Generated; edit the template, not this text. To see it again:
//   jagtile generate cpu/bwd_fp32_d72_dv40_drop/recompute_generic_m64_n48_v2_r6
//
// A work item is one sequence for one kv head, in blocks of up to 64 query rows (rows of all heads that share it,
// interleaved), so that nobody else adds to its gradients: they are deterministic. The weights P are computed again from the
// scores and the lse (FlashAttention-2, Dao 2023). Scores are kept transposed, a row a key and a lane a query.
//   for each 64 query rows:        Q and dO, as they are and transposed; delta = rowsum(dO O) - dlse
//     for each 48 keys:            copy K and V into scratch
//       for each 8 query rows:     S = K Q^T, dP = V dO^T, P = exp(S - lse), dS = P (dP - delta),
//                                   what the forward dropped of P and of dP is 0,
//                                   dQ^T += K^T dS, dV += P dO, dK += dS Q
//
// Scratch a thread      bytes
//   Q, dO               57344   twice: rows along lanes, columns along lanes
//   dQ^T                18432   fp32
//   K, V                21504
//   scores               3072   S and dP, then P and dS
// and dK, dV in fp32 for all keys of a sequence.
#include "cpu/include/generic.h"

#include <algorithm>
#include <atomic>
#include <new>
#include <vector>

#include "cpu/include/dropout.h"
#include "cpu/include/gemm.h"
#include "cpu/include/operand.h"
#include "cpu/include/softmax.h"
#include "cpu/include/work.h"

namespace {

using Element = Fp32;
using Scalar = float;
using Operand = Vec;

constexpr int kPack = 1;  // elements in a scalar
constexpr int kHeadDim = 72;
constexpr int kHeadDimV = 40;
constexpr int kBlockRows = 64;
constexpr int kBlockVectors = 16;
constexpr int kBlockKeys = 48;
constexpr int kVectors = 2;  // of 4 query rows in a tile
constexpr int kTileRows = 8;
constexpr int kDepth = 72;  // scalars in a row of Q or K
constexpr int kDepthV = 40;
constexpr int kPitchK = 72;  // scalars from row to row of the K scratch
constexpr int kPitchV = 40;
constexpr int kKeysAtOnce = 6;  // rows of S, dK or dV in registers
constexpr int kScoreRows = 48;  // 8 times 6 cover 48
constexpr int kColumnsAtOnce = 6;  // rows of dQ^T in registers
constexpr int kQueryRows = 72;  // 12 times 6 cover 72
constexpr int kGroups = 9;  // of columns of dK
constexpr int kGroupVectors = 2;
constexpr int kGroupsV = 5;  // of columns of dV
constexpr int kGroupVectorsV = 2;
constexpr int kDegree = 5;  // of the polynomial in exp2

struct alignas(64) Scratch {
  Operand q_lanes[kBlockVectors * kDepth];  // a lane a row; tile by tile: [kDepth][kVectors]
  Operand dout_lanes[kBlockVectors * kDepthV];
  Operand q[kGroups * kBlockRows / kPack * kGroupVectors];  // a lane a column: [group][row][kGroupVectors]
  Operand dout[kGroupsV * kBlockRows / kPack * kGroupVectorsV];
  Vec dq[kBlockVectors * kQueryRows];  // tile by tile: [kQueryRows][kVectors]
  Vec lse[kBlockVectors], delta[kBlockVectors];  // lse of base 2
  QueryCounters counters[kBlockVectors];
  Vec scores[kScoreRows * kVectors];
  Vec gradients[kScoreRows * kVectors];  // of the weights, then of the scores
  Scalar k[kScoreRows * kPitchK];
  Scalar v[kScoreRows * kPitchV];
  Element nothing[std::max(kHeadDim, kHeadDimV)];  // zeros: what lanes without a row that sees a key read
  Element nowhere[kHeadDim];                       // where lanes behind an item's last row write
};
thread_local Scratch scratch;

// Gradients of one block of keys.
struct KeyGradients {
  Vec dk[kGroups * kScoreRows * kGroupVectors];  // [group][key][kGroupVectors]
  Vec dv[kGroupsV * kScoreRows * kGroupVectorsV];
};
thread_local std::vector<KeyGradients> key_gradients;

// One vector of rows. A row that sees no key counts for nothing, whatever it and its gradients hold.
void load_queries(const GradientParams& g, const WorkItem& item, int kv_head, int vector, int tile_vectors) {
  const Params& p = g.forward;
  const Element *q[kLanes], *dout[kLanes], *out[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) q[lane] = dout[lane] = out[lane] = scratch.nothing;
  Vec lse = broadcast(INFINITY), delta = {};
  for_each_row<kLanes>(p, item, vector, [&](int lane, int64_t token, int head) {
    token += item.q_begin;
    head += kv_head * p.gqa_ratio;
    const float row_lse = *at(p.lse, p.lse_strides, token, head);
    if (row_lse == -INFINITY) return;
    q[lane] = at(static_cast<const Element*>(p.q), p.q_strides, token, head);
    dout[lane] = at(static_cast<const Element*>(g.dout), g.dout_strides, token, head);
    out[lane] = at(static_cast<const Element*>(p.out), p.out_strides, token, head);
    lse[lane] = row_lse * kLog2E;
    if (g.dlse) delta[lane] = -*at(g.dlse, g.dlse_strides, token, head);
  });
  Vec products[kLanes] = {};
  for_each_chunk<kHeadDimV, kLanes>([&](int column, auto count) {
    for (int lane = 0; lane < kLanes; ++lane) {
      products[lane] += Element::read<count>(dout[lane] + column) * Element::read<count>(out[lane] + column);
    }
  });
  transpose(products);
  for (const Vec& part : products) delta += part;
  scratch.lse[vector] = lse;
  scratch.delta[vector] = delta;
  const int tile = vector / kVectors * kVectors, row = vector * kLanes / kPack;
  load_transposed<kHeadDim>(scratch.q_lanes + tile * kDepth + vector % kVectors, tile_vectors, q);
  load_transposed<kHeadDimV>(scratch.dout_lanes + tile * kDepthV + vector % kVectors, tile_vectors, dout);
  load_columns<kHeadDim, kGroupVectors>(scratch.q + row * kGroupVectors, kBlockRows / kPack * kGroupVectors, q);
  load_columns<kHeadDimV, kGroupVectorsV>(scratch.dout + row * kGroupVectorsV,
                                          kBlockRows / kPack * kGroupVectorsV, dout);
}

// One block of keys, in scratch, against one tile of kTileVectors * kLanes rows.
template <int kTileVectors>
void differentiate(int vector, int first_key, int keys, float scale_log2, KeyGradients& to,
                   const Params& p, int64_t k_begin) {
  constexpr int kDepthRows = kTileVectors * kLanes / kPack;
  Vec *scores = scratch.scores, *gradients = scratch.gradients;
  for (int key = 0; key < keys; key += kKeysAtOnce) {
    multiply<kKeysAtOnce, kTileVectors, kPitchK, 1>(scores + key * kTileVectors, nullptr, scratch.k + key * kPitchK,
                                                    scratch.q_lanes + vector * kDepth, kDepth);
    multiply<kKeysAtOnce, kTileVectors, kPitchV, 1>(gradients + key * kTileVectors, nullptr, scratch.v + key * kPitchV,
                                                    scratch.dout_lanes + vector * kDepthV, kDepthV);
  }

  const auto put = [&](int at, Vec weight, Vec gradient) {
    scores[at] = weight;
    gradients[at] = gradient;
  };
  const Vec *lse = scratch.lse + vector, *delta = scratch.delta + vector;
  const QueryCounters* counters = scratch.counters + vector;
  dropped_gradient<kTileVectors, kDegree, false>(scores, gradients, first_key, keys, scale_log2, lse, delta, nullptr,
                                                 put, p, counters, k_begin + first_key);
  const int padded = (keys + kKeysAtOnce - 1) / kKeysAtOnce * kKeysAtOnce;
  for (int at = keys * kTileVectors; at < std::max(padded, keys + keys % 2) * kTileVectors; ++at) put(at, Vec{}, Vec{});

  for (int column = 0; column < kHeadDim; column += kColumnsAtOnce) {
    multiply_onto<kColumnsAtOnce, kTileVectors, 1, kPitchK>(
        scratch.dq + vector * kQueryRows + column * kTileVectors, scratch.k + column,
        gradients, keys);
  }
  const Scalar *weight_rows = reinterpret_cast<Scalar*>(scores), *gradient_rows = reinterpret_cast<Scalar*>(gradients);
  const int row = vector * kLanes / kPack;
  for (int key = 0; key < keys; key += kKeysAtOnce) {
    for (int group = 0; group < kGroupsV; ++group) {
      multiply_onto<kKeysAtOnce, kGroupVectorsV, kDepthRows, 1>(
          to.dv + (group * kScoreRows + key) * kGroupVectorsV, weight_rows + key * kDepthRows,
          scratch.dout + (group * kBlockRows / kPack + row) * kGroupVectorsV, kDepthRows);
    }
    for (int group = 0; group < kGroups; ++group) {
      multiply_onto<kKeysAtOnce, kGroupVectors, kDepthRows, 1>(
          to.dk + (group * kScoreRows + key) * kGroupVectors, gradient_rows + key * kDepthRows,
          scratch.q + (group * kBlockRows / kPack + row) * kGroupVectors, kDepthRows);
    }
  }
}

// dQ of one vector of rows.
void store_queries(const GradientParams& g, const WorkItem& item, int kv_head, int vector, int tile_vectors) {
  const Params& p = g.forward;
  Element* to[kLanes];
  for (auto& row : to) row = scratch.nowhere;
  for_each_row<kLanes>(p, item, vector, [&](int lane, int64_t token, int head) {
    to[lane] = at(static_cast<Element*>(g.dq), g.dq_strides, item.q_begin + token, kv_head * p.gqa_ratio + head);
  });
  const Vec* dq = scratch.dq + vector / kVectors * kVectors * kQueryRows + vector % kVectors;
  store_transposed<kHeadDim>(to, [&](int i) { return dq[i * tile_vectors] * p.scale; });
}

// Some rows of dK or dV.
template <int kDim, int kColumnVectors>
void store_keys(Element* to, int64_t stride, const Vec* from, int keys, float factor) {
  for (int key = 0; key < keys; ++key) {
    for_each_chunk<kDim, kLanes>([&](int column, auto count) {
      const int vector = column / kLanes;
      const Vec* group = from + vector / kColumnVectors * kScoreRows * kColumnVectors;
      Element::write<count>(to + key * stride + column, group[key * kColumnVectors + vector % kColumnVectors] * factor);
    });
  }
}

void process_rows(const GradientParams& g, const WorkItem& item, int kv_head) {
  const Params& p = g.forward;
  const float scale_log2 = p.scale * kLog2E;
  const int vectors = (item.rows + kLanes - 1) / kLanes;
  const auto tile_vectors = [&](int vector) { return std::min(kVectors, vectors - vector / kVectors * kVectors); };
  std::fill_n(scratch.dq, vectors * kQueryRows, Vec{});
  for (int vector = 0; vector < vectors; ++vector) {
    load_queries(g, item, kv_head, vector, tile_vectors(vector));
    scratch.counters[vector] = count_queries(p, item, kv_head, vector);
  }
  const Element* k = at(static_cast<const Element*>(p.k), p.k_strides, item.k_begin, kv_head);
  const Element* v = at(static_cast<const Element*>(p.v), p.v_strides, item.k_begin, kv_head);
  for (int key = 0; key < item.keys; key += kBlockKeys) {
    const int keys = std::min(kBlockKeys, item.keys - key);
    load_rows<kHeadDim, kPitchK, Operand>(scratch.k, k + key * p.k_strides.token, p.k_strides.token, keys);
    load_rows<kHeadDimV, kPitchV, Operand>(scratch.v, v + key * p.v_strides.token, p.v_strides.token, keys);
    for (int vector = 0; vector < vectors; vector += kVectors) {
      switch (tile_vectors(vector)) {
        case 1: differentiate<1>(vector, key, keys, scale_log2, key_gradients[key / kBlockKeys], p, item.k_begin); break;
        case 2: differentiate<2>(vector, key, keys, scale_log2, key_gradients[key / kBlockKeys], p, item.k_begin); break;
      }
    }
  }
  for (int vector = 0; vector < vectors; ++vector) store_queries(g, item, kv_head, vector, tile_vectors(vector));
}

void process(const GradientParams& g, const WorkGroup& group, const WorkItem* items, int kv_head) {
  key_gradients.assign((group.keys + kBlockKeys - 1) / kBlockKeys, KeyGradients{});
  for (size_t i = group.first; i < group.last; ++i) process_rows(g, items[i], kv_head);
  Element* dk = at(static_cast<Element*>(g.dk), g.dk_strides, group.k_begin, kv_head);
  Element* dv = at(static_cast<Element*>(g.dv), g.dv_strides, group.k_begin, kv_head);
  for (int64_t key = 0; key < group.keys; key += kBlockKeys) {
    const int keys = int(std::min<int64_t>(kBlockKeys, group.keys - key));
    const KeyGradients& from = key_gradients[key / kBlockKeys];
    store_keys<kHeadDim, kGroupVectors>(dk + key * g.dk_strides.token, g.dk_strides.token, from.dk, keys, g.forward.scale);
    store_keys<kHeadDimV, kGroupVectorsV>(dv + key * g.dv_strides.token, g.dv_strides.token, from.dv, keys,
                                          kept_scale(g.forward));
  }
}

}  // namespace

extern "C" __attribute__((visibility("default")))
int32_t jagtile_bwd_fp32_d72_dv40_drop_recompute_generic_m64_n48_v2_r6(const GradientParams* params) {
  const GradientParams& g = *params;
  const Params& p = g.forward;
  std::atomic<int32_t> status{kDone};
  try {
    std::vector<WorkItem> items;
    std::vector<WorkGroup> groups;
    if (!list_groups<kBlockRows, kTileRows, false>(groups, items, p)) return kBadOffsets;
    const int64_t count = int64_t(groups.size()) * p.heads_kv;
    const int threads = int(std::clamp<int64_t>(count, 1, p.threads));
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t i = 0; i < count; ++i) {
      try {
        process(g, groups[i / p.heads_kv], items.data(), int(i % p.heads_kv));
      } catch (const std::bad_alloc&) {
        status = kNoMemory;
      }
    }
  } catch (const std::bad_alloc&) {
    status = kNoMemory;
  }
  return status;
}
