// The host side of eager calls in C++: _jagtile_host, which runtime/native.py loads. What it serves it serves as Python
// would; all that is unusual it leaves to Python.
#include <cmath>
#include <optional>

#include <ATen/SavedTensorHooks.h>

#include "attention.h"

namespace jagtile {
namespace {

namespace py = pybind11;

// Arguments as Python's checks pass them; nothing for any other object.
std::optional<bool> flag(PyObject* object) {
  if (object == Py_True) return true;
  if (object == Py_False) return false;
  return std::nullopt;
}

std::optional<int64_t> hint(PyObject* object) {
  if (object == Py_None) return -1;
  if (!PyLong_CheckExact(object)) return std::nullopt;
  int overflow = 0;
  const int64_t value = PyLong_AsLongLongAndOverflow(object, &overflow);
  return overflow || value < 0 ? std::nullopt : std::optional(value);
}

std::optional<double> scale(PyObject* object, int64_t head_dim) {
  if (object == Py_None) return 1.0 / std::sqrt(static_cast<double>(head_dim));
  return PyFloat_CheckExact(object) ? std::optional(PyFloat_AS_DOUBLE(object)) : std::nullopt;
}

std::optional<bool> bottom_right(PyObject* object) {
  if (!PyUnicode_CheckExact(object)) return std::nullopt;
  if (PyUnicode_CompareWithASCIIString(object, "top_left") == 0) return false;
  if (PyUnicode_CompareWithASCIIString(object, "bottom_right") == 0) return true;
  return std::nullopt;
}

bool is_zero(PyObject* object) { return PyFloat_CheckExact(object) && PyFloat_AS_DOUBLE(object) == 0.0; }

template <class... Found>
bool all(const Found&... found) {
  return (found.has_value() && ...);
}

PyObject* for_python() { return Py_NewRef(Py_None); }
PyObject* unknown() { return Py_NewRef(Py_False); }

// As varlen_attention. None: a call for Python; False: one that Python has yet to teach.
PyObject* serve(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(count == 12, "serve takes 12 arguments");
  for (int at = 0; at < 5; ++at)
    if (!THPVariable_CheckExact(arguments[at])) return for_python();
  const auto tensor = [&](int at) -> const at::Tensor& { return THPVariable_Unpack(arguments[at]); };
  const at::Tensor &q = tensor(0), &k = tensor(1), &v = tensor(2);
  const Operands operands{{q, false}, {k, false}, {v, false}, tensor(3), tensor(4)};
  if (!is_eager() || !operands.are_plain() || !at::isReducedFloatingType(q.scalar_type())) return for_python();
  const auto max_q = hint(arguments[5]), max_k = hint(arguments[6]);
  const auto is_causal = flag(arguments[7]), aligned = bottom_right(arguments[8]), return_lse = flag(arguments[11]);
  const auto factor = scale(arguments[9], q.sizes()[2]);
  if (!all(max_q, max_k, is_causal, aligned, return_lse, factor) || !is_zero(arguments[10])) return for_python();
  if (has_tangent(q) || has_tangent(k) || has_tangent(v)) return for_python();
  const bool trained = c10::GradMode::is_enabled() && (q.requires_grad() || k.requires_grad() || v.requires_grad());
  const auto call = calls.find(facts_of(operands, {*max_q, *max_k, *is_causal, *aligned, trained, *return_lse, *factor}));
  if (!call) return unknown();
  auto found = packed_attention(call, operands);
  if (!found) return for_python();
  auto& [out, lse] = *found;
  if (!*return_lse) return THPVariable_Wrap(std::move(out));
  return Py_BuildValue("(NN)", THPVariable_Wrap(std::move(out)), THPVariable_Wrap(std::move(lse)));
  END_HANDLE_TH_ERRORS
}

// As ops.backward, of a call that is served with an lse and without grad: the three gradients. None: a call for Python; a
// handle: of the call whose backward Python has yet to teach.
PyObject* serve_backward(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(count == 14, "serve_backward takes 14 arguments");
  const bool has_dlse = arguments[1] != Py_None;
  for (int at = 0; at < 9; ++at)
    if ((at != 1 || has_dlse) && !THPVariable_CheckExact(arguments[at])) return for_python();
  const auto tensor = [&](int at) -> const at::Tensor& { return THPVariable_Unpack(arguments[at]); };
  const Operands operands{{tensor(2), false}, {tensor(3), false}, {tensor(4), false}, tensor(5), tensor(6)};
  const auto max_q = hint(arguments[9]), max_k = hint(arguments[10]);
  const auto is_causal = flag(arguments[11]), aligned = flag(arguments[12]);
  if (!all(max_q, max_k, is_causal, aligned) || !PyFloat_CheckExact(arguments[13]) || !operands.are_plain()) {
    return for_python();
  }
  const double factor = PyFloat_AS_DOUBLE(arguments[13]);
  const auto call = calls.find(facts_of(operands, {*max_q, *max_k, *is_causal, *aligned, false, true, factor}));
  if (!call) return for_python();
  bool known;
  auto grads = backward(*call, operands, {tensor(7), false}, tensor(8), {tensor(0), false},
                        has_dlse ? tensor(1) : at::Tensor(), known);
  if (!grads) return known ? for_python() : handle_of(call).release();
  const auto wrap = [&](int which) { return THPVariable_Wrap(std::move((*grads)[which])); };
  return Py_BuildValue("(NNN)", wrap(0), wrap(1), wrap(2));
  END_HANDLE_TH_ERRORS
}

// As sdpa, likewise.
PyObject* serve_nested(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(count == 9, "serve_nested takes 9 arguments");
  if (arguments[3] != Py_None || !is_eager()) return for_python();
  std::array<std::optional<Nested>, 3> found;
  for (int at = 0; at < 3; ++at) {
    found[at] = Nested::of(arguments[at]);
    if (!found[at] || has_tangent(found[at]->tensor) || found[at]->values.requires_grad()) return for_python();
  }
  std::array nested{std::move(*found[0]), std::move(*found[1]), std::move(*found[2])};
  const auto& [query, key, value] = nested;
  if (key.form.offsets.get() != value.form.offsets.get()) return for_python();  // which compares them
  const Operands operands{{query.values, true}, {key.values, true}, {value.values, true}, query.offsets, key.offsets};
  const auto autocast =
      driver.device_type == at::kCUDA ? c10::DispatchKey::AutocastCUDA : c10::DispatchKey::AutocastCPU;
  if (!operands.are_plain() || !c10::impl::tls_is_dispatch_key_excluded(autocast)) return for_python();
  const auto is_causal = flag(arguments[5]), enable_gqa = flag(arguments[7]), aligned = bottom_right(arguments[8]);
  const auto factor = scale(arguments[6], operands.q.size(2));
  if (!all(is_causal, enable_gqa, aligned, factor) || !is_zero(arguments[4])) return for_python();
  if (operands.q.size(1) != operands.k.size(1) && !*enable_gqa) return for_python();  // which says so
  const bool trained = c10::GradMode::is_enabled() && (query.tensor.requires_grad() || key.tensor.requires_grad() ||
                                                       value.tensor.requires_grad());
  // Hooks of what is saved, such as a checkpoint's, are to see the same tensors of every call.
  if (trained && at::SavedTensorDefaultHooks::get_hooks(true)) return for_python();
  const auto call = calls.find(facts_of(
      operands, {query.max_seqlen(), key.max_seqlen(), *is_causal, *aligned, trained, false, *factor}));
  if (!call) return unknown();
  Held object = nested_attention(call, std::move(nested));
  return object ? object.release() : for_python();
  END_HANDLE_TH_ERRORS
}

// (block, (offset, operand, bytes beyond it) of each word, (function, grid, threads, shared memory) of each kernel,
// bits that addresses must not have, bytes of scratch, kind of list or -1, whether kernels wait for those before)
Recipe recipe_of(const py::tuple& told) {
  Recipe recipe;
  const auto block = told[0].cast<std::string>();
  recipe.block.assign(block.begin(), block.end());
  for (const auto& word : told[1]) {
    const auto [offset, name, beyond] = word.cast<std::tuple<uint32_t, std::string, uint64_t>>();
    const auto operand = std::find(OPERANDS.begin(), OPERANDS.end(), name) - OPERANDS.begin();
    TORCH_CHECK(static_cast<size_t>(operand) < OPERANDS.size(), "no operand is called ", name);
    TORCH_CHECK(offset + sizeof(uint64_t) <= block.size(), "the block has no word at ", offset);
    recipe.words.push_back({offset, static_cast<Operand>(operand), beyond});
  }
  for (const auto& kernel : told[2]) {
    const auto [function, grid, threads, smem] = kernel.cast<std::tuple<uintptr_t, unsigned, unsigned, unsigned>>();
    recipe.kernels.push_back({reinterpret_cast<void*>(function), grid, threads, smem});
  }
  recipe.unaligned = told[3].cast<uint64_t>();
  recipe.scratch_bytes = told[4].cast<int64_t>();
  recipe.list = told[5].cast<int64_t>();
  recipe.dependent = told[6].cast<bool>();
  TORCH_CHECK(block.size() <= MAX_BLOCK_BYTES, "a block of ", block.size(), " bytes");
  return recipe;
}

void learn(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& cu_seqlens_q,
           const at::Tensor& cu_seqlens_k, std::optional<int64_t> max_seqlen_q, std::optional<int64_t> max_seqlen_k,
           bool is_causal, bool bottom_right, double scale, bool trained, bool return_lse, const py::tuple& recipe) {
  const Operands operands{{q, false}, {k, false}, {v, false}, cu_seqlens_q, cu_seqlens_k};
  const Options options{max_seqlen_q.value_or(-1), max_seqlen_k.value_or(-1), is_causal, bottom_right, trained,
                        return_lse, scale};
  calls.learn(facts_of(operands, options), options, recipe_of(recipe));
}

void learn_backward(const py::capsule& call, const at::Tensor& dout, const py::tuple& recipe) {
  (*call.get_pointer<std::shared_ptr<Call>>())->learn_backward({dout, false}, recipe_of(recipe));
}

using ListKey = std::tuple<uintptr_t, uintptr_t, int64_t, uintptr_t>;

ListKey keep_list(const at::Tensor& cu_seqlens_q, const at::Tensor& cu_seqlens_k, int64_t list, uintptr_t stream,
                  const at::Tensor& buffer) {
  const auto key = WorkLists::key(cu_seqlens_q, cu_seqlens_k, list, reinterpret_cast<void*>(stream));
  work_lists.keep(key, cu_seqlens_q, cu_seqlens_k, buffer);
  return {reinterpret_cast<uintptr_t>(key.cu_seqlens_q), reinterpret_cast<uintptr_t>(key.cu_seqlens_k), list, stream};
}

void drop_list(const ListKey& key) {
  const auto& [q, k, list, stream] = key;
  using Impl = c10::TensorImpl*;
  work_lists.drop({reinterpret_cast<Impl>(q), reinterpret_cast<Impl>(k), list, reinterpret_cast<void*>(stream)});
}

void use_driver(uintptr_t launch, uintptr_t launch_ex, uintptr_t is_capturing, const std::string& device_type,
                py::object raw_stream, py::object failed) {
  driver.launch = reinterpret_cast<Driver::Launch>(launch);
  driver.launch_ex = reinterpret_cast<Driver::LaunchEx>(launch_ex);
  driver.is_capturing = reinterpret_cast<Driver::IsCapturing>(is_capturing);
  driver.device_type = c10::Device(device_type).type();
  driver.raw_stream = raw_stream.release().ptr();  // as long as the process lives
  driver.failed = failed.release().ptr();
  streams.forget();
}

void use_python(py::object gradients, py::object nest, py::object last_derivative, py::object nested_type,
                py::object nested_int, py::tuple marks, py::tuple value_marks) {
  fallback = {gradients.release().ptr(), nest.release().ptr(), last_derivative.release().ptr()};
  NestedPython& python = nested_python();
  python.type = reinterpret_cast<PyTypeObject*>(nested_type.release().ptr());
  python.nested_int = reinterpret_cast<PyTypeObject*>(nested_int.release().ptr());
  python.marks = marks.release().ptr();
  python.value_marks = value_marks.release().ptr();
}

// The nested tensor of values, of a model's form.
py::object nest_like(const py::object& model, const at::Tensor& values) {
  auto nested = Nested::of(model.ptr());
  TORCH_CHECK(nested, "the model is no nested tensor (batch, heads, tokens, dim) without holes");
  return py::reinterpret_steal<py::object>(nest(nested->form, values).release());
}

PyMethodDef hot[] = {
    {"serve", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(serve)), METH_FASTCALL, nullptr},
    {"serve_backward", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(serve_backward)), METH_FASTCALL, nullptr},
    {"serve_nested", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(serve_nested)), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace
}  // namespace jagtile

PYBIND11_MODULE(_jagtile_host, module) {
  using namespace jagtile;
  if (PyModule_AddFunctions(module.ptr(), hot)) throw pybind11::error_already_set();
  module.def("learn", learn);
  module.def("learn_backward", learn_backward);
  module.def("forget", [] { calls.forget(); });
  module.def("keep_list", keep_list);
  module.def("drop_list", drop_list);
  module.def("count_lists", [] { return work_lists.size(); });
  module.def("use_driver", use_driver);
  module.def("use_python", use_python);
  module.def("nest_like", nest_like);
}
