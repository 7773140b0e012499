// How kernels start.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../ops.h"

namespace rlhf::cuda {

constexpr int kWarp = 32;

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

template <typename... Parameters, typename... Values>
int launch(void (*kernel)(Parameters...), int64_t blocks, int threads, void* stream, Values... values) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;  // the grid's x axis
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(values)...);
}

}  // namespace rlhf::cuda
