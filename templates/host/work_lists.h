// The work lists that Python keeps (runtime/cuda/work_list.py), by what the node of a backward has at hand.
#pragma once

#include <mutex>
#include <optional>
#include <unordered_map>

#include <ATen/core/Tensor.h>

namespace jagtile {

class WorkLists {
 public:
  struct Key {
    c10::TensorImpl *cu_seqlens_q, *cu_seqlens_k;
    int64_t list;
    void* stream;
    bool operator==(const Key&) const = default;
  };

  static Key key(const at::Tensor& cu_seqlens_q, const at::Tensor& cu_seqlens_k, int64_t list, void* stream) {
    return {cu_seqlens_q.unsafeGetTensorImpl(), cu_seqlens_k.unsafeGetTensorImpl(), list, stream};
  }

  // The list's buffer, if it was made for the offsets as they are now.
  std::optional<at::Tensor> find(const Key& key) const {
    std::lock_guard lock(mutex_);
    const auto found = lists_.find(key);
    if (found == lists_.end() || found->second.version_q != version(key.cu_seqlens_q) ||
        found->second.version_k != version(key.cu_seqlens_k))
      return std::nullopt;
    return found->second.buffer;
  }

  void keep(const Key& key, const at::Tensor& cu_seqlens_q, const at::Tensor& cu_seqlens_k, at::Tensor buffer) {
    Kept kept{Weak(cu_seqlens_q.getIntrusivePtr()), Weak(cu_seqlens_k.getIntrusivePtr()), version(key.cu_seqlens_q),
              version(key.cu_seqlens_k), std::move(buffer)};
    std::lock_guard lock(mutex_);
    lists_.insert_or_assign(key, std::move(kept));
  }

  void drop(const Key& key) {
    std::lock_guard lock(mutex_);
    lists_.erase(key);
  }

  size_t size() const {
    std::lock_guard lock(mutex_);
    return lists_.size();
  }

 private:
  using Weak = c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>;
  struct Kept {
    Weak cu_seqlens_q, cu_seqlens_k;  // so that no other tensor gets their addresses
    uint32_t version_q, version_k;
    at::Tensor buffer;
  };
  struct Hash {
    size_t operator()(const Key& key) const {
      size_t hash = 0;
      for (size_t word : {reinterpret_cast<size_t>(key.cu_seqlens_q), reinterpret_cast<size_t>(key.cu_seqlens_k),
                          static_cast<size_t>(key.list), reinterpret_cast<size_t>(key.stream)})
        hash = (hash ^ word) * 0x9E3779B97F4A7C15u;
      return hash ^ hash >> 32;
    }
  };

  // Inference tensors count no versions, and no list of theirs is kept.
  static uint32_t version(c10::TensorImpl* tensor) {
    return tensor->is_inference() ? ~0u : tensor->version_counter().current_version();
  }

  mutable std::mutex mutex_;
  std::unordered_map<Key, Kept, Hash> lists_;
};
inline WorkLists work_lists;

}  // namespace jagtile
