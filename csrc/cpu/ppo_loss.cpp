// ppo_loss on the CPU: one pass over the inputs gives the loss, its gradients and all statistics.
#include "../common/policy.h"
#include "aggregate.h"

namespace rlhf::RLHF_ISA {
namespace {

template <class T>
struct Inputs {
  Grid logprobs, old_logprobs, advantages, mask, ref_logprobs, entropy, importance_weights;
  PpoOptions<T> options;
  T kl_coef, entropy_coef;
  int kl_estimator;
  T *grad_logprobs, *grad_entropy;  // contiguous, may be null
  int64_t cols;
};

struct Partial {  // of one unit
  double loss = 0, kl = 0, entropy = 0, k1 = 0, k2 = 0, k3 = 0, high = 0, low = 0, dual = 0;
  double min = INFINITY, max = -INFINITY;  // of the log-ratio
  Moments ratio;
};

template <class T>
struct Tile {
  T mask[kTile], logprobs[kTile], old_logprobs[kTile], advantages[kTile], weights[kTile], slope[kTile], ratio[kTile];
};

template <class T>
void surrogate(Tile<T>& t, int n, const PpoOptions<T>& options, Partial& p) {
  T high = 0, low = 0, dual = 0, min = INFINITY, max = -INFINITY;
  double loss = 0, k1 = 0, k2 = 0, k3 = 0;
#pragma omp simd reduction(+ : high, low, dual, loss, k1, k2, k3) reduction(min : min) reduction(max : max)
  for (int j = 0; j < n; ++j) {
    const auto token = ppo_token(t.logprobs[j], t.old_logprobs[j], t.advantages[j], t.weights[j], options);
    const T d = token.log_ratio;
    t.slope[j] = token.slope;
    t.ratio[j] = token.ratio;
    high += token.clip_high ? T(1) : T(0);
    low += token.clip_low ? T(1) : T(0);
    dual += token.dual ? T(1) : T(0);
    loss += token.loss;
    k1 -= d;
    k2 += T(0.5) * d * d;
    k3 += token.k3;
    const T from_above = t.mask[j] != 0 ? d : T(INFINITY), from_below = t.mask[j] != 0 ? d : -T(INFINITY);
    min = from_above < min ? from_above : min;
    max = from_below > max ? from_below : max;
  }
  p.loss += loss, p.k1 += k1, p.k2 += k2, p.k3 += k3;
  p.high += high, p.low += low, p.dual += dual;
  p.min = min < p.min ? min : p.min;
  p.max = max > p.max ? max : p.max;
}

template <int estimator, class T>
void kl_term(Tile<T>& t, const T* ref_logprobs, int n, T coef, Partial& p) {
  double kl = 0;
#pragma omp simd reduction(+ : kl)
  for (int j = 0; j < n; ++j) {
    const Kl<T> token = kl_estimate<estimator>(t.logprobs[j] - ref_logprobs[j]);
    kl += token.value;
    // A statistic alone must not give 0 * inf, nor a masked token a slope of 1.
    t.slope[j] += coef != 0 && t.mask[j] != 0 ? coef * token.slope : T(0);
  }
  p.kl += kl;
}

template <class T>
void unit(const Inputs<T>& in, int64_t row, int64_t begin, int64_t end, T weight, Partial& p) {
  Tile<T> t;
  T extra[kTile];
  for (T& w : t.weights) w = 1;
  const int64_t stop = padding_begin(in.mask, row, begin, end);
  for (int64_t at = row * in.cols + stop; at < row * in.cols + end; ++at) {
    if (in.grad_logprobs) in.grad_logprobs[at] = 0;
    if (in.grad_entropy) in.grad_entropy[at] = 0;
  }
  for (int64_t col = begin; col < stop; col += kTile) {
    const int n = int(stop - col < kTile ? stop - col : kTile);
    load(t.mask, in.mask, row, col, n);
    load_masked(t.logprobs, in.logprobs, t.mask, row, col, n);
    load_masked(t.old_logprobs, in.old_logprobs, t.mask, row, col, n);
    load_masked(t.advantages, in.advantages, t.mask, row, col, n);
    if (in.importance_weights.data) load_masked(t.weights, in.importance_weights, t.mask, row, col, n);
    surrogate(t, n, in.options, p);
    p.ratio.merge(moments(t.ratio, t.mask, sum(t.mask, n), n, T(1)));
    if (in.ref_logprobs.data) {
      load_masked(extra, in.ref_logprobs, t.mask, row, col, n);
      with_estimator(in.kl_estimator, [&](auto kind) { kl_term<kind()>(t, extra, n, in.kl_coef, p); });
    }
    if (in.entropy.data) {
      load_masked(extra, in.entropy, t.mask, row, col, n);
      p.entropy += sum(extra, n);
    }
    const int64_t at = row * in.cols + col;
    if (in.grad_logprobs) {
      for (int j = 0; j < n; ++j) in.grad_logprobs[at + j] = weight * t.slope[j];
    }
    if (in.grad_entropy) {
      for (int j = 0; j < n; ++j) in.grad_entropy[at + j] = -weight * in.entropy_coef * t.mask[j];
    }
  }
}

template <class T>
void run(const Inputs<T>& in, int64_t rows, int aggregation, const double* normalizer, T* loss, T* stats, int threads) {
  const Units units(rows, in.cols);
  const TokenWeights weights(in.mask, rows, in.cols, aggregation, normalizer);
  Buffer<Partial> partials(units.count);
  for_each(units.count, worth_threads(threads, rows * in.cols), [&](int64_t u) {
    const int64_t row = units.row(u);
    unit(in, row, units.begin(u), units.end(u), T(weights.of_row[row]), partials[u]);
  });
  Partial all;
  for (int64_t u = 0; u < units.count; ++u) {
    const Partial& p = partials[u];
    const double weight = weights.of_row[units.row(u)];
    if (weight == 0) continue;
    all.loss += weight * p.loss, all.kl += weight * p.kl, all.entropy += weight * p.entropy;
    all.k1 += p.k1, all.k2 += p.k2, all.k3 += p.k3, all.high += p.high, all.low += p.low, all.dual += p.dual;
    all.min = p.min < all.min ? p.min : all.min;
    all.max = p.max > all.max ? p.max : all.max;
    all.ratio.merge(p.ratio);
  }
  const double n = weights.tokens > 0 ? weights.tokens : 1;
  if (all.k2 != all.k2) all.min = all.max = NAN;  // comparisons step over a NaN, statistics must not
  const bool some = weights.tokens > 0;
  *loss = T(all.loss + (in.kl_coef != 0 ? in.kl_coef * all.kl : 0) -
            (in.entropy_coef != 0 ? in.entropy_coef * all.entropy : 0));
  const auto ratio_of = [&](double log_ratio) { return some ? clamp_ratio(exp_of(T(log_ratio)), in.options) : 0; };
  const double results[] = {
      all.loss,
      all.kl,
      all.entropy,
      all.k1 / n,
      all.k2 / n,
      all.k3 / n,
      all.high / n,
      all.low / n,
      all.dual / n,
      all.ratio.mean(),
      all.ratio.variance(),
      ratio_of(all.min),
      ratio_of(all.max),
      some ? (-all.min > all.max ? -all.min : all.max) : 0,
      weights.tokens,
  };
  for (double result : results) *stats++ = T(result);
}

}  // namespace

int64_t ppo_loss(Grid logprobs, Grid old_logprobs, Grid advantages, Grid mask, Grid ref_logprobs, Grid entropy,
                 Grid importance_weights, int64_t rows, int64_t cols, double clip_low, double clip_high,
                 double dual_clip, double log_ratio_clamp, double kl_coef, int kl_estimator, double entropy_coef,
                 int aggregation, const double* normalizer, int dtype, void* loss, void* stats, void* grad_logprobs,
                 void* grad_entropy, int threads) {
  auto call = [&](auto zero) {
    using T = decltype(zero);
    const T clamp = T(log_ratio_clamp);
    const PpoOptions<T> options{T(clip_low), T(clip_high), T(dual_clip), clamp, exp_of(-clamp), exp_of(clamp)};
    const Inputs<T> in{logprobs,     old_logprobs,       advantages,       mask,       ref_logprobs,
                       entropy,      importance_weights, options,          T(kl_coef), T(entropy_coef),
                       kl_estimator, (T*)grad_logprobs,  (T*)grad_entropy, cols};
    run(in, rows, aggregation, normalizer, (T*)loss, (T*)stats, threads);
  };
  dtype == kFloat64 ? call(0.0) : call(0.f);
  return -1;
}

}  // namespace rlhf::RLHF_ISA
