// How kernels start.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../ops.h"

namespace rlhf::cuda {

constexpr int kWarp = 32;

#ifdef __CUDACC__
extern __shared__ uint4 dynamic_shared[];  // as many bytes as the launch asks for
#endif

// body(scalar_t()) for a DType code.
template <typename Body>
int with_dtype(int dtype, Body body) {
  switch (dtype) {
    case kFloat32:
      return body(float());
    case kBFloat16:
      return body(__nv_bfloat16());
    case kFloat16:
      return body(__half());
    case kFloat64:
      return body(double());
    default:
      return cudaErrorInvalidValue;
  }
}

// With so many bytes of dynamic_shared.
template <typename... Parameters, typename... Values>
int launch_with(size_t shared_bytes, void (*kernel)(Parameters...), int64_t blocks, int threads, void* stream,
                Values... values) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;  // the grid's x axis
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(values)...);
}

template <typename... Parameters, typename... Values>
int launch(void (*kernel)(Parameters...), int64_t blocks, int threads, void* stream, Values... values) {
  return launch_with(0, kernel, blocks, threads, stream, values...);
}

}  // namespace rlhf::cuda
