// Attention as one node of autograd: the launches of a known kind of call, forward and backward.
#pragma once

#include <memory>
#include <mutex>
#include <type_traits>

#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include "calls.h"
#include "nested.h"

namespace jagtile {

using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using NodePointer = decltype(torch::autograd::Edge::function);  // torch 2.13: intrusive, before: shared

// What Python does where a node can't.
struct Fallback {
  PyObject* gradients = nullptr;       // (call, whether to learn, dout, dlse, q, ..., lse, options) -> dq, dk, dv
  PyObject* nest = nullptr;            // (offsets, cache, size, strides, packed) -> nested tensor
  PyObject* last_derivative = nullptr; // (gradient, dout) -> the gradient, differentiating which is refused
};
inline Fallback fallback;

inline Held wrapped(const at::Tensor& x) {
  return x.defined() ? owned(THPVariable_Wrap(x)) : Held::borrowed(Py_None);
}

// Call as Python sees it.
inline Held handle_of(const std::shared_ptr<Call>& call) {
  return owned(PyCapsule_New(new std::shared_ptr<Call>(call), "jagtile.call", [](PyObject* capsule) {
    delete static_cast<std::shared_ptr<Call>*>(PyCapsule_GetPointer(capsule, "jagtile.call"));
  }));
}

// out and lse, launched; nothing where Python is to do it.
inline std::optional<std::array<at::Tensor, 2>> forward(const Call& call, const Operands& operands) {
  const Packed &q = operands.q, &v = operands.v;
  const int64_t tokens = q.size(0), heads = q.size(1);
  Addresses at{};
  operands.write(at);
  auto site = Site::find(call.forward, operands, at);
  if (!site) return std::nullopt;
  at::Tensor out = q.fresh(tokens, heads, v.size(2)), lse;
  at[OUT] = reinterpret_cast<uint64_t>(out.data_ptr());
  if (!call.forward.takes(at)) return std::nullopt;
  if (call.options.trained || call.options.return_lse) {
    lse = at::empty({heads, tokens}, q.tensor.options().dtype(at::kFloat));
    at[LSE] = reinterpret_cast<uint64_t>(lse.data_ptr());
  }
  launch(call.forward, at, site->stream, site->device);
  return std::array{std::move(out), std::move(lse)};
}

// dq, dk and dv, launched; nothing where Python is to do it. ``known``: whether that is not for want of a recipe.
inline std::optional<std::array<at::Tensor, 3>> backward(const Call& call, const Operands& operands, const Packed& out,
                                                         const at::Tensor& lse, const Packed& dout,
                                                         const at::Tensor& dlse, bool& known) {
  const auto& [q, k, v, cu_seqlens_q, cu_seqlens_k] = operands;
  known = true;
  const auto fits = [&](const Packed& x) {
    return is_plain(x.tensor) && x.tensor.options().type_equal(q.tensor.options()) && x.tensor.dim() == 3 &&
           x.size(0) == q.size(0) && x.size(1) == q.size(1) && x.size(2) == v.size(2) && x.stride(2) == 1;
  };
  const auto fits_rows = [&](const at::Tensor& x) {
    return is_plain(x) && x.scalar_type() == at::kFloat && x.device() == q.tensor.device() && x.dim() == 2 &&
           x.size(0) == q.size(1) && x.size(1) == q.size(0);
  };
  // Hooks may have packed what was saved and unpacked something else.
  if (c10::GradMode::is_enabled() || !is_eager() || !operands.are_plain() ||
      facts_of(operands, call.options) != call.facts || !dout.tensor.defined() || !fits(dout) || !fits(out) ||
      dout.tensor.device() != q.tensor.device() || !out.is_contiguous() || !fits_rows(lse) || !lse.is_contiguous() ||
      (dlse.defined() && !fits_rows(dlse)))
    return std::nullopt;
  const auto recipe = call.backward(dout);
  known = recipe != nullptr;
  if (!known) return std::nullopt;
  Addresses at{};
  operands.write(at);
  at[OUT] = reinterpret_cast<uint64_t>(out.tensor.data_ptr());
  at[DOUT] = reinterpret_cast<uint64_t>(dout.tensor.data_ptr());
  at[LSE] = reinterpret_cast<uint64_t>(lse.data_ptr());
  auto site = Site::find(*recipe, operands, at);
  if (!site) return std::nullopt;
  const at::Tensor of_rows = dlse.defined() ? dlse.contiguous() : dlse;
  if (of_rows.defined()) at[DLSE] = reinterpret_cast<uint64_t>(of_rows.data_ptr());
  std::array grads{q.fresh(q.size(0), q.size(1), q.size(2)), k.fresh(k.size(0), k.size(1), k.size(2)),
                   v.fresh(v.size(0), v.size(1), v.size(2))};
  for (int which = 0; which < 3; ++which) at[DQ + which] = reinterpret_cast<uint64_t>(grads[which].data_ptr());
  if (!recipe->takes(at)) return std::nullopt;
  launch(*recipe, at, site->stream, site->device);
  return grads;
}

// What a node knows of nested operands.
struct NestedForms {
  struct Version {
    c10::VariableVersion counter;
    uint32_t seen;
  };
  std::array<Form, 3> grads;
  // Of the nested tensors: changing one in place does not count up the version of its values.
  std::vector<Version> versions;

  void watch(const at::Tensor& nested) {
    if (nested.is_inference()) return;
    const auto& counter = nested.unsafeGetTensorImpl()->version_counter();
    versions.push_back({counter, counter.current_version()});
  }

  void check() const {
    for (const auto& [counter, seen] : versions)
      TORCH_CHECK(counter.current_version() == seen,
                  "one of the variables needed for gradient computation has been modified by an inplace operation: a "
                  "nested operand or output of jagtile's attention is at version ",
                  counter.current_version(), "; expected ", seen);
  }
};

class AttentionNode : public Node {
 public:
  explicit AttentionNode(std::shared_ptr<Call> call) : call_(std::move(call)) {}

  std::string name() const override { return nested_ ? "NestedAttentionBackward" : "PackedAttentionBackward"; }

  void save(const Operands& operands, const at::Tensor& out, const at::Tensor& lse) {
    size_t at = 0;
    for (const at::Tensor* x : {&operands.q.tensor, &operands.k.tensor, &operands.v.tensor, &operands.cu_seqlens_q,
                                &operands.cu_seqlens_k, &out, &lse}) {
      saved_[at] = SavedVariable(*x, is_output(at));
      ++at;
    }
  }

  void save_forms(std::unique_ptr<NestedForms> nested) { nested_ = std::move(nested); }

  variable_list apply(variable_list&& douts) override {
    std::array<at::Tensor, SAVED> saved;
    {
      std::lock_guard lock(mutex_);
      for (size_t at = 0; at < SAVED; ++at) saved[at] = saved_[at].unpack(getptr());
    }
    return nested_ ? nested_gradients(saved, douts[0]) : packed_gradients(saved, douts);
  }

  // Compiled autograd runs ``apply`` on stand-ins of what was saved, which go to Python's operator.
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    if (nested_) return Node::compiled_args(args);  // refused, as all of nested tensors is
    for (size_t at = 0; at < SAVED; ++at) args.collect(saved_[at], is_output(at));
    for (int64_t fact : call_->facts) args.collect(fact);
  }

  variable_list apply_with_saved(const variable_list& douts,
                                 torch::dynamo::autograd::SwapSavedVariables& saved) override {
    for (SavedVariable& variable : saved_) saved.before(variable);
    variable_list grads = apply(variable_list(douts));
    for (SavedVariable& variable : saved_) saved.after(variable);
    return grads;
  }

  void release_variables() override {
    std::lock_guard lock(mutex_);
    for (SavedVariable& variable : saved_) variable.reset_data();
  }

 private:
  static constexpr size_t SAVED = 7;  // q, k, v, both offsets, out, lse
  using Saved = std::array<at::Tensor, SAVED>;

  // A nested output's values are not the node's output, and an lse that nobody asked for is none.
  bool is_output(size_t at) const { return (at == 5 && !nested_) || (at == 6 && call_->options.return_lse); }

  // dq, dk, dv as q, k and v were saved.
  std::array<at::Tensor, 3> gradients(const Saved& saved, const Packed& dout, const at::Tensor& dlse) const {
    const bool heads_first = nested_ != nullptr;
    const auto packed = [&](size_t at) { return Packed{saved[at], heads_first}; };
    const Operands operands{packed(0), packed(1), packed(2), saved[3], saved[4]};
    bool known;
    if (auto found = backward(*call_, operands, packed(5), saved[6], dout, dlse, known)) return std::move(*found);
    return pythons_gradients(operands, packed(5), saved[6], dout, dlse, !known);
  }

  std::array<at::Tensor, 3> pythons_gradients(const Operands& operands, const Packed& out, const at::Tensor& lse,
                                              const Packed& dout, const at::Tensor& dlse, bool learn) const {
    const auto& [q, k, v, cu_seqlens_q, cu_seqlens_k] = operands;
    const Options& options = call_->options;
    pybind11::gil_scoped_acquire gil;
    const auto view = [](const Packed& x) { return wrapped(x.tensor.defined() ? x.view() : x.tensor); };
    const auto hint = [](int64_t value) { return value < 0 ? Py_NewRef(Py_None) : PyLong_FromLongLong(value); };
    const auto flag = [](bool value) { return value ? Py_True : Py_False; };
    const Held call = handle_of(call_), dout_object = view(dout), dlse_object = wrapped(dlse), q_object = view(q),
               k_object = view(k), v_object = view(v), offsets_q = wrapped(cu_seqlens_q),
               offsets_k = wrapped(cu_seqlens_k), out_object = view(out), lse_object = wrapped(lse),
               options_tuple = owned(Py_BuildValue("(NNOOd)", hint(options.max_seqlen_q), hint(options.max_seqlen_k),
                                                   flag(options.is_causal), flag(options.bottom_right), options.scale));
    const Held answer = owned(PyObject_CallFunctionObjArgs(
        fallback.gradients, call.get(), flag(learn), dout_object.get(), dlse_object.get(), q_object.get(),
        k_object.get(), v_object.get(), offsets_q.get(), offsets_k.get(), out_object.get(), lse_object.get(),
        options_tuple.get(), nullptr));
    std::array<at::Tensor, 3> grads;
    for (int which = 0; which < 3; ++which) {
      const at::Tensor grad = THPVariable_Unpack(PyTuple_GET_ITEM(answer.get(), which));
      grads[which] = nested_ ? grad.transpose(0, 1) : grad;
    }
    return grads;
  }

  variable_list packed_gradients(const Saved& saved, const variable_list& douts) const {
    auto grads = gradients(saved, {douts[0], false}, douts.size() > 1 ? douts[1] : at::Tensor());
    variable_list wanted(3);
    for (int which = 0; which < 3; ++which)
      if (task_should_compute_output(which)) wanted[which] = std::move(grads[which]);
    return wanted;
  }

  variable_list nested_gradients(const Saved& saved, const at::Tensor& dout) const {
    variable_list wanted(3);
    if (!dout.defined()) return wanted;
    nested_->check();
    pybind11::gil_scoped_acquire gil;
    const Held object = wrapped(dout), values = attribute(object.get(), nested_python().values);
    const bool again = c10::GradMode::is_enabled();  // create_graph=True
    {
      c10::AutoGradMode off(false);
      auto grads = gradients(saved, {THPVariable_Unpack(values.get()), true}, {});
      for (int which = 0; which < 3; ++which)
        if (task_should_compute_output(which))
          wanted[which] = THPVariable_Unpack(nested(nested_->grads[which], grads[which]).get());
    }
    if (again)
      for (at::Tensor& grad : wanted)
        if (grad.defined()) {
          const Held nested = wrapped(grad);
          const Held last = owned(
              PyObject_CallFunctionObjArgs(fallback.last_derivative, nested.get(), object.get(), nullptr));
          grad = THPVariable_Unpack(last.get());
        }
    return wanted;
  }

  static Held nested(const Form& form, const at::Tensor& values) {
    if (is_eager() && is_plain(values)) return nest(form, values);
    const Held packed = wrapped(values.transpose(0, 1));
    return owned(PyObject_CallFunctionObjArgs(fallback.nest, form.offsets.get(), form.cache.get(), form.size.get(),
                                              form.strides.get(), packed.get(), nullptr));
  }

  std::shared_ptr<Call> call_;
  std::array<SavedVariable, SAVED> saved_;
  std::unique_ptr<NestedForms> nested_;
};

template <class Pointer, class Made, class... Arguments>
std::pair<Pointer, Made*> make_node(Arguments&&... arguments) {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<Node>>) {
    Pointer node(new Made(std::forward<Arguments>(arguments)...), [](auto* made) { deleteNode(made); });
    return {node, static_cast<Made*>(node.get())};
  } else {
    auto node = c10::make_intrusive<Made>(std::forward<Arguments>(arguments)...);
    Made* made = node.get();
    return {Pointer(std::move(node)), made};
  }
}

// Attention of packed operands: out, lse. Nothing where Python is to do it.
inline std::optional<std::array<at::Tensor, 2>> packed_attention(const std::shared_ptr<Call>& call,
                                                                 const Operands& operands) {
  auto found = forward(*call, operands);
  if (!found || !call->options.trained) return found;
  const auto& [out, lse] = *found;
  auto [pointer, node] = make_node<NodePointer, AttentionNode>(call);
  pointer->set_next_edges(
      torch::autograd::collect_next_edges(operands.q.tensor, operands.k.tensor, operands.v.tensor));
  set_history(out, pointer);
  if (call->options.return_lse) set_history(lse, pointer);
  node->save(operands, out, lse);
  return found;
}

// Attention of nested operands: a nested tensor. Nothing where Python is to do it.
inline Held nested_attention(const std::shared_ptr<Call>& call, std::array<Nested, 3> nested) {
  auto& [query, key, value] = nested;
  const Operands operands{{query.values, true}, {key.values, true}, {value.values, true}, query.offsets, key.offsets};
  auto found = forward(*call, operands);
  if (!found) return {};
  const auto& [values, lse] = *found;
  Held object = nest(query.form, values);
  if (!call->options.trained) return object;
  const at::Tensor out = THPVariable_Unpack(object.get());
  auto [pointer, node] = make_node<NodePointer, AttentionNode>(call);
  pointer->set_next_edges(torch::autograd::collect_next_edges(query.tensor, key.tensor, value.tensor));
  // As ``set_history`` but for asking Python for size and layout.
  const auto input = pointer->add_input_metadata(values.options().layout(at::kJagged),
                                                 out.unsafeGetTensorImpl()->sym_sizes_default(), true, true,
                                                 values.scalar_type());
  torch::autograd::impl::set_gradient_edge(out, {pointer, input});
  auto forms = std::make_unique<NestedForms>();
  for (const Nested& operand : nested) forms->watch(operand.tensor);
  forms->watch(out);
  const Held strides = attribute(object.get(), nested_python().strides);
  PyObject* ragged = PyTuple_GET_ITEM(query.form.size.get(), RAGGED);
  for (int which = 0; which < 3; ++which) {
    Form& form = forms->grads[which] = std::move(nested[which].form);
    // Gradients are as contiguous as the output, wherever operands lie, and mostly as wide.
    if (PyTuple_GET_ITEM(form.size.get(), RAGGED) == ragged) form.strides = Held::borrowed(strides.get());
  }
  node->save_forms(std::move(forms));
  node->save(operands, values, lse);
  return object;
}

}  // namespace jagtile
