// Attention in training: the sequences of a row (packing.py) one after another, causal, forward and backward.
// A block of queries meets the keys that it sees, a span of them at a time: its scores stay in L2 while the softmax
// passes over them, and nothing of size (queries, keys) is kept. The backward computes the probabilities again, with
// the spans outside and the blocks inside, so that a span's keys, values and gradients stay in L2 (Dao et al. 2022).
// The factors of the products are float32, or bfloat16 where the CPU multiplies it: queries, keys, values, gradients,
// probabilities and slopes are then rounded just before. Sums, scores and results are float32.
#include <algorithm>
#include <limits>

#include "few_rows.h"
#include "product.h"
#include "tile.h"

namespace rlhf::RLHF_ISA {
namespace {

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

template <class T>
struct Rows {  // from `data` on
  const T* data;
  int64_t stride;
  Rows operator+(int64_t row) const { return {data + row * stride, stride}; }
  Left left() const { return {data, stride * int64_t(sizeof *data), 4}; }
};

Rows<float> of_head(Grid x, int64_t head) {
  return {static_cast<const float*>(x.data) + head * x.col_stride, x.row_stride};
}

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

template <int kToWrite>
void fetch(const float* row, int64_t dim) {
  for (int64_t j = 0; j < dim; j += 16) __builtin_prefetch(row + j, kToWrite);
}

// The products of one head and some sequences, of which none has more than `most` keys, or queries. Scores,
// weights and slopes are (kQueries, padded).
template <class Unit>
struct Products {
  using type = typename Unit::type;
  static constexpr bool kRounds = !std::is_same_v<type, float>;
  // A depth of queries or keys is a multiple of it, with zeros at its end; so are the rows of a block.
  static constexpr int64_t kWhole = Unit::kTiles ? kTileBlock : Unit::kSize;
  static constexpr int64_t kQueries = Unit::kTiles ? 2 * kTileBlock : 8 * kBlockRows;  // of a block
  static_assert(kPanel % kWhole == 0 && kQueries % kWhole == 0);

  int64_t dim, most, span, padded;
  Products(int64_t dim, int64_t most)
      : dim(dim),
        most(whole(most)),
        span(std::max<int64_t>(kSpan / dim / kKeys, 1) * kKeys),
        padded(whole_vectors(std::min(whole(most), span))) {}

  static int64_t whole(int64_t count) { return (count + kWhole - 1) / kWhole * kWhole; }
  static int64_t first_row(const Block& block, int64_t key) {
    const int64_t blind = block.blind(key);
    return blind - blind % kWhole;
  }

  int64_t row_size() const { return units<Unit>(dim) * Unit::kSize; }
  int64_t rows_size() const { return most * row_size(); }
  int64_t by_keys_size() const { return whole_vectors(most) * units<Unit>(dim); }
  int64_t by_dim_size(int64_t rows) const { return units<Unit>(rows) * whole_vectors(dim); }
  int64_t scores_size() const { return kQueries * padded; }
  int64_t span_size() const { return std::min(most, span) * dim; }

  // row(i), for every i < count, as factors. They lie far apart: those ahead are fetched.
  template <class F>
  void copy_rows(int64_t count, F row, type* out) const {
    for (int64_t i = 0; i < count; ++i, out += row_size()) {
      fetch<0>(row(std::min(i + 8, count - 1)), dim);
      if constexpr (kRounds) {
        round_to_bfloat16(row(i), dim, out);
        if (dim % 2) out[dim] = 0;
      } else {
        std::memcpy(out, row(i), dim * sizeof *out);
      }
    }
  }

  // The keys or values of a sequence from the one at `first` on, as factors: where they lie, if they can stay there.
  Rows<type> gather(Rows<float> x, const Sequence& s, int64_t first, type* room) const {
    if constexpr (!kRounds) {
      if (!s.shared_keys) return x + (s.own + first);
    }
    copy_rows(s.keys() - first, [&](int64_t i) { return (x + s.token(first + i)).data; }, room);
    return {room, row_size()};
  }

  // The queries of a sequence, or the gradients of their results.
  Rows<type> gather(Rows<float> x, const Sequence& s, type* room) const {
    if constexpr (kRounds) {
      copy_rows(s.queries, [&](int64_t i) { return (x + (s.query + i)).data; }, room);
      std::fill(room + s.queries * row_size(), room + whole(s.queries) * row_size(), type(0));
      return {room, row_size()};
    } else {
      return x + s.query;
    }
  }

  // Packs the right factor of products whose lanes are keys, from the one at `first` on, a whole number of panels.
  void pack_by_keys(Rows<type> x, int64_t first, int64_t keys, uint32_t* b) const {
    const int64_t all = whole_vectors(whole(keys)), depth = units<Unit>(dim);
    for (int64_t lane = first; lane < all; lane += kPanel) {
      const int64_t lanes = std::min<int64_t>(kPanel, all - lane);
      pack_rows<Unit>((x + (lane - first)).data, x.stride, std::min(lanes, keys - lane), dim, lanes, b + lane * depth);
    }
  }

  // Packs the right factor of products whose lanes are those of a head: rows `first` to `count`, of at most `depth`.
  void pack_by_dim(Rows<type> x, int64_t first, int64_t count, int64_t depth, uint32_t* b) const {
    for (int64_t lane = 0; lane < dim; lane += kPanel) {
      const int64_t lanes = std::min<int64_t>(kPanel, dim - lane), width = whole_vectors(lanes);
      uint32_t* panel = b + lane * units<Unit>(depth);
      pack_columns<Unit>(x.data + lane, x.stride, count - first, lanes, panel + units<Unit>(first) * width);
      std::fill(panel + units<Unit>(count) * width, panel + units<Unit>(whole(count)) * width, 0);
    }
  }

  // Weights or slopes as a factor, with the rows of queries.
  Left by_queries(const type* x) const { return {x, padded * int64_t(sizeof *x), 4}; }

  // With the rows of keys. Tiles are loaded from rows of memory, other units from anywhere.
  Left by_keys(const type* x, const Block& block, uint32_t* room) const {
    const int64_t from = first_row(block, 0), rows = whole(block.count), keys = whole_vectors(whole(block.seen()));
    if constexpr (Unit::kTiles) {
      auto* to = reinterpret_cast<uint16_t*>(room);
      for (int64_t i = from; i < rows; i += kWhole) {
        for (int64_t key = 0; key < keys; key += kWidth) {
          transpose_block(x + i * padded + key, padded, to + key * kQueries + i, kQueries);
        }
      }
      return {room, kQueries * 2, 4};
    } else if constexpr (kRounds) {
      pack_columns<Unit>(x + from * padded, padded, rows - from, keys, room + units<Unit>(from) * keys);
      return {room, 4, keys * 4};
    } else {
      return {x, 4, padded * 4};
    }
  }

  // y (block, padded) = x b, x (block, dim). b: by keys.
  void times_keys(Left x, const Block& block, const uint32_t* b, float* y) const {
    const int64_t depth = units<Unit>(dim), all = whole_vectors(whole(block.span.size));
    b += block.span.begin * depth;
    for (int64_t lane = 0; lane < block.seen(); lane += kPanel) {
      const int64_t from = first_row(block, lane), lanes = std::min<int64_t>(kPanel, all - lane);
      multiply<Unit>(x.skip(from), whole(block.count) - from, b + lane * depth, depth, y + from * padded + lane, padded,
                     lanes, false);
    }
  }

  // y (block, dim) = or += x b, x (block, keys of the span). b: by dim.
  void over_keys(Left x, const Block& block, const uint32_t* b, float* y, bool add) const {
    for (int64_t lane = 0; lane < dim; lane += kPanel) {
      const int64_t lanes = std::min<int64_t>(kPanel, dim - lane), width = whole_vectors(lanes);
      const uint32_t* from = b + lane * units<Unit>(most) + units<Unit>(block.span.begin) * width;
      for (int64_t key = 0; key < block.seen(); key += kKeys) {
        for (int64_t i = first_row(block, key), rows; i < block.count; i += rows) {
          rows = std::min<int64_t>(Unit::kRows, whole(block.count) - i);
          const int64_t keys = std::min(kKeys, whole(block.seen(std::min(i + rows, block.count))) - key);
          multiply<Unit>(x.skip(i, units<Unit>(key)), rows, from + units<Unit>(key) * width, units<Unit>(keys),
                         y + i * dim + lane, dim, lanes, add || key > 0);
        }
      }
    }
  }

  // y (keys, dim) += x b, x (keys of the span, block). b: by dim.
  void over_queries(Left x, const Block& block, const uint32_t* b, float* y) const {
    for (int64_t lane = 0; lane < dim; lane += kPanel) {
      const int64_t lanes = std::min<int64_t>(kPanel, dim - lane), width = whole_vectors(lanes);
      for (int64_t key = 0; key < block.seen(); key += Unit::kRows) {
        const int64_t from = first_row(block, key), depth = units<Unit>(whole(block.count) - from);
        multiply<Unit>(x.skip(key, units<Unit>(from)), std::min<int64_t>(Unit::kRows, whole(block.seen()) - key),
                       b + lane * units<Unit>(kQueries) + units<Unit>(from) * width, depth, y + key * dim + lane, dim,
                       lanes, true);
      }
    }
  }

  // Gradients of the keys of a span to the rows of their tokens. The sequence that owns the shared ones came before.
  void hand_out(const float* y, const Sequence& s, Span keys, float* to, int64_t stride) const {
    for (int64_t t = 0; t < keys.size; ++t, y += dim) {
      const int64_t key = keys.begin + t;
      float* row = to + s.token(key) * stride;
      if (key >= s.shared_keys) {
        std::memcpy(row, y, dim * sizeof *row);
      } else {
        for (int64_t j = 0; j < dim; ++j) row[j] += y[j];
      }
    }
  }

  Span span_at(int64_t begin, int64_t keys) const { return {begin, std::min(span, keys - begin)}; }

  // Where the first span begins of which the query at this place, or one behind it, sees something.
  int64_t first_span(int64_t place, int64_t window) const {
    return std::max<int64_t>(place - window + 1, 0) / span * span;
  }
  bool sees_several_spans(int64_t place, int64_t window) const { return first_span(place, window) + span <= place; }

  // f(the block, without a span)
  template <class F>
  static void for_blocks(const Sequence& s, const int64_t* places, F f) {
    for (int64_t first = s.query, end = s.query + s.queries; first < end; first += kQueries) {
      f(Block{first, std::min(kQueries, end - first), places + first, {}});
    }
  }
};

// f(head, first and end of the sequences of some families, their products)
template <class Unit, class F>
void for_heads(const int64_t* table, const int64_t* families, int64_t count, int64_t heads, int64_t dim, int threads,
               F f) {
  const auto* sequences = reinterpret_cast<const Sequence*>(table);
  int64_t scores = 0;
  for (const Sequence* s = sequences; s < sequences + families[count]; ++s) scores += s->queries * s->keys();
  threads = threads_for_products(threads, scores * heads * dim);
  const int64_t parts = std::min<int64_t>(threads, count);
  for_each(heads * parts, threads, [&](int64_t i) {
    const InUse<Unit> in_use;
    const int64_t part = i % parts;
    const Sequence *first = sequences + families[count * part / parts],
                   *end = sequences + families[count * (part + 1) / parts];
    int64_t most = 0;
    for (const Sequence* s = first; s < end; ++s) most = std::max({most, s->keys(), s->queries});
    f(i / parts, first, end, Products<Unit>(dim, most));
  });
}

void put(float* to, vf x) { std::memcpy(to, &x, sizeof x); }

void put(uint16_t* to, vf x) {  // rounded as BF16::store does
  const vh rounded = __builtin_convertvector((bits<vu>(x) + 0x8000u) >> 16, vh);
  std::memcpy(to, &rounded, sizeof rounded);
}

// Of a row of scores: among the first `seen`, what the query at this place does not see becomes kNever, and so do those
// that make the vectors whole -> the end of these.
int64_t hide(float* x, int64_t place, int64_t window, int64_t seen) {
  const int64_t whole = whole_vectors(seen);
  for (int64_t t = 0; t < std::min(place - window + 1, seen); ++t) x[t] = kNever;
  for (int64_t t = seen; t < whole; ++t) x[t] = kNever;
  return whole;
}

// Scores of a query -> e^(score - largest) in y (may be x), with zeros from `whole` to `end`. kept: the largest, and
// their sum; if this is not the first span, of those before it too -> the factor of what was summed with them.
template <class T>
float softmax(const Exp<>& exp, const float* x, int64_t whole, int64_t end, bool first, float* kept, T* y) {
  vf largest = splat(first ? kNever : kept[0]), sum{};
  for (int64_t t = 0; t < whole; t += kWidth) largest = max(load_vector<vf>(x + t), largest);
  const float most = reduce_max(largest);
  const float factor = first || most == kept[0] ? 1.0f : exp(splat(kept[0] - most))[0];
  const float origin = most == kNever ? 0 : most;  // a window hides the whole span
  for (int64_t t = 0; t < whole; t += kWidth) {
    const vf e = exp(load_vector<vf>(x + t) - origin);
    put(y + t, e);
    sum += e;
  }
  for (int64_t t = whole; t < end; ++t) y[t] = 0;
  kept[1] = reduce_add(sum) + (first ? 0 : factor * kept[1]);
  kept[0] = most;
  return factor;
}

// p: scores -> probabilities, by the largest score and 1 / the sum of what softmax() kept. s: slopes of the
// probabilities -> those of q k^T in d, by those of cap(). mean: that of s by p (null: here are all keys that it sees).
// weights and d, which may be p and s, have zeros from `whole` to `end`.
template <class T>
void softmax_backward(const Exp<>& exp, float* p, float* s, int64_t whole, int64_t end, const float* kept, float scale,
                      const float* mean, const float* caps, T* weights, T* d) {
  vf sum{};
  for (int64_t t = 0; t < whole; t += kWidth) {
    const vf weight = exp(load_vector<vf>(p + t) - kept[0]) * kept[1];
    sum = fma(weight, load_vector<vf>(s + t), sum);
    put(p + t, weight);
    if constexpr (!std::is_same_v<T, float>) put(weights + t, weight);
  }
  const float shift = mean ? *mean : float(reduce_add(sum));
  for (int64_t t = 0; t < whole; t += kWidth) {
    const vf slope = load_vector<vf>(p + t) * (load_vector<vf>(s + t) - shift) * scale;
    put(d + t, caps ? slope * load_vector<vf>(caps + t) : slope);
  }
  for (int64_t t = whole; t < end; ++t) weights[t] = d[t] = 0;
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

// Rows of results, which lie far apart, arrive while the block is computed.
void fetch_rows(const float* x, int64_t rows, int64_t dim, int64_t stride) {
  for (int64_t i = 0; i < rows; ++i) fetch<1>(x + i * stride, dim);
}

void scale_row(float* x, int64_t dim, float factor) {
  for (int64_t j = 0; j < dim; ++j) x[j] *= factor;
}

// f(Unit{}): for bfloat16 where the CPU multiplies it, or else float32, which then costs no more.
template <class F>
void with_factors(int dtype, F f) {
  with_unit(dtype, [&](auto unit) {
    using Unit = decltype(unit);
    f(std::conditional_t<std::is_same_v<Unit, UnitWidened>, UnitF32, Unit>{});
  });
}

// Weights or slopes of a block, as softmax leaves them for the products: in place, or rounded.
template <class Unit>
class Factors {
 public:
  using type = typename Unit::type;
  type* data;

  Factors(const Products<Unit>& products, float* scores)
      : products_(products), rounded_(products.kRounds ? products.scores_size() : 0, kUnset) {
    if constexpr (Products<Unit>::kRounds) {
      data = rounded_.data;
    } else {
      data = scores;
    }
  }
  type* row(int64_t i) const { return data + i * products_.padded; }

  // Rows that softmax leaves out, as there is no query or it sees none of the span.
  void clear(const Block& block) const {
    const auto clear = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) std::fill_n(row(i), products_.whole(block.seen()), type(0));
    };
    clear(products_.first_row(block, 0), block.blind(0));
    clear(block.count, products_.whole(block.count));
  }

 private:
  const Products<Unit>& products_;
  Buffer<type> rounded_;
};

template <class Unit>
void forward(Grid q, Grid k, Grid v, const int64_t* places, const int64_t* table, const int64_t* families,
             int64_t count, int64_t heads, int64_t key_heads, int64_t dim, int64_t window, double scale, double softcap,
             float* y, float* saved, int threads) {
  using type = typename Unit::type;
  const Exp<> exp(softcap ? 1 : scale);
  for_heads<Unit>(
      table, families, count, heads, dim, threads,
      [&](int64_t head, const Sequence* begin, const Sequence* end, const Products<Unit>& products) {
        const int64_t key_head = head / (heads / key_heads);
        const Rows<float> queries = of_head(q, head), keys = of_head(k, key_head), values = of_head(v, key_head);
        const Buffer<uint32_t> right_keys(products.by_keys_size(), kUnset);
        const Buffer<uint32_t> right_values(products.by_dim_size(products.most), kUnset);
        const Buffer<type> room(products.rows_size(), kUnset);
        const Buffer<type> q_room(products.kRounds ? products.rows_size() : 0, kUnset);
        const Buffer<float> scores(products.scores_size(), kUnset), sums(products.kQueries * dim, kUnset);
        const Factors<Unit> weights(products, scores.data);
        for (const Sequence* s = begin; s < end; ++s) {
          const int64_t first = s == begin ? 0 : s->packed_with(s[-1]);
          products.pack_by_keys(products.gather(keys, *s, first, room.data), first, s->keys(), right_keys.data);
          products.pack_by_dim(products.gather(values, *s, first, room.data), first, s->keys(), products.most,
                               right_values.data);
          const Rows<type> q_rows = products.gather(queries, *s, q_room.data);
          products.for_blocks(*s, places, [&](Block block) {
            const int64_t start = products.first_span(block.places[0], window), last = block.places[block.count - 1];
            float* out = y + (block.first * heads + head) * dim;
            fetch_rows(out, block.count, dim, heads * dim);
            for (int64_t begin = start; begin <= last; begin += products.span) {
              block.span = products.span_at(begin, s->keys());
              products.times_keys((q_rows + (block.first - s->query)).left(), block, right_keys.data, scores.data);
              for (int64_t i = block.blind(0); i < block.count; ++i) {
                float *x = scores.data + i * products.padded, *kept = saved + ((block.first + i) * heads + head) * 2;
                if (softcap) cap(x, block.seen(i + 1), scale, softcap);
                const int64_t whole = hide(x, block.place(i), window, block.seen(i + 1));
                const float factor =
                    softmax(exp, x, whole, products.whole(block.seen()), begin == start, kept, weights.row(i));
                if (factor != 1) scale_row(sums.data + i * dim, dim, factor);
              }
              weights.clear(block);
              products.over_keys(products.by_queries(weights.data), block, right_values.data, sums.data, begin > start);
            }
            for (int64_t i = 0; i < block.count; ++i) {
              float* sum = saved + ((block.first + i) * heads + head) * 2 + 1;
              *sum = 1 / *sum;
              for (int64_t j = 0; j < dim; ++j) out[i * heads * dim + j] = sums[i * dim + j] * *sum;
            }
          });
        }
      });
}

// With p the probabilities, g the gradient of y and s = g v^T: d = scale p (s - mean of s by p), grad_q = d k,
// grad_k = d^T q, grad_v = p^T g. (The mean is also g y, and taken so for a query that sees several spans. But it is
// rounded otherwise, and where one key is seen s - mean is 0.)
template <class Unit>
void backward(Grid q, Grid k, Grid v, const float* y, const float* saved, const float* grad, const int64_t* places,
              const int64_t* table, const int64_t* families, int64_t count, int64_t heads, int64_t key_heads,
              int64_t dim, int64_t window, double scale, double softcap, float* grad_q, float* of_keys,
              float* of_values, int threads) {
  using type = typename Unit::type;
  const Exp<> exp(softcap ? 1 : scale);
  const int64_t stride = heads * dim;
  for_heads<Unit>(
      table, families, count, heads, dim, threads,
      [&](int64_t head, const Sequence* begin, const Sequence* end, const Products<Unit>& products) {
        const int64_t key_head = head / (heads / key_heads), own = head * dim;
        const Rows<float> queries = of_head(q, head), keys = of_head(k, key_head), values = of_head(v, key_head);
        const Rows<float> slope_of_y{grad + own, stride};
        const Buffer<uint32_t> right_keys(products.by_keys_size(), kUnset);
        const Buffer<uint32_t> right_values(products.by_keys_size(), kUnset);
        const Buffer<uint32_t> right_rows(products.by_dim_size(products.most), kUnset);
        const Buffer<uint32_t> right_block(products.by_dim_size(products.kQueries), kUnset);
        const Buffer<uint32_t> left_keys(products.kRounds ? units<Unit>(products.scores_size()) : 0, kUnset);
        const int64_t rounded = products.kRounds ? products.rows_size() : 0;
        const Buffer<type> room(products.rows_size(), kUnset), q_room(rounded, kUnset), g_room(rounded, kUnset);
        const Buffer<float> scores(products.scores_size(), kUnset), changes(products.scores_size(), kUnset);
        const Buffer<float> caps(softcap ? products.padded : 0), means(products.most, kUnset);
        const Buffer<float> key_sums(products.span_size(), kUnset), value_sums(products.span_size(), kUnset);
        const Buffer<float> query_sums(products.kQueries * dim, kUnset);
        const Factors<Unit> weights(products, scores.data), slopes(products, changes.data);
        for (const Sequence* s = begin; s < end; ++s) {
          const int64_t first = s == begin ? 0 : s->packed_with(s[-1]);
          products.pack_by_keys(products.gather(values, *s, first, room.data), first, s->keys(), right_values.data);
          const Rows<type> from = products.gather(keys, *s, first, room.data);
          products.pack_by_keys(from, first, s->keys(), right_keys.data);
          products.pack_by_dim(from, first, s->keys(), products.most, right_rows.data);
          const Rows<type> all_q = products.gather(queries, *s, q_room.data);
          const Rows<type> all_g = products.gather(slope_of_y, *s, g_room.data);
          for (int64_t i = 0; i < s->queries; ++i) {
            const int64_t at = ((s->query + i) * heads + head) * dim;
            if (products.sees_several_spans(places[s->query + i], window)) means[i] = dot(grad + at, y + at, dim);
          }
          for (int64_t start = 0; start < s->keys(); start += products.span) {
            const Span span = products.span_at(start, s->keys());
            std::fill_n(key_sums.data, products.whole(span.size) * dim, 0.0f);
            std::fill_n(value_sums.data, products.whole(span.size) * dim, 0.0f);
            products.for_blocks(*s, places, [&](Block block) {
              const int64_t begins = products.first_span(block.places[0], window);
              block.span = span;
              if (start < begins || block.place(block.count - 1) < 0) return;
              float* out = grad_q + block.first * stride + own;
              fetch_rows(out, block.count, dim, stride);
              const int64_t row = block.first - s->query;
              const Rows<type> q_rows = all_q + row, g_rows = all_g + row;
              products.times_keys(q_rows.left(), block, right_keys.data, scores.data);
              products.times_keys(g_rows.left(), block, right_values.data, changes.data);
              const int64_t blind = block.blind(0), end = products.whole(block.seen());
              for (int64_t i = blind; i < block.count; ++i) {
                float *p = scores.data + i * products.padded, *d = changes.data + i * products.padded;
                const int64_t at = (block.first + i) * heads + head, seen = block.seen(i + 1);
                if (softcap) cap(p, seen, scale, softcap, caps.data);
                const int64_t whole = hide(p, block.place(i), window, seen);
                const bool several = products.sees_several_spans(block.places[i], window);
                softmax_backward(exp, p, d, whole, end, saved + at * 2, float(scale),
                                 several ? means.data + row + i : nullptr, softcap ? caps.data : nullptr,
                                 weights.row(i), slopes.row(i));
              }
              weights.clear(block);
              slopes.clear(block);
              products.over_keys(products.by_queries(slopes.data), block, right_rows.data, query_sums.data, false);
              for (int64_t i = blind; i < block.count; ++i) {
                float* to = out + i * stride;
                for (int64_t j = 0; j < dim; ++j) to[j] = (start > begins ? to[j] : 0) + query_sums[i * dim + j];
              }
              products.pack_by_dim(q_rows, 0, block.count, products.kQueries, right_block.data);
              products.over_queries(products.by_keys(slopes.data, block, left_keys.data), block, right_block.data,
                                    key_sums.data);
              products.pack_by_dim(g_rows, 0, block.count, products.kQueries, right_block.data);
              products.over_queries(products.by_keys(weights.data, block, left_keys.data), block, right_block.data,
                                    value_sums.data);
            });
            products.hand_out(key_sums.data, *s, span, of_keys + own, stride);
            products.hand_out(value_sums.data, *s, span, of_values + own, stride);
          }
        }
      });
}

}  // namespace

int64_t packed_attention(Grid q, Grid k, Grid v, const int64_t* places, const int64_t* table, const int64_t* families,
                         int64_t count, int64_t heads, int64_t key_heads, int64_t dim, int64_t window, double scale,
                         double softcap, int dtype, float* y, float* saved, int threads) {
  with_factors(dtype, [&](auto unit) {
    forward<decltype(unit)>(q, k, v, places, table, families, count, heads, key_heads, dim, window, scale, softcap, y,
                            saved, threads);
  });
  return -1;
}

int64_t packed_attention_backward(Grid q, Grid k, Grid v, const float* y, const float* saved, const float* grad,
                                  const int64_t* places, const int64_t* table, const int64_t* families, int64_t count,
                                  int64_t heads, int64_t key_heads, int64_t dim, int64_t window, double scale,
                                  double softcap, int dtype, int64_t tokens, float* by_head, float* grad_q,
                                  float* grad_k, float* grad_v, int threads) {
  float *of_keys = by_head ? by_head : grad_k, *of_values = by_head ? by_head + tokens * heads * dim : grad_v;
  with_factors(dtype, [&](auto unit) {
    backward<decltype(unit)>(q, k, v, y, saved, grad, places, table, families, count, heads, key_heads, dim, window,
                             scale, softcap, grad_q, of_keys, of_values, threads);
  });
  if (by_head) {
    add_heads(of_keys, tokens, heads, key_heads, dim, grad_k, threads);
    add_heads(of_values, tokens, heads, key_heads, dim, grad_v, threads);
  }
  return -1;
}

}  // namespace rlhf::RLHF_ISA
