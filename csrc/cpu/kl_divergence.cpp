// Exact KL(p || q) of two rows of logits over the vocabulary, from one read of each, and its gradients.
//
//   KL = sum_j p_j (log p_j - log q_j) = gap / sum_p - log sum_p + log sum_q,  gap = sum_j e^d_j (d_j - f_j)
//   dKL/dx_j = p_j (log p_j - log q_j - KL),  dKL/dy_j = q_j - p_j
//
// with d and f the distances of the logits x of p and y of q from their maxima. p_j = 0 makes the term 0, whatever q
// is.
#include "../ops.h"
#include "parallel.h"
#include "softmax_row.h"

namespace rlhf::RLHF_ISA {
namespace {

struct Divergence {
  Softmax p, q;
  double gap = 0;

  void raise_max(double max_p, double max_q) {
    const double from_p = p.max, from_q = q.max;
    p.raise_max(max_p, 1.0);
    q.raise_max(max_q, 1.0);
    if (p.sum == 0) {  // what p has read so far cannot happen, and q's zeros there make nothing infinite
      gap = 0;
      return;
    }
    gap *= p.max > from_p ? std::exp(from_p - p.max) : 1;
    gap += p.sum * ((from_p - p.max) - (q.max > from_q ? from_q - q.max : 0));
  }
  double value() const { return gap / p.sum - std::log(p.sum) + std::log(q.sum); }
};

inline double reference_point(double max) { return max == -INFINITY ? 0.0 : max; }

// e^d (d - f), 0 where e^d is
inline vf gap_term(vf e, vf d, vf f) { return e > 0 ? e * (d - f) : vf{}; }

template <class E>
Divergence divergence_row(const typename E::type* x, const typename E::type* y, int64_t vocab) {
  Divergence row;
  if constexpr (std::is_same_v<E, F64>) {
    double max_p = -INFINITY, max_q = -INFINITY, sum_p = 0, sum_q = 0, gap = 0;
#pragma omp simd reduction(max : max_p, max_q)
    for (int64_t j = 0; j < vocab; ++j) {
      max_p = x[j] > max_p ? x[j] : max_p;
      max_q = y[j] > max_q ? y[j] : max_q;
    }
    const double origin_p = reference_point(max_p), origin_q = reference_point(max_q);
#pragma omp simd reduction(+ : sum_p, sum_q, gap)
    for (int64_t j = 0; j < vocab; ++j) {
      const double d = x[j] - origin_p, f = y[j] - origin_q, e = exp_of(d);
      sum_p += e;
      sum_q += exp_of(f);
      gap += e > 0 ? e * (d - f) : 0.0;
    }
    row.p.max = max_p, row.p.sum = sum_p, row.q.max = max_q, row.q.sum = sum_q, row.gap = gap;
  } else {
    const Exp<> exp(1.0);
    for (int64_t begin = 0; begin < vocab; begin += kBlock<E>) {
      const int64_t size = vocab - begin < kBlock<E> ? vocab - begin : kBlock<E>, whole = size - size % kPair;
      row.raise_max(E::max(x + begin, size), E::max(y + begin, size));
      const vf max_p = splat(float(reference_point(row.p.max))), max_q = splat(float(reference_point(row.q.max)));
      struct {
        vf p{}, q{}, gap{};
      } sums, sums_b;
      const auto accumulate = [&](auto& sum, vf a, vf b) {
        const vf d = a - max_p, f = b - max_q;
        vf e, e_q;
        sum.p = exp.add(sum.p, d, e);
        sum.q = exp.add(sum.q, f, e_q);
        sum.gap += gap_term(e, d, f);
      };
      for (int64_t i = begin; i < begin + whole; i += kPair) {
        fetch<E>(x + i + kBlock<E>);
        fetch<E>(y + i + kBlock<E>);
        const Pair a = E::load(x + i), b = E::load(y + i);
        accumulate(sums, a.a, b.a);
        accumulate(sums_b, a.b, b.b);
      }
      if (whole < size) {
        const Pair a = load_tail<E>(x + begin + whole, size - whole), b = load_tail<E>(y + begin + whole, size - whole);
        accumulate(sums, a.a, b.a);
        accumulate(sums_b, a.b, b.b);
      }
      row.p.sum += reduce_add(sums.p, sums_b.p);
      row.q.sum += reduce_add(sums.q, sums_b.q);
      row.gap += reduce_add(sums.gap, sums_b.gap);
    }
  }
  return row;
}

// grad_x_j = p_j (d_j - f_j - shift) g and grad_y_j = (q_j - p_j) g; either may be null. Past the cache, both lie
// alike.
template <class E>
void gradient_row(const typename E::type* x, const typename E::type* y, typename E::type* grad_x,
                  typename E::type* grad_y, int64_t vocab, double max_p, double max_q, double log_p, double log_q,
                  double shift, double g, bool past_cache) {
  const double scale_p = g * std::exp(-log_p), scale_q = g * std::exp(-log_q);
  if constexpr (std::is_same_v<E, F64>) {
    for (int64_t j = 0; j < vocab; ++j) {
      const double d = x[j] - max_p, f = y[j] - max_q, e = exp_of(d);
      if (grad_x) grad_x[j] = e > 0 ? scale_p * e * (d - f - shift) : e * scale_p;
      if (grad_y) grad_y[j] = scale_q * exp_of(f) - scale_p * e;
    }
  } else {
    const Exp<> exp(1.0);  // also in 16 bits: p and q cancel
    const vf vmax_p = splat(float(max_p)), vmax_q = splat(float(max_q)), vscale_p = splat(float(scale_p));
    const vf vscale_q = splat(float(scale_q)), vshift = splat(float(shift));
    const auto gradient = [&](vf a, vf b, vf& by_x, vf& by_y) {
      const vf d = a - vmax_p, f = b - vmax_q, e = exp(d) * vscale_p;
      by_x = e == 0 ? vf{} : e * (d - f - vshift);
      by_y = fma(exp(f), vscale_q, -e);
    };
    auto* out = grad_x ? grad_x : grad_y;
    for_pairs<E>(out, vocab, past_cache, [&](int64_t i, int64_t n, auto past) {
      const Pair a = load_some<E>(x + i, n), b = load_some<E>(y + i, n);
      Pair by_x, by_y;
      gradient(a.a, b.a, by_x.a, by_y.a);
      gradient(a.b, b.b, by_x.b, by_y.b);
      if (grad_x) store_some<E, past.value>(grad_x + i, n, by_x);
      if (grad_y) store_some<E, past.value>(grad_y + i, n, by_y);
    });
  }
}

}  // namespace

int64_t kl_divergence_forward(const void* logits, const void* ref_logits, int dtype, int64_t rows, int64_t vocab,
                              const uint8_t* mask, void* kl, void* saved, int threads) {
  return with_element(dtype, [&](auto element) {
    using E = decltype(element);
    using Accum = std::conditional_t<std::is_same_v<E, F64>, double, float>;
    const auto *x = static_cast<const typename E::type*>(logits), *y = static_cast<const typename E::type*>(ref_logits);
    const int64_t share = grain(rows, 2 * vocab * sizeof *x, threads);
#pragma omp parallel for num_threads(team(threads, 2 * rows * vocab)) schedule(dynamic, share)
    for (int64_t i = 0; i < rows; ++i) {
      const bool counts = !mask || mask[i];
      const Divergence row = counts ? divergence_row<E>(x + i * vocab, y + i * vocab, vocab) : Divergence{};
      const double values[] = {row.p.max, row.q.max, std::log(row.p.sum), std::log(row.q.sum)};
      for (int k = 0; k < 4; ++k) static_cast<Accum*>(saved)[4 * i + k] = counts ? Accum(values[k]) : Accum(0);
      static_cast<Accum*>(kl)[i] = counts ? Accum(row.value()) : Accum(0);
    }
    return int64_t(-1);
  });
}

int64_t kl_divergence_backward(const void* logits, const void* ref_logits, int dtype, int64_t rows, int64_t vocab,
                               const uint8_t* mask, const void* kl, const void* saved, const void* grad_kl,
                               void* grad_logits, void* grad_ref_logits, int threads) {
  return with_element(dtype, [&](auto element) {
    using E = decltype(element);
    using Accum = std::conditional_t<std::is_same_v<E, F64>, double, float>;
    const auto *x = static_cast<const typename E::type*>(logits), *y = static_cast<const typename E::type*>(ref_logits);
    auto *grad_x = static_cast<typename E::type*>(grad_logits),
         *grad_y = static_cast<typename E::type*>(grad_ref_logits);
    const int64_t bytes = rows * vocab * sizeof *x;
    if (grad_x) use_huge_pages(grad_x, bytes);
    if (grad_y) use_huge_pages(grad_y, bytes);
    const auto apart = reinterpret_cast<uintptr_t>(grad_x) - reinterpret_cast<uintptr_t>(grad_y);
    const bool past = past_cache(bytes) && (!grad_x || !grad_y || apart % sizeof(vf) == 0);
    const int64_t share = grain(rows, 2 * vocab * sizeof *x, threads);
#pragma omp parallel for num_threads(team(threads, 2 * rows * vocab)) schedule(dynamic, share)
    for (int64_t i = 0; i < rows; ++i) {
      auto *out_x = grad_x ? grad_x + i * vocab : nullptr, *out_y = grad_y ? grad_y + i * vocab : nullptr;
      if (mask && !mask[i]) {
        if (out_x) std::memset(out_x, 0, vocab * sizeof *x);
        if (out_y) std::memset(out_y, 0, vocab * sizeof *x);
        continue;
      }
      const Accum* s = static_cast<const Accum*>(saved) + 4 * i;
      const double shift = double(s[2]) - double(s[3]) + double(static_cast<const Accum*>(kl)[i]);
      gradient_row<E>(x + i * vocab, y + i * vocab, out_x, out_y, vocab, s[0], s[1], s[2], s[3], shift,
                      static_cast<const Accum*>(grad_kl)[i], past);
    }
    return int64_t(-1);
  });
}

}  // namespace rlhf::RLHF_ISA
