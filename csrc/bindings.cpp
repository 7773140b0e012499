// Python sees every op of ops.h under its own name: _C.token_logprobs_forward(...),
// _C.cuda.token_logprobs_forward(...). Pointers arrive as integers. The GIL is released while a kernel runs.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <type_traits>

#include "ops.h"

namespace py = pybind11;

namespace pybind11::detail {

template <>
struct type_caster<rlhf::Grid> {
  PYBIND11_TYPE_CASTER(rlhf::Grid, const_name("tuple[int, int, int, int]"));

  bool load(handle source, bool) {
    if (!PyTuple_Check(source.ptr()) || PyTuple_GET_SIZE(source.ptr()) != 4) return false;
    const auto item = [&](int i) { return PyLong_AsLongLong(PyTuple_GET_ITEM(source.ptr(), i)); };
    value = {reinterpret_cast<const void*>(item(0)), int(item(1)), item(2), item(3)};
    if (PyErr_Occurred()) throw error_already_set();
    return true;
  }
};

}  // namespace pybind11::detail

namespace {

template <class T>
using FromPython = std::conditional_t<std::is_pointer_v<T>, std::uintptr_t, T>;

template <class T>
T argument(FromPython<T> value) {
  if constexpr (std::is_pointer_v<T>) {
    return reinterpret_cast<T>(value);
  } else {
    return value;
  }
}

// The pointer is looked up at each call, so that use_isa() takes effect.
template <auto op, class... Args>
void bind_cpu(py::module_& m, const char* name, int64_t (*)(Args...)) {
  m.def(name, [](FromPython<Args>... args) {
    auto* kernel = rlhf::cpu_isa().ops.*op;
    py::gil_scoped_release release;
    return kernel(argument<Args>(args)...);
  });
}

#ifdef RLHF_CUDA
template <class... Args>
void bind_cuda(py::module_& m, const char* name, int (*kernel)(Args...)) {
  m.def(name, [kernel](FromPython<Args>... args) {
    py::gil_scoped_release release;
    return kernel(argument<Args>(args)...);
  });
}
#endif

}  // namespace

#ifdef RLHF_CUDA
namespace rlhf::cuda {
#define DECLARE(op) std::remove_pointer_t<decltype(CudaOps::op)> op;
RLHF_CUDA_OPS(DECLARE)
#undef DECLARE
}  // namespace rlhf::cuda
#endif

PYBIND11_MODULE(_C, m) {
#define BIND(op) bind_cpu<&rlhf::CpuOps::op>(m, #op, rlhf::CpuOps{}.op);
  RLHF_CPU_OPS(BIND)
#undef BIND

  m.def("isa", [] { return std::string(rlhf::cpu_isa().name); });
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
  m.attr("version") = RLHF_VERSION;
#ifdef RLHF_CUDA
  m.attr("cuda_version") = RLHF_CUDA;  // of the nvcc that built this module
  m.attr("cuda_architectures") = RLHF_CUDA_ARCHITECTURES;
  py::module_ cuda = m.def_submodule("cuda");
#define BIND(op) bind_cuda(cuda, #op, &rlhf::cuda::op);
  RLHF_CUDA_OPS(BIND)
#undef BIND
#else
  m.attr("cuda_version") = py::none();
#endif
}
