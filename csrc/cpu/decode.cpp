// What generation computes for each new token, in float32 but for the products with weights in bfloat16: attention of
// one query a row over the buffer of keys and values, a whole llama layer around it, and the choice of the token.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "few_rows.h"
#include "simd.h"
#include "tile.h"

namespace rlhf::RLHF_ISA {

// layer.cpp
std::remove_pointer_t<decltype(CpuOps::rms_norm)> rms_norm;
std::remove_pointer_t<decltype(CpuOps::rotary)> rotary;
std::remove_pointer_t<decltype(CpuOps::glu)> glu;

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

// scores[t] = scale q . keys[t] for t < count, each the same bits wherever it lies.
void score_keys(const float* q, const float* keys, int64_t count, int64_t dim, float scale, float* scores) {
  const int64_t whole = dim / kWidth * kWidth;
  const auto some = [&](const float* key, auto n, float* out) {  // n <= kWidth keys, one after the other, as they lie
    vf sums[kWidth]{};
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) {
      for (int64_t j = 0; j < whole; j += kWidth) {
        sums[i] = fma(load_vector<vf>(q + j), load_vector<vf>(key + i * dim + j), sums[i]);
      }
    }
    vf dots = sums_of(sums);
    for (int64_t j = whole; j < dim; ++j) {
      for (int i = 0; i < n; ++i) dots[i] += q[j] * key[i * dim + j];
    }
    dots *= scale;
    std::memcpy(out, &dots, n * sizeof *out);
  };
  int64_t t = 0;
  for (; t + kWidth <= count; t += kWidth) some(keys + t * dim, std::integral_constant<int, kWidth>{}, scores + t);
  if (t < count) some(keys + t * dim, int(count - t), scores + t);
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

// Of the rows from `first` to `end`, which share the first columns of row `source`, and of one head of keys. The
// queries go over what they share together, a few keys (then values) at a time, which stay in L1.
void attend_together(const float* q, int64_t row_stride, const float* keys, const float* values, const float* bias,
                     int64_t source, int64_t shared, int64_t first, int64_t end, int64_t heads, int64_t key_heads,
                     int64_t key_head, int64_t dim, int64_t capacity, int64_t filled, float scale, double softcap,
                     float* y) {
  constexpr int64_t kStays = 4096;  // numbers
  const int64_t together = std::max<int64_t>(kStays / dim / kWidth, 1) * kWidth;
  const int64_t group = heads / key_heads, padded = whole_vectors(filled);
  const Buffer<float> scores((end - first) * group * padded);
  const auto lane = [&](int64_t row, int64_t head) { return scores.data + ((row - first) * group + head) * padded; };
  const auto query = [&](int64_t row, int64_t head) { return q + row * row_stride + (key_head * group + head) * dim; };
  const auto out = [&](int64_t row, int64_t head) { return y + (row * heads + key_head * group + head) * dim; };
  // f(row, head, begin, count, where these columns lie) for a few columns at a time
  const auto for_columns = [&](const float* buffer, auto f) {
    const auto of_rows = [&](int64_t holder, int64_t from, int64_t to, int64_t begin, int64_t stop) {
      const float* columns = buffer + (holder * key_heads + key_head) * capacity * dim;
      for (; begin < stop; begin += together) {
        const int64_t count = std::min(together, stop - begin);
        for (int64_t row = from; row < to; ++row) {
          for (int64_t head = 0; head < group; ++head) f(row, head, begin, count, columns + begin * dim);
        }
      }
    };
    of_rows(source, first, end, 0, shared);
    for (int64_t row = first; row < end; ++row) of_rows(row, row, row + 1, shared, filled);
  };
  for_columns(keys, [&](int64_t row, int64_t head, int64_t begin, int64_t count, const float* columns) {
    score_keys(query(row, head), columns, count, dim, scale, lane(row, head) + begin);
  });
  for (int64_t row = first; row < end; ++row) {
    for (int64_t head = 0; head < group; ++head) {
      float *x = lane(row, head), *sums = out(row, head);
      if (softcap) cap(x, filled, 1, softcap);
      for (int64_t t = 0; bias && t < filled; ++t) x[t] += bias[row * capacity + t];
      for (int64_t t = filled; t < padded; ++t) x[t] = -INFINITY;
      vf largest = splat(-INFINITY);
      for (int64_t t = 0; t < padded; t += kWidth) largest = max(load_vector<vf>(x + t), largest);
      const float factor = float(1 / exp_sum(x, reduce_max(largest), padded, x));
      for (int64_t t = 0; t < filled; ++t) x[t] *= factor;
      std::memset(sums, 0, dim * sizeof *sums);
    }
  }
  for_columns(values, [&](int64_t row, int64_t head, int64_t begin, int64_t count, const float* columns) {
    add_values(lane(row, head) + begin, columns, count, dim, out(row, head));
  });
}

}  // namespace

// Up to kTogether neighbours that share columns are one piece of work.
int64_t attend(const float* q, int64_t row_stride, const float* keys, const float* values, const float* bias,
               const int64_t* back, int64_t shared, int64_t rows, int64_t heads, int64_t key_heads, int64_t dim,
               int64_t capacity, int64_t filled, double scale, double softcap, float* y, int threads) {
  constexpr int64_t kTogether = 8;
  const int64_t together = back ? kTogether : 1, blocks = (rows + together - 1) / together;
  for_each(blocks * key_heads, worth_threads(threads, rows * heads * filled * dim), [&](int64_t i) {
    const int64_t end = std::min((i / key_heads + 1) * together, rows);
    for (int64_t row = i / key_heads * together, next; row < end; row = next) {
      const int64_t source = back ? row - back[row] : row;
      for (next = row + 1; next < end && next - back[next] == source;) ++next;
      attend_together(q, row_stride, keys, values, bias, source, shared, row, next, heads, key_heads, i % key_heads,
                      dim, capacity, filled, float(scale), softcap, y);
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
                 const float* bias, const int64_t* back, int64_t shared, int64_t rows, int64_t width,
                 int64_t intermediate, int64_t heads, int64_t key_heads, int64_t dim, int64_t capacity, int64_t filled,
                 double scale, double eps, int threads) {
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
  attend(turned.data, queries, keys, values, bias, back, shared, rows, heads, key_heads, dim, capacity, filled, scale,
         0, q.data, threads);
  FewRows<Unit>(q.data, rows, queries, threads).times({{w.output.data, w.output_bias, width, x}}, true);

  rms_norm(x, w.mlp_norm, rows, width, eps, kFloat32, normed.data, nullptr, threads);
  const FewRows<Unit> hidden(normed.data, rows, width, threads);
  hidden.times({{w.gate.data, nullptr, intermediate, gate.data}, {w.up.data, nullptr, intermediate, up.data}}, false);
  glu(gate.data, up.data, false, kFloat32, intermediate, rows, intermediate, gate.data, threads);
  FewRows<Unit>(gate.data, rows, intermediate, threads).times({{w.down.data, nullptr, width, x}}, true);
}

}  // namespace

// Threads share the rows, where there are enough of them: every one reads all weights, and none waits for another
// before the end. Fewer rows than a vector has lanes cost as much as that many.
int64_t decode_layer(LayerWeights w, float* x, const float* cos, const float* sin, float* keys, float* values,
                     const float* bias, const int64_t* back, int64_t shared, int64_t rows, int64_t width,
                     int64_t intermediate, int64_t heads, int64_t key_heads, int64_t dim, int64_t capacity,
                     int64_t filled, double scale, double eps, int threads) {
  const int64_t work = rows * width * (2 * (heads + key_heads) * dim + 3 * intermediate) + rows * heads * filled * dim;
  const int64_t most = threads_for_products(threads, work), vectors = whole_vectors(rows) / kWidth;
  const bool share_rows = 2 * vectors > most;
  const int64_t share = share_rows ? (vectors + most - 1) / most * kWidth : rows, shares = (rows + share - 1) / share;
  for_each(shares, int(shares), [&](int64_t i) {
    const int64_t first = i * share, count = rows - first < share ? rows - first : share;
    const int64_t buffer = first * key_heads * capacity * dim;
    with_unit(w.q.dtype, [&](auto unit) {
      decode_rows<decltype(unit)>(w, x + first * width, cos + first * dim, sin + first * dim, keys + buffer,
                                  values + buffer, bias ? bias + first * capacity : nullptr,
                                  back ? back + first : nullptr, shared, count, width, intermediate, heads, key_heads,
                                  dim, capacity, filled, scale, eps, share_rows ? 1 : threads);
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
