// What generation computes for each new token beside matrix products, in float32: attention of one query a row over the
// buffer of keys and values, and the choice of the token.
#include <cmath>

#include "simd.h"
#include "tile.h"

namespace rlhf::RLHF_ISA {
namespace {

constexpr int64_t kBlock = 128;  // tokens whose probabilities are summed before one of them is looked for

// y[i] = exp(x[i] - shift), x[i] <= shift, of a whole number of vectors -> their sum.
double exp_sum(const float* x, float shift, int64_t n, float* y) {
  const Exp<F32::kDegree> exp(1.0);
  vf sum{};
  for (int64_t i = 0; i < n; i += kWidth) {
    const vf e = exp(load_vector<vf>(x + i) - shift);
    std::memcpy(y + i, &e, sizeof e);
    sum += e;
  }
  return reduce_add(sum);
}

}  // namespace

int64_t attend(const float* q, int64_t row_stride, const float* keys, const float* values, const float* bias,
               int64_t rows, int64_t heads, int64_t key_heads, int64_t dim, int64_t capacity, int64_t filled,
               double scale, float* y, int threads) {
  const int64_t group = heads / key_heads, padded = (filled + kWidth - 1) / kWidth * kWidth;
  for_each(rows, worth_threads(threads, rows * heads * filled * dim), [&](int64_t row) {
    const Buffer<float> scores(padded);
    for (int64_t head = 0; head < heads; ++head) {
      const float* query = q + row * row_stride + head * dim;
      const int64_t buffer = (row * key_heads + head / group) * capacity * dim;
      float* out = y + (row * heads + head) * dim;
      float largest = -INFINITY;
      for (int64_t t = 0; t < filled; ++t) {
        const float* key = keys + buffer + t * dim;
        float dot = 0;
#pragma omp simd reduction(+ : dot)
        for (int64_t j = 0; j < dim; ++j) dot += query[j] * key[j];
        scores[t] = dot * float(scale) + (bias ? bias[row * capacity + t] : 0);
        if (!(scores[t] <= largest)) largest = scores[t];  // a NaN stays
      }
      for (int64_t t = filled; t < padded; ++t) scores[t] = -INFINITY;
      const float factor = float(1 / exp_sum(scores.data, largest, padded, scores.data));
      for (int64_t j = 0; j < dim; ++j) out[j] = 0;
      for (int64_t t = 0; t < filled; ++t) {
        const float *value = values + buffer + t * dim, p = scores[t] * factor;
#pragma omp simd
        for (int64_t j = 0; j < dim; ++j) out[j] += p * value[j];
      }
    }
  });
  return -1;
}

// First the block, then the token in it: a cumulative sum over the vocabulary would cost more than its logits.
int64_t sample_tokens(const float* logits, const double* uniforms, int64_t rows, int64_t vocab, double temperature,
                      int64_t* tokens, float* logprobs, int threads) {
  const int64_t blocks = (vocab + kBlock - 1) / kBlock;
  const float inverse = float(1 / temperature);
  for_each(rows, worth_threads(threads, rows * vocab), [&](int64_t row) {
    const float* x = logits + row * vocab;
    const float largest = F32::max(x, vocab) * inverse;
    const Buffer<double> sums(blocks);
    float z[kBlock], weights[kBlock];
    const auto block_sum = [&](int64_t block) {
      const int64_t n = vocab - block * kBlock < kBlock ? vocab - block * kBlock : kBlock;
      for (int64_t j = n; j < kBlock; ++j) z[j] = -INFINITY;
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) z[j] = x[block * kBlock + j] * inverse;
      return exp_sum(z, largest, kBlock, weights);
    };
    double total = 0;
    for (int64_t block = 0; block < blocks; ++block) total += sums[block] = block_sum(block);

    double target = uniforms[row] * total;
    int64_t block = 0;
    while (block + 1 < blocks && target >= sums[block]) target -= sums[block++];
    while (block > 0 && sums[block] == 0) {  // rounding led beyond the last token that can happen
      --block;
      target = INFINITY;
    }
    block_sum(block);
    int64_t last = 0, chosen = -1;
    for (int64_t j = 0; j < kBlock && chosen < 0; ++j) {
      if (weights[j] == 0) continue;
      last = j;
      if (target < weights[j]) chosen = j;
      target -= weights[j];
    }
    const int64_t token = block * kBlock + (chosen < 0 ? last : chosen);
    tokens[row] = token < vocab ? token : vocab - 1;  // of logits that are all NaN
    logprobs[row] = float(double(x[tokens[row]] * inverse - largest) - std::log(total));
  });
  return -1;
}

}  // namespace rlhf::RLHF_ISA
