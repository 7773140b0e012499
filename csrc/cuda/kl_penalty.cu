// kl_penalty on CUDA: the estimate at each token, and its derivative where a backward will follow. One launch, nothing
// shared between threads. [64 x 1024] float32 with slope: 1 MiB, 0.25 us of HBM traffic inside one launch.
#include "estimators.cuh"
#include "grid.cuh"

namespace rlhf::cuda {
namespace {

constexpr int kBlock = 128;

template <class T, bool kPlain>
__global__ void __launch_bounds__(kBlock, 1) kl_penalty_kernel(Grid logprobs, Grid ref_logprobs, Quads quads,
                                                               int estimator, T input, T output, T* kl, T* slope) {
  for (int64_t quad = quads.first(); quad < quads.end(); quad += kBlock) {
    const Place at = quads.place(quad);
    const Quad<T> p = load<kPlain, T>(logprobs, at), q = load<kPlain, T>(ref_logprobs, at);
    Quad<T> value, derivative;
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      const Kl<T> token = kl_token(estimator, p[i] - q[i], input, output);
      value[i] = token.value;
      derivative[i] = token.slope;
    }
    store<kPlain>(kl, quads.cols, at, value);
    if (slope != nullptr) store<kPlain>(slope, quads.cols, at, derivative);
  }
}

}  // namespace

int kl_penalty(Grid logprobs, Grid ref_logprobs, int64_t rows, int64_t cols, int estimator, double input_clamp,
               double output_clamp, int dtype, void* kl, void* slope, void* stream) {
  const Quads quads(rows, cols, kBlock, INT32_MAX);
  return with_version(dtype, is_plain(cols, {logprobs, ref_logprobs}, {}, {kl, slope}), [&](auto zero, auto plain) {
    using T = decltype(zero);
    return launch(kl_penalty_kernel<T, plain.value>, quads.count == 0 ? 0 : quads.blocks(), kBlock, stream, logprobs,
                  ref_logprobs, quads, estimator, T(input_clamp), T(output_clamp), static_cast<T*>(kl),
                  static_cast<T*>(slope));
  });
}

}  // namespace rlhf::cuda
