// pairwise_loss on CUDA: loss, gradients and statistics of Bradley-Terry preferences in one launch. The gradient needs
// the sum of all weights first: up to kSumInBlock every block adds them for itself, beyond that a launch before does.
// Not given, they are 1 and there is nothing to add.
#include "estimators.cuh"
#include "grid.cuh"
#include "reduce.cuh"
#include "sums.cuh"

namespace rlhf::cuda {
namespace {

constexpr int64_t kMaxBlocks = 1024;
constexpr int64_t kSumInBlock = 4096;

enum Field { kLoss, kAccuracy, kDifference, kChosen, kRejected, kSums };  // weighted sums over pairs
constexpr int kFields = kSums + kMomentsFields<1>;

template <class T>
struct Inputs {
  Grid chosen, rejected, ref_chosen, ref_rejected, margin, target_prob, weights;
  T scale, margin_value, prob_value, center_coef;
  T *grad_chosen, *grad_rejected;  // may be null
};

template <class T, bool kPlain>
__device__ inline double own_weights(const Grid& weights, const Quads& quads, int64_t first, int64_t end) {
  double sum[1] = {};
  for (int64_t quad = first; quad < end; quad += kThreads) {
    const Quad<T> w = load<kPlain, T>(weights, quads.place(quad));
#pragma unroll
    for (int i = 0; i < kQuad; ++i) sum[0] += w[i];
  }
  return block_reduce<Sum>(sum)[0];
}

template <class T, bool kPlain>
__global__ void __launch_bounds__(kThreads, 2) weights_kernel(Grid weights, Quads quads, double* partials) {
  const double sum = own_weights<T, kPlain>(weights, quads, quads.first(), quads.end());
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

// 1 / the sum of all weights; of_blocks is what weights_kernel left, or null.
template <class T, bool kPlain>
__device__ inline double find_share(const Grid& weights, const Quads& quads, int64_t pairs, const double* of_blocks) {
  double total = pairs;
  if (weights.data != nullptr && of_blocks == nullptr) {
    total = own_weights<T, kPlain>(weights, quads, threadIdx.x, quads.count);
  } else if (weights.data != nullptr) {
    double sum[1] = {};
    for (int block = threadIdx.x; block < gridDim.x; block += kThreads) sum[0] += of_blocks[block];
    total = block_reduce<Sum>(sum)[0];
  }
  return 1 / (total > 0 ? total : 1);
}

template <bool kPlain, class T>
__device__ inline void add(const Inputs<T>& in, const Quads& quads, Place at, T share, double (&sums)[kSums],
                           Moments<1>& rewards) {
  Quad<T> c = load<kPlain, T>(in.chosen, at), r = load<kPlain, T>(in.rejected, at);
  const Quad<T> margin = load_or<kPlain>(in.margin, at, in.margin_value);
  const Quad<T> prob = load_or<kPlain>(in.target_prob, at, in.prob_value);
  const Quad<T> w = load_or<kPlain>(in.weights, at, T(1));
  // Implicit rewards: scale * (log pi - log pi_ref), rounded, so that those of a tie are equal.
  if (in.ref_chosen.data != nullptr) {
    const Quad<T> ref_c = load<kPlain, T>(in.ref_chosen, at), ref_r = load<kPlain, T>(in.ref_rejected, at);
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      c[i] = multiply(in.scale, c[i] - ref_c[i]);
      r[i] = multiply(in.scale, r[i] - ref_r[i]);
    }
  }
  Quad<T> by_chosen, by_rejected;
#pragma unroll
  for (int i = 0; i < kQuad; ++i) {
    if (i >= at.count) continue;
    const PairLoss<T> one = pair_loss(c[i], r[i], margin[i], prob[i], in.center_coef);
    const T each = w[i] * share * in.scale, difference = c[i] - r[i];
    by_chosen[i] = each * one.by_chosen;
    by_rejected[i] = each * one.by_rejected;
    sums[kLoss] += w[i] * one.loss;
    sums[kAccuracy] += w[i] * (T(0.5) * (sign(difference) + 1));
    sums[kDifference] += w[i] * difference;
    sums[kChosen] += w[i] * c[i];
    sums[kRejected] += w[i] * r[i];
    rewards.add({c[i]});
    rewards.add({r[i]});
  }
  if (in.grad_chosen != nullptr) store<kPlain>(in.grad_chosen, quads.cols, at, by_chosen);
  if (in.grad_rejected != nullptr) store<kPlain>(in.grad_rejected, quads.cols, at, by_rejected);
}

template <class T, bool kPlain>
__global__ void __launch_bounds__(kThreads, 2)
    pairwise_loss_kernel(Inputs<T> in, Quads quads, int64_t pairs, const double* weights_of_blocks, Ticket ticket,
                         double* partials, T* loss, T* stats) {
  const double share = find_share<T, kPlain>(in.weights, quads, pairs, weights_of_blocks);
  double sums[kSums] = {};
  Moments<1> rewards;
  for (int64_t quad = quads.first(); quad < quads.end(); quad += kThreads) {
    add<kPlain>(in, quads, quads.place(quad), T(share), sums, rewards);
  }
  double* mine = partials + int64_t(blockIdx.x) * kFields;
  store_block_moments(rewards, mine + kSums);
  const double* block_sums = block_reduce<Sum>(sums);
  if (threadIdx.x < kSums) mine[threadIdx.x] = block_sums[threadIdx.x];
  if (!is_last_block(ticket)) return;

  const auto first = first_moments<1>(partials + kSums, kFields, gridDim.x);  // on its way with the sums
  const double* all_sums = reduce_blocks<kSums>(partials, kFields);
  const Spread<1> all = merge_moments(first, partials + kSums, kFields, gridDim.x);
  if (threadIdx.x != 0) return;
  *loss = T(all_sums[kLoss] * share);
#pragma unroll
  for (int i = kAccuracy; i <= kRejected; ++i) *stats++ = T(all_sums[i] * share);
  *stats++ = T(all.mean[0]);
  *stats++ = T(sqrt(all.variance(0)));
  *stats++ = T(pairs);
}

}  // namespace

int pairwise_loss(Grid chosen, Grid rejected, Grid ref_chosen, Grid ref_rejected, Grid margin, Grid target_prob,
                  Grid weights, int64_t pairs, double scale, double margin_value, double prob_value, double center_coef,
                  int dtype, void* loss, void* stats, void* grad_chosen, void* grad_rejected, double* scratch,
                  void* stream) {
  const bool plain = is_plain(pairs, {chosen, rejected, ref_chosen, ref_rejected, margin, target_prob, weights}, {},
                              {grad_chosen, grad_rejected});
  return with_version(dtype, plain, [&](auto zero, auto is_plain) {
    using T = decltype(zero);
    const Inputs<T> in{chosen,
                       rejected,
                       ref_chosen,
                       ref_rejected,
                       margin,
                       target_prob,
                       weights,
                       T(scale),
                       T(margin_value),
                       T(prob_value),
                       T(center_coef),
                       static_cast<T*>(grad_chosen),
                       static_cast<T*>(grad_rejected)};
    const Quads quads(1, pairs, kThreads, kMaxBlocks);
    double *of_blocks = nullptr, *partials = scratch + 1 + kMaxBlocks;
    Ticket ticket;
    if (const int error = take_ticket(stream, scratch, &ticket)) return error;
    if (weights.data != nullptr && pairs > kSumInBlock) {
      of_blocks = scratch + 1;
      if (const int error =
              launch(weights_kernel<T, is_plain.value>, quads.blocks(), kThreads, stream, weights, quads, of_blocks))
        return error;
    }
    return launch(pairwise_loss_kernel<T, is_plain.value>, quads.blocks(), kThreads, stream, in, quads, pairs,
                  of_blocks, ticket, partials, static_cast<T*>(loss), static_cast<T*>(stats));
  });
}

}  // namespace rlhf::cuda
