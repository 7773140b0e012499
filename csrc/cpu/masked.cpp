// masked_mean and masked_whiten on the CPU.
#include <cmath>

#include "tile.h"

namespace rlhf::RLHF_ISA {
namespace {

template <class T>
void load_mask(T* out, const Grid& mask, int64_t row, int64_t col, int n) {
  if (mask.data) return load(out, mask, row, col, n);
  for (int j = 0; j < n; ++j) out[j] = 1;
}

// f(tile of values, tile of mask, row, col, n) over every tile of a unit; values are 0 outside the mask.
template <class T, class F>
void each_tile(const Grid& values, const Grid& mask, const Units& units, int64_t u, F f) {
  T x[kTile], m[kTile];
  const int64_t row = units.row(u), end = units.end(u);
  for (int64_t col = units.begin(u); col < end; col += kTile) {
    const int n = int(end - col < kTile ? end - col : kTile);
    load_mask(m, mask, row, col, n);
    load_masked(x, values, m, row, col, n);
    f(x, m, row, col, n);
  }
}

template <class T>
void mean(const Grid& values, const Grid& mask, int64_t rows, int64_t cols, T* means, T* counts, int threads) {
  const Units units(rows, cols);
  struct Partial {
    double sum = 0, count = 0;
  };
  Buffer<Partial> partials(units.count);
  for_each(units.count, worth_threads(threads, rows * cols), [&](int64_t u) {
    each_tile<T>(values, mask, units, u, [&](const T* x, const T* m, int64_t, int64_t, int n) {
      partials[u].sum += sum(x, n);
      partials[u].count += sum(m, n);
    });
  });
  for (int64_t row = 0; row < rows; ++row) {
    double total = 0, count = 0;
    for (int64_t u = row * units.per_row; u < (row + 1) * units.per_row; ++u) {
      total += partials[u].sum;
      count += partials[u].count;
    }
    counts[row] = T(count > 0 ? count : 1);
    means[row] = T(total / (count > 0 ? count : 1));
  }
}

template <class T>
void mean_backward(const Grid& mask, int64_t rows, int64_t cols, const T* grad_means, const T* counts, T* grad,
                   int threads) {
  const Units units(rows, cols);
  for_each(units.count, worth_threads(threads, rows * cols), [&](int64_t u) {
    const int64_t row = units.row(u), end = units.end(u);
    const T each = grad_means[row] / counts[row];
    T m[kTile];
    for (int64_t col = units.begin(u); col < end; col += kTile) {
      const int n = int(end - col < kTile ? end - col : kTile);
      load(m, mask, row, col, n);
      T* out = grad + row * cols + col;
      for (int j = 0; j < n; ++j) out[j] = m[j] != 0 ? each : T(0);
    }
  });
}

template <class T>
void whiten(const Grid& values, const Grid& mask, int64_t rows, int64_t cols, bool shift_mean, double eps, T* whitened,
            T* saved, int threads) {
  const Units units(rows, cols);
  Buffer<Moments> partials(units.count);
  const int team = worth_threads(threads, rows * cols);
  for_each(units.count, team, [&](int64_t u) {
    each_tile<T>(values, mask, units, u, [&](const T* x, const T* m, int64_t, int64_t, int n) {
      partials[u].merge(moments(x, m, sum(m, n), n));
    });
  });
  Moments all;
  for (int64_t u = 0; u < units.count; ++u) all.merge(partials[u]);
  const double dof = all.n > 1 ? all.n - 1 : 1;
  const T center = T(all.mean()), scale = T(1 / std::sqrt(all.m2 / dof + eps)), back = shift_mean ? T(0) : center;
  for_each(units.count, team, [&](int64_t u) {
    each_tile<T>(values, mask, units, u, [&](const T* x, const T* m, int64_t row, int64_t col, int n) {
      T* out = whitened + row * cols + col;
      for (int j = 0; j < n; ++j) out[j] = m[j] != 0 ? (x[j] - center) * scale + back : T(0);
    });
  });
  saved[0] = center, saved[1] = scale, saved[2] = T(all.n);
}

}  // namespace

int64_t masked_mean(Grid values, Grid mask, int64_t rows, int64_t cols, int dtype, void* means, void* counts,
                    int threads) {
  if (dtype == kFloat64) {
    mean(values, mask, rows, cols, (double*)means, (double*)counts, threads);
  } else {
    mean(values, mask, rows, cols, (float*)means, (float*)counts, threads);
  }
  return -1;
}

int64_t masked_mean_backward(Grid mask, int64_t rows, int64_t cols, int dtype, const void* grad_means,
                             const void* counts, void* grad, int threads) {
  if (dtype == kFloat64) {
    mean_backward(mask, rows, cols, (const double*)grad_means, (const double*)counts, (double*)grad, threads);
  } else {
    mean_backward(mask, rows, cols, (const float*)grad_means, (const float*)counts, (float*)grad, threads);
  }
  return -1;
}

int64_t masked_whiten(Grid values, Grid mask, int64_t rows, int64_t cols, int shift_mean, double eps, int dtype,
                      void* whitened, void* saved, int threads) {
  if (dtype == kFloat64) {
    whiten(values, mask, rows, cols, shift_mean != 0, eps, (double*)whitened, (double*)saved, threads);
  } else {
    whiten(values, mask, rows, cols, shift_mean != 0, eps, (float*)whitened, (float*)saved, threads);
  }
  return -1;
}

}  // namespace rlhf::RLHF_ISA
