// What a transformer layer computes between its matrix products, in float32: RMSNorm, rotary positions, SwiGLU, and
// the gradients of them. PyTorch takes 3 to 10 passes over memory for each; these take one. Specification: the modules
// of transformers' llama.
#include <cmath>
#include <cstring>

#include "simd.h"
#include "tile.h"

namespace rlhf::RLHF_ISA {
namespace {

constexpr int64_t kRows = 128;  // of grad_weight that are summed before the sums are: fixed, whatever the threads

// f(first, end) for every kRows rows.
template <class F>
void for_blocks(int64_t rows, int64_t width, int threads, F f) {
  for_each((rows + kRows - 1) / kRows, worth_threads(threads, rows * width),
           [&](int64_t block) { f(block * kRows, (block + 1) * kRows < rows ? (block + 1) * kRows : rows); });
}

// s = 1 / (1 + exp(-x)) of a tile whose first n numbers count.
void sigmoid(const float* x, float* s, int64_t n) {
  static_assert(kTile % kWidth == 0);
  const Exp<> exp(1.0);
  float tail[kTile] = {};
  if (n < kTile) {
    std::memcpy(tail, x, n * sizeof *x);
    x = tail;
  }
  for (int64_t i = 0; i < n; i += kWidth) {
    const vf v = load_vector<vf>(x + i), e = exp(v < 0.0f ? v : -v), larger = 1.0f / (1.0f + e);
    const vf y = v < 0.0f ? e * larger : larger;
    std::memcpy(s + i, &y, sizeof y);
  }
}

}  // namespace

int64_t rms_norm(const float* x, const float* weight, int64_t rows, int64_t width, double eps, float* y, float* scale,
                 int threads) {
  for_blocks(rows, width, threads, [&](int64_t row, int64_t end) {
    for (; row < end; ++row) {
      const float* in = x + row * width;
      float* out = y + row * width;
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < width; ++j) sum += in[j] * in[j];
      const float r = 1 / std::sqrt(sum / width + float(eps));
      if (scale) scale[row] = r;
#pragma omp simd
      for (int64_t j = 0; j < width; ++j) out[j] = in[j] * r * weight[j];
    }
  });
  return -1;
}

// With h = x * scale: grad_weight = sum over rows of grad * h, and grad_x = scale (grad w - h mean(grad w h)).
int64_t rms_norm_backward(const float* x, const float* weight, const float* scale, const float* grad, int64_t rows,
                          int64_t width, float* grad_x, float* grad_weight, int threads) {
  const int64_t size = (rows + kRows - 1) / kRows * width;
  const Buffer<float> sums(size);
  for_blocks(rows, width, threads, [&](int64_t row, int64_t end) {
    float* sum = sums.data + row / kRows * width;
    for (; row < end; ++row) {
      const float *in = x + row * width, *g = grad + row * width;
      float* out = grad_x + row * width;
      const float r = scale[row];
      float dot = 0;
#pragma omp simd reduction(+ : dot)
      for (int64_t j = 0; j < width; ++j) {
        const float gh = g[j] * in[j] * r;
        sum[j] += gh;
        dot += gh * weight[j];
      }
      const float mean = dot / width * r;
#pragma omp simd
      for (int64_t j = 0; j < width; ++j) out[j] = r * (g[j] * weight[j] - in[j] * mean);
    }
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

int64_t swiglu(const float* gate, const float* up, int64_t row_stride, int64_t rows, int64_t width, float* y,
               int threads) {
  for_blocks(rows, width, threads, [&](int64_t row, int64_t end) {
    const bool dense = row_stride == width;  // then the block is one long row
    const int64_t n = dense ? (end - row) * width : width;
    float s[kTile];
    for (; row < end; row += dense ? end - row : 1) {
      const float *g = gate + row * row_stride, *u = up + row * row_stride;
      float* out = y + row * width;
      for (int64_t i = 0; i < n; i += kTile) {
        const int64_t m = n - i < kTile ? n - i : kTile;
        sigmoid(g + i, s, m);
#pragma omp simd
        for (int64_t j = 0; j < m; ++j) out[i + j] = g[i + j] * s[j] * u[i + j];
      }
    }
  });
  return -1;
}

// silu(x) = x s has the derivative s (1 + x (1 - s)), s = sigmoid(x).
int64_t swiglu_backward(const float* gate, const float* up, const float* grad, int64_t rows, int64_t width,
                        float* grad_gate, float* grad_up, int threads) {
  for_blocks(rows, width, threads, [&](int64_t row, int64_t end) {
    const int64_t begin = row * width, n = (end - row) * width;
    float s[kTile];
    for (int64_t i = begin; i < begin + n; i += kTile) {
      const int64_t m = begin + n - i < kTile ? begin + n - i : kTile;
      sigmoid(gate + i, s, m);
#pragma omp simd
      for (int64_t j = 0; j < m; ++j) {
        const float x = gate[i + j], g = grad[i + j];
        grad_up[i + j] = g * x * s[j];
        grad_gate[i + j] = g * up[i + j] * s[j] * (1 + x * (1 - s[j]));
      }
    }
  });
  return -1;
}

}  // namespace rlhf::RLHF_ISA
