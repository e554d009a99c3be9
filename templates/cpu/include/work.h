// The work of a batch, from its offsets: blocks of query rows, or all those of a sequence, longest first.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/params.h"

// Some query rows of one sequence for each kv head. Row r is token r / gqa_ratio, head r % gqa_ratio of the kv head's.
struct WorkItem {
  int64_t q_begin, k_begin;  // first tokens of the sequence
  int64_t first_row;
  int rows;
  int keys;                  // that its last row sees
  int64_t diagonal;          // causal: token t sees the keys up to t + diagonal
  double cost;
};

static inline int64_t offset_at(const void* offsets, bool wide, int index) {
  return wide ? static_cast<const int64_t*>(offsets)[index] : static_cast<const int32_t*>(offsets)[index];
}

template <typename T>
static inline T* at(T* base, const Strides& strides, int64_t token, int64_t head) {
  return base + token * strides.token + head * strides.head;
}

// Calls visit(lane, token, head) for the rows of one vector of an item, with tokens of the sequence, heads of the group.
template <int kRows, typename Visit>
static inline void for_each_row(const Params& p, const WorkItem& item, int vector, Visit visit) {
  const int64_t first = item.first_row + vector * kRows;
  const int rows = std::min(kRows, item.rows - vector * kRows);
  int64_t token = first / p.gqa_ratio;
  int head = int(first % p.gqa_ratio);
  for (int lane = 0; lane < rows; ++lane) {
    visit(lane, token, head);
    if (++head == p.gqa_ratio) {
      head = 0;
      ++token;
    }
  }
}

// Splits a sequence's rows into equal blocks of at most kBlockRows, whole tiles of kTileRows but for the last.
template <int kBlockRows, int kTileRows, bool kCausal>
static inline void append_sequence(std::vector<WorkItem>& items, const Params& p, int64_t q_begin, int64_t len_q,
                                   int64_t k_begin, int64_t len_k) {
  const int64_t rows = len_q * p.gqa_ratio;
  const int64_t blocks = (rows + kBlockRows - 1) / kBlockRows;
  const int64_t diagonal = p.bottom_right ? len_k - len_q : 0;
  for (int64_t block = 0, first = 0; first < rows; ++block) {
    const int64_t share = (rows - first + blocks - block - 1) / (blocks - block);
    const int64_t count = std::min(rows - first, (share + kTileRows - 1) / kTileRows * kTileRows);
    const auto seen_by = [&](int64_t row) {
      return kCausal ? std::clamp<int64_t>(row / p.gqa_ratio + diagonal + 1, 0, len_k) : len_k;
    };
    const int64_t most = seen_by(first + count - 1);
    const double cost = double(count + kTileRows) * double(seen_by(first) + most + 2);
    items.push_back({q_begin, k_begin, first, int(count), int(most), diagonal, cost});
    first += count;
  }
}

// Calls visit(q_begin, len_q, k_begin, len_k) for every sequence, and for the tokens of none, which have no partners.
// False where the offsets fall, or leave the tensors.
template <typename Visit>
static inline bool for_each_sequence(const Params& p, Visit visit) {
  const bool wide_q = p.wide_offsets & 1, wide_k = p.wide_offsets & 2;
  int64_t q_begin = offset_at(p.cu_seqlens_q, wide_q, 0), k_begin = offset_at(p.cu_seqlens_k, wide_k, 0);
  if (q_begin < 0 || k_begin < 0) return false;
  visit(0, std::min(q_begin, p.total_q), 0, 0);
  visit(0, 0, 0, std::min(k_begin, p.total_k));
  for (int sequence = 0; sequence < p.batch; ++sequence) {
    const int64_t q_end = offset_at(p.cu_seqlens_q, wide_q, sequence + 1);
    const int64_t k_end = offset_at(p.cu_seqlens_k, wide_k, sequence + 1);
    if (q_end < q_begin || k_end < k_begin) return false;
    if (q_end > p.total_q || k_end > p.total_k) return false;
    visit(q_begin, q_end - q_begin, k_begin, k_end - k_begin);
    q_begin = q_end;
    k_begin = k_end;
  }
  visit(q_begin, p.total_q - q_begin, 0, 0);
  visit(0, 0, k_begin, p.total_k - k_begin);
  return true;
}

template <typename Item>
static inline void sort_by_cost(std::vector<Item>& items) {
  std::stable_sort(items.begin(), items.end(), [](const Item& a, const Item& b) { return a.cost > b.cost; });
}

// The forward's work. False as for_each_sequence.
template <int kBlockRows, int kTileRows, bool kCausal>
static inline bool list_work(std::vector<WorkItem>& items, const Params& p) {
  const auto append = [&](int64_t q_begin, int64_t len_q, int64_t k_begin, int64_t len_k) {
    append_sequence<kBlockRows, kTileRows, kCausal>(items, p, q_begin, len_q, k_begin, len_k);
  };
  if (!for_each_sequence(p, append)) return false;
  sort_by_cost(items);
  return true;
}

// All query rows of one sequence for each kv head, as blocks: items[first] to items[last - 1].
struct WorkGroup {
  size_t first, last;
  int64_t k_begin, keys;  // of the sequence
  double cost;
};

// The backward's work. False as for_each_sequence.
template <int kBlockRows, int kTileRows, bool kCausal>
static inline bool list_groups(std::vector<WorkGroup>& groups, std::vector<WorkItem>& items, const Params& p) {
  const auto append = [&](int64_t q_begin, int64_t len_q, int64_t k_begin, int64_t len_k) {
    WorkGroup group = {items.size(), 0, k_begin, len_k, double(len_k)};
    append_sequence<kBlockRows, kTileRows, kCausal>(items, p, q_begin, len_q, k_begin, len_k);
    group.last = items.size();
    for (size_t i = group.first; i < group.last; ++i) group.cost += items[i].cost;
    if (len_q || len_k) groups.push_back(group);
  };
  if (!for_each_sequence(p, append)) return false;
  sort_by_cost(groups);
  return true;
}
