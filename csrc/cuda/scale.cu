// scale on CUDA: x *= factor where the factor lies on the device. Nothing is read or written where it is 1, as it is
// when loss.backward() starts the backward: a gradient that the forward has written costs one launch then, and no wait.
#include "reduce.cuh"

namespace rlhf::cuda {
namespace {

constexpr int kThreads = 256, kMaxBlocks = 8 * 132;

template <typename scalar_t>
__global__ void __launch_bounds__(kThreads, 4) scale_kernel(scalar_t* x, int64_t count, const void* factor, int dtype) {
  using acc_t = accumulator_t<scalar_t>;
  constexpr int kSize = Pack<scalar_t>::kSize;
  const double number = dtype == kFloat64 ? *static_cast<const double*>(factor) : *static_cast<const float*>(factor);
  if (number == 1) return;
  const int64_t whole = count / kSize, step = int64_t(gridDim.x) * kThreads;
  const int64_t first = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  for (int64_t pack = first; pack < whole; pack += step) {
    acc_t values[kSize];
    unpack(load_pack<16>(x + pack * kSize), values);
#pragma unroll
    for (int i = 0; i < kSize; ++i) values[i] *= acc_t(number);
    store_pack(values, x + pack * kSize);
  }
  const int64_t rest = whole * kSize + first;
  if (rest < count) x[rest] = from_acc<scalar_t>(to_acc(x[rest]) * acc_t(number));
}

}  // namespace

int scale(void* x, int dtype, int64_t count, const void* factor, int factor_dtype, void* stream) {
  return with_dtype(dtype, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    const int64_t per_block = kThreads * Pack<scalar_t>::kSize, blocks = (count + per_block - 1) / per_block;
    return launch(scale_kernel<scalar_t>, min(blocks, int64_t(kMaxBlocks)), kThreads, stream, static_cast<scalar_t*>(x),
                  count, factor, factor_dtype);
  });
}

}  // namespace rlhf::cuda
