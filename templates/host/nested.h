// Nested tensors of the jagged layout: what Python's objects of them hold, and new ones put together as
// runtime/njt_form.py does, with the same attributes.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Allocator.h>
#include <c10/core/TensorOptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include "recipe.h"

namespace jagtile {

constexpr int RAGGED = 2;  // the ragged dimension of (batch, heads, tokens, dim)

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
    pybind11::gil_scoped_acquire gil;
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
    const Held ragged_idx = attribute(object, python.ragged_idx), lengths = attribute(object, python.lengths);
    if (PyLong_AsLong(ragged_idx.get()) != RAGGED || lengths.get() != Py_None) return std::nullopt;
    const Held values = attribute(object, python.values);
    Held offsets = attribute(object, python.offsets);
    if (!THPVariable_CheckExact(values.get()) || !THPVariable_CheckExact(offsets.get())) return std::nullopt;
    Nested nested;
    nested.tensor = THPVariable_Unpack(object);
    nested.values = THPVariable_Unpack(values.get());
    nested.offsets = THPVariable_Unpack(offsets.get());
    const auto sizes = nested.tensor.unsafeGetTensorImpl()->sym_sizes_default();
    if (sizes.size() != 4 || nested.values.dim() != 3) return std::nullopt;
    nested.form = {std::move(offsets), attribute(object, python.cache), attribute(object, python.size),
                   attribute(object, python.strides), sizes[0], sizes[RAGGED]};
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
  const Held attributes = owned(PyObject_GenericGetDict(object.get(), nullptr));
  const auto integer = [](int64_t number) { return PyLong_FromLongLong(number); };
  PyObject* model_size = form.size.get();
  const Held ragged_idx = owned(integer(RAGGED)), whole = whole_stride(form, strides[1]);
  const Held size_tuple = owned(Py_BuildValue("(ONON)", PyTuple_GET_ITEM(model_size, 0), integer(sizes[0]),
                                              PyTuple_GET_ITEM(model_size, RAGGED), integer(sizes[2])));
  const Held stride_tuple = owned(
      Py_BuildValue("(ONNN)", whole.get(), integer(strides[0]), integer(strides[1]), integer(strides[2])));
  for (auto [name, value] : {std::pair{python.ragged_idx, ragged_idx.get()}, {python.size, size_tuple.get()},
                             {python.strides, stride_tuple.get()}, {python.values, of_values.get()},
                             {python.offsets, form.offsets.get()}, {python.lengths, Py_None},
                             {python.cache, form.cache.get()}})
    if (PyDict_SetItem(attributes.get(), name, value)) throw_pythons();
  mark(attributes.get(), python.marks, RAGGED);
  if (PyTuple_GET_SIZE(python.value_marks)) {
    const Held of_values_attributes = owned(PyObject_GenericGetDict(of_values.get(), nullptr));
    mark(of_values_attributes.get(), python.value_marks, RAGGED - 1);
  }
  return object;
}

}  // namespace jagtile
