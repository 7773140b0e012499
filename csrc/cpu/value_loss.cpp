// value_loss on the CPU: one pass over the inputs gives the loss, its gradient and all statistics.
#include "../common/policy.h"
#include "aggregate.h"

namespace rlhf::RLHF_ISA {
namespace {

template <class T>
struct Inputs {
  Grid values, old_values, returns, mask;
  T cliprange;
  T* grad;  // contiguous, may be null
  int64_t cols;
};

struct Partial {  // of one unit
  double loss = 0, clipped = 0;
  Moments values, returns, error;
};

template <class T>
void unit(const Inputs<T>& in, int64_t row, int64_t begin, int64_t end, T weight, Partial& p) {
  T mask[kTile], v[kTile], old[kTile], target[kTile], loss[kTile], slope[kTile], error[kTile];
  const T range = in.cliprange;
  const int64_t stop = padding_begin(in.mask, row, begin, end);
  for (int64_t col = stop; in.grad && col < end; ++col) in.grad[row * in.cols + col] = 0;
  for (int64_t col = begin; col < stop; col += kTile) {
    const int n = int(stop - col < kTile ? stop - col : kTile);
    load(mask, in.mask, row, col, n);
    load_masked(v, in.values, mask, row, col, n);
    load_masked(old, in.old_values, mask, row, col, n);
    load_masked(target, in.returns, mask, row, col, n);
    T clipped = 0;
#pragma omp simd reduction(+ : clipped)
    for (int j = 0; j < n; ++j) {
      const auto token = value_token(v[j], old[j], target[j], range);
      loss[j] = token.loss;
      slope[j] = token.slope;
      error[j] = token.error;
      clipped += token.clipped;
    }
    const double count = sum(mask, n);
    p.loss += sum(loss, n);
    p.clipped += clipped;
    p.values.merge(moments(v, mask, count, n));
    p.returns.merge(moments(target, mask, count, n));
    p.error.merge(moments(error, mask, count, n));
    if (in.grad) {
      T* grad = in.grad + row * in.cols + col;
      for (int j = 0; j < n; ++j) grad[j] = weight * slope[j];
    }
  }
}

template <class T>
void run(const Inputs<T>& in, int64_t rows, int aggregation, const double* normalizer, T* loss, T* stats, int threads) {
  const Units units(rows, in.cols);
  const TokenWeights weights(in.mask, rows, in.cols, aggregation, normalizer);
  Buffer<Partial> partials(units.count);
  for_each(units.count, worth_threads(threads, rows * in.cols), [&](int64_t u) {
    const int64_t row = units.row(u);
    unit(in, row, units.begin(u), units.end(u), T(weights.of_row[row]), partials[u]);
  });
  Partial all;
  for (int64_t u = 0; u < units.count; ++u) {
    const Partial& p = partials[u];
    const double weight = weights.of_row[units.row(u)];
    if (weight == 0) continue;
    all.loss += weight * p.loss, all.clipped += p.clipped;
    all.values.merge(p.values), all.returns.merge(p.returns), all.error.merge(p.error);
  }
  *loss = T(all.loss);
  const double results[] = {
      all.loss,
      all.clipped / (weights.tokens > 0 ? weights.tokens : 1),
      all.values.mean(),
      all.returns.mean(),
      all.returns.variance(),
      all.error.mean(),
      all.error.variance(),
      weights.tokens,
  };
  for (double result : results) *stats++ = T(result);
}

}  // namespace

int64_t value_loss(Grid values, Grid old_values, Grid returns, Grid mask, int64_t rows, int64_t cols, double cliprange,
                   int aggregation, const double* normalizer, int dtype, void* loss, void* stats, void* grad,
                   int threads) {
  auto call = [&](auto zero) {
    using T = decltype(zero);
    const Inputs<T> in{values, old_values, returns, mask, T(cliprange), (T*)grad, cols};
    run(in, rows, aggregation, normalizer, (T*)loss, (T*)stats, threads);
  };
  dtype == kFloat64 ? call(0.0) : call(0.f);
  return -1;
}

}  // namespace rlhf::RLHF_ISA
