// Attention in training: the sequences of a row (packing.py) one after another, causal, forward and backward, float32.
// A block of queries meets all keys that it sees at once: its scores stay in L2 while the softmax passes over them, and
// nothing of size (queries, keys) is kept. The backward computes the probabilities again (Dao et al. 2022).
#include <algorithm>
#include <limits>

#include "few_rows.h"
#include "product.h"
#include "tile.h"

namespace rlhf::RLHF_ISA {
namespace {

constexpr int64_t kQueries = 48;  // of a block
// Keys of one chain of additions, no more than multiply() leaves in one piece. So the sum of a query has the same bits
// whatever block it is in: the keys behind those that it sees have a weight of 0.
constexpr int64_t kKeys = 128;
static_assert(kKeys <= kPieceDepth);
constexpr float kNever = -std::numeric_limits<float>::infinity();

struct Sequence {  // a row of the table
  int64_t query, queries, own, own_keys, shared, shared_keys;
  int64_t keys() const { return shared_keys + own_keys; }
  int64_t token(int64_t key) const { return key < shared_keys ? shared + key : own + key - shared_keys; }
};

struct Rows {  // of one head
  const float* data;
  int64_t stride;
  Rows(Grid x, int64_t head) : data(static_cast<const float*>(x.data) + head * x.col_stride), stride(x.row_stride) {}
  const float* operator[](int64_t row) const { return data + row * stride; }
  Left left(int64_t row) const { return {(*this)[row], stride * 4, 4}; }
};

// The products of one sequence and head. Scores, weights and slopes are (kQueries, padded), of which the keys that a
// block sees count.
struct Products {
  int64_t dim, padded;
  Products(int64_t dim, int64_t keys) : dim(dim), padded(whole_vectors(keys)) {}

  int64_t by_keys_size() const { return padded * dim; }
  int64_t by_dim_size(int64_t rows) const { return rows * whole_vectors(dim); }

  // The keys or values of a sequence, end to end.
  void gather(Rows x, const Sequence& s, float* rows) const {
    for (int64_t t = 0; t < s.keys(); ++t) std::memcpy(rows + t * dim, x[s.token(t)], dim * sizeof *rows);
  }

  // Packs the right factor of products whose lanes are keys.
  void pack_by_keys(const float* rows, int64_t keys, uint32_t* b) const {
    const int64_t all = whole_vectors(keys);
    for (int64_t lane = 0; lane < all; lane += kPanel) {
      const int64_t lanes = std::min<int64_t>(kPanel, all - lane);
      pack_rows<UnitF32>(rows + lane * dim, dim, std::min(lanes, keys - lane), dim, lanes, b + lane * dim);
    }
  }

  // Packs the right factor of products whose lanes are those of a head.
  void pack_by_dim(const float* rows, int64_t stride, int64_t count, uint32_t* b) const {
    for (int64_t lane = 0; lane < dim; lane += kPanel) {
      pack_columns<UnitF32>(rows + lane, stride, count, std::min<int64_t>(kPanel, dim - lane), b + lane * count);
    }
  }

  // y (rows, padded) = x b, of the first `seen` of b's keys.
  void times_keys(Left x, int64_t rows, const uint32_t* b, int64_t keys, int64_t seen, float* y) const {
    for (int64_t lane = 0; lane < seen; lane += kPanel) {
      const int64_t lanes = std::min<int64_t>(kPanel, whole_vectors(keys) - lane);
      multiply<UnitF32>(x, rows, b + lane * dim, dim, y + lane, padded, lanes, false);
    }
  }

  // y (rows, dim; rows y_stride apart) = x (rows, padded) b, over the first `seen` of b's keys.
  void over_keys(const float* x, int64_t rows, const uint32_t* b, int64_t keys, int64_t seen, float* y,
                 int64_t y_stride) const {
    for (int64_t lane = 0; lane < dim; lane += kPanel) {
      const int64_t lanes = std::min<int64_t>(kPanel, dim - lane);
      for (int64_t key = 0; key < seen; key += kKeys) {
        multiply<UnitF32>({x + key, padded * 4, 4}, rows, b + lane * keys + key * whole_vectors(lanes),
                          std::min(kKeys, seen - key), y + lane, y_stride, lanes, key > 0);
      }
    }
  }

  // y (seen, dim) += x^T b, x (rows, padded).
  void over_queries(const float* x, int64_t rows, const uint32_t* b, int64_t seen, float* y) const {
    for (int64_t lane = 0; lane < dim; lane += kPanel) {
      const int64_t lanes = std::min<int64_t>(kPanel, dim - lane);
      multiply<UnitF32>({x, 4, padded * 4}, seen, b + lane * rows, rows, y + lane, dim, lanes, true);
    }
  }
};

// f(a block's first query, how many there are, how many keys the last of them sees)
template <class F>
void for_blocks(const Sequence& s, const int64_t* places, F f) {
  for (int64_t first = s.query, end = s.query + s.queries; first < end; first += kQueries) {
    const int64_t count = std::min(kQueries, end - first);
    f(first, count, places[first + count - 1] + 1);
  }
}

// f(head, first and end of the sequences of a family, the most keys of one of them)
template <class F>
void for_heads(const int64_t* table, const int64_t* families, int64_t count, int64_t heads, int64_t dim, int threads,
               F f) {
  const auto* sequences = reinterpret_cast<const Sequence*>(table);
  int64_t scores = 0;
  for (const Sequence* s = sequences; s < sequences + families[count]; ++s) scores += s->queries * s->keys();
  for_each(heads * count, threads_for_products(threads, scores * heads * dim), [&](int64_t i) {
    const Sequence *first = sequences + families[i % count], *end = sequences + families[i % count + 1];
    int64_t most = 0;
    for (const Sequence* s = first; s < end; ++s) most = std::max(most, s->keys());
    f(i / count, first, end, most);
  });
}

// Of a row of scores: what the query at this place does not see becomes kNever -> the end of a whole number of vectors;
// from there to `seen` there is 0.
int64_t hide(float* x, int64_t place, int64_t window, int64_t seen) {
  const int64_t whole = whole_vectors(place + 1);
  for (int64_t t = 0; t <= place - window; ++t) x[t] = kNever;
  for (int64_t t = place + 1; t < whole; ++t) x[t] = kNever;
  for (int64_t t = whole; t < seen; ++t) x[t] = 0;
  return whole;
}

}  // namespace

int64_t packed_attention(Grid q, Grid k, Grid v, const int64_t* places, const int64_t* table, const int64_t* families,
                         int64_t count, int64_t heads, int64_t key_heads, int64_t dim, int64_t window, double scale,
                         float* y, float* saved, int threads) {
  const Exp<> exp(scale);
  for_heads(table, families, count, heads, dim, threads,
            [&](int64_t head, const Sequence* s, const Sequence* end, int64_t most) {
              const int64_t key_head = head / (heads / key_heads);
              const Rows queries(q, head), keys(k, key_head), values(v, key_head);
              const Products products(dim, most);
              const Buffer<uint32_t> right_keys(products.by_keys_size()), right_values(products.by_dim_size(most));
              const Buffer<float> rows(most * dim), scores(kQueries * products.padded);
              for (; s < end; ++s) {
                products.gather(keys, *s, rows.data);
                products.pack_by_keys(rows.data, s->keys(), right_keys.data);
                products.gather(values, *s, rows.data);
                products.pack_by_dim(rows.data, dim, s->keys(), right_values.data);
                for_blocks(*s, places, [&](int64_t first, int64_t n, int64_t seen) {
                  products.times_keys(queries.left(first), n, right_keys.data, s->keys(), seen, scores.data);
                  for (int64_t i = 0; i < n; ++i) {
                    float *x = scores.data + i * products.padded, *kept = saved + ((first + i) * heads + head) * 2;
                    const int64_t whole = hide(x, places[first + i], window, seen);
                    vf largest = splat(kNever), sum{};
                    for (int64_t t = 0; t < whole; t += kWidth) largest = max(load_vector<vf>(x + t), largest);
                    kept[0] = reduce_max(largest);
                    for (int64_t t = 0; t < whole; t += kWidth) {
                      const vf e = exp(load_vector<vf>(x + t) - kept[0]);
                      std::memcpy(x + t, &e, sizeof e);
                      sum += e;
                    }
                    kept[1] = float(1 / reduce_add(sum));
                  }
                  float* out = y + (first * heads + head) * dim;
                  products.over_keys(scores.data, n, right_values.data, s->keys(), seen, out, heads * dim);
                  for (int64_t i = 0; i < n; ++i, out += heads * dim) {
                    const float factor = saved[((first + i) * heads + head) * 2 + 1];
                    for (int64_t j = 0; j < dim; ++j) out[j] *= factor;
                  }
                });
              }
            });
  return -1;
}

// With p the probabilities, g the gradient of y and s = g v^T: d = scale p (s - mean of s by p), grad_q = d k,
// grad_k = d^T q, grad_v = p^T g. (The mean is also g y, but rounded otherwise, and where few keys are seen s - mean is
// 0.)
int64_t packed_attention_backward(Grid q, Grid k, Grid v, const float* saved, const float* grad, const int64_t* places,
                                  const int64_t* table, const int64_t* families, int64_t count, int64_t heads,
                                  int64_t key_heads, int64_t dim, int64_t window, double scale, float* grad_q,
                                  float* grad_k, float* grad_v, int threads) {
  const Exp<> exp(scale);
  const int64_t stride = heads * dim;
  for_heads(table, families, count, heads, dim, threads,
            [&](int64_t head, const Sequence* begin, const Sequence* end, int64_t most) {
              const int64_t key_head = head / (heads / key_heads), own = head * dim;
              const Rows queries(q, head), keys(k, key_head), values(v, key_head);
              const Products products(dim, most);
              const Buffer<uint32_t> right_keys(products.by_keys_size()), right_values(products.by_keys_size());
              const Buffer<uint32_t> right_rows(products.by_dim_size(std::max(most, kQueries)));
              const Buffer<uint32_t> right_block(products.by_dim_size(kQueries));
              const Buffer<float> rows(most * dim), of_keys(most * dim), of_values(most * dim);
              const Buffer<float> weights(kQueries * products.padded), slopes(kQueries * products.padded);
              for (const Sequence* s = begin; s < end; ++s) {
                for (int64_t t = s->own; t < s->own + s->own_keys; ++t) {
                  std::memset(grad_k + t * stride + own, 0, dim * sizeof *grad_k);
                  std::memset(grad_v + t * stride + own, 0, dim * sizeof *grad_v);
                }
              }
              for (const Sequence* s = begin; s < end; ++s) {
                products.gather(values, *s, rows.data);
                products.pack_by_keys(rows.data, s->keys(), right_values.data);
                products.gather(keys, *s, rows.data);
                products.pack_by_keys(rows.data, s->keys(), right_keys.data);
                products.pack_by_dim(rows.data, dim, s->keys(), right_rows.data);
                std::memset(of_keys.data, 0, s->keys() * dim * sizeof *of_keys.data);
                std::memset(of_values.data, 0, s->keys() * dim * sizeof *of_values.data);
                for_blocks(*s, places, [&](int64_t first, int64_t n, int64_t seen) {
                  const float* g = grad + first * stride + own;
                  products.times_keys(queries.left(first), n, right_keys.data, s->keys(), seen, weights.data);
                  products.times_keys({g, stride * 4, 4}, n, right_values.data, s->keys(), seen, slopes.data);
                  for (int64_t i = 0; i < n; ++i) {
                    float *p = weights.data + i * products.padded, *d = slopes.data + i * products.padded;
                    const float* kept = saved + ((first + i) * heads + head) * 2;
                    const int64_t whole = hide(p, places[first + i], window, seen);
                    vf sum{};
                    for (int64_t t = 0; t < whole; t += kWidth) {
                      const vf weight = exp(load_vector<vf>(p + t) - kept[0]) * kept[1];
                      sum = fma(weight, load_vector<vf>(d + t), sum);
                      std::memcpy(p + t, &weight, sizeof weight);
                    }
                    const float mean = float(reduce_add(sum));
                    for (int64_t t = 0; t < whole; t += kWidth) {
                      const vf slope = load_vector<vf>(p + t) * (load_vector<vf>(d + t) - mean) * float(scale);
                      std::memcpy(d + t, &slope, sizeof slope);
                    }
                    for (int64_t t = whole; t < seen; ++t) d[t] = 0;
                  }
                  products.over_keys(slopes.data, n, right_rows.data, s->keys(), seen, grad_q + first * stride + own,
                                     stride);
                  products.pack_by_dim(queries[first], queries.stride, n, right_block.data);
                  products.over_queries(slopes.data, n, right_block.data, seen, of_keys.data);
                  products.pack_by_dim(g, stride, n, right_block.data);
                  products.over_queries(weights.data, n, right_block.data, seen, of_values.data);
                });
                for (int64_t t = 0; t < s->keys(); ++t) {
                  const int64_t to = s->token(t) * stride + own;
                  for (int64_t j = 0; j < dim; ++j) {
                    grad_k[to + j] += of_keys[t * dim + j];
                    grad_v[to + j] += of_values[t * dim + j];
                  }
                }
              }
            });
  return -1;
}

}  // namespace rlhf::RLHF_ISA
