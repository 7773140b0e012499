// What a transformer layer computes between its matrix products, in float32: RMSNorm, rotary positions, gated units,
// and the gradients of them. PyTorch takes 3 to 10 passes over memory for each; these take one. Where the products are
// in bfloat16, a pass reads and writes their side of it. Specification: the modules of transformers' llama and gemma.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "product.h"
#include "simd.h"
#include "tile.h"

namespace rlhf::RLHF_ISA {
namespace {

constexpr int64_t kRows = 128;  // of grad_weight that are summed before the sums are: fixed, whatever the threads

float at(const float* x, int64_t i) { return x[i]; }
float at(const uint16_t* x, int64_t i) { return BF16::scalar(x[i]); }
void put(float* y, int64_t i, float x) { y[i] = x; }
void put(uint16_t* y, int64_t i, float x) {  // rounds as PyTorch does, to even
  const auto u = bits<uint32_t>(x);
  y[i] = x == x ? uint16_t((u + 0x7fffu + (u >> 16 & 1)) >> 16) : uint16_t(0x7fc0);
}

// f(float{}) or, for bfloat16, f(uint16_t{}).
template <class F>
int64_t with_type(int dtype, F f) {
  dtype == kBFloat16 ? f(uint16_t{}) : f(float{});
  return -1;
}

// f(first, end) for every kRows rows.
template <class F>
void for_blocks(int64_t rows, int64_t width, int threads, F f) {
  for_each((rows + kRows - 1) / kRows, worth_threads(threads, rows * width),
           [&](int64_t block) { f(block * kRows, (block + 1) * kRows < rows ? (block + 1) * kRows : rows); });
}

// silu(x) = x sigmoid(x), and gelu(x) = x sigmoid(2 u), as 1 + tanh(u) = 2 sigmoid(2 u), with u = sqrt(2 / pi) (x +
// 0.044715 x^3). So the argument of sigmoid is x rise (1 + cubic x^2), and its derivative rise (1 + 3 cubic x^2).
struct Argument {
  float rise, cubic;
  explicit Argument(bool gelu) : rise(gelu ? 1.5957691216f : 1), cubic(gelu ? 0.044715f : 0) {}
  template <class V>
  V operator()(V x) const {
    return x * rise * (1.0f + cubic * square(x));
  }
  float derivative(float x) const { return rise * (1 + 3 * cubic * square(x)); }
  template <class V>
  static V square(V x) {  // never inf, which times 0 is NaN
    const V y = x * x;
    return y < 1e30f ? y : V{} + 1e30f;
  }
};

// s = 1 / (1 + exp(-a)) of a tile whose first n numbers count, with their argument a.
void sigmoid(const float* x, float* s, int64_t n, const Argument& argument) {
  static_assert(kTile % kWidth == 0);
  const Exp<> exp(1.0);
  for (int64_t i = 0; i < n; i += kWidth) {
    const vf v = argument(load_vector<vf>(x + i)), e = exp(v < 0.0f ? v : -v), larger = 1.0f / (1.0f + e);
    const vf y = v < 0.0f ? e * larger : larger;
    std::memcpy(s + i, &y, sizeof y);
  }
}

// x as float32 in a tile of its own, whose end beyond the first n numbers is 0.
template <class T>
void widen(const T* x, int64_t n, float* tile) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) tile[i] = at(x, i);
  std::memset(tile + n, 0, (kTile - n) * sizeof *tile);
}

}  // namespace

int64_t rms_norm(const float* x, const float* weight, int64_t rows, int64_t width, double eps, int dtype, void* y,
                 float* scale, int threads) {
  return with_type(dtype, [&](auto zero) {
    for_blocks(rows, width, threads, [&](int64_t row, int64_t end) {
      for (; row < end; ++row) {
        const float* in = x + row * width;
        auto* out = static_cast<decltype(zero)*>(y) + row * width;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < width; ++j) sum += in[j] * in[j];
        const float r = 1 / std::sqrt(sum / width + float(eps));
        if (scale) scale[row] = r;
#pragma omp simd
        for (int64_t j = 0; j < width; ++j) put(out, j, in[j] * r * weight[j]);
      }
    });
  });
}

// With h = x * scale: grad_weight = sum over rows of grad * h, and grad_x = scale (grad w - h mean(grad w h)).
int64_t rms_norm_backward(const float* x, const float* weight, const float* scale, int dtype, const void* grad,
                          int64_t rows, int64_t width, float* grad_x, float* grad_weight, int threads) {
  const int64_t size = (rows + kRows - 1) / kRows * width;
  const Buffer<float> sums(size);
  with_type(dtype, [&](auto zero) {
    for_blocks(rows, width, threads, [&](int64_t row, int64_t end) {
      float* sum = sums.data + row / kRows * width;
      for (; row < end; ++row) {
        const float* in = x + row * width;
        const auto* g = static_cast<const decltype(zero)*>(grad) + row * width;
        float* out = grad_x + row * width;
        const float r = scale[row];
        float dot = 0;
#pragma omp simd reduction(+ : dot)
        for (int64_t j = 0; j < width; ++j) {
          const float gh = at(g, j) * in[j] * r;
          sum[j] += gh;
          dot += gh * weight[j];
        }
        const float mean = dot / width * r;
#pragma omp simd
        for (int64_t j = 0; j < width; ++j) out[j] = r * (at(g, j) * weight[j] - in[j] * mean);
      }
    });
  });
  std::memset(grad_weight, 0, width * sizeof(float));
  for (int64_t i = 0; i < size; i += width) {
    for (int64_t j = 0; j < width; ++j) grad_weight[j] += sums[i + j];
  }
  return -1;
}

int64_t rotary(const float* x, int64_t row_stride, const float* cos, const float* sin, int64_t rows, int64_t positions,
               int64_t heads, int64_t dim, double direction, float* y, int threads) {
  const int64_t half = dim / 2;
  const float sign = float(direction);
  for_blocks(rows, heads * dim, threads, [&](int64_t row, int64_t end) {
    for (; row < end; ++row) {
      const float *c = cos + row % positions * dim, *s = sin + row % positions * dim;
      for (int64_t head = 0; head < heads; ++head) {
        const float *low = x + row * row_stride + head * dim, *high = low + half;
        float *out_low = y + (row * heads + head) * dim, *out_high = out_low + half;
#pragma omp simd
        for (int64_t j = 0; j < half; ++j) {
          out_low[j] = low[j] * c[j] - sign * s[j] * high[j];
          out_high[j] = high[j] * c[j] + sign * s[j] * low[j];
        }
      }
    }
  });
  return -1;
}

int64_t glu(const void* gate, const void* up, bool gelu, int dtype, int64_t row_stride, int64_t rows, int64_t width,
            void* y, int threads) {
  const Argument argument(gelu);
  return with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    for_blocks(rows, width, threads, [&](int64_t row, int64_t end) {
      const bool dense = row_stride == width;  // then the block is one long row
      const int64_t n = dense ? (end - row) * width : width;
      float x[kTile], s[kTile];
      for (; row < end; row += dense ? end - row : 1) {
        const T *g = static_cast<const T*>(gate) + row * row_stride, *u = static_cast<const T*>(up) + row * row_stride;
        T* out = static_cast<T*>(y) + row * width;
        for (int64_t i = 0; i < n; i += kTile) {
          const int64_t m = n - i < kTile ? n - i : kTile;
          widen(g + i, m, x);
          sigmoid(x, s, m, argument);
#pragma omp simd
          for (int64_t j = 0; j < m; ++j) put(out, i + j, x[j] * s[j] * at(u, i + j));
        }
      }
    });
  });
}

// x s has the derivative s + x s (1 - s) a', with s = sigmoid(a).
int64_t glu_backward(const void* gate, const void* up, const void* grad, bool gelu, int dtype, int64_t rows,
                     int64_t width, void* grad_gate, void* grad_up, int threads) {
  const Argument argument(gelu);
  return with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const T *gates = static_cast<const T*>(gate), *ups = static_cast<const T*>(up),
            *grads = static_cast<const T*>(grad);
    T *to_gate = static_cast<T*>(grad_gate), *to_up = static_cast<T*>(grad_up);
    for_blocks(rows, width, threads, [&](int64_t row, int64_t end) {
      const int64_t begin = row * width, n = (end - row) * width;
      float x[kTile], s[kTile];
      for (int64_t i = begin; i < begin + n; i += kTile) {
        const int64_t m = begin + n - i < kTile ? begin + n - i : kTile;
        widen(gates + i, m, x);
        sigmoid(x, s, m, argument);
#pragma omp simd
        for (int64_t j = 0; j < m; ++j) {
          const float g = at(grads, i + j);
          const float xs = x[j] * s[j];
          put(to_up, i + j, g * xs);
          put(to_gate, i + j, g * at(ups, i + j) * (s[j] + xs * (1 - s[j]) * argument.derivative(x[j])));
        }
      }
    });
  });
}

int64_t transpose(const void* x, int64_t rows, int64_t width, void* y, int threads) {
  constexpr int64_t kSide = 2 * kWidth;  // numbers in a line of a cache, with AVX-512
  const auto* from = static_cast<const uint16_t*>(x);
  auto* to = static_cast<uint16_t*>(y);
  for_each((width + kSide - 1) / kSide, worth_threads(threads, rows * width), [&](int64_t block) {
    const int64_t column = block * kSide, end = std::min(column + kSide, width);
    int64_t row = 0;
    for (; end == column + kSide && row + kSide <= rows; row += kSide) {
      for (int64_t first = column; first < end; first += kWidth) {
        transpose_block(from + row * width + first, width, to + first * rows + row, rows);
      }
    }
    for (; row < rows; ++row) {
      for (int64_t j = column; j < end; ++j) to[j * rows + row] = from[row * width + j];
    }
  });
  return -1;
}

}  // namespace rlhf::RLHF_ISA
