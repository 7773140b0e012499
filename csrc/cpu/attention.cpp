// Attention in training: the sequences of a row (packing.py) one after another, causal, forward and backward, float32.
// A block of queries meets the keys that it sees, a span of them at a time: its scores stay in L2 while the softmax
// passes over them, and nothing of size (queries, keys) is kept. The backward computes the probabilities again, with
// the spans outside and the blocks inside, so that a span's keys, values and gradients stay in L2 (Dao et al. 2022).
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
static_assert(kKeys <= kPieceDepth && kKeys % kPanel == 0);
// Numbers in the keys of a span. The backward has five tables of this size, 640 KB: keys (twice), values, and the
// gradients of both.
constexpr int64_t kSpan = 32768;
constexpr float kNever = -std::numeric_limits<float>::infinity();

struct Sequence {  // a row of the table
  int64_t query, queries, own, own_keys, shared, shared_keys;
  int64_t keys() const { return shared_keys + own_keys; }
  int64_t token(int64_t key) const { return key < shared_keys ? shared + key : own + key - shared_keys; }
  // How many of the first keys, in whole panels, were packed for the sequence before.
  int64_t packed_with(const Sequence& before) const {
    const int64_t theirs = before.shared_keys ? before.shared_keys : before.own_keys;
    return before.token(0) == token(0) ? std::min(theirs, shared_keys) / kPanel * kPanel : 0;
  }
};

struct Rows {  // from `data` on
  const float* data;
  int64_t stride;
  Rows(const float* data, int64_t stride) : data(data), stride(stride) {}
  Rows(Grid x, int64_t head) : Rows(static_cast<const float*>(x.data) + head * x.col_stride, x.row_stride) {}
  Rows operator+(int64_t row) const { return {data + row * stride, stride}; }
  Left left() const { return {data, stride * 4, 4}; }
};

// Some keys of a sequence, which are counted from `begin` on.
struct Span {
  int64_t begin, size;
};

// Some queries of a sequence, which meet the keys of a span together.
struct Block {
  int64_t first, count;
  const int64_t* places;  // theirs, ascending
  Span span;
  int64_t place(int64_t i) const { return places[i] - span.begin; }
  // How many keys of the span the first `queries` see.
  int64_t seen(int64_t queries) const { return std::min(place(queries - 1) + 1, span.size); }
  int64_t seen() const { return seen(count); }
  int64_t blind(int64_t key) const {  // how many, the first ones, see neither this key nor one behind it
    int64_t n = 0;
    while (n < count && place(n) < key) ++n;
    return n;
  }
};

// The products of one head and the sequences of a family, of which none has more than `most` keys. Scores, weights and
// slopes are (kQueries, padded).
struct Products {
  int64_t dim, most, span, padded;
  Products(int64_t dim, int64_t most)
      : dim(dim),
        most(most),
        span(std::max<int64_t>(kSpan / dim / kKeys, 1) * kKeys),
        padded(whole_vectors(std::min(most, span))) {}

  int64_t by_keys_size() const { return whole_vectors(most) * dim; }
  int64_t by_dim_size(int64_t rows) const { return rows * whole_vectors(dim); }
  int64_t scores_size() const { return kQueries * padded; }
  int64_t span_size() const { return std::min(most, span) * dim; }

  // The keys or values of a sequence from the one at `first` on: where they lie, if they lie together.
  Rows gather(Rows x, const Sequence& s, int64_t first, float* room) const {
    if (!s.shared_keys) return x + (s.own + first);
    for (int64_t t = first; t < s.keys(); ++t) {
      std::memcpy(room + (t - first) * dim, (x + s.token(t)).data, dim * sizeof *room);
    }
    return {room, dim};
  }

  // Packs the right factor of products whose lanes are keys, from the one at `first` on, a whole number of panels.
  void pack_by_keys(Rows x, int64_t first, int64_t keys, uint32_t* b) const {
    const int64_t all = whole_vectors(keys);
    for (int64_t lane = first; lane < all; lane += kPanel) {
      const int64_t lanes = std::min<int64_t>(kPanel, all - lane);
      pack_rows<UnitF32>((x + (lane - first)).data, x.stride, std::min(lanes, keys - lane), dim, lanes, b + lane * dim);
    }
  }

  // Packs the right factor of products whose lanes are those of a head: rows `first` to `count`, of at most `depth`.
  void pack_by_dim(Rows x, int64_t first, int64_t count, int64_t depth, uint32_t* b) const {
    for (int64_t lane = 0; lane < dim; lane += kPanel) {
      const int64_t lanes = std::min<int64_t>(kPanel, dim - lane);
      pack_columns<UnitF32>(x.data + lane, x.stride, count - first, lanes,
                            b + lane * depth + first * whole_vectors(lanes));
    }
  }

  // y (block, padded) = x b. b: by keys.
  void times_keys(Rows x, const Block& block, const uint32_t* b, float* y) const {
    b += block.span.begin * dim;
    for (int64_t lane = 0; lane < block.seen(); lane += kPanel) {
      const int64_t from = block.blind(lane), lanes = std::min<int64_t>(kPanel, whole_vectors(block.span.size) - lane);
      multiply<UnitF32>((x + from).left(), block.count - from, b + lane * dim, dim, y + from * padded + lane, padded,
                        lanes, false);
    }
  }

  // y (block, dim; rows y_stride apart) = or += x (block, padded) b. b: by dim.
  void over_keys(const float* x, const Block& block, const uint32_t* b, float* y, int64_t y_stride, bool add) const {
    for (int64_t lane = 0; lane < dim; lane += kPanel) {
      const int64_t lanes = std::min<int64_t>(kPanel, dim - lane);
      const uint32_t* from = b + lane * most + block.span.begin * whole_vectors(lanes);
      for (int64_t key = 0; key < block.seen(); key += kKeys) {
        for (int64_t i = block.blind(key); i < block.count; i += kBlockRows) {
          const int64_t rows = std::min<int64_t>(kBlockRows, block.count - i);
          multiply<UnitF32>({x + i * padded + key, padded * 4, 4}, rows, from + key * whole_vectors(lanes),
                            std::min(kKeys, block.seen(i + rows) - key), y + i * y_stride + lane, y_stride, lanes,
                            add || key > 0);
        }
      }
    }
  }

  // y (keys, dim) += x^T b, x (block, padded). b: by dim. Before, y has only the first `old` keys.
  void over_queries(const float* x, const Block& block, const uint32_t* b, int64_t old, float* y) const {
    for (int64_t lane = 0; lane < dim; lane += kPanel) {
      const int64_t lanes = std::min<int64_t>(kPanel, dim - lane);
      for (int64_t key = 0, end; key < block.seen(); key = end) {
        end = std::min<int64_t>(key + kBlockRows, key < old ? old : block.seen());
        const int64_t from = block.blind(key);
        multiply<UnitF32>({x + from * padded + key, 4, padded * 4}, end - key,
                          b + lane * kQueries + from * whole_vectors(lanes), block.count - from, y + key * dim + lane,
                          dim, lanes, key < old);
      }
    }
  }

  // Gradients of the keys of a span, of which nobody sees those from `seen` on, to the rows of their tokens. The
  // sequence that owns the shared ones came before.
  void hand_out(const float* y, const Sequence& s, Span keys, int64_t seen, float* to, int64_t stride) const {
    for (int64_t t = 0; t < keys.size; ++t) {
      const int64_t key = keys.begin + t;
      float* row = to + s.token(key) * stride;
      if (t >= seen) {
        if (key >= s.shared_keys) std::memset(row, 0, dim * sizeof *row);
      } else if (key >= s.shared_keys) {
        std::memcpy(row, y + t * dim, dim * sizeof *row);
      } else {
        for (int64_t j = 0; j < dim; ++j) row[j] += y[t * dim + j];
      }
    }
  }

  Span span_at(int64_t begin, int64_t keys) const { return {begin, std::min(span, keys - begin)}; }

  // Where the first span begins of which the query at this place, or one behind it, sees something.
  int64_t first_span(int64_t place, int64_t window) const {
    return std::max<int64_t>(place - window + 1, 0) / span * span;
  }
  bool sees_several_spans(int64_t place, int64_t window) const { return first_span(place, window) + span <= place; }
};

// f(the block, without a span)
template <class F>
void for_blocks(const Sequence& s, const int64_t* places, F f) {
  for (int64_t first = s.query, end = s.query + s.queries; first < end; first += kQueries) {
    f(Block{first, std::min(kQueries, end - first), places + first, {}});
  }
}

// f(head, first and end of the sequences of a family, their products)
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
    f(i / count, first, end, Products(dim, most));
  });
}

// Of a row of scores: what the query at this place does not see becomes kNever -> the end of a whole number of vectors;
// from there to `seen` there is 0.
int64_t hide(float* x, int64_t place, int64_t window, int64_t seen) {
  const int64_t own = std::min(place + 1, seen), whole = whole_vectors(own);
  for (int64_t t = 0; t < std::min(place - window + 1, own); ++t) x[t] = kNever;
  for (int64_t t = own; t < whole; ++t) x[t] = kNever;
  for (int64_t t = whole; t < seen; ++t) x[t] = 0;
  return whole;
}

// Scores of a query -> e^(score - largest). kept: the largest, and their sum; if this is not the first span, of those
// before it too -> the factor of what was summed with them.
float softmax(const Exp<>& exp, float* x, int64_t whole, bool first, float* kept) {
  vf largest = splat(first ? kNever : kept[0]), sum{};
  for (int64_t t = 0; t < whole; t += kWidth) largest = max(load_vector<vf>(x + t), largest);
  const float most = reduce_max(largest);
  const float factor = first || most == kept[0] ? 1.0f : exp(splat(kept[0] - most))[0];
  const float origin = most == kNever ? 0 : most;  // a window hides the whole span
  for (int64_t t = 0; t < whole; t += kWidth) {
    const vf e = exp(load_vector<vf>(x + t) - origin);
    std::memcpy(x + t, &e, sizeof e);
    sum += e;
  }
  kept[1] = reduce_add(sum) + (first ? 0 : factor * kept[1]);
  kept[0] = most;
  return factor;
}

// p: scores -> probabilities, by the largest score and 1 / the sum of what softmax() kept. s: slopes of the
// probabilities -> those of q k^T. mean: that of s by p (null: here are all keys that it sees).
void softmax_backward(const Exp<>& exp, float* p, float* s, int64_t whole, const float* kept, float scale,
                      const float* mean) {
  vf sum{};
  for (int64_t t = 0; t < whole; t += kWidth) {
    const vf weight = exp(load_vector<vf>(p + t) - kept[0]) * kept[1];
    sum = fma(weight, load_vector<vf>(s + t), sum);
    std::memcpy(p + t, &weight, sizeof weight);
  }
  const float shift = mean ? *mean : float(reduce_add(sum));
  for (int64_t t = 0; t < whole; t += kWidth) {
    const vf slope = load_vector<vf>(p + t) * (load_vector<vf>(s + t) - shift) * scale;
    std::memcpy(s + t, &slope, sizeof slope);
  }
}

// y (tokens, key_heads, dim) = the sum over the heads of queries that read the same keys, of x (tokens, heads, dim).
void add_heads(const float* x, int64_t tokens, int64_t heads, int64_t key_heads, int64_t dim, float* y, int threads) {
  const int64_t group = heads / key_heads;
  for_each(tokens * key_heads, worth_threads(threads, tokens * heads * dim), [&](int64_t i) {
    const float* from = x + i * group * dim;
    float* to = y + i * dim;
    std::memcpy(to, from, dim * sizeof *to);
    for (int64_t head = 1; head < group; ++head) {
      for (int64_t j = 0; j < dim; ++j) to[j] += from[head * dim + j];
    }
  });
}

float dot(const float* x, const float* y, int64_t n) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) sum += x[j] * y[j];
  return sum;
}

void scale_row(float* x, int64_t dim, float factor) {
  for (int64_t j = 0; j < dim; ++j) x[j] *= factor;
}

}  // namespace

int64_t packed_attention(Grid q, Grid k, Grid v, const int64_t* places, const int64_t* table, const int64_t* families,
                         int64_t count, int64_t heads, int64_t key_heads, int64_t dim, int64_t window, double scale,
                         double softcap, float* y, float* saved, int threads) {
  const Exp<> exp(softcap ? 1 : scale);
  for_heads(
      table, families, count, heads, dim, threads,
      [&](int64_t head, const Sequence* begin, const Sequence* end, Products products) {
        const int64_t key_head = head / (heads / key_heads);
        const Rows queries(q, head), keys(k, key_head), values(v, key_head);
        const Buffer<uint32_t> right_keys(products.by_keys_size(), kUnset);
        const Buffer<uint32_t> right_values(products.by_dim_size(products.most), kUnset);
        const Buffer<float> room(products.most * dim, kUnset), scores(products.scores_size(), kUnset);
        for (const Sequence* s = begin; s < end; ++s) {
          const int64_t first = s == begin ? 0 : s->packed_with(s[-1]);
          products.pack_by_keys(products.gather(keys, *s, first, room.data), first, s->keys(), right_keys.data);
          products.pack_by_dim(products.gather(values, *s, first, room.data), first, s->keys(), products.most,
                               right_values.data);
          for_blocks(*s, places, [&](Block block) {
            const int64_t start = products.first_span(block.places[0], window), last = block.places[block.count - 1];
            float* out = y + (block.first * heads + head) * dim;
            for (int64_t begin = start; begin <= last; begin += products.span) {
              block.span = products.span_at(begin, s->keys());
              products.times_keys(queries + block.first, block, right_keys.data, scores.data);
              for (int64_t i = block.blind(0); i < block.count; ++i) {
                float *x = scores.data + i * products.padded, *kept = saved + ((block.first + i) * heads + head) * 2;
                if (softcap) cap(x, block.seen(i + 1), scale, softcap);
                const int64_t whole = hide(x, block.place(i), window, block.seen());
                const float factor = softmax(exp, x, whole, begin == start, kept);
                if (factor != 1) scale_row(out + i * heads * dim, dim, factor);
              }
              products.over_keys(scores.data, block, right_values.data, out, heads * dim, begin > start);
            }
            for (int64_t i = 0; i < block.count; ++i, out += heads * dim) {
              float* sum = saved + ((block.first + i) * heads + head) * 2 + 1;
              *sum = 1 / *sum;
              scale_row(out, dim, *sum);
            }
          });
        }
      });
  return -1;
}

// With p the probabilities, g the gradient of y and s = g v^T: d = scale p (s - mean of s by p), grad_q = d k,
// grad_k = d^T q, grad_v = p^T g. (The mean is also g y, and taken so for a query that sees several spans. But it is
// rounded otherwise, and where one key is seen s - mean is 0.)
int64_t packed_attention_backward(Grid q, Grid k, Grid v, const float* y, const float* saved, const float* grad,
                                  const int64_t* places, const int64_t* table, const int64_t* families, int64_t count,
                                  int64_t heads, int64_t key_heads, int64_t dim, int64_t window, double scale,
                                  double softcap, int64_t tokens, float* by_head, float* grad_q, float* grad_k,
                                  float* grad_v, int threads) {
  const Exp<> exp(softcap ? 1 : scale);
  const int64_t stride = heads * dim;
  float *all_keys = by_head ? by_head : grad_k, *all_values = by_head ? by_head + tokens * stride : grad_v;
  for_heads(table, families, count, heads, dim, threads,
            [&](int64_t head, const Sequence* begin, const Sequence* end, Products products) {
              const int64_t key_head = head / (heads / key_heads), own = head * dim;
              const Rows queries(q, head), keys(k, key_head), values(v, key_head), slope_of_y(grad + own, stride);
              const Buffer<uint32_t> right_keys(products.by_keys_size(), kUnset);
              const Buffer<uint32_t> right_values(products.by_keys_size(), kUnset);
              const Buffer<uint32_t> right_rows(products.by_dim_size(products.most), kUnset);
              const Buffer<uint32_t> right_block(products.by_dim_size(kQueries), kUnset);
              const Buffer<float> room(products.most * dim, kUnset), weights(products.scores_size(), kUnset);
              const Buffer<float> slopes(products.scores_size(), kUnset), sums(2 * products.span_size(), kUnset);
              const Buffer<float> caps(softcap ? products.padded : 0, kUnset);
              float *of_keys = sums.data, *of_values = of_keys + products.span_size();
              for (const Sequence* s = begin; s < end; ++s) {
                const int64_t first = s == begin ? 0 : s->packed_with(s[-1]);
                products.pack_by_keys(products.gather(values, *s, first, room.data), first, s->keys(),
                                      right_values.data);
                const Rows from = products.gather(keys, *s, first, room.data);
                products.pack_by_keys(from, first, s->keys(), right_keys.data);
                products.pack_by_dim(from, first, s->keys(), products.most, right_rows.data);
                for (int64_t start = 0; start < s->keys(); start += products.span) {
                  const Span span = products.span_at(start, s->keys());
                  int64_t old = 0;
                  for_blocks(*s, places, [&](Block block) {
                    const int64_t begins = products.first_span(block.places[0], window);
                    block.span = span;
                    if (start < begins || block.place(block.count - 1) < 0) return;
                    const Rows q_rows = queries + block.first, g_rows = slope_of_y + block.first;
                    products.times_keys(q_rows, block, right_keys.data, weights.data);
                    products.times_keys(g_rows, block, right_values.data, slopes.data);
                    for (int64_t i = block.blind(0); i < block.count; ++i) {
                      float *p = weights.data + i * products.padded, *d = slopes.data + i * products.padded;
                      const int64_t at = (block.first + i) * heads + head, seen = block.seen(i + 1);
                      if (softcap) cap(p, seen, scale, softcap, caps.data);
                      const int64_t whole = hide(p, block.place(i), window, block.seen());
                      const bool several = products.sees_several_spans(block.places[i], window);
                      const float mean = several ? dot(grad + at * dim, y + at * dim, dim) : 0;
                      softmax_backward(exp, p, d, whole, saved + at * 2, float(scale), several ? &mean : nullptr);
                      for (int64_t t = 0; softcap && t < seen; ++t) d[t] *= caps[t];
                      for (int64_t t = whole; t < block.seen(); ++t) d[t] = 0;
                    }
                    float* to = grad_q + block.first * stride + own;
                    products.over_keys(slopes.data, block, right_rows.data, to, stride, start > begins);
                    products.pack_by_dim(q_rows, 0, block.count, kQueries, right_block.data);
                    products.over_queries(slopes.data, block, right_block.data, old, of_keys);
                    products.pack_by_dim(g_rows, 0, block.count, kQueries, right_block.data);
                    products.over_queries(weights.data, block, right_block.data, old, of_values);
                    old = std::max(old, block.seen());
                  });
                  products.hand_out(of_keys, *s, span, old, all_keys + own, stride);
                  products.hand_out(of_values, *s, span, old, all_values + own, stride);
                }
              }
            });
  if (by_head) {
    add_heads(all_keys, tokens, heads, key_heads, dim, grad_k, threads);
    add_heads(all_values, tokens, heads, key_heads, dim, grad_v, threads);
  }
  return -1;
}

}  // namespace rlhf::RLHF_ISA
