// Nested tensors of the jagged layout: what Python's objects of them hold, and new ones put together as
// runtime/njt_form.py does, with the same attributes.
#pragma once

#include <algorithm>
#include <array>
#include <optional>

#include <ATen/core/Tensor.h>
#include <c10/core/Allocator.h>
#include <c10/core/ConstantSymNodeImpl.h>
#include <c10/core/TensorOptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/python_symnode.h>

#include "recipe.h"

namespace jagtile {

constexpr int RAGGED = 2;  // the ragged dimension of (batch, heads, tokens, dim)

// Whether this thread has the interpreter, also where there are several (PyGILState_Check says yes to all then).
inline bool has_interpreter() {
#if PY_VERSION_HEX >= 0x030D0000
  PyThreadState* const current = PyThreadState_GetUnchecked();
#else
  PyThreadState* const current = _PyThreadState_UncheckedGet();
#endif
  return current && current == PyGILState_GetThisThreadState();
}

// A Python object that may be let go of in any thread.
class Held {
 public:
  Held() = default;
  explicit Held(PyObject* owned) : object_(owned) {}
  Held(Held&& other) noexcept : object_(std::exchange(other.object_, nullptr)) {}
  Held& operator=(Held&& other) noexcept {
    std::swap(object_, other.object_);
    return *this;
  }
  ~Held() {
    if (!object_ || !Py_IsInitialized()) return;
    std::optional<pybind11::gil_scoped_acquire> gil;
    if (!has_interpreter()) gil.emplace();  // to acquire what this thread has costs several times as much as to ask
    Py_DECREF(object_);
  }
  PyObject* get() const { return object_; }
  PyObject* release() { return std::exchange(object_, nullptr); }
  explicit operator bool() const { return object_; }
  static Held borrowed(PyObject* object) {
    Py_XINCREF(object);
    return Held(object);
  }

 private:
  PyObject* object_ = nullptr;
};

// Python's part. Names are interned, once.
struct NestedPython {
  PyTypeObject* type = nullptr;  // NestedTensor
  PyTypeObject* nested_int = nullptr;  // NestedIntNode, which a nested int in Python refers to
  PyObject* marks = nullptr;     // names of attributes by which torch marks the ragged dimension of a nested tensor
  PyObject* value_marks = nullptr;  // likewise, of its values
  PyObject *values, *offsets, *lengths, *ragged_idx, *size, *strides, *cache, *max_seqlen;

  NestedPython() {
    for (auto [name, text] : {std::pair{&values, "_values"}, {&offsets, "_offsets"}, {&lengths, "_lengths"},
                              {&ragged_idx, "_ragged_idx"}, {&size, "_size"}, {&strides, "_strides"},
                              {&cache, "_metadata_cache"}, {&max_seqlen, "max_seqlen"}})
      *name = PyUnicode_InternFromString(text);
  }
};

inline NestedPython& nested_python() {
  static NestedPython names;
  return names;
}

inline Held attribute(PyObject* object, PyObject* name) {
  Held found(PyObject_GetAttr(object, name));
  if (!found) throw_pythons();
  return found;
}

inline Held owned(PyObject* made) {
  if (!made) throw_pythons();
  return Held(made);
}

// Where an object keeps its attributes.
inline Held attributes_of(PyObject* object) { return owned(PyObject_GenericGetDict(object, nullptr)); }

// Of four references, which it takes over.
inline Held tuple_of(std::array<PyObject*, 4> items) {
  const bool complete = std::all_of(items.begin(), items.end(), [](PyObject* item) { return item; });
  Held tuple(complete ? PyTuple_New(items.size()) : nullptr);
  if (!tuple) {
    for (PyObject* item : items) Py_XDECREF(item);
    throw_pythons();
  }
  for (size_t at = 0; at < items.size(); ++at) PyTuple_SET_ITEM(tuple.get(), at, items[at]);
  return tuple;
}

// A nested int as C++ holds it. What is the same for all of them it answers itself, and that it equals itself: else each copy
// of a size and each comparison of two is several calls of Python.
class NestedInt final : public torch::impl::PythonSymNodeImpl {
 public:
  using PythonSymNodeImpl::PythonSymNodeImpl;

  // The ragged dimension of a nested tensor's size.
  static c10::SymInt of(const c10::SymInt& ragged) {
    auto* node = ragged.is_heap_allocated() ? dynamic_cast<PythonSymNodeImpl*>(ragged.toSymNodeImplUnowned()) : nullptr;
    if (!node || dynamic_cast<NestedInt*>(node)) return ragged;
    auto pythons = pybind11::reinterpret_borrow<pybind11::object>(node->getPyObj());
    if (Py_TYPE(pythons.ptr()) != nested_python().nested_int) return ragged;
    return c10::SymInt(c10::SymNode(c10::make_intrusive<NestedInt>(std::move(pythons))));
  }

  bool is_int() override { return true; }
  bool is_bool() override { return false; }
  bool is_float() override { return false; }
  bool is_nested_int() const override { return true; }
  std::optional<int64_t> maybe_as_int() override { return std::nullopt; }
  c10::SymNode clone() override { return c10::SymNode::reclaim_copy(this); }
  c10::SymNode eq(const c10::SymNode& other) override {
    auto* pythons = dynamic_cast<PythonSymNodeImpl*>(other.get());
    if (!pythons || !pythons->getPyObj().is(getPyObj())) return PythonSymNodeImpl::eq(other);
    return c10::make_intrusive<c10::ConstantSymNodeImpl<bool>>(true);  // to be read, not combined with Python's answers
  }
};

// What makes packed values a nested tensor of a given raggedness.
struct Form {
  Held offsets, cache, size, strides;
  c10::SymInt batch, ragged;  // of the size, as C++ holds them
};

// A nested operand without holes (batch, heads, tokens, dim).
struct Nested {
  Form form;
  at::Tensor tensor, values, offsets;

  // Of a nested tensor, and nothing of other objects.
  static std::optional<Nested> of(PyObject* object) {
    const NestedPython& python = nested_python();
    if (Py_TYPE(object) != python.type) return std::nullopt;
    const Held attributes = attributes_of(object);
    const auto get = [&](PyObject* name) { return PyDict_GetItemWithError(attributes.get(), name); };  // borrowed
    PyObject *ragged_idx = get(python.ragged_idx), *values = get(python.values), *offsets = get(python.offsets),
             *cache = get(python.cache), *size = get(python.size), *strides = get(python.strides);
    if (!ragged_idx || !values || !offsets || !cache || !size || !strides) return std::nullopt;
    if (PyLong_AsLong(ragged_idx) != RAGGED || get(python.lengths) != Py_None) return std::nullopt;
    if (!THPVariable_CheckExact(values) || !THPVariable_CheckExact(offsets)) return std::nullopt;
    Nested nested;
    nested.tensor = THPVariable_Unpack(object);
    nested.values = THPVariable_Unpack(values);
    nested.offsets = THPVariable_Unpack(offsets);
    const auto sizes = nested.tensor.unsafeGetTensorImpl()->sym_sizes_default();
    if (sizes.size() != 4 || nested.values.dim() != 3) return std::nullopt;
    nested.form = {Held::borrowed(offsets), Held::borrowed(cache), Held::borrowed(size),
                   Held::borrowed(strides), sizes[0], NestedInt::of(sizes[RAGGED])};
    return nested;
  }

  // What torch has cached, -1 for nothing.
  int64_t max_seqlen() const {
    PyObject* cached = PyDict_GetItem(form.cache.get(), nested_python().max_seqlen);
    return cached && THPVariable_Check(cached) ? THPVariable_Unpack(cached).size(0) : -1;
  }
};

// The stride from sequence to sequence: nested int times a token's. It is taken from strides that have it already.
inline Held whole_stride(const Form& form, int64_t token_stride) {
  PyObject* known = PyTuple_GET_ITEM(form.strides.get(), RAGGED);
  if (PyLong_Check(known) && PyLong_AsLongLong(known) == token_stride)
    return Held::borrowed(PyTuple_GET_ITEM(form.strides.get(), 0));
  const Held stride = owned(PyLong_FromLongLong(token_stride));
  return owned(PyNumber_Multiply(PyTuple_GET_ITEM(form.size.get(), RAGGED), stride.get()));
}

inline void mark(PyObject* attributes, PyObject* names, int axis) {
  for (Py_ssize_t at = 0; at < PyTuple_GET_SIZE(names); ++at) {
    const Held marked = owned(PySet_New(nullptr)), number = owned(PyLong_FromLong(axis));
    if (PySet_Add(marked.get(), number.get()) ||
        PyDict_SetItem(attributes, PyTuple_GET_ITEM(names, at), marked.get()))
      throw_pythons();
  }
}

// What stands in C++ for a nested tensor that is made here. It answers for size and layout itself, with what Python would
// say: autograd asks each gradient, in a thread that has to get hold of the interpreter for an answer from there.
class NestedImpl final : public c10::TensorImpl {
 public:
  using c10::TensorImpl::TensorImpl;

 private:
  c10::SymIntArrayRef sym_sizes_custom() const override { return sym_sizes_default(); }
  c10::Layout layout_custom() const override { return at::kJagged; }
};

// The nested tensor of values (heads, tokens, dim), as torch's constructor makes it by _make_wrapper_subclass.
inline Held nest(const Form& form, const at::Tensor& values) {
  const NestedPython& python = nested_python();
  const auto sizes = values.sizes(), strides = values.strides();
  const std::array<c10::SymInt, 4> size{form.batch, sizes[0], form.ragged, sizes[2]};
  const std::array<c10::SymInt, 4> stride{0, strides[0], strides[1], strides[2]};  // C++ is asked for no strides

  c10::Storage storage(c10::Storage::use_byte_size_t{}, values.storage().sym_nbytes(), c10::GetAllocator(c10::kMeta), true);
  storage.set_data_ptr_noswap(at::DataPtr{nullptr, values.device()});
  const auto key = c10::computeDispatchKey(values.scalar_type(), c10::kJagged, values.device());
  const c10::DispatchKeySet keys({key, c10::DispatchKey::NestedTensor, c10::DispatchKey::AutogradNestedTensor});
  at::Tensor tensor = at::detail::make_tensor<NestedImpl>(std::move(storage), keys, values.dtype());
  c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(size, stride);
  impl->set_python_custom_sizes_strides(c10::TensorImpl::SizesStridesPolicy::CustomSizes);
  impl->set_python_custom_layout(true);
  impl->set_python_dispatch(true);

  Held object = owned(THPVariable_Wrap(tensor, python.type));
  const Held of_values = owned(THPVariable_Wrap(values));
  const Held attributes = attributes_of(object.get());
  const auto integer = [](int64_t number) { return PyLong_FromLongLong(number); };
  const auto same_size = [&](int dim) { return Py_NewRef(PyTuple_GET_ITEM(form.size.get(), dim)); };
  const Held ragged_idx = owned(integer(RAGGED));
  const Held size_tuple = tuple_of({same_size(0), integer(sizes[0]), same_size(RAGGED), integer(sizes[2])});
  const Held stride_tuple = tuple_of(
      {whole_stride(form, strides[1]).release(), integer(strides[0]), integer(strides[1]), integer(strides[2])});
  for (auto [name, value] : {std::pair{python.ragged_idx, ragged_idx.get()}, {python.size, size_tuple.get()},
                             {python.strides, stride_tuple.get()}, {python.values, of_values.get()},
                             {python.offsets, form.offsets.get()}, {python.lengths, Py_None},
                             {python.cache, form.cache.get()}})
    if (PyDict_SetItem(attributes.get(), name, value)) throw_pythons();
  mark(attributes.get(), python.marks, RAGGED);
  if (PyTuple_GET_SIZE(python.value_marks)) mark(attributes_of(of_values.get()).get(), python.value_marks, RAGGED - 1);
  return object;
}

}  // namespace jagtile
