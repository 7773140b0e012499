// Python sees every op of ops.h under its own name: _C.token_logprobs_forward(...),
// _C.cuda.token_logprobs_forward(...). Tensors arrive as themselves. The GIL is released while a kernel runs.
#include <pybind11/pybind11.h>

#include <string>
#include <type_traits>

#include "ops.h"

namespace py = pybind11;

namespace {

// A tensor is read through its Python attributes: building needs no torch, and one build serves every torch.
struct {
  PyObject *data_ptr, *dtype, *stride;  // interned names
  PyObject* dtypes[4];                  // torch.float32, ... in the order of DType
} attributes;

py::object attribute(py::handle tensor, PyObject* name) {
  PyObject* value = PyObject_GetAttr(tensor.ptr(), name);
  if (!value) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}

py::object method(py::handle tensor, PyObject* name) {
  PyObject* value = PyObject_CallMethodNoArgs(tensor.ptr(), name);
  if (!value) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}

// From a tensor, None, or an address as an integer.
struct Address {
  void* value;
};

void* address_of(py::handle source) {
  if (source.is_none()) return nullptr;
  void* value = PyLong_AsVoidPtr(PyLong_Check(source.ptr()) ? source.ptr() : method(source, attributes.data_ptr).ptr());
  if (PyErr_Occurred()) throw py::error_already_set();
  return value;
}

// From a (rows, cols) tensor, a (cols,) one as a single row, or None.
rlhf::Grid grid_of(py::handle source) {
  if (source.is_none()) return {nullptr, 0, 0, 0};
  const py::object dtype = attribute(source, attributes.dtype), strides = method(source, attributes.stride);
  int code = 0;
  while (code < rlhf::kBool && dtype.ptr() != attributes.dtypes[code]) ++code;
  const auto stride = [&](py::ssize_t axis) { return PyLong_AsLongLong(PyTuple_GET_ITEM(strides.ptr(), axis)); };
  const py::ssize_t axes = PyTuple_GET_SIZE(strides.ptr());
  return {address_of(source), code, axes == 2 ? stride(0) : 0, stride(axes - 1)};
}

}  // namespace

namespace pybind11::detail {

template <>
struct type_caster<rlhf::Grid> {
  PYBIND11_TYPE_CASTER(rlhf::Grid, const_name("Tensor | None"));
  bool load(handle source, bool) {
    value = grid_of(source);
    return true;
  }
};

template <>
struct type_caster<Address> {
  PYBIND11_TYPE_CASTER(Address, const_name("Tensor | int | None"));
  bool load(handle source, bool) {
    value = {address_of(source)};
    return true;
  }
};

}  // namespace pybind11::detail

namespace {

template <class T>
using FromPython = std::conditional_t<std::is_pointer_v<T>, Address, T>;

template <class T>
T argument(FromPython<T> value) {
  if constexpr (std::is_pointer_v<T>) {
    return static_cast<T>(value.value);
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
  const py::module_ torch = py::module_::import("torch");
  attributes = {PyUnicode_InternFromString("data_ptr"), PyUnicode_InternFromString("dtype"),
                PyUnicode_InternFromString("stride")};
  const char* const dtypes[] = {"float32", "bfloat16", "float16", "float64"};
  for (int code = 0; code < rlhf::kBool; ++code)
    attributes.dtypes[code] = py::object(torch.attr(dtypes[code])).release().ptr();

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
  cuda.attr("scratch_doubles") = rlhf::kCudaScratch;
#define BIND(op) bind_cuda(cuda, #op, &rlhf::cuda::op);
  RLHF_CUDA_OPS(BIND)
#undef BIND
#else
  m.attr("cuda_version") = py::none();
#endif
}
