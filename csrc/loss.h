// A loss whose kernel also computes its gradients, in one call, and the forward and backward of its autograd.Function,
// all without Python code.
#pragma once
#include <array>

#include "memory.h"

namespace rlhf {

// (*arguments of the kernel up to its dtype, number of statistics, *whether each gradient is wanted, threads) ->
// (loss, statistics, *gradients or None). None: Python must allocate the outputs. kernel takes the arguments of the op
// in CpuOps.
template <size_t kGradients, size_t kArguments, class Kernel>
PyObject* made_loss(PyObject* const* given, Py_ssize_t count, Kernel kernel) {
  constexpr size_t kOutputs = 2 + kGradients, kBefore = kArguments - kOutputs - 2;  // without dtype and threads
  if (count != kBefore + kOutputs) throw py::type_error("needs another number of arguments");
  DLTensor like;
  if (!is_plain_tensor(given[0]) || !read(given[0], like) || like.device_type != 1) Py_RETURN_NONE;
  const int dtype = like.dtype() == kFloat64 ? kFloat64 : kFloat32;
  PyObject* const* const shapes = given + kBefore;  // of statistics and gradients
  py::object outputs = checked(PyTuple_New(kOutputs)), scalar = checked(PyTuple_New(0));
  std::array<PyObject*, kArguments> all;
  std::copy(given, given + kBefore, all.begin());
  for (size_t i = 0; i < kOutputs; ++i) {
    PyObject* const shape = i == 0 ? scalar.ptr() : i == 1 ? shapes[0] : given[0];
    py::object one = i > 1 && shapes[i - 1] != Py_True ? py::none() : empty(shape, dtype);
    if (!one) Py_RETURN_NONE;
    all[kBefore + 1 + i] = one.ptr();
    PyTuple_SET_ITEM(outputs.ptr(), i, one.release().ptr());
  }
  const py::object code = checked(PyLong_FromLong(dtype));
  all[kBefore] = code.ptr();
  all.back() = given[count - 1];
  checked(kernel(all.data(), all.size()));
  return outputs.release().ptr();
}

// The forward of its autograd.Function: (ctx, *n inputs, outputs) -> the loss. The last n outputs are the gradients.
inline PyObject* keep_gradients(PyObject* const* given, Py_ssize_t count) {
  if (count < 3 || !PyTuple_Check(given[count - 1])) throw py::type_error("needs ctx, inputs and outputs");
  PyObject *const ctx = given[0], *const outputs = given[count - 1];
  const Py_ssize_t size = PyTuple_GET_SIZE(outputs), n = count - 2;
  if (size <= n) throw py::type_error("needs a gradient for each input");
  const py::object gradients = checked(PyTuple_GetSlice(outputs, size - n, size));
  set(ctx, torch().to_save, gradients.ptr());
  set(ctx, torch().materialize_grads, Py_False);
  PyObject* const loss = PyTuple_GET_ITEM(outputs, 0);
  Py_INCREF(loss);
  return loss;
}

// Its backward: (ctx, gradient of the loss) -> (*gradients, None). They are returned unchanged if the gradient of the
// loss is 1 and nothing else holds them, as in loss.backward(). Otherwise this calls the backward that is written in
// Python (ops/_autograd.py) and passes it the saved tensors, because a checkpoint lets them be read only once.
inline PyObject* give_gradients(PyObject* const* given, Py_ssize_t count) {
  if (count != 2) throw py::type_error("needs ctx and one gradient");
  const py::object saved = checked(PyObject_GetAttr(given[0], torch().saved_tensors));
  constexpr Py_ssize_t kMost = 4;
  const Py_ssize_t n = PyTuple_Check(saved.ptr()) ? PyTuple_GET_SIZE(saved.ptr()) : kMost;
  if (n >= kMost) throw py::type_error("needs fewer gradients");
  std::array<PyObject*, kMost> all{given[1]};
  for (Py_ssize_t i = 0; i < n; ++i) all[i + 1] = PyTuple_GET_ITEM(saved.ptr(), i);
  if (consumable(all.data(), n + 1) != kAsTheyAre) {
    const py::object function = checked(PyObject_GetAttr(given[0], torch().forward_cls));
    return PyObject_CallMethodObjArgs(function.ptr(), torch().backward, given[0], given[1], saved.ptr(), nullptr);
  }
  py::object out = checked(PyTuple_New(n + 1));
  for (Py_ssize_t i = 0; i <= n; ++i) {
    PyObject* const one = i < n ? all[i + 1] : Py_None;
    Py_INCREF(one);
    PyTuple_SET_ITEM(out.ptr(), i, one);
  }
  return out.release().ptr();
}

}  // namespace rlhf
