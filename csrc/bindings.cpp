// Python sees every op of ops.h under its own name: _C.token_logprobs_forward(...),
// _C.cuda.token_logprobs_forward(...). Tensors arrive as themselves. The GIL is released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "loss.h"
#include "ops.h"
#include "rows.h"
#include "tensor.h"

namespace py = pybind11;

namespace {

// A member of CpuOps is looked up at each call, so that use_isa() takes effect; a CUDA op is itself.
template <auto op>
auto kernel() {
  if constexpr (std::is_member_object_pointer_v<decltype(op)>) {
    return rlhf::cpu_isa().ops.*op;
  } else {
    return op;
  }
}

template <auto op, class... Args, size_t... I>
PyObject* call(PyObject* const* given, Py_ssize_t count, std::index_sequence<I...>) {
  if (count != sizeof...(Args)) throw py::type_error("needs " + std::to_string(sizeof...(Args)) + " arguments");
  const std::tuple<Args...> args{rlhf::from_python<Args>(given[I])...};
  const auto run = [&] {
    py::gil_scoped_release release;
    return std::apply(kernel<op>(), args);
  };
  return PyLong_FromLongLong(run());
}

using FastCall = PyObject* (*)(PyObject* const* given, Py_ssize_t count);

template <FastCall function>
PyObject* guarded(PyObject*, PyObject* const* given, Py_ssize_t count) {
  try {
    return function(given, count);
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {  // torch's own too, which its C functions let through
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

template <auto op, class... Args>
PyObject* entry(PyObject* const* given, Py_ssize_t count) {
  return call<op, Args...>(given, count, std::index_sequence_for<Args...>{});
}

template <auto op, size_t gradients, class... Args>
PyObject* loss_entry(PyObject* const* given, Py_ssize_t count) {
  return rlhf::made_loss<gradients, sizeof...(Args)>(given, count, entry<op, Args...>);
}

// Not through m.def: its look for an overload takes longer than the smallest kernels.
template <FastCall function>
void bind(py::module_& m, const char* name) {
  static PyMethodDef method{name, nullptr, METH_FASTCALL, nullptr};
  method.ml_meth = reinterpret_cast<PyCFunction>(&guarded<function>);
  m.attr(name) = rlhf::checked(PyCFunction_New(&method, nullptr));
}

template <auto op, class Result, class... Args>
void bind_op(py::module_& m, const char* name, Result (*)(Args...)) {
  bind<entry<op, Args...>>(m, name);
}

template <auto op, size_t gradients, class Result, class... Args>
void bind_loss(py::module_& m, const char* name, Result (*)(Args...)) {
  bind<loss_entry<op, gradients, Args...>>(m, name);
}

}  // namespace

#ifdef RLHF_CUDA
namespace rlhf::cuda {
#define DECLARE(op) std::remove_pointer_t<decltype(CudaOps::op)> op;
RLHF_CUDA_OPS(DECLARE)
#undef DECLARE
}  // namespace rlhf::cuda
#endif

PYBIND11_MODULE(_C, m) {
#define BIND(op) bind_op<&rlhf::CpuOps::op>(m, #op, rlhf::CpuOps{}.op);
  RLHF_CPU_OPS(BIND)
#undef BIND
#define BIND(op, gradients) bind_loss<&rlhf::CpuOps::op, gradients>(m, #op "_made", rlhf::CpuOps{}.op);
  BIND(ppo_loss, 2)
  BIND(value_loss, 1)
  BIND(pairwise_loss, 2)
  BIND(ranking_loss, 1)
#undef BIND

  m.attr("interface") = 14;  // another number where a function takes other arguments (rlhf_fast/ops/_native.py)
  m.attr("Negated") = py::reinterpret_borrow<py::object>(rlhf::torch().negated);
  bind<rlhf::alike>(m, "alike");
  bind<rlhf::labelled>(m, "labelled");
  bind<rlhf::route<false>>(m, "route");
  bind<rlhf::route<true>>(m, "route_in_backward");
  bind<rlhf::consume>(m, "consume");
  bind<rlhf::empties>(m, "empties");
  bind<rlhf::keep_gradients>(m, "keep_gradients");
  bind<rlhf::give_gradients>(m, "give_gradients");
  bind<rlhf::token_logprobs>(m, "token_logprobs");
  bind<rlhf::token_logprobs_and_save>(m, "token_logprobs_and_save");
  bind<rlhf::token_logprobs_gradient>(m, "token_logprobs_gradient");
  for (const char* of_ctx : {"give_gradients", "token_logprobs_gradient"}) {  // which is their self
    m.attr(of_ctx) = rlhf::checked(PyInstanceMethod_New(m.attr(of_ctx).ptr()));
  }
  m.def("empty_cache", [] { return rlhf::kept_memory().empty(); });
  m.def("keep_from", [](size_t bytes) { return std::exchange(rlhf::kept_memory().from, bytes); });  // -> what it was

  m.def("isa", [] {  // the one in use: where Linux refuses AMX's tiles, products are those of avx512
    const rlhf::CpuIsa& isa = rlhf::cpu_isa();
    return std::string(isa.tiles && !rlhf::may_use_tiles() ? "avx512" : isa.name);
  });
  m.def("isas", [] {  // name -> whether this CPU runs it
    int count;
    const rlhf::CpuIsa* isas = rlhf::cpu_isas(&count);
    py::dict supported;
    for (int i = 0; i < count; ++i) supported[isas[i].name] = isas[i].supported;
    return supported;
  });
  m.def("use_isa", [](const std::string& name) {
    if (!rlhf::use_cpu_isa(name.c_str())) throw py::value_error("no code for " + name + " that this CPU runs");
  });

  m.attr("compiler") = RLHF_COMPILER;
  m.attr("cuda_choice") = RLHF_CUDA_CHOICE;  // "yes: nvcc", or "no: why not"
  m.attr("version") = RLHF_VERSION;
#ifdef RLHF_CUDA
  m.attr("cuda_version") = RLHF_CUDA;  // of the nvcc that built this module
  m.attr("cuda_architectures") = RLHF_CUDA_ARCHITECTURES;
  py::module_ cuda = m.def_submodule("cuda");
  cuda.attr("scratch_doubles") = rlhf::kCudaScratch;
#define BIND(op) bind_op<&rlhf::cuda::op>(cuda, #op, &rlhf::cuda::op);
  RLHF_CUDA_OPS(BIND)
#undef BIND
#else
  m.attr("cuda_version") = py::none();
#endif
}
