// token_logprobs and its backward, each in one call that allocates the outputs and runs the kernel. On tiny tensors,
// doing this in Python takes longer than the kernel.
#pragma once
#include <functional>
#include <numeric>

#include "memory.h"

namespace rlhf {

// A plain, contiguous CPU tensor.
inline bool read_contiguous(PyObject* x, DLTensor& t) {
  if (!is_plain_tensor(x) || !read(x, t) || t.device_type != 1 || (t.ndim > 0 && !t.strides)) return false;
  int64_t stride = 1;
  for (int i = t.ndim; i-- > 0; stride *= t.shape[i]) {
    if (t.shape[i] != 1 && t.strides[i] != stride) return false;
  }
  return true;
}

inline int64_t elements(const DLTensor& t) {
  return std::accumulate(t.shape, t.shape + t.ndim, int64_t{1}, std::multiplies<>());
}

// The inputs of both directions. readable: whether all of them are contiguous and on a CPU.
struct LabelledRows {
  DLTensor logits, labels, mask;
  bool readable, masked;
  int64_t rows = 0, vocab = 0;

  LabelledRows(PyObject* x, PyObject* y, PyObject* m) : masked(m != Py_None) {
    constexpr int kDLBool = 6;
    readable = read_contiguous(x, logits) && read_contiguous(y, labels) && logits.ndim == labels.ndim + 1 &&
               std::equal(labels.shape, labels.shape + labels.ndim, logits.shape) && holds<int64_t>(labels) &&
               (!masked || (read_contiguous(m, mask) && mask.code == kDLBool && holds<uint8_t>(mask) &&
                            elements(mask) == elements(labels)));
    if (!readable) return;
    rows = elements(labels);
    vocab = logits.shape[labels.ndim];
  }

  int accumulator() const { return logits.dtype() == kFloat64 ? kFloat64 : kFloat32; }
  const int64_t* label() const { return static_cast<const int64_t*>(labels.address()); }
  const uint8_t* counts() const { return masked ? static_cast<const uint8_t*>(mask.address()) : nullptr; }
};

constexpr Py_ssize_t kSaved = 5;  // logits, labels, mask, entropy, saved

inline int threads() { return from_python<int>(checked(PyObject_CallNoArgs(torch().threads)).ptr()); }

// (logits, labels, mask, temperature, with_entropy) -> (logprobs, entropy or None, saved) of
// CpuOps::token_logprobs_forward, or the number of the row that it refuses. None: Python must prepare the arguments.
inline PyObject* token_logprobs(PyObject* const* given, Py_ssize_t count) {
  if (count != 5) throw py::type_error("needs 5 arguments");
  const LabelledRows in(given[0], given[1], given[2]);
  if (!in.readable) Py_RETURN_NONE;
  const auto temperature = from_python<double>(given[3]);
  const int team = threads();
  const py::object two = checked(PyLong_FromLong(2)), pairs = checked(PyTuple_Pack(2, given[1], two.ptr()));
  const py::object logprobs = empty(given[1], in.accumulator());
  const py::object entropy = given[4] == Py_True ? empty(given[1], in.accumulator()) : py::none();
  const py::object saved = empty(pairs.ptr(), in.accumulator());
  if (!logprobs || !entropy || !saved) Py_RETURN_NONE;
  void *const a = address_of(logprobs.ptr()), *const b = address_of(entropy.ptr()), *const c = address_of(saved.ptr());
  const auto run = [&] {
    py::gil_scoped_release release;
    return cpu_isa().ops.token_logprobs_forward(in.logits.address(), in.logits.dtype(), in.rows, in.vocab, 1, in.vocab,
                                                0, in.label(), in.counts(), temperature, a, b, c, team);
  };
  const int64_t refused = run();
  if (refused >= 0) return PyLong_FromLongLong(refused);
  return PyTuple_Pack(3, logprobs.ptr(), entropy.ptr(), saved.ptr());
}

// The forward of its autograd.Function: (ctx, logits, labels, mask, (*arguments of the op)) -> (logprobs, entropy,
// (saved,)). If Python must prepare the arguments or refuse a label, this calls the forward that is written in Python.
inline PyObject* token_logprobs_and_save(PyObject* const* given, Py_ssize_t count) {
  constexpr Py_ssize_t kArguments = 6;
  if (count != 5 || !PyTuple_Check(given[4]) || PyTuple_GET_SIZE(given[4]) != kArguments) {
    throw py::type_error("needs ctx, three tensors and the arguments of the op");
  }
  const Torch& names = torch();
  PyObject *const ctx = given[0], *const *const arguments = PySequence_Fast_ITEMS(given[4]);
  const py::object outputs = checked(token_logprobs(arguments, kArguments - 1));
  if (!PyTuple_Check(outputs.ptr())) {
    const py::object function = checked(PyObject_GetAttr(ctx, names.forward_cls));
    return PyObject_CallMethodObjArgs(function.ptr(), names.forward_in_python, ctx, given[1], given[2], given[3],
                                      given[4], nullptr);
  }
  PyObject* const* const made = PySequence_Fast_ITEMS(outputs.ptr());  // logprobs, entropy, saved
  // A copy, because users may change the result in place.
  const py::object entropy = made[1] == Py_None ? py::none() : checked(PyObject_CallMethodNoArgs(made[1], names.clone));
  const py::object to_save = checked(PyTuple_Pack(kSaved, given[1], given[2], given[3], entropy.ptr(), made[2]));
  set(ctx, names.to_save, to_save.ptr());
  set(ctx, names.materialize_grads, Py_False);
  set(ctx, names.temperature, arguments[3]);
  set(ctx, names.with_entropy, arguments[4]);
  set(ctx, names.inplace, arguments[5]);
  const py::object hidden = checked(PyTuple_Pack(1, made[2]));
  return PyTuple_Pack(3, made[0], made[1], hidden.ptr());
}

// (logits, labels, mask, entropy, saved, gradient of logprobs, gradient of entropy) -> gradient of the logits, by
// CpuOps::token_logprobs_backward; null if Python must prepare the arguments or refuse something.
inline py::object gradient_of(PyObject* const* given, double temperature) {
  const LabelledRows in(given[0], given[1], given[2]);
  if (!in.readable) return {};
  constexpr int kSavedPlace = 1;
  const void* read[4];
  for (int i = 0; i < 4; ++i) {
    DLTensor t;
    PyObject* const x = given[3 + i];
    const int64_t size = in.rows * (i == kSavedPlace ? 2 : 1);
    if (x != Py_None && (!read_contiguous(x, t) || t.dtype() != in.accumulator() || elements(t) != size)) return {};
    read[i] = x == Py_None ? nullptr : t.address();
  }
  const auto [entropy, saved, grad_logprobs, grad_entropy] = read;
  const int team = threads();
  py::object grad = empty(given[0], in.logits.dtype());
  if (!grad) return {};
  void* const out = address_of(grad.ptr());
  int64_t refused;
  {
    py::gil_scoped_release release;
    refused = cpu_isa().ops.token_logprobs_backward(in.logits.address(), in.logits.dtype(), in.rows, in.vocab, 1,
                                                    in.vocab, 0, in.label(), in.counts(), temperature, saved, entropy,
                                                    grad_logprobs, grad_entropy, out, in.vocab, in.vocab, team);
  }
  return refused < 0 ? grad : py::object();
}

// The backward of its autograd.Function: (ctx, gradients of logprobs and entropy, None) -> (gradient of logits, *None).
// If the gradient is to be written in place or to be differentiated (create_graph), or a mode is active, this calls the
// backward that is written in Python (token_logprobs.py) and passes it the saved tensors, because a checkpoint lets
// them be read only once.
inline PyObject* token_logprobs_gradient(PyObject* const* given, Py_ssize_t count) {
  if (count != 4) throw py::type_error("needs ctx and three gradients");
  const Torch& names = torch();
  PyObject* const ctx = given[0];
  const py::object saved = checked(PyObject_GetAttr(ctx, names.saved_tensors));
  if (!PyTuple_Check(saved.ptr()) || PyTuple_GET_SIZE(saved.ptr()) != kSaved) {
    throw py::type_error("needs what its forward saves");
  }
  PyObject* all[kSaved + 2];
  std::copy_n(PySequence_Fast_ITEMS(saved.ptr()), kSaved, all);
  std::copy_n(given + 1, 2, all + kSaved);
  const int inplace = PyObject_IsTrue(checked(PyObject_GetAttr(ctx, names.inplace)).ptr());
  if (inplace < 0) throw py::error_already_set();
  if (!inplace && !is_true(names.grad_enabled) && route_of<true>(all, kSaved + 2) == kKernel) {
    const py::object temperature = checked(PyObject_GetAttr(ctx, names.temperature));
    const py::object grad = gradient_of(all, from_python<double>(temperature.ptr()));
    if (grad) return PyTuple_Pack(4, grad.ptr(), Py_None, Py_None, Py_None);
  }
  const py::object function = checked(PyObject_GetAttr(ctx, names.forward_cls));
  return PyObject_CallMethodObjArgs(function.ptr(), names.backward, ctx, given[1], given[2], saved.ptr(), nullptr);
}

}  // namespace rlhf
