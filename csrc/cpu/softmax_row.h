// One row of a softmax: its statistics from one pass over memory, and its gradient from another.
//
//   d_j = c (x_j - max x),  sum = sum_j e^d_j,  moment = sum_j e^d_j d_j,  c = 1 / temperature
//   log p_j = d_j - log(sum),  H = log(sum) - moment / sum
//
// Distances are taken from the row's true maximum and before anything else, so large logits lose nothing. Block sums
// are float32 over at most kBlock / kPair terms a lane; across blocks they are double.
#pragma once
#include <cmath>
#include <type_traits>

#include "../common/math.h"
#include "simd.h"

namespace rlhf::RLHF_ISA {

// Elements of a page, the block of a row that is read twice, for its maximum and for its sums, the second time from L1;
// meanwhile the next one is fetched, because the hardware prefetcher stops at every page (without: 1.4x slower from
// memory). Four pages at a time leave an L1 of 32 KB too little room: 1.15x slower in float32.
template <class E>
constexpr int64_t kBlock = 4096 / sizeof(typename E::type);

// Into L1, a Pair's worth of elements.
template <class E>
inline void fetch(const typename E::type* p) {
  for (size_t byte = 0; byte < kPair * sizeof *p; byte += 64) {
    __builtin_prefetch(reinterpret_cast<const char*>(p) + byte);
  }
}

struct F64 {  // plain loops, which vectorise
  using type = double;
  static double scalar(double x) { return x; }
  static double round(double x) { return x; }
};

struct Softmax {
  double max = -INFINITY, sum = 0, moment = 0;

  // Later sums will be relative to m, if that is larger; the ones so far are moved there.
  void raise_max(double m, double c) {
    if (!(m > max)) return;
    if (sum > 0) {
      const double shift = c * (max - m), scale = std::exp(shift);
      moment = scale > 0 ? scale * (moment + shift * sum) : 0;
      sum *= scale;
    }
    max = m;
  }
};

template <bool kMoment, class E>
inline Softmax softmax_row(const typename E::type* x, int64_t vocab, double c) {
  Softmax row;
  if constexpr (std::is_same_v<E, F64>) {
    double max = -INFINITY, sum = 0, moment = 0;
#pragma omp simd reduction(max : max)
    for (int64_t j = 0; j < vocab; ++j) max = x[j] > max ? x[j] : max;
    const double origin = max == -INFINITY ? 0.0 : max;
#pragma omp simd reduction(+ : sum, moment)
    for (int64_t j = 0; j < vocab; ++j) {
      const double d = c * (x[j] - origin), e = exp_of(d);
      sum += e;
      if constexpr (kMoment) moment += e == 0 ? 0.0 : e * d;
    }
    return {max, sum, moment};
  } else {
    const Exp<> exp(c);
    for (int64_t begin = 0; begin < vocab; begin += kBlock<E>) {
      const auto* p = x + begin;
      const int64_t size = vocab - begin < kBlock<E> ? vocab - begin : kBlock<E>, whole = size - size % kPair;
      row.raise_max(E::max(p, size), c);
      const vf max = splat(row.max == -INFINITY ? 0.0f : float(row.max));  // -inf - -inf is not a distance

      vf sum{}, sum_b{}, moment{}, moment_b{};
      const auto accumulate = [&](Pair v) {
        vf d = v.a - max, d_b = v.b - max;
        vf e, e_b;
        sum = exp.add(sum, d, e);
        sum_b = exp.add(sum_b, d_b, e_b);
        if constexpr (kMoment) {
          moment = fma(e, exp.bounded(d), moment);
          moment_b = fma(e_b, exp.bounded(d_b), moment_b);
        }
      };
      for (int64_t i = 0; i < whole; i += kPair) {
        fetch<E>(p + i + kBlock<E>);
        accumulate(E::load(p + i));
      }
      if (whole < size) accumulate(load_tail<E>(p + whole, size - whole));
      row.sum += reduce_add(sum, sum_b);
      if constexpr (kMoment) row.moment += c * reduce_add(moment, moment_b);
    }
    return row;
  }
}

// f(i, n, past) for the n elements of a row from i on, a Pair's worth or what is left: before the first that lies where
// out can be written past the cache, and at the end.
template <class E, class F>
inline void for_pairs(const typename E::type* out, int64_t size, bool past_cache, F f) {
  int64_t i = 0;
  if (past_cache) {
    i = int64_t(-reinterpret_cast<uintptr_t>(out) % sizeof(vf) / sizeof *out);
    i = i < size ? i : size;
    if (i > 0) f(0, i, std::false_type{});
    for (; i + kPair <= size; i += kPair) f(i, kPair, std::true_type{});
    fence();
  }
  for (; i + kPair <= size; i += kPair) f(i, kPair, std::false_type{});
  if (i < size) f(i, size - i, std::false_type{});
}

// The gradient with respect to x of  g log p_y + h H:  c (g (1[j = y] - p_j) - h p_j (log p_j + H)).
struct RowGradient {
  double g, h;
  double max, log_sum, entropy;  // entropy only where h is not 0
};

// Writes grad_j = e^d_j (a + b (x_j - max)) and then the label's element. x and grad may be the same memory, unless it
// is written past the cache.
template <bool kMoment, class E>
inline void gradient_row(const typename E::type* x, typename E::type* grad, int64_t vocab, int64_t label, double c,
                         const RowGradient& row, bool past_cache) {
  const double scale = c * std::exp(-row.log_sum);  // p_j = e^d_j / sum
  const double mean = row.log_sum - row.entropy;    // of d under p
  const double x_label = E::scalar(x[label]);
  if constexpr (std::is_same_v<E, F64>) {
    const double g = row.g, h = row.h, max = row.max;
#pragma omp simd
    for (int64_t j = 0; j < vocab; ++j) {
      const double d = c * (x[j] - max), e = exp_of(d);
      grad[j] = e == 0 ? 0.0 : -scale * e * (kMoment ? g + h * (d - mean) : g);
    }
  } else {
    const Exp<E::kCoarse> exp(c);
    const vf max = splat(float(row.max));
    const vf a = splat(float(-scale * (kMoment ? row.g - row.h * mean : row.g))), b = splat(float(-scale * row.h * c));
    const auto gradient = [&](vf v) {
      const vf d = v - max;
      return exp(d) * (kMoment ? fma(b, exp.bounded(d), a) : a);
    };
    for_pairs<E>(grad, vocab, past_cache, [&](int64_t i, int64_t n, auto past) {
      const Pair v = load_some<E>(x + i, n);
      store_some<E, past.value>(grad + i, n, {gradient(v.a), gradient(v.b)});
    });
  }
  // 1 - p_y from expm1, because it cancels when the model is sure.
  const double log_p = c * (x_label - row.max) - row.log_sum, p = kMoment ? std::exp(log_p) : 0;
  grad[label] =
      E::round(c * (-row.g * std::expm1(log_p) - (kMoment && p != 0 ? row.h * p * (log_p + row.entropy) : 0)));
}

}  // namespace rlhf::RLHF_ISA
