// What generation computes for each new token, in float32 but for the products with weights in bfloat16: attention of
// one query a row over the buffer of keys and values, a whole llama layer around it, and the choice of the token.
#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "few_rows.h"
#include "simd.h"
#include "tile.h"

namespace rlhf::RLHF_ISA {

// layer.cpp
std::remove_pointer_t<decltype(CpuOps::rms_norm)> rms_norm;
std::remove_pointer_t<decltype(CpuOps::rotary)> rotary;
std::remove_pointer_t<decltype(CpuOps::swiglu)> swiglu;

namespace {

constexpr int64_t kBlock = 128;  // tokens whose probabilities are summed before one of them is looked for

// y[i] = exp(x[i] - shift), x[i] <= shift, of a whole number of vectors -> their sum.
double exp_sum(const float* x, float shift, int64_t n, float* y) {
  const Exp<> exp(1.0);
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

int64_t few_rows_product(const float* x, Matrix weight, const float* bias, int64_t rows, int64_t depth, int64_t width,
                         float* y, int threads) {
  with_unit(weight.dtype, [&](auto unit) {
    FewRows<decltype(unit)>(x, rows, depth, threads).times({{weight.data, bias, width, y}}, false);
  });
  return -1;
}

namespace {

// decode_layer of some rows. Threads share the outputs of a product, and wait for each other after it.
template <class Unit>
void decode_rows(const LayerWeights& w, float* x, const float* cos, const float* sin, float* keys, float* values,
                 const float* bias, int64_t rows, int64_t width, int64_t intermediate, int64_t heads, int64_t key_heads,
                 int64_t dim, int64_t capacity, int64_t filled, double scale, double eps, int threads) {
  const int64_t queries = heads * dim, kept = key_heads * dim;
  const Buffer<float> normed(rows * width), q(rows * queries), k(rows * kept), v(rows * kept), turned(rows * queries);
  const Buffer<float> gate(rows * intermediate), up(rows * intermediate);
  const auto keep = [&](const float* heads_of_rows, float* buffer) {
    for (int64_t i = 0; i < rows * key_heads; ++i) {
      std::memcpy(buffer + (i * capacity + filled - 1) * dim, heads_of_rows + i * dim, dim * sizeof *buffer);
    }
  };

  rms_norm(x, w.norm, rows, width, eps, kFloat32, normed.data, nullptr, threads);
  const FewRows<Unit> input(normed.data, rows, width, threads);
  input.times(
      {{w.q.data, w.q_bias, queries, q.data}, {w.k.data, w.k_bias, kept, k.data}, {w.v.data, w.v_bias, kept, v.data}},
      false);
  if (w.q_norm) {
    rms_norm(q.data, w.q_norm, rows * heads, dim, eps, kFloat32, q.data, nullptr, threads);
    rms_norm(k.data, w.k_norm, rows * key_heads, dim, eps, kFloat32, k.data, nullptr, threads);
  }
  rotary(k.data, kept, cos, sin, rows, rows, key_heads, dim, 1, turned.data, threads);
  keep(turned.data, keys);
  keep(v.data, values);
  rotary(q.data, queries, cos, sin, rows, rows, heads, dim, 1, turned.data, threads);
  attend(turned.data, queries, keys, values, bias, rows, heads, key_heads, dim, capacity, filled, scale, q.data,
         threads);
  FewRows<Unit>(q.data, rows, queries, threads).times({{w.output.data, w.output_bias, width, x}}, true);

  rms_norm(x, w.mlp_norm, rows, width, eps, kFloat32, normed.data, nullptr, threads);
  const FewRows<Unit> hidden(normed.data, rows, width, threads);
  hidden.times({{w.gate.data, nullptr, intermediate, gate.data}, {w.up.data, nullptr, intermediate, up.data}}, false);
  swiglu(gate.data, up.data, kFloat32, intermediate, rows, intermediate, gate.data, threads);
  FewRows<Unit>(gate.data, rows, intermediate, threads).times({{w.down.data, nullptr, width, x}}, true);
}

}  // namespace

// Threads share the rows, where there are enough of them: every one reads all weights, and none waits for another
// before the end. Fewer rows than a vector has lanes cost as much as that many.
int64_t decode_layer(LayerWeights w, float* x, const float* cos, const float* sin, float* keys, float* values,
                     const float* bias, int64_t rows, int64_t width, int64_t intermediate, int64_t heads,
                     int64_t key_heads, int64_t dim, int64_t capacity, int64_t filled, double scale, double eps,
                     int threads) {
  const int64_t work = rows * width * (2 * (heads + key_heads) * dim + 3 * intermediate) + rows * heads * filled * dim;
  const int64_t most = threads_for_products(threads, work), vectors = whole_vectors(rows) / kWidth;
  const bool share_rows = 2 * vectors > most;
  const int64_t share = share_rows ? (vectors + most - 1) / most * kWidth : rows, shares = (rows + share - 1) / share;
  for_each(shares, int(shares), [&](int64_t i) {
    const int64_t first = i * share, count = rows - first < share ? rows - first : share;
    const int64_t buffer = first * key_heads * capacity * dim;
    with_unit(w.q.dtype, [&](auto unit) {
      decode_rows<decltype(unit)>(w, x + first * width, cos + first * dim, sin + first * dim, keys + buffer,
                                  values + buffer, bias ? bias + first * capacity : nullptr, count, width, intermediate,
                                  heads, key_heads, dim, capacity, filled, scale, eps, share_rows ? 1 : threads);
    });
  });
  return -1;
}

// First the block, then the token in it: a cumulative sum over the vocabulary would cost more than its logits.
// Distances from the largest logit come before the temperature: a difference of two quotients would lose what they have
// in common.
int64_t sample_tokens(const float* logits, const double* uniforms, int64_t rows, int64_t vocab, double temperature,
                      int64_t* tokens, float* logprobs, int threads) {
  const int64_t blocks = (vocab + kBlock - 1) / kBlock;
  const float inverse = std::min(float(1 / temperature), std::numeric_limits<float>::max());  // 0 of infinity is no 0
  for_each(rows, worth_threads(threads, rows * vocab), [&](int64_t row) {
    const float* x = logits + row * vocab;
    const float largest = F32::max(x, vocab);
    const Buffer<double> sums(blocks);
    float z[kBlock], weights[kBlock];
    const auto block_sum = [&](int64_t block) {
      const int64_t n = vocab - block * kBlock < kBlock ? vocab - block * kBlock : kBlock;
      for (int64_t j = n; j < kBlock; ++j) z[j] = -INFINITY;
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) z[j] = (x[block * kBlock + j] - largest) * inverse;
      return exp_sum(z, 0, kBlock, weights);
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
    tokens[row] = token < vocab ? token : vocab - 1;  // where a logit is NaN: any token, and its log-probability is NaN
    logprobs[row] = float((double(x[tokens[row]]) - largest) / temperature - std::log(total));
  });
  return -1;
}

}  // namespace rlhf::RLHF_ISA
