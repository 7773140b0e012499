// pairwise_loss and ranking_loss on the CPU: loss, gradients and statistics of Bradley-Terry preferences in one pass.
#include "../common/math.h"
#include "tile.h"

namespace rlhf::RLHF_ISA {
namespace {

template <class T>
struct Pairs {
  Grid chosen, rejected, ref_chosen, ref_rejected, margin, target_prob, weights;
  T scale, margin_value, prob_value, center_coef;
  T *grad_chosen, *grad_rejected;  // contiguous, may be null
};

template <class T>
void fill_or_load(T* out, const Grid& x, T value, int64_t begin, int n) {
  if (x.data) return load(out, x, 0, begin, n);
  for (int j = 0; j < n; ++j) out[j] = value;
}

template <class T>
void run(const Pairs<T>& in, int64_t pairs, T* loss, T* stats) {
  T c[kTile], r[kTile], margin[kTile], p[kTile], w[kTile], extra[kTile], losses[kTile], ones[kTile];
  for (T& one : ones) one = 1;
  double total = in.weights.data ? 0 : double(pairs);
  for (int64_t begin = 0; in.weights.data && begin < pairs; begin += kTile) {
    const int n = int(pairs - begin < kTile ? pairs - begin : kTile);
    load(w, in.weights, 0, begin, n);
    total += sum(w, n);
  }
  const double share = 1 / (total > 0 ? total : 1);
  double all_loss = 0, accuracy = 0, difference = 0, chosen = 0, rejected = 0;
  Moments rewards;
  for (int64_t begin = 0; begin < pairs; begin += kTile) {
    const int n = int(pairs - begin < kTile ? pairs - begin : kTile);
    load(c, in.chosen, 0, begin, n);
    load(r, in.rejected, 0, begin, n);
    fill_or_load(margin, in.margin, in.margin_value, begin, n);
    fill_or_load(p, in.target_prob, in.prob_value, begin, n);
    fill_or_load(w, in.weights, T(1), begin, n);
    if (in.ref_chosen.data) {  // implicit rewards: scale * (log pi - log pi_ref)
      load(extra, in.ref_chosen, 0, begin, n);
      for (int j = 0; j < n; ++j) c[j] = in.scale * (c[j] - extra[j]);
      load(extra, in.ref_rejected, 0, begin, n);
      for (int j = 0; j < n; ++j) r[j] = in.scale * (r[j] - extra[j]);
    }
#pragma omp simd reduction(+ : accuracy, difference, chosen, rejected)
    for (int j = 0; j < n; ++j) {
      const PairLoss<T> one = pair_loss(c[j], r[j], margin[j], p[j], in.center_coef);
      const T each = w[j] * T(share) * in.scale;
      losses[j] = w[j] * one.loss;
      margin[j] = each * one.by_chosen;  // from here on the gradients
      extra[j] = each * one.by_rejected;
      accuracy += w[j] * (T(0.5) * (sign(c[j] - r[j]) + 1));
      difference += w[j] * (c[j] - r[j]);
      chosen += w[j] * c[j];
      rejected += w[j] * r[j];
    }
    all_loss += sum(losses, n);
    rewards.merge(moments(c, ones, n, n));
    rewards.merge(moments(r, ones, n, n));
    if (in.grad_chosen) std::memcpy(in.grad_chosen + begin, margin, n * sizeof(T));
    if (in.grad_rejected) std::memcpy(in.grad_rejected + begin, extra, n * sizeof(T));
  }
  *loss = T(all_loss * share);
  const double results[] = {accuracy * share, difference * share,         chosen * share, rejected * share,
                            rewards.mean(),   ::sqrt(rewards.variance()), double(pairs)};
  for (double result : results) *stats++ = T(result);
}

struct Prompt {  // of ranking_loss
  double loss = 0, pairs = 0, accuracy = 0, margin = 0;
};

// All pairs of one prompt; grad is that of the prompt's own mean.
template <class T>
Prompt rank_row(const T* r, const int64_t* ranks, int64_t k, T* grad) {
  Prompt p;
  for (int64_t i = 0; i < k; ++i) {
    for (int64_t j = 0; j < k; ++j) {
      if (ranks[i] < 0 || ranks[j] <= ranks[i]) continue;
      const T d = r[i] - r[j];
      const Preference<T> one = preference(d, T(1));
      p.loss += one.loss;
      p.pairs += 1;
      p.accuracy += 0.5 * (sign(d) + 1);
      p.margin += d;
      grad[i] += one.slope;
      grad[j] -= one.slope;
    }
  }
  const double share = p.pairs > 0 ? 1 / p.pairs : 0;
  for (int64_t i = 0; i < k; ++i) grad[i] *= T(share);
  p.loss *= share;
  return p;
}

template <class T>
void run_ranking(const Grid& rewards, const int64_t* ranks, int64_t rows, int64_t k, T* loss, T* stats, T* grad,
                 int threads) {
  Buffer<Prompt> prompts(rows);
  for_each(rows, worth_threads(threads, rows * k * k), [&](int64_t i) {
    const Buffer<T> r(k);
    for (int64_t col = 0; col < k; col += kTile) {
      load(r.data + col, rewards, i, col, int(k - col < kTile ? k - col : kTile));
    }
    for (int64_t j = 0; j < k; ++j) grad[i * k + j] = 0;
    prompts[i] = rank_row(r.data, ranks + i * k, k, grad + i * k);
  });
  double count = 0;
  Prompt all;
  for (int64_t i = 0; i < rows; ++i) {
    const Prompt& p = prompts[i];
    count += p.pairs > 0;
    all.loss += p.loss, all.pairs += p.pairs, all.accuracy += p.accuracy, all.margin += p.margin;
  }
  const double share = 1 / (count > 0 ? count : 1), pairs = all.pairs > 0 ? all.pairs : 1;
  for (int64_t i = 0; i < rows * k; ++i) grad[i] *= T(share);
  *loss = T(all.loss * share);
  stats[0] = T(all.accuracy / pairs);
  stats[1] = T(all.margin / pairs);
  stats[2] = T(all.pairs);
}

}  // namespace

int64_t pairwise_loss(Grid chosen, Grid rejected, Grid ref_chosen, Grid ref_rejected, Grid margin, Grid target_prob,
                      Grid weights, int64_t pairs, double scale, double margin_value, double prob_value,
                      double center_coef, int dtype, void* loss, void* stats, void* grad_chosen, void* grad_rejected,
                      int) {
  auto call = [&](auto zero) {
    using T = decltype(zero);
    const Pairs<T> in{chosen,         rejected,        ref_chosen,       ref_rejected,    margin,
                      target_prob,    weights,         T(scale),         T(margin_value), T(prob_value),
                      T(center_coef), (T*)grad_chosen, (T*)grad_rejected};
    run(in, pairs, (T*)loss, (T*)stats);
  };
  dtype == kFloat64 ? call(0.0) : call(0.f);
  return -1;
}

int64_t ranking_loss(Grid rewards, const int64_t* ranks, int64_t rows, int64_t k, int dtype, void* loss, void* stats,
                     void* grad, int threads) {
  if (dtype == kFloat64) {
    run_ranking(rewards, ranks, rows, k, (double*)loss, (double*)stats, (double*)grad, threads);
  } else {
    run_ranking(rewards, ranks, rows, k, (float*)loss, (float*)stats, (float*)grad, threads);
  }
  return -1;
}

}  // namespace rlhf::RLHF_ISA
