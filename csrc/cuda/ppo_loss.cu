// ppo_loss on CUDA: one launch reads every input once and writes the loss, its gradients and all statistics.
//
// Each block sums its tokens and leaves kFields numbers; the last block to finish adds those of all blocks. [64 x 1024]
// float32, no optional input: 0.85 MB in, 0.25 MB out, 64 blocks. What the launch waits for: HBM once (tokens and mask
// together), the mask from L2 (0.6 us), the ticket and the partial results (two trips to L2).
#include "estimators.cuh"
#include "grid.cuh"
#include "sums.cuh"
#include "weights.cuh"

namespace rlhf::cuda {
namespace {

// Sums over tokens. kLoss, kKl and kEntropy carry the share of their row; ratios are taken from 1.
enum Field { kLoss, kKlTerm, kEntropy, kD, kD2, kK3Sum, kHigh, kLow, kDual, kTokens, kRatio, kRatio2, kSums };
enum Extreme { kMinusMin, kMaximum, kExtremes };  // of the log-ratio
constexpr int kStats = 15;
constexpr int kFields = kSums + kExtremes;

template <class T>
struct Inputs {
  Grid logprobs, old_logprobs, advantages, mask, ref_logprobs, entropy, importance_weights;
  PpoOptions<T> options;
  T kl_coef, entropy_coef;
  int kl_estimator;
  T *grad_logprobs, *grad_entropy;  // may be null
};

template <class T>
struct Tokens {
  Place at;
  Quad<T> logprobs, old_logprobs, advantages, ref_logprobs, entropy, importance_weights;
  Mask mask;  // read last, see load_mask
};

template <bool kPlain, class T>
__device__ inline Tokens<T> read(const Inputs<T>& in, Place at) {
  return {at,
          load<kPlain, T>(in.logprobs, at),
          load<kPlain, T>(in.old_logprobs, at),
          load<kPlain, T>(in.advantages, at),
          load_or<kPlain, T>(in.ref_logprobs, at, T(0)),
          load_or<kPlain, T>(in.entropy, at, T(0)),
          load_or<kPlain, T>(in.importance_weights, at, T(1)),
          load_mask<kPlain>(in.mask, at)};
}

template <bool kPlain, class T>
__device__ inline void add(const Inputs<T>& in, const Tokens<T>& tokens, int64_t cols, const Weights& weights,
                           double (&sums)[kSums], double (&extremes)[kExtremes]) {
  const Mask mask = tokens.mask;
  const Quad<T> logprobs = keep(tokens.logprobs, mask), old_logprobs = keep(tokens.old_logprobs, mask);
  const Quad<T> advantages = keep(tokens.advantages, mask), importance = keep(tokens.importance_weights, mask);
  const Quad<T> ref_logprobs = keep(tokens.ref_logprobs, mask), entropy = keep(tokens.entropy, mask);
  const double share = weights.share(tokens.at.row);
  const T weight = T(share * weights.inverse_norm);
  Quad<T> gradient, entropy_gradient;
#pragma unroll
  for (int i = 0; i < kQuad; ++i) {
    const auto token = ppo_token(logprobs[i], old_logprobs[i], advantages[i], importance[i], in.options);
    T slope = token.slope;
    sums[kLoss] += share * token.loss;
    if (in.ref_logprobs.data != nullptr) {
      const Kl<T> kl = kl_token(in.kl_estimator, logprobs[i] - ref_logprobs[i]);
      sums[kKlTerm] += share * kl.value;
      if (in.kl_coef != 0) slope += in.kl_coef * kl.slope;  // a statistic alone must not give 0 * inf
    }
    sums[kEntropy] += share * entropy[i];
    gradient[i] = mask[i] ? weight * slope : T(0);
    entropy_gradient[i] = mask[i] ? -weight * in.entropy_coef : T(0);

    const T d = token.log_ratio;
    const double ratio = mask[i] ? double(token.ratio) - 1 : 0;
    sums[kD] += d;
    sums[kD2] += T(0.5) * d * d;
    sums[kK3Sum] += token.k3;
    sums[kHigh] += token.clip_high;
    sums[kLow] += token.clip_low;
    sums[kDual] += token.dual;
    sums[kRatio] += ratio;
    sums[kRatio2] += ratio * ratio;
    if (mask[i]) {
      extremes[kMinusMin] = fmax(extremes[kMinusMin], -double(d));
      extremes[kMaximum] = fmax(extremes[kMaximum], double(d));
    }
  }
  sums[kTokens] += mask.count();
  if (in.grad_logprobs != nullptr) store<kPlain>(in.grad_logprobs, cols, tokens.at, gradient);
  if (in.grad_entropy != nullptr) store<kPlain>(in.grad_entropy, cols, tokens.at, entropy_gradient);
}

template <class T>
__device__ inline void finish(const Inputs<T>& in, double inverse_norm, const double* sums, const double* extremes,
                              T* loss, T* stats) {
  const bool some = sums[kTokens] > 0;
  const double each = some ? 1 / sums[kTokens] : 0, norm = some ? inverse_norm : 0;
  const double policy = some ? sums[kLoss] * norm : 0, kl = some ? sums[kKlTerm] * norm : 0;
  const double entropy = some ? sums[kEntropy] * norm : 0;
  *loss = T(policy + (in.kl_coef != 0 ? in.kl_coef * kl : 0) - (in.entropy_coef != 0 ? in.entropy_coef * entropy : 0));

  const bool lost = sums[kD2] != sums[kD2];  // maxima step over a NaN, statistics must not
  const double minus_min = lost ? NAN : extremes[kMinusMin], maximum = lost ? NAN : extremes[kMaximum];
  const auto ratio_of = [&](double d) { return some ? clamp_ratio(exp_of(T(d)), in.options) : T(0); };
  const double mean = sums[kRatio] * each, deviations = sums[kRatio2] - mean * sums[kRatio];
  const double results[kStats] = {policy,
                                  kl,
                                  entropy,
                                  -sums[kD] * each,
                                  sums[kD2] * each,
                                  sums[kK3Sum] * each,
                                  sums[kHigh] * each,
                                  sums[kLow] * each,
                                  sums[kDual] * each,
                                  some ? 1 + mean : 0,
                                  deviations < 0 ? 0 : deviations * each,
                                  ratio_of(-minus_min),
                                  ratio_of(maximum),
                                  some ? (minus_min > maximum ? minus_min : maximum) : 0,
                                  sums[kTokens]};
#pragma unroll
  for (int i = 0; i < kStats; ++i) stats[i] = T(results[i]);
}

template <class T, bool kPlain>
__global__ void __launch_bounds__(kThreads, std::is_same_v<T, double> ? 1 : 2)
    ppo_loss_kernel(Inputs<T> in, Quads quads, Weighting weighting, Ticket ticket, double* partials, T* loss,
                    T* stats) {
  double sums[kSums] = {}, extremes[kExtremes] = {-INFINITY, -INFINITY};
  int64_t quad = quads.first();
  const int64_t end = quads.end();
  Tokens<T> tokens;
  if (quad < end) tokens = read<kPlain>(in, quads.place(quad));  // asked for before the mask is counted
  const Weights weights = find_weights(weighting);
  while (quad < end) {
    add<kPlain>(in, tokens, quads.cols, weights, sums, extremes);
    quad += kThreads;
    if (quad < end) tokens = read<kPlain>(in, quads.place(quad));
  }

  double* mine = partials + int64_t(blockIdx.x) * kFields;
  const double* block_sums = block_reduce<Sum>(sums);
  const double* block_extremes = block_reduce<Max>(extremes);
  if (threadIdx.x < kSums) mine[threadIdx.x] = block_sums[threadIdx.x];
  if (threadIdx.x < kExtremes) mine[kSums + threadIdx.x] = block_extremes[threadIdx.x];
  if (!is_last_block(ticket)) return;

  const double* all = reduce_blocks<kSums, kExtremes>(partials, kFields);
  if (threadIdx.x == 0) finish(in, weights.inverse_norm, all, all + kSums, loss, stats);
}

}  // namespace

int ppo_loss(Grid logprobs, Grid old_logprobs, Grid advantages, Grid mask, Grid ref_logprobs, Grid entropy,
             Grid importance_weights, int64_t rows, int64_t cols, double clip_low, double clip_high, double dual_clip,
             double log_ratio_clamp, double kl_coef, int kl_estimator, double entropy_coef, int aggregation,
             const double* normalizer, int dtype, void* loss, void* stats, void* grad_logprobs, void* grad_entropy,
             double* scratch_memory, void* stream) {
  const Scratch scratch(scratch_memory, rows);
  Weighting weighting(mask, rows, cols, aggregation, normalizer);
  Ticket ticket;
  if (const int error = prepare(scratch, stream, &weighting, &ticket)) return error;
  const bool plain = is_plain(cols, {logprobs, old_logprobs, advantages, ref_logprobs, entropy, importance_weights},
                              mask, {grad_logprobs, grad_entropy});
  return with_version(dtype, plain, [&](auto zero, auto is_plain) {
    using T = decltype(zero);
    const T clamp = T(log_ratio_clamp);
    const PpoOptions<T> options{T(clip_low), T(clip_high), T(dual_clip), clamp, exp_of(-clamp), exp_of(clamp)};
    const Inputs<T> in{logprobs,
                       old_logprobs,
                       advantages,
                       mask,
                       ref_logprobs,
                       entropy,
                       importance_weights,
                       options,
                       T(kl_coef),
                       T(entropy_coef),
                       kl_estimator,
                       static_cast<T*>(grad_logprobs),
                       static_cast<T*>(grad_entropy)};
    const Quads quads(rows, cols, kThreads, kMaxBlocks);
    return launch(ppo_loss_kernel<T, is_plain.value>, quads.blocks(), kThreads, stream, in, quads, weighting, ticket,
                  scratch.partials, static_cast<T*>(loss), static_cast<T*>(stats));
  });
}

}  // namespace rlhf::cuda
