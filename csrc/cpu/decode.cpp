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

// The sums of the vectors, one in each lane: every round adds neighbouring lanes of two neighbouring vectors.
inline vf sums_of(vf (&x)[kWidth]) {
  vi even, odd;
#pragma GCC unroll 16
  for (int j = 0; j < kWidth; ++j) {
    even[j] = 2 * j;
    odd[j] = 2 * j + 1;
  }
#pragma GCC unroll 4
  for (int count = kWidth / 2; count > 0; count /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < count; ++i) {
      x[i] = shuffle(x[2 * i], x[2 * i + 1], even) + shuffle(x[2 * i], x[2 * i + 1], odd);
    }
  }
  return x[0];
}

// scores[t] = scale q . keys[t] for begin <= t < end, kWidth keys at a time, of which the last overlap those before.
void score_keys(const float* q, const float* keys, int64_t begin, int64_t end, int64_t filled, int64_t dim, float scale,
                float* scores) {
  const int64_t whole = dim / kWidth * kWidth;
  for (int64_t t = begin; t < end && filled >= kWidth; t += kWidth) {
    const int64_t at = std::min(t, filled - kWidth);
    const float* key = keys + at * dim;
    vf sums[kWidth];
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) {  // one after the other, as they lie in memory
      sums[i] = vf{};
      for (int64_t j = 0; j < whole; j += kWidth) {
        sums[i] = fma(load_vector<vf>(q + j), load_vector<vf>(key + i * dim + j), sums[i]);
      }
    }
    vf dots = sums_of(sums);
    for (int64_t j = whole; j < dim; ++j) {
      for (int i = 0; i < kWidth; ++i) dots[i] += q[j] * key[i * dim + j];
    }
    dots *= scale;
    std::memcpy(scores + at, &dots, sizeof dots);
  }
  for (int64_t t = begin; t < end && filled < kWidth; ++t) {
    float dot = 0;
    for (int64_t j = 0; j < dim; ++j) dot += q[j] * keys[t * dim + j];
    scores[t] = dot * scale;
  }
}

// out += weights . values, of `count` values.
template <int kVectors>
inline int64_t add_values(const float* weights, const float* values, int64_t count, int64_t dim, int64_t j,
                          float* out) {
  for (; j + kVectors * kWidth <= dim; j += kVectors * kWidth) {
    vf sum[kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) sum[i] = load_vector<vf>(out + j + i * kWidth);
    for (int64_t t = 0; t < count; ++t) {
      const vf weight = splat(weights[t]);
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; ++i) {
        sum[i] = fma(weight, load_vector<vf>(values + t * dim + j + i * kWidth), sum[i]);
      }
    }
    std::memcpy(out + j, sum, sizeof sum);
  }
  return j;
}

void add_values(const float* weights, const float* values, int64_t count, int64_t dim, float* out) {
  int64_t j = add_values<8>(weights, values, count, dim, 0, out);
  j = add_values<4>(weights, values, count, dim, j, out);
  j = add_values<1>(weights, values, count, dim, j, out);
  for (; j < dim; ++j) {
    for (int64_t t = 0; t < count; ++t) out[j] += weights[t] * values[t * dim + j];
  }
}

}  // namespace

// The queries that share a head of keys go over it together, a few keys (then values) at a time, which stay in L1.
int64_t attend(const float* q, int64_t row_stride, const float* keys, const float* values, const float* bias,
               int64_t rows, int64_t heads, int64_t key_heads, int64_t dim, int64_t capacity, int64_t filled,
               double scale, float* y, int threads) {
  constexpr int64_t kStays = 4096;  // numbers
  const int64_t together = std::max<int64_t>(kStays / dim / kWidth, 1) * kWidth;
  const int64_t group = heads / key_heads, padded = (filled + kWidth - 1) / kWidth * kWidth;
  for_each(rows * key_heads, worth_threads(threads, rows * heads * filled * dim), [&](int64_t i) {
    const int64_t row = i / key_heads, first = i % key_heads * group;  // head
    const float *query = q + row * row_stride + first * dim, *key = keys + i * capacity * dim;
    const float* value = values + i * capacity * dim;
    float* out = y + (row * heads + first) * dim;
    const Buffer<float> scores(group * padded);
    for (int64_t begin = 0; begin < filled; begin += together) {
      const int64_t end = std::min(begin + together, filled);
      for (int64_t head = 0; head < group; ++head) {
        score_keys(query + head * dim, key, begin, end, filled, dim, float(scale), scores.data + head * padded);
      }
    }
    for (int64_t head = 0; head < group; ++head) {
      float* x = scores.data + head * padded;
      for (int64_t t = 0; bias && t < filled; ++t) x[t] += bias[row * capacity + t];
      for (int64_t t = filled; t < padded; ++t) x[t] = -INFINITY;
      vf largest = splat(-INFINITY);
      for (int64_t t = 0; t < padded; t += kWidth) largest = max(load_vector<vf>(x + t), largest);
      const float factor = float(1 / exp_sum(x, reduce_max(largest), padded, x));
      for (int64_t t = 0; t < filled; ++t) x[t] *= factor;
    }
    for (int64_t j = 0; j < group * dim; ++j) out[j] = 0;
    for (int64_t begin = 0; begin < filled; begin += together) {
      const int64_t count = std::min(together, filled - begin);
      for (int64_t head = 0; head < group; ++head) {
        add_values(scores.data + head * padded + begin, value + begin * dim, count, dim, out + head * dim);
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
