// kl_penalty on the CPU: the estimate at each token, and its derivative where a backward will follow.
#include "../common/policy.h"
#include "tile.h"

namespace rlhf::RLHF_ISA {
namespace {

template <int estimator, class T>
void run(const Grid& logprobs, const Grid& ref_logprobs, int64_t rows, int64_t cols, T input, T output, T* kl, T* slope,
         int threads) {
  const Units units(rows, cols);
  // By value: through references each store would make the compiler read them again.
  for_each(units.count, worth_threads(threads, rows * cols), [=](int64_t u) {
    T buffer[3][kTile];
    const int64_t row = units.row(u), end = units.end(u);
    for (int64_t col = units.begin(u); col < end; col += kTile) {
      const int n = int(end - col < kTile ? end - col : kTile);
      const T* p = view(buffer[0], logprobs, row, col, n);
      const T* q = view(buffer[1], ref_logprobs, row, col, n);
      T *value = kl + row * cols + col, *derivative = slope ? slope + row * cols + col : buffer[2];
#pragma omp simd
      for (int j = 0; j < n; ++j) {
        const Kl<T> token = kl_clamped<estimator>(p[j] - q[j], input, output);
        value[j] = token.value;
        derivative[j] = token.slope;
      }
    }
  });
}

}  // namespace

int64_t kl_penalty(Grid logprobs, Grid ref_logprobs, int64_t rows, int64_t cols, int estimator, double input_clamp,
                   double output_clamp, int dtype, void* kl, void* slope, int threads) {
  auto call = [&](auto zero, auto kind) {
    using T = decltype(zero);
    run<kind()>(logprobs, ref_logprobs, rows, cols, T(input_clamp), T(output_clamp), (T*)kl, (T*)slope, threads);
  };
  auto with_dtype = [&](auto kind) { dtype == kFloat64 ? call(0.0, kind) : call(0.f, kind); };
  with_estimator(estimator, with_dtype);
  return -1;
}

}  // namespace rlhf::RLHF_ISA
