// token_logprobs in one call: outputs and kernel. On tiny tensors, arranging both in Python takes longer than they do.
#pragma once
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

// What both directions read. bool(): whether all of it is contiguous and on a CPU.
struct LabelledRows {
  DLTensor logits, labels, mask;
  bool readable, masked;
  int64_t rows = 1, vocab = 0;

  LabelledRows(PyObject* x, PyObject* y, PyObject* m) : masked(m != Py_None) {
    constexpr int kDLBool = 6;
    readable = read_contiguous(x, logits) && read_contiguous(y, labels) && logits.ndim == labels.ndim + 1 &&
               holds<int64_t>(labels) &&
               (!masked || (read_contiguous(m, mask) && mask.code == kDLBool && holds<uint8_t>(mask)));
    if (!readable) return;
    for (int i = 0; i < labels.ndim; ++i) rows *= labels.shape[i];
    vocab = logits.shape[labels.ndim];
  }

  int accumulator() const { return logits.dtype() == kFloat64 ? kFloat64 : kFloat32; }
  const int64_t* label() const { return static_cast<const int64_t*>(labels.address()); }
  const uint8_t* counts() const { return masked ? static_cast<const uint8_t*>(mask.address()) : nullptr; }
};

// (keep_from, logits, labels, mask, temperature, with_entropy, threads) -> (logprobs, entropy or None, saved) of
// CpuOps::token_logprobs_forward, or the row that it refuses. None: Python has to arrange the arguments.
inline PyObject* token_logprobs(PyObject* const* given, Py_ssize_t count) {
  if (count != 7) throw py::type_error("needs 7 arguments");
  const LabelledRows in(given[1], given[2], given[3]);
  if (!in.readable) Py_RETURN_NONE;
  const auto keep_from = from_python<size_t>(given[0]);
  const auto temperature = from_python<double>(given[4]);
  const auto threads = from_python<int>(given[6]);
  const py::object two = checked(PyLong_FromLong(2)), pairs = checked(PyTuple_Pack(2, given[2], two.ptr()));
  const py::object logprobs = empty(given[2], in.accumulator(), keep_from);
  const py::object entropy = given[5] == Py_True ? empty(given[2], in.accumulator(), keep_from) : py::none();
  const py::object saved = empty(pairs.ptr(), in.accumulator(), keep_from);
  if (!logprobs || !entropy || !saved) Py_RETURN_NONE;
  void *const a = address_of(logprobs.ptr()), *const b = address_of(entropy.ptr()), *const c = address_of(saved.ptr());
  const auto run = [&] {
    py::gil_scoped_release release;
    return cpu_isa().ops.token_logprobs_forward(in.logits.address(), in.logits.dtype(), in.rows, in.vocab, 1, in.vocab,
                                                0, in.label(), in.counts(), temperature, a, b, c, threads);
  };
  const int64_t refused = run();
  if (refused >= 0) return PyLong_FromLongLong(refused);
  return PyTuple_Pack(3, logprobs.ptr(), entropy.ptr(), saved.ptr());
}

// (keep_from, logits, labels, mask, temperature, saved, entropy, grad_logprobs, grad_entropy, threads) -> the gradient
// of CpuOps::token_logprobs_backward. None: as above.
inline PyObject* token_logprobs_gradient(PyObject* const* given, Py_ssize_t count) {
  if (count != 10) throw py::type_error("needs 10 arguments");
  const LabelledRows in(given[1], given[2], given[3]);
  if (!in.readable) Py_RETURN_NONE;
  const void* read[4];
  for (int i = 0; i < 4; ++i) {
    DLTensor t;
    PyObject* const x = given[5 + i];
    if (x != Py_None && !read_contiguous(x, t)) Py_RETURN_NONE;
    if (x != Py_None && t.dtype() != in.accumulator()) throw py::type_error("needs gradients of the outputs' dtype");
    read[i] = x == Py_None ? nullptr : t.address();
  }
  const auto temperature = from_python<double>(given[4]);
  const auto threads = from_python<int>(given[9]);
  py::object grad = empty(given[1], in.logits.dtype(), from_python<size_t>(given[0]));
  if (!grad) Py_RETURN_NONE;
  void* const out = address_of(grad.ptr());
  {
    py::gil_scoped_release release;
    cpu_isa().ops.token_logprobs_backward(in.logits.address(), in.logits.dtype(), in.rows, in.vocab, 1, in.vocab, 0,
                                          in.label(), in.counts(), temperature, read[0], read[1], read[2], read[3], out,
                                          in.vocab, in.vocab, threads);
  }
  return grad.release().ptr();
}

}  // namespace rlhf
