// Log-probs from hidden states on the CPU, and their gradients: three matrix products with the softmax between them.
//
//   z = weight @ hidden.T   (vocab, lanes), one lane a row of hidden: maxima and sums run down the lanes of a vector
//   z = softcap tanh((z + bias) / softcap), where there are such
//   dz = z's gradient;  dweight += dz @ hidden;  dhidden = dz.T @ weight
//
// A thread makes a tile of dz beside z, multiplies it for dweight, and writes it over z in the order in which dhidden
// reads it.
// Threads share the tiles of the vocabulary, then the columns of dhidden. Every number is summed in an order that
// depends on neither the threads nor, in the forward and in dhidden, on the other rows.
#include <cmath>

#include "../ops.h"
#include "parallel.h"
#include "product.h"
#include "softmax_row.h"
#include "tile.h"

namespace rlhf::RLHF_ISA {
namespace {

using vd = double __attribute__((vector_size(8 * kWidth)));

// Rows of the weight in a tile: whole blocks, and one piece of depth for dhidden, which is loaded and stored once a
// tile. Their logits or dz, 146 KB at 304 lanes, stay in L2 while they are multiplied; with many lanes, of a small
// vocabulary, not. Two bfloat16 are one unit of depth, so there tiles are taller (365 KB): 0.87 to 0.9 of the time of
// 120 at a width of 256, 0.86 to 0.95 at 896 (EPYC 9004, in turns; 240 and 360 take 1.02 of 300's; in float32 150 and
// 240 take 0.97 to 1.02). Not where the vocabulary is below kTallFrom: a chunk then has so many lanes that every thread
// would take tens of MB for its tile.
constexpr int64_t kTileRows = 120, kTallTileRows = 300, kTallFrom = 2048;
static_assert(kTileRows % kBlockRows == 0 && kTileRows % 2 == 0 && kTileRows <= kPieceDepth);
static_assert(kTallTileRows % kBlockRows == 0 && kTallTileRows % 2 == 0 && kTallTileRows / 2 <= kPieceDepth);
constexpr int64_t kLanes = 16;  // the lanes are padded to a multiple

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// What is common to both directions.
template <class Unit>
struct Problem {
  using type = typename Unit::type;
  const type* hidden;
  int64_t hidden_stride;
  const type* weight;
  int64_t weight_stride, rows, vocab, width;

  int64_t lanes() const { return (rows + kLanes - 1) / kLanes * kLanes; }
  // Of a whole tile, in whole blocks. It must not depend on the lanes: what is summed tile by tile, is summed in its
  // order.
  int64_t height() const {
    const bool tall = Unit::kSize == 2 && vocab >= kTallFrom;
    const int64_t rows = tall ? kTallTileRows : kTileRows;
    return (rows + Unit::kRows - 1) / Unit::kRows * Unit::kRows;
  }
  int64_t tiles() const { return (vocab + height() - 1) / height(); }
  int64_t tile_rows(int64_t tile) const { return least(vocab - tile * height(), height()); }
  const type* weight_tile(int64_t tile) const { return weight + tile * height() * weight_stride; }
};

// z of a panel of lanes, with bias (null: none) and softcap (0: none).
void finish_logits(float* z, int64_t stride, int64_t rows, int64_t lanes, const float* bias, double softcap) {
  const vf cap = splat(float(softcap));
  for (int64_t v = 0; v < rows; ++v, z += stride) {
    const vf shift = splat(bias ? bias[v] : 0.0f);
    for (int64_t lane = 0; lane < lanes; lane += kWidth) {
      vf x = load_vector<vf>(z + lane) + shift;
      if (softcap != 0) x = cap * tanh(x / cap);
      std::memcpy(z + lane, &x, sizeof x);
    }
  }
}

// The maximum of each lane and its sums of exp and of exp times distance (softmax_row.h), over the rows of a tile.
template <bool kMoment>
void lane_statistics(const float* z, int64_t stride, int64_t rows, const Exp<>& exp, float* out, int64_t out_stride) {
  vf most = splat(-INFINITY), most_b = most;
  for (int64_t v = 0; v + 1 < rows; v += 2) {
    most = max(load_vector<vf>(z + v * stride), most);
    most_b = max(load_vector<vf>(z + (v + 1) * stride), most_b);
  }
  if (rows % 2) most = max(load_vector<vf>(z + (rows - 1) * stride), most);
  most = max(most, most_b);
  const vf origin = most == splat(-INFINITY) ? vf{} : most;  // -inf - -inf is not a distance
  vf sum{}, moment{};
  for (int64_t v = 0; v < rows; ++v) {
    const vf d = load_vector<vf>(z + v * stride) - origin;
    vf e;
    sum = exp.add(sum, d, e);
    if constexpr (kMoment) moment = fma(e, exp.bounded(d), moment);
  }
  std::memcpy(out, &most, sizeof most);
  std::memcpy(out + out_stride, &sum, sizeof sum);
  std::memcpy(out + 2 * out_stride, &moment, sizeof moment);
}

struct LaneSums {
  vf max;
  vd sum, moment;
};

// The tiles of kWidth lanes together, in order and in double.
LaneSums merge(const float* partial, int64_t tiles, int64_t stride, const Exp<>& exp) {
  vf most = splat(-INFINITY);
  for (int64_t t = 0; t < tiles; ++t) most = max(load_vector<vf>(partial + 3 * t * stride), most);
  const vf origin = most == splat(-INFINITY) ? vf{} : most;
  vd sum{}, moment{};
  for (int64_t t = 0; t < tiles; ++t) {
    const float* part = partial + 3 * t * stride;
    const vf shift = load_vector<vf>(part) - origin;
    const vd scale = __builtin_convertvector(exp(shift), vd);
    const vd part_sum = __builtin_convertvector(load_vector<vf>(part + stride), vd);
    const vd part_moment = __builtin_convertvector(load_vector<vf>(part + 2 * stride), vd);
    sum += scale * part_sum;
    moment += scale * (part_moment + __builtin_convertvector(exp.bounded(shift), vd) * part_sum);
  }
  return {most, sum, moment};
}

template <class Unit>
void forward(const Problem<Unit>& p, const float* bias, double softcap, const int64_t* labels, double temperature,
             float* logits, float* logprobs, float* entropy, float* saved, int threads) {
  const int64_t lanes = p.lanes(), tiles = p.tiles(), depth = units<Unit>(p.width);
  const bool copies = !Unit::kAsItLies || p.width % Unit::kSize != 0;
  const double c = 1 / temperature;
  const Exp<> exp(c);
  const Buffer<uint32_t> hidden(lanes * depth);
  const Buffer<float> partial(tiles * 3 * lanes), label_logit(p.rows);
  if (logits) use_huge_pages(logits, p.vocab * lanes * sizeof *logits);
#pragma omp parallel num_threads(team(threads, p.rows* p.vocab))
  {
    [[maybe_unused]] const InUse<Unit> in_use;
    const Buffer<float> own(logits ? 0 : p.tile_rows(0) * lanes);
    const Buffer<uint32_t> copy(copies ? p.height() * depth : 0);
#pragma omp for
    for (int64_t lane = 0; lane < lanes; lane += kPanel) {
      // The padding lanes are rows of zeros.
      const int64_t panel = least(lanes - lane, kPanel), filled = least(p.rows - lane, panel);
      pack_rows<Unit>(p.hidden + lane * p.hidden_stride, p.hidden_stride, filled, p.width, panel,
                      hidden.data + lane * depth);
    }
#pragma omp for schedule(dynamic)
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t first = tile * p.height(), count = p.tile_rows(tile);
      float* z = logits ? logits + first * lanes : own.data;
      Left weight{p.weight_tile(tile), p.weight_stride * int64_t(sizeof *p.weight), 4};
      if (copies) {
        copy_units<Unit>(p.weight_tile(tile), p.weight_stride, count, p.width, copy.data);
        weight = {copy.data, depth * 4, 4};
      }
      for (int64_t lane = 0; lane < lanes; lane += kPanel) {
        const int64_t panel = least(lanes - lane, kPanel);
        multiply<Unit>(weight, count, hidden.data + lane * depth, depth, z + lane, lanes, panel, false);
        if (bias || softcap != 0) finish_logits(z + lane, lanes, count, panel, bias ? bias + first : nullptr, softcap);
        for (int64_t j = lane; j < lane + panel; j += kWidth) {
          (entropy ? lane_statistics<true> : lane_statistics<false>)(z + j, lanes, count, exp,
                                                                     &partial[3 * tile * lanes + j], lanes);
        }
      }
      for (int64_t i = 0; i < p.rows; ++i) {
        if (labels[i] >= first && labels[i] < first + count) label_logit[i] = z[(labels[i] - first) * lanes + i];
      }
    }
#pragma omp for
    for (int64_t lane = 0; lane < lanes; lane += kWidth) {
      const LaneSums s = merge(&partial[lane], tiles, lanes, exp);
      for (int64_t i = lane; i < least(lane + kWidth, p.rows); ++i) {
        const double max = s.max[i - lane], sum = s.sum[i - lane], log_sum = std::log(sum);
        logprobs[i] = float(c * (label_logit[i] - max) - log_sum);
        if (entropy) entropy[i] = float(log_sum - c * s.moment[i - lane] / sum);
        saved[2 * i] = float(max);
        saved[2 * i + 1] = float(log_sum);
      }
    }
  }
}

// The gradient with respect to a lane's logits is e^d (a + b (z - max)), and at its label something else: gradient_row.
struct LaneGradients {
  const Buffer<float> max, a, b;
  explicit LaneGradients(int64_t lanes) : max(lanes), a(lanes), b(lanes) {}
};

// A capped logit z has the derivative 1 - (z / softcap)^2, exactly 0 where it has reached the cap. Without a cap (0) z
// may be infinite, and there is nothing to multiply by.
void write_gradient(const float* z, int64_t lanes, int64_t rows, const LaneGradients& g, float softcap,
                    const Exp<>& exp, float* out) {
  const vf cap = splat(softcap);
  for (int64_t v = 0; v < rows; ++v, z += lanes, out += lanes) {
    for (int64_t lane = 0; lane < lanes; lane += kWidth) {
      const vf x = load_vector<vf>(z + lane), d = x - load_vector<vf>(&g.max[lane]);
      vf dz = exp(d) * fma(load_vector<vf>(&g.b[lane]), exp.bounded(d), load_vector<vf>(&g.a[lane]));
      if (softcap != 0) dz *= 1.0f - x / cap * (x / cap);
      std::memcpy(out + lane, &dz, sizeof dz);
    }
  }
}

// Sums of dz over its first `count` lanes, the others are padding. float32 over 32 terms, double beyond: of a small
// vocabulary there are 10^5 lanes, and one chain of so many loses three digits.
void add_bias(const float* dz, int64_t stride, int64_t rows, int64_t count, float* grad_bias, bool add) {
  const int64_t whole = count - count % kWidth;
  for (int64_t v = 0; v < rows; ++v, dz += stride) {
    double sum = add ? grad_bias[v] : 0;
    for (int64_t lane = 0; lane < whole;) {
      vf sums{};
      for (const int64_t end = least(lane + 32 * kWidth, whole); lane < end; lane += kWidth) {
        sums += load_vector<vf>(dz + lane);
      }
      sum += reduce_add(sums);
    }
    for (int64_t lane = whole; lane < count; ++lane) sum += dz[lane];
    grad_bias[v] = float(sum);
  }
}

// dz in bfloat16 twice: by rows for dweight, and over itself in units of two neighbouring rows for dhidden.
void narrow(float* dz, int64_t lanes, int64_t rows, uint16_t* by_row) {
  for (int64_t v = 0; v < rows; v += 2) {
    const float *low = dz + v * lanes, *high = low + lanes;
    for (int64_t lane = 0; lane < lanes; lane += kWidth) {
      const vu a = bits<vu>(load_vector<vf>(low + lane)) + 0x8000u;  // rounded as BF16::store does
      const vu b = v + 1 < rows ? bits<vu>(load_vector<vf>(high + lane)) + 0x8000u : vu{};
      const vh even = __builtin_convertvector(a >> 16, vh), odd = __builtin_convertvector(b >> 16, vh);
      const vu unit = a >> 16 | (b & 0xffff0000u);
      std::memcpy(by_row + v * lanes + lane, &even, sizeof even);
      if (v + 1 < rows) std::memcpy(by_row + (v + 1) * lanes + lane, &odd, sizeof odd);
      std::memcpy(dz + v / 2 * lanes + lane, &unit, sizeof unit);  // rows v / 2 and before have been read
    }
  }
}

// The first `count` lanes as rows, from which AMX's tiles are loaded.
void pack_lanes(const uint32_t* x, int64_t stride, int64_t count, int64_t depth, uint32_t* out) {
  for (int64_t lane = 0; lane < count; lane += kWidth) {
    for (int64_t k = 0; k < depth; k += kWidth) {
      vu square[kWidth] = {};
      for (int64_t j = 0; j < least(depth - k, kWidth); ++j) square[j] = load_vector<vu>(x + (k + j) * stride + lane);
      transpose(square);
      for (int64_t i = 0; i < least(count - lane, kWidth); ++i) {
        std::memcpy(out + (lane + i) * depth + k, &square[i], least(depth - k, kWidth) * sizeof *x);
      }
    }
  }
}

// The first `count` lanes as blocks of kBlockRows, each contiguous, the last one of what is left; for AMX as rows.
template <class Unit>
void pack_blocks(const uint32_t* x, int64_t stride, int64_t count, int64_t depth, uint32_t* out) {
  if constexpr (Unit::kTiles) return pack_lanes(x, stride, count, depth, out);
  const int64_t whole = count / kBlockRows * kBlockRows, rest = count - whole;
  for (int64_t k = 0; k < depth; ++k, x += stride) {
    for (int64_t lane = 0; lane < whole; lane += kBlockRows) {
      std::memcpy(out + lane * depth + k * kBlockRows, x + lane, kBlockRows * sizeof *x);
    }
    if (rest) std::memcpy(out + whole * depth + k * rest, x + whole, rest * sizeof *x);
  }
}

// The block of what pack_blocks wrote that begins at lane `first`.
template <class Unit>
Left packed_block(const uint32_t* x, int64_t first, int64_t count, int64_t depth) {
  if constexpr (Unit::kTiles) return {x + first * depth, 4 * depth, 4};
  return {x + first * depth, 4, 4 * count};
}

// Fetches rows of memory into L2, a few lines at a time and while something else is computed.
class Ahead {
 public:
  Ahead(const void* data, int64_t rows, int64_t bytes, int64_t stride, int64_t calls)
      : row_(static_cast<const char*>(data)),
        rows_(rows),
        bytes_(bytes),
        stride_(stride),
        share_(rows * ((bytes + 63) / 64) / calls + 1) {}
  void fetch() {
    for (int64_t i = 0; i < share_ && rows_ > 0; ++i) {
      __builtin_prefetch(row_ + offset_, 0, 2);
      if ((offset_ += 64) < bytes_) continue;
      offset_ = 0;
      row_ += stride_;
      --rows_;
    }
  }

 private:
  const char* row_;
  int64_t rows_, bytes_, stride_, share_, offset_ = 0;
};

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// The rows and columns of dhidden = dz.T @ weight that one thread computes, over the whole vocabulary. dz lies in
// blocks (pack_blocks), the weight anywhere in memory. While a panel of it is multiplied, the next one is packed, a
// slice before each block of rows, and the one after that is fetched.
template <class Unit>
void add_hidden(const Problem<Unit>& p, const float* logits, Range rows, Range columns, float* grad_hidden) {
  struct Step {  // a panel of a tile
    int64_t tile, column, panel, count;
    const typename Unit::type* weight;
  };
  const int64_t panels = (columns.size() + kPanel - 1) / kPanel, steps = p.tiles() * panels;
  const int64_t blocks = (rows.size() + Unit::kRows - 1) / Unit::kRows;
  const auto at = [&](int64_t i) {
    const int64_t tile = i / panels, column = columns.begin + i % panels * kPanel;
    return Step{tile, column, least(columns.end - column, kPanel), p.tile_rows(tile), p.weight_tile(tile) + column};
  };
  const auto pack = [&](const Step& s, int64_t begin, int64_t end, uint32_t* out) {  // these units of the depth
    const int64_t first = begin * Unit::kSize;
    pack_columns<Unit>(s.weight + first * p.weight_stride, p.weight_stride, least(end * Unit::kSize, s.count) - first,
                       s.panel, out + begin * whole_vectors(s.panel));
  };
  const Buffer<uint32_t> even(units<Unit>(p.height()) * kPanel), odd(units<Unit>(p.height()) * kPanel);
  pack(at(0), 0, units<Unit>(at(0).count), even.data);
  for (int64_t i = 0; i < steps; ++i) {
    uint32_t *now = i % 2 ? odd.data : even.data, *next = i % 2 ? even.data : odd.data;
    const Step step = at(i), after = at(least(i + 1, steps - 1)), later = at(least(i + 2, steps - 1));
    const int64_t depth = units<Unit>(step.count), next_depth = i + 1 < steps ? units<Unit>(after.count) : 0;
    const auto* dz = reinterpret_cast<const uint32_t*>(logits + step.tile * p.height() * p.lanes());
    Ahead ahead(later.weight, later.count, later.panel * sizeof *later.weight, p.weight_stride * sizeof *later.weight,
                blocks);
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t row = rows.begin + block * Unit::kRows, count = least(rows.end - row, Unit::kRows);
      ahead.fetch();
      pack(after, block * next_depth / blocks, (block + 1) * next_depth / blocks, next);
      multiply<Unit>(packed_block<Unit>(dz, row, count, depth), count, now, depth,
                     grad_hidden + row * p.width + step.column, p.width, step.panel, step.tile > 0);
    }
  }
}

template <class Unit>
void backward(const Problem<Unit>& p, double softcap, const int64_t* labels, double temperature, float* logits,
              const float* saved, const float* entropy, const float* grad_logprobs, const float* grad_entropy,
              float* grad_hidden, float* grad_weight, uint16_t* rounded_weight, float* grad_bias, bool add,
              int threads) {
  constexpr bool half = Unit::kSize == 2;
  const bool by_weight = grad_weight || rounded_weight;
  const int64_t lanes = p.lanes(), tiles = p.tiles(), depth = units<Unit>(p.rows);
  const double c = 1 / temperature;
  const Exp<> exp(c);
  const Buffer<uint32_t> hidden(by_weight ? depth * whole_vectors(p.width) : 0);
  const LaneGradients lane_gradients(lanes);
  for (int64_t i = 0; i < p.rows; ++i) {
    const double g = grad_logprobs ? grad_logprobs[i] : 0, h = grad_entropy ? grad_entropy[i] : 0;
    const double scale = c * std::exp(-double(saved[2 * i + 1]));
    lane_gradients.max[i] = saved[2 * i];
    lane_gradients.a[i] = float(-scale * (grad_entropy ? g - h * (double(saved[2 * i + 1]) - entropy[i]) : g));
    lane_gradients.b[i] = float(-scale * h * c);
  }
  const auto at_label = [&](int64_t i, float z) {
    const double g = grad_logprobs ? grad_logprobs[i] : 0, h = grad_entropy ? grad_entropy[i] : 0;
    const double log_p = c * (double(z) - saved[2 * i]) - saved[2 * i + 1], prob = std::exp(log_p);
    const double dz = c * (-g * std::expm1(log_p) - (h != 0 && prob != 0 ? h * prob * (log_p + entropy[i]) : 0));
    const double capped = softcap != 0 ? z / float(softcap) : 0;
    return float(dz * (1 - capped * capped));
  };
  if (grad_weight && !add) use_huge_pages(grad_weight, p.vocab * p.width * sizeof *grad_weight);
  if (rounded_weight) use_huge_pages(rounded_weight, p.vocab * p.width * sizeof *rounded_weight);

  const int team_size = team(threads, p.rows * p.vocab);
  const int64_t panels = (p.width + kPanel - 1) / kPanel;
  // dhidden in a grid: first its columns are shared, because every share of its rows packs the weight again.
  const int64_t share_panels = (panels + team_size - 1) / team_size;
  const int64_t column_shares = grad_hidden ? (panels + share_panels - 1) / share_panels : 0;  // none is empty
  const int64_t blocks = (p.rows + Unit::kRows - 1) / Unit::kRows;
  const int64_t row_shares = column_shares ? least(team_size / column_shares, blocks) : 0;
#pragma omp parallel num_threads(team_size)
  {
    [[maybe_unused]] const InUse<Unit> in_use;
    const Buffer<float> dz(p.tile_rows(0) * lanes);
    const Buffer<uint16_t> by_row(half ? p.tile_rows(0) * lanes : 0);
    const Buffer<float> tile_weight(rounded_weight ? p.tile_rows(0) * p.width : 0);
    if (by_weight) {
#pragma omp for
      for (int64_t panel = 0; panel < panels; ++panel) {
        const int64_t column = panel * kPanel;
        pack_columns<Unit>(p.hidden + column, p.hidden_stride, p.rows, least(p.width - column, kPanel),
                           hidden.data + column * depth);
      }
    }
#pragma omp for schedule(dynamic)
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t first = tile * p.height(), count = p.tile_rows(tile);
      float* z = logits + first * lanes;
      write_gradient(z, lanes, count, lane_gradients, float(softcap), exp, dz.data);
      for (int64_t i = 0; i < p.rows; ++i) {
        if (labels[i] < first || labels[i] >= first + count) continue;
        const int64_t place = (labels[i] - first) * lanes + i;
        dz[place] = at_label(i, z[place]);
      }
      if (grad_bias) add_bias(dz.data, lanes, count, p.rows, grad_bias + first, add);
      if (half) {
        // The last row that counts may share a unit with the padding, where an infinite weight has left NaN.
        for (int64_t v = 0; v < count; ++v) std::memset(&dz[v * lanes + p.rows], 0, (lanes - p.rows) * sizeof *z);
        narrow(dz.data, lanes, count, by_row.data);
      }
      if (grad_hidden) {
        pack_blocks<Unit>(reinterpret_cast<uint32_t*>(dz.data), lanes, p.rows, units<Unit>(count),
                          reinterpret_cast<uint32_t*>(z));
      }
      if (!by_weight) continue;
      float* out = rounded_weight ? tile_weight.data : grad_weight + first * p.width;
      const Left left = half ? Left{by_row.data, lanes * 2, 4} : Left{dz.data, lanes * 4, 4};
      for (int64_t column = 0; column < p.width; column += kPanel) {
        multiply<Unit>(left, count, hidden.data + column * depth, depth, out + column, p.width,
                       least(p.width - column, kPanel), add);
      }
      if (rounded_weight) round_to_bfloat16(out, count * p.width, rounded_weight + first * p.width);
    }
#pragma omp for schedule(static, 1)
    for (int64_t share = 0; share < column_shares * row_shares; ++share) {
      const int64_t first = share % column_shares * share_panels * kPanel, row = share / column_shares;
      add_hidden(
          p, logits,
          {row * blocks / row_shares * Unit::kRows, least((row + 1) * blocks / row_shares * Unit::kRows, p.rows)},
          {first, least(first + share_panels * kPanel, p.width)}, grad_hidden);
    }
  }
}

}  // namespace

int64_t linear_forward(const void* hidden, int64_t hidden_stride, const void* weight, int64_t weight_stride, int dtype,
                       int64_t rows, int64_t vocab, int64_t width, const float* bias, double softcap,
                       const int64_t* labels, double temperature, float* logits, float* logprobs, float* entropy,
                       float* saved, int threads) {
  with_unit(dtype, [&](auto unit) {
    using T = typename decltype(unit)::type;
    const Problem<decltype(unit)> p{
        static_cast<const T*>(hidden), hidden_stride, static_cast<const T*>(weight), weight_stride, rows, vocab, width};
    forward(p, bias, softcap, labels, temperature, logits, logprobs, entropy, saved, threads);
  });
  return -1;
}

int64_t linear_backward(const void* hidden, int64_t hidden_stride, const void* weight, int64_t weight_stride, int dtype,
                        int64_t rows, int64_t vocab, int64_t width, double softcap, const int64_t* labels,
                        double temperature, float* logits, const float* saved, const float* entropy,
                        const float* grad_logprobs, const float* grad_entropy, float* grad_hidden, void* grad_weight,
                        int grad_weight_dtype, float* grad_bias, int add, int threads) {
  const bool rounds = grad_weight_dtype == kBFloat16;
  with_unit(dtype, [&](auto unit) {
    using T = typename decltype(unit)::type;
    const Problem<decltype(unit)> p{
        static_cast<const T*>(hidden), hidden_stride, static_cast<const T*>(weight), weight_stride, rows, vocab, width};
    backward(p, softcap, labels, temperature, logits, saved, entropy, grad_logprobs, grad_entropy, grad_hidden,
             rounds ? nullptr : static_cast<float*>(grad_weight),
             rounds ? static_cast<uint16_t*>(grad_weight) : nullptr, grad_bias, add != 0, threads);
  });
  return -1;
}

int64_t linear_narrow(float* x, int64_t count, void* out, int threads) {
  constexpr uintptr_t kPiece = uintptr_t(8) << 20;  // bytes, whole huge pages
  const uintptr_t begin = reinterpret_cast<uintptr_t>(x), end = begin + count * sizeof *x;
  use_huge_pages(out, count * 2);
  const int64_t pieces = count ? (end - 1) / kPiece - begin / kPiece + 1 : 0;
  for_each(pieces, least(threads, pieces), [&](int64_t i) {
    const uintptr_t piece = (begin / kPiece + i) * kPiece;
    const uintptr_t from = piece > begin ? piece : begin, to = piece + kPiece < end ? piece + kPiece : end;
    round_to_bfloat16(reinterpret_cast<const float*>(from), (to - from) / sizeof *x,
                      static_cast<uint16_t*>(out) + (from - begin) / sizeof *x);
    release_pages(from, to, end - begin);
  });
  return -1;
}

}  // namespace rlhf::RLHF_ISA
