// What was learned of calls: for tensors that differ in nothing but values, the recipes of their launches.
#pragma once

#include <array>
#include <bit>
#include <memory>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <vector>

#include <ATen/Context.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/variable.h>

#include "recipe.h"
#include "work_lists.h"

namespace jagtile {

// Whether no mode, transform or tracer looks on.
inline bool is_eager() {
  const auto local = c10::impl::tls_local_dispatch_key_set();
  return (local.included_ - c10::default_included_set).empty() && !at::impl::torch_function_mode_enabled();
}

// Whether it is a dense tensor with nothing but data.
inline bool is_plain(const at::Tensor& x) {
  using enum c10::DispatchKey;
  constexpr c10::DispatchKeySet usual({CPU, CUDA, AutogradCPU, AutogradCUDA, AutocastCPU, AutocastCUDA, ADInplaceOrView});
  return x.defined() && (x.key_set() | usual) == usual;
}

inline bool has_tangent(const at::Tensor& x) {
  const auto* meta = torch::autograd::impl::get_autograd_meta(x);
  return meta && meta->fw_grad_ && !meta->fw_grad_->empty();
}

// A tensor (tokens, heads, dim), or the values (heads, tokens, dim) of a nested one, seen as that.
struct Packed {
  const at::Tensor& tensor;
  bool heads_first;

  int64_t size(int axis) const { return tensor.sizes()[stored(axis)]; }
  int64_t stride(int axis) const { return tensor.strides()[stored(axis)]; }
  at::Tensor view() const { return heads_first ? tensor.transpose(0, 1) : tensor; }
  bool is_contiguous() const {
    return stride(2) == 1 && stride(1) == size(2) && stride(0) == size(1) * size(2);
  }
  // One of its dtype and device, contiguous as (tokens, heads, dim).
  at::Tensor fresh(int64_t tokens, int64_t heads, int64_t dim) const {
    if (heads_first) return at::empty_strided({heads, tokens, dim}, {dim, heads * dim, 1}, tensor.options());
    return at::empty({tokens, heads, dim}, tensor.options());
  }

 private:
  int stored(int axis) const { return heads_first && axis < 2 ? 1 - axis : axis; }
};

struct Operands {
  Packed q, k, v;
  const at::Tensor &cu_seqlens_q, &cu_seqlens_k;

  bool are_plain() const {
    for (const at::Tensor* x : {&q.tensor, &k.tensor, &v.tensor, &cu_seqlens_q, &cu_seqlens_k})
      if (!is_plain(*x) || x->device() != q.tensor.device()) return false;
    return q.tensor.dim() == 3 && k.tensor.dim() == 3 && v.tensor.dim() == 3 && cu_seqlens_q.dim() == 1 &&
           cu_seqlens_k.dim() == 1 && q.tensor.device().type() == driver.device_type;
  }

  void write(Addresses& at) const {
    at[Q] = reinterpret_cast<uint64_t>(q.tensor.data_ptr());
    at[K] = reinterpret_cast<uint64_t>(k.tensor.data_ptr());
    at[V] = reinterpret_cast<uint64_t>(v.tensor.data_ptr());
    at[CU_SEQLENS_Q] = reinterpret_cast<uint64_t>(cu_seqlens_q.data_ptr());
    at[CU_SEQLENS_K] = reinterpret_cast<uint64_t>(cu_seqlens_k.data_ptr());
  }
};

struct Options {
  int64_t max_seqlen_q, max_seqlen_k;  // -1: not given
  bool is_causal, bottom_right, trained, return_lse;
  double scale;
};

// All that checks, routes and plans read of a call.
using Facts = std::array<int64_t, 28>;

inline Facts facts_of(const Operands& operands, const Options& options) {
  const auto& [q, k, v, cu_q, cu_k] = operands;
  const auto type = [](const at::Tensor& x) { return static_cast<int64_t>(x.scalar_type()); };
  const int64_t types = type(q.tensor) | type(k.tensor) << 8 | type(v.tensor) << 16 | type(cu_q) << 24 | type(cu_k) << 32;
  const int64_t flags = options.is_causal | options.bottom_right << 1 | options.trained << 2 | options.return_lse << 3;
  return {
      q.size(0), q.size(1), q.size(2), k.size(0), k.size(1), k.size(2), v.size(0), v.size(1), v.size(2),
      q.stride(0), q.stride(1), q.stride(2), k.stride(0), k.stride(1), k.stride(2), v.stride(0), v.stride(1), v.stride(2),
      cu_q.sizes()[0], cu_k.sizes()[0], cu_q.strides()[0], cu_k.strides()[0],
      types, flags | static_cast<int64_t>(q.tensor.device().index()) << 8,
      options.max_seqlen_q, options.max_seqlen_k, std::bit_cast<int64_t>(options.scale), 0,
  };
}

// One kind of call.
class Call {
 public:
  Call(const Facts& facts, const Options& options, Recipe forward) : facts(facts), options(options), forward(std::move(forward)) {}

  const Facts facts;
  const Options options;
  const Recipe forward;

  std::shared_ptr<const Recipe> backward(const Packed& dout) const {
    std::lock_guard lock(mutex_);
    for (const Backward& known : backwards_)
      if (known.is_of(dout)) return known.recipe;
    return nullptr;
  }

  void learn_backward(const Packed& dout, Recipe recipe) {
    std::lock_guard lock(mutex_);
    if (backwards_.size() >= MAX_BACKWARDS) backwards_.clear();
    backwards_.push_back({dout.stride(0), dout.stride(1), at::globalContext().deterministicAlgorithms(),
                          std::make_shared<const Recipe>(std::move(recipe))});
  }

 private:
  static constexpr size_t MAX_BACKWARDS = 16;
  struct Backward {
    int64_t token_stride, head_stride;
    bool deterministic;
    std::shared_ptr<const Recipe> recipe;

    bool is_of(const Packed& dout) const {
      return dout.stride(0) == token_stride && dout.stride(1) == head_stride &&
             at::globalContext().deterministicAlgorithms() == deterministic;
    }
  };

  mutable std::mutex mutex_;
  std::vector<Backward> backwards_;
};

class Calls {
 public:
  std::shared_ptr<Call> find(const Facts& facts) const {
    std::lock_guard lock(mutex_);
    const auto found = calls_.find(facts);
    return found == calls_.end() ? nullptr : found->second;
  }

  void learn(const Facts& facts, const Options& options, Recipe forward) {
    std::lock_guard lock(mutex_);
    if (calls_.size() >= MAX_CALLS) calls_.clear();
    calls_.insert_or_assign(facts, std::make_shared<Call>(facts, options, std::move(forward)));
  }

  void forget() {
    std::lock_guard lock(mutex_);
    calls_.clear();
  }

 private:
  static constexpr size_t MAX_CALLS = 2048;  // there is one, or two, for every batch
  struct Hash {
    size_t operator()(const Facts& facts) const {
      uint64_t hash = 0;
      for (int64_t fact : facts) hash = (std::rotl(hash, 5) ^ static_cast<uint64_t>(fact)) * 0x9E3779B97F4A7C15u;
      return hash ^ hash >> 32;
    }
  };

  mutable std::mutex mutex_;
  std::unordered_map<Facts, std::shared_ptr<Call>, Hash> calls_;
};
inline Calls calls;

// A launch's stream and what it uses beside the operands. Made only where Python need not do the launch.
struct Site {
  c10::Device device;
  void* stream;
  at::Tensor work_list, scratch;

  static std::optional<Site> find(const Recipe& recipe, const Operands& operands, Addresses& at) {
    const c10::Device device = operands.q.tensor.device();
    if (c10::impl::getDeviceGuardImpl(device.type())->getDevice() != device || !recipe.takes(at)) return std::nullopt;
    Site site{device, streams.current(device), {}, {}};
    if (recipe.list >= 0) {  // one that is captured is built in the graph
      if (may_capture(site.stream)) return std::nullopt;
      auto kept = work_lists.find(
          WorkLists::key(operands.cu_seqlens_q, operands.cu_seqlens_k, recipe.list, site.stream));
      if (!kept) return std::nullopt;
      site.work_list = std::move(*kept);
      at[WORK_LIST] = reinterpret_cast<uint64_t>(site.work_list.data_ptr());
    }
    if (recipe.scratch_bytes) {  // the stream's again as soon as the kernels are enqueued
      site.scratch = at::empty({recipe.scratch_bytes}, operands.q.tensor.options().dtype(at::kByte));
      at[SCRATCH] = reinterpret_cast<uint64_t>(site.scratch.data_ptr());
    }
    return site;
  }
};

}  // namespace jagtile
