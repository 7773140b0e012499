// How the bindings read a torch tensor without torch's headers: one build then serves every torch.
//
// torch 2.10 and later provide DLPack's table of C functions, which returns pointer, shape, strides, dtype and device
// in about 20 ns. With older versions they are read from Python attributes, 50 ns each.
#pragma once
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "ops.h"

namespace rlhf {

namespace py = pybind11;

// As in dlpack.h 1.x.
struct DLTensor {
  void* data;
  int32_t device_type, device_id, ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;

  void* address() const { return static_cast<char*>(data) + byte_offset; }
  int dtype() const {  // a DType; kBool stands for whatever is none of them
    switch (code << 8 | bits) {
      case 2 << 8 | 32:
        return kFloat32;
      case 4 << 8 | 16:
        return kBFloat16;
      case 2 << 8 | 16:
        return kFloat16;
      case 2 << 8 | 64:
        return kFloat64;
      default:
        return kBool;
    }
  }
};
struct DLManagedTensorVersioned {
  uint32_t major, minor;
  void* context;
  void (*deleter)(DLManagedTensorVersioned*);  // from any thread, without the GIL
  uint64_t flags;
  DLTensor tensor;
};
struct DLExchange {
  uint32_t major, minor;
  void *previous, *allocate, *from_object;
  int (*to_object)(DLManagedTensorVersioned*, void** object);  // both: 0, or -1 with a Python error
  int (*read)(void* object, DLTensor* out);                    // the tensor stays the owner
};

// What is asked of torch again and again, looked up once.
struct Torch {
  PyObject *data_ptr, *dtype, *itemsize, *stride, *requires_grad, *is_neg, *numel;  // interned names
  PyObject *to_save, *saved_tensors, *materialize_grads, *forward_cls, *backward;   // of an autograd.Function's ctx
  PyObject *inplace, *temperature, *with_entropy, *forward_in_python, *clone;  // that token_logprobs.py has put there
  PyObject *tensor, *parameter, *dtypes[4];  // types, and torch.float32, ... in the order of DType
  PyObject *dispatch_modes, *functorch_level, *older_vmap, *grad_enabled, *keep_graph, *threads, *negated;
  PyObject *forward_ad, *current_level;  // a module, and a name in it
  const DLExchange* exchange = nullptr;

  Torch() {
    const py::module_ torch = py::module_::import("torch");
    const auto own = [](py::object x) { return x.release().ptr(); };  // for as long as the process lives
    data_ptr = PyUnicode_InternFromString("data_ptr");
    dtype = PyUnicode_InternFromString("dtype");
    itemsize = PyUnicode_InternFromString("itemsize");
    stride = PyUnicode_InternFromString("stride");
    requires_grad = PyUnicode_InternFromString("requires_grad");
    is_neg = PyUnicode_InternFromString("is_neg");
    numel = PyUnicode_InternFromString("numel");
    to_save = PyUnicode_InternFromString("to_save");
    saved_tensors = PyUnicode_InternFromString("saved_tensors");
    materialize_grads = PyUnicode_InternFromString("materialize_grads");
    forward_cls = PyUnicode_InternFromString("_forward_cls");
    with_entropy = PyUnicode_InternFromString("with_entropy");
    forward_in_python = PyUnicode_InternFromString("forward_in_python");
    clone = PyUnicode_InternFromString("clone");
    inplace = PyUnicode_InternFromString("inplace");
    temperature = PyUnicode_InternFromString("temperature");
    backward = PyUnicode_InternFromString("backward");
    tensor = own(torch.attr("Tensor"));
    parameter = own(torch.attr("nn").attr("Parameter"));
    const char* const names[] = {"float32", "bfloat16", "float16", "float64"};
    for (int code = 0; code < kBool; ++code) dtypes[code] = own(torch.attr(names[code]));
    dispatch_modes = own(torch.attr("_C").attr("_len_torch_dispatch_stack"));
    functorch_level = own(torch.attr("_C").attr("_functorch").attr("peek_interpreter_stack"));
    older_vmap = own(torch.attr("_C").attr("_functorch").attr("is_legacy_batchedtensor"));
    grad_enabled = own(torch.attr("is_grad_enabled"));
    threads = own(torch.attr("get_num_threads"));
    forward_ad = own(py::module_::import("torch.autograd.forward_ad"));
    current_level = PyUnicode_InternFromString("_current_level");
    keep_graph = own(torch.attr("_C").attr("_autograd").attr("_get_current_graph_task_keep_graph"));
    negated = PyErr_NewException("rlhf_fast._C.Negated", PyExc_RuntimeError, nullptr);
    const py::object capsule = py::getattr(torch.attr("Tensor"), "__dlpack_c_exchange_api__", py::none());
    if (PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) {
      const auto* table = static_cast<DLExchange*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
      if (table->major == 1) exchange = table;
    }
  }
};

inline const Torch& torch() {
  static const Torch* instance = new Torch;
  return *instance;
}

inline py::object checked(PyObject* x) {
  if (!x) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(x);
}

inline void set(PyObject* x, PyObject* name, PyObject* value) {
  if (PyObject_SetAttr(x, name, value) != 0) throw py::error_already_set();
}

inline bool is_plain_tensor(PyObject* x) {  // no subclass, which may mean something else by its data
  return Py_TYPE(x) == (PyTypeObject*)torch().tensor || Py_TYPE(x) == (PyTypeObject*)torch().parameter;
}

// Whether x means the negative of what lies in memory, as the imaginary part of a conjugate does. torch's answer takes
// 60 ns; only what may be a part of complex numbers is asked: floating, no two elements side by side.
inline bool is_negated(PyObject* x, const DLTensor& t) {
  constexpr int kFloat = 2;
  if (t.code != kFloat) return false;
  for (int i = 0; i < t.ndim; ++i) {
    if (t.shape[i] != 1 && (!t.strides || t.strides[i] == 1)) return false;
  }
  return checked(PyObject_CallMethodNoArgs(x, torch().is_neg)).ptr() == Py_True;
}

// Whether x lies in a storage without memory: freed (FSDP: storage.resize_(0)), or never there. Its address is then its
// offset, which a slice's is not 0. torch is asked only about one that no heap is likely to have.
inline bool has_no_memory(PyObject* x, const void* address) {
  constexpr uintptr_t kUnlikely = uintptr_t{1} << 40;
  if (!address) return true;
  if (reinterpret_cast<uintptr_t>(address) >= kUnlikely) return false;
  const py::handle tensor(x);
  const auto offset = tensor.attr("storage_offset")().cast<uintptr_t>() * tensor.attr("itemsize").cast<uintptr_t>();
  return reinterpret_cast<uintptr_t>(address) == offset;
}

// False where torch has no exchange table, the tensor no memory (functorch's wrappers, autograd's zeros), or its memory
// another meaning.
inline bool read(PyObject* x, DLTensor& out) {
  if (!torch().exchange || !torch().exchange->read) return false;
  if (torch().exchange->read(x, &out) != 0) {
    PyErr_Clear();
    return false;
  }
  return (std::any_of(out.shape, out.shape + out.ndim, [](int64_t size) { return size == 0; }) ||
          !has_no_memory(x, out.address())) &&
         !is_negated(x, out);
}

// What read() did not read for that reason is given again as a copy (Op.run in ops/_dispatch.py).
inline void refuse_negated(PyObject* x) {
  if (checked(PyObject_CallMethodNoArgs(x, torch().is_neg)).ptr() != Py_True) return;
  PyErr_SetString(torch().negated, "a tensor is marked as the negative of its memory; needs x.resolve_neg()");
  throw py::error_already_set();
}

// What FSDP frees, say, keeps its shape: storage.resize_(0).
inline void refuse_freed(PyObject* x) {
  if (PyLong_AsLongLong(checked(PyObject_CallMethodNoArgs(x, torch().numel)).ptr()) == 0) return;
  throw std::runtime_error("a tensor has no memory: its storage has been freed");
}

template <class T>
bool holds(const DLTensor& t) {
  if constexpr (std::is_void_v<T>) {
    return true;
  } else if constexpr (std::is_floating_point_v<T>) {
    return t.dtype() == (sizeof(T) == 8 ? kFloat64 : kFloat32);
  } else {
    return t.dtype() == kBool && t.bits == 8 * sizeof(T);
  }
}

template <class T>
bool holds(PyObject* x) {  // the same of a tensor that read() did not read
  if constexpr (std::is_void_v<T>) {
    return true;
  } else {
    const py::object dtype = checked(PyObject_GetAttr(x, torch().dtype));
    const auto* const end = torch().dtypes + kBool;
    const int code = std::find(torch().dtypes, end, dtype.ptr()) - torch().dtypes;
    if constexpr (std::is_floating_point_v<T>) {
      return code == (sizeof(T) == 8 ? kFloat64 : kFloat32);
    } else {
      return code == kBool &&
             PyLong_AsLong(checked(PyObject_GetAttr(dtype.ptr(), torch().itemsize)).ptr()) == sizeof(T);
    }
  }
}

template <class T>
void require(bool holds) {
  if (holds) return;
  constexpr const char* kNeeded = std::is_same_v<T, float>                                      ? "float32"
                                  : std::is_same_v<T, int64_t>                                  ? "int64"
                                  : sizeof(std::conditional_t<std::is_void_v<T>, char, T>) == 8 ? "float64"
                                                                                                : "bool";
  throw py::type_error(std::string("needs ") + kNeeded + " where a tensor of another dtype is");
}

// From a tensor, None, or an address as an integer. A tensor of a smaller dtype would be read past its end.
template <class T = void>
T* address_of(PyObject* x) {
  using Element = std::remove_const_t<T>;
  if (x == Py_None) return nullptr;
  DLTensor t;
  if (is_plain_tensor(x) && read(x, t)) {
    require<Element>(holds<Element>(t));
    return static_cast<T*>(t.address());
  }
  py::object number;
  if (!PyLong_Check(x)) {
    require<Element>(holds<Element>(x));
    refuse_negated(x);
    number = checked(PyObject_CallMethodNoArgs(x, torch().data_ptr));
  }
  void* address = PyLong_AsVoidPtr(number ? number.ptr() : x);
  if (PyErr_Occurred()) throw py::error_already_set();
  if (number && has_no_memory(x, address)) refuse_freed(x);
  return static_cast<T*>(address);
}

// From a (rows, cols) tensor, a (cols,) one as a single row, or None.
inline Grid grid_of(PyObject* x) {
  if (x == Py_None) return {nullptr, 0, 0, 0};
  DLTensor t;
  if (is_plain_tensor(x) && read(x, t) && t.strides) {
    return {t.address(), t.dtype(), t.ndim == 2 ? t.strides[0] : 0, t.strides[t.ndim - 1]};
  }
  const py::object dtype = checked(PyObject_GetAttr(x, torch().dtype));
  const py::object strides = checked(PyObject_CallMethodNoArgs(x, torch().stride));
  int code = 0;
  while (code < kBool && dtype.ptr() != torch().dtypes[code]) ++code;
  const auto stride = [&](py::ssize_t axis) { return PyLong_AsLongLong(PyTuple_GET_ITEM(strides.ptr(), axis)); };
  const py::ssize_t axes = PyTuple_GET_SIZE(strides.ptr());
  return {address_of(x), code, axes == 2 ? stride(0) : 0, stride(axes - 1)};
}

template <class T>
T from_python(PyObject* x) {
  if constexpr (std::is_same_v<T, Grid>) {
    return grid_of(x);
  } else if constexpr (std::is_same_v<T, Matrix>) {
    const Grid grid = x == Py_None ? throw py::type_error("needs a matrix where None is") : grid_of(x);
    if (grid.dtype > kBFloat16) throw py::type_error("needs float32 or bfloat16 where a tensor of another dtype is");
    return {grid.data, grid.dtype};
  } else if constexpr (std::is_same_v<T, LayerWeights>) {  // a tuple of its members
    if (!PyTuple_Check(x) || PyTuple_GET_SIZE(x) != 15) throw py::type_error("needs the weights of a layer");
    T w;
    Py_ssize_t next = 0;
    const auto fill = [&](auto&... members) {
      ((members = from_python<std::remove_reference_t<decltype(members)>>(PyTuple_GET_ITEM(x, next++))), ...);
    };
    fill(w.norm, w.q, w.k, w.v, w.q_bias, w.k_bias, w.v_bias, w.q_norm, w.k_norm, w.output, w.output_bias, w.mlp_norm,
         w.gate, w.up, w.down);
    for (const Matrix& other : {w.k, w.v, w.output, w.gate, w.up, w.down}) {
      if (other.dtype != w.q.dtype) throw py::type_error("needs the matrices of a layer in one dtype");
    }
    return w;
  } else if constexpr (std::is_pointer_v<T>) {
    return address_of<std::remove_pointer_t<T>>(x);
  } else if constexpr (std::is_floating_point_v<T>) {
    const double value = PyFloat_AsDouble(x);
    if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
    return value;
  } else {
    const int64_t value = PyLong_AsLongLong(x);
    if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
    return static_cast<T>(value);
  }
}

inline PyObject* as_bool(bool x) { return PyBool_FromLong(x); }

// (ndim, needed, mask, *tensors): whether the first `needed` tensors are not None, and all that are not None are plain
// tensors of one shape and device, with ndim axes (-1: any number) and, except for the mask, a floating dtype. False
// may also mean that this function cannot tell.
inline PyObject* alike(PyObject* const* given, Py_ssize_t count) {
  if (count < 3) throw py::type_error("needs ndim, needed, mask and tensors");
  const long ndim = PyLong_AsLong(given[0]), needed = PyLong_AsLong(given[1]);
  if (PyErr_Occurred()) throw py::error_already_set();
  PyObject *const mask = given[2], *const *const tensors = given + 3, *const *const end = given + count;
  DLTensor first, other;
  bool begun = false;
  const auto fits = [&](PyObject* x, bool floating) {
    if (x == Py_None) return true;
    DLTensor& t = begun ? other : first;
    if (!is_plain_tensor(x) || !read(x, t) || (floating && t.dtype() == kBool)) return false;
    if (!begun) return (begun = true) && (ndim < 0 || t.ndim == ndim);
    return t.ndim == first.ndim && t.device_type == first.device_type && t.device_id == first.device_id &&
           std::equal(t.shape, t.shape + t.ndim, first.shape);
  };
  return as_bool(std::find(tensors, std::min(tensors + needed, end), Py_None) == std::min(tensors + needed, end) &&
                 std::all_of(tensors, end, [&](PyObject* x) { return fits(x, true); }) && fits(mask, false));
}

// (logits, labels, mask): whether these are plain tensors on one device: floating logits (..., V) with 0 < V <= 2^30,
// int64 labels (...), and a mask (...) or None. False may also mean that this function cannot tell.
inline PyObject* labelled(PyObject* const* given, Py_ssize_t count) {
  if (count != 3) throw py::type_error("needs logits, labels and mask");
  PyObject *const logits = given[0], *const labels = given[1], *const mask = given[2];
  DLTensor rows, other;
  const auto fits = [&](PyObject* x) {
    return is_plain_tensor(x) && read(x, other) && other.ndim == rows.ndim - 1 &&
           other.device_type == rows.device_type && other.device_id == rows.device_id &&
           std::equal(other.shape, other.shape + other.ndim, rows.shape);
  };
  if (!is_plain_tensor(logits) || !read(logits, rows) || rows.dtype() == kBool || rows.ndim == 0) return as_bool(false);
  const int64_t vocab = rows.shape[rows.ndim - 1];
  if (vocab < 1 || vocab > int64_t{1} << 30) return as_bool(false);
  if (!fits(labels) || other.code != 0 || other.bits != 64) return as_bool(false);
  return as_bool(mask == Py_None || fits(mask));
}

// The way of a call into an op (ops/_native.py).
enum Route : int { kLibrary = 0, kKernel = 1, kFunction = 2 };

inline bool nobody_watches() {  // no dispatch mode, no functorch, no forward-mode derivative
  const py::object modes = checked(PyObject_CallNoArgs(torch().dispatch_modes));
  const py::object level = checked(PyObject_GetAttr(torch().forward_ad, torch().current_level));  // or -1
  return PyLong_AsLong(modes.ptr()) == 0 && PyLong_AsLong(level.ptr()) < 0 &&
         checked(PyObject_CallNoArgs(torch().functorch_level)).is_none();
}

inline bool is_true(PyObject* function) { return checked(PyObject_CallNoArgs(function)).ptr() == Py_True; }

// Whether a kernel may have x in a backward. Those of PyTorch's older vmap (is_grads_batched) look plain and have no
// memory.
inline bool is_readable(PyObject* x) {
  DLTensor t;
  if (torch().exchange) return read(x, t);
  return checked(PyObject_CallOneArg(torch().older_vmap, x)).ptr() != Py_True &&
         checked(PyObject_CallMethodNoArgs(x, torch().is_neg)).ptr() != Py_True;
}

// (*arguments). kKernel: all are plain tensors, numbers or None, and nobody watches. kFunction: so they are, and a
// gradient is wanted.
template <bool kInBackward>
Route route_of(PyObject* const* given, Py_ssize_t count) {
  const bool recording = is_true(torch().grad_enabled);
  bool differentiable = false;
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* const x = given[i];
    const PyTypeObject* type = Py_TYPE(x);
    if (is_plain_tensor(x)) {
      if (kInBackward && !is_readable(x)) return kLibrary;
      if (recording && !differentiable) {
        differentiable = checked(PyObject_GetAttr(x, torch().requires_grad)).ptr() == Py_True;
      }
    } else if (type != &PyFloat_Type && type != &PyLong_Type && type != &PyBool_Type && x != Py_None) {
      return kLibrary;
    }
  }
  if (!nobody_watches()) return kLibrary;
  return differentiable ? kFunction : kKernel;
}

template <bool kInBackward>
PyObject* route(PyObject* const* given, Py_ssize_t count) {
  return PyLong_FromLong(route_of<kInBackward>(given, count));
}

// What a backward may do with its saved outputs: kShared: nothing, others may see them or need them again. kOwn: write
// over them. kAsTheyAre: the same, and they need no scaling, because the gradient that came in is 1.
enum Consume : int { kShared = 0, kOwn = 1, kAsTheyAre = 2 };

// (gradient that came in, *saved outputs), of which may be None.
inline Consume consumable(PyObject* const* given, Py_ssize_t count) {
  if (is_true(torch().grad_enabled) || is_true(torch().keep_graph)) return kShared;  // create_graph, retain_graph
  if (route_of<true>(given, count) == kLibrary) return kShared;
  DLTensor g;
  if (count == 0 || !is_plain_tensor(given[0]) || !read(given[0], g)) return kOwn;
  if (g.device_type != 1 || g.ndim != 0) return kOwn;
  const void* const data = g.address();
  const bool one = g.dtype() == kFloat32   ? *static_cast<const float*>(data) == 1
                   : g.dtype() == kFloat64 ? *static_cast<const double*>(data) == 1
                                           : false;
  return one ? kAsTheyAre : kOwn;
}

inline PyObject* consume(PyObject* const* given, Py_ssize_t count) { return PyLong_FromLong(consumable(given, count)); }

}  // namespace rlhf
