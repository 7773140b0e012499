// value_loss on CUDA, in the manner of ppo_loss: one launch gives the loss, its gradient and all statistics.
#include "estimators.cuh"
#include "grid.cuh"
#include "sums.cuh"
#include "weights.cuh"

namespace rlhf::cuda {
namespace {

enum Variable { kValue, kReturn, kError, kVariables };
enum Field { kLoss, kClipped, kSums };  // kLoss carries the share of its row
constexpr int kStats = 8;
constexpr int kFields = kSums + kMomentsFields<kVariables>;

template <class T>
struct Inputs {
  Grid values, old_values, returns, mask;
  T cliprange;
  T* grad;  // may be null
};

template <class T>
struct Tokens {
  Place at;
  Quad<T> values, old_values, returns;
  Mask mask;  // read last, see load_mask
};

template <bool kPlain, class T>
__device__ inline Tokens<T> read(const Inputs<T>& in, Place at) {
  return {at, load<kPlain, T>(in.values, at), load<kPlain, T>(in.old_values, at), load<kPlain, T>(in.returns, at),
          load_mask<kPlain>(in.mask, at)};
}

template <bool kPlain, class T>
__device__ inline void add(const Inputs<T>& in, const Tokens<T>& tokens, int64_t cols, const Weights& weights,
                           double (&sums)[kSums], Moments<kVariables>& moments) {
  const Mask mask = tokens.mask;
  const double share = weights.share(tokens.at.row);
  const T weight = T(share * weights.inverse_norm);
  Quad<T> gradient;
#pragma unroll
  for (int i = 0; i < kQuad; ++i) {
    gradient[i] = T(0);
    if (!mask[i]) continue;
    const auto token = value_token(tokens.values[i], tokens.old_values[i], tokens.returns[i], in.cliprange);
    gradient[i] = weight * token.slope;
    sums[kLoss] += share * token.loss;
    sums[kClipped] += token.clipped;
    moments.add({tokens.values[i], tokens.returns[i], token.error});
  }
  if (in.grad != nullptr) store<kPlain>(in.grad, cols, tokens.at, gradient);
}

template <class T, bool kPlain>
__global__ void __launch_bounds__(kThreads, 2) value_loss_kernel(Inputs<T> in, Quads quads, Weighting weighting,
                                                                 Ticket ticket, double* partials, T* loss, T* stats) {
  double sums[kSums] = {};
  Moments<kVariables> moments;
  int64_t quad = quads.first();
  const int64_t end = quads.end();
  Tokens<T> tokens;
  if (quad < end) tokens = read<kPlain>(in, quads.place(quad));  // asked for before the mask is counted
  const Weights weights = find_weights(weighting);
  while (quad < end) {
    add<kPlain>(in, tokens, quads.cols, weights, sums, moments);
    quad += kThreads;
    if (quad < end) tokens = read<kPlain>(in, quads.place(quad));
  }

  double* mine = partials + int64_t(blockIdx.x) * kFields;
  store_block_moments(moments, mine + kSums);
  const double* block_sums = block_reduce<Sum>(sums);
  if (threadIdx.x < kSums) mine[threadIdx.x] = block_sums[threadIdx.x];
  if (!is_last_block(ticket)) return;

  const auto first = first_moments<kVariables>(partials + kSums, kFields, gridDim.x);  // on its way with the sums
  const double* all_sums = reduce_blocks<kSums>(partials, kFields);
  const Spread<kVariables> all = merge_moments(first, partials + kSums, kFields, gridDim.x);
  if (threadIdx.x != 0) return;
  const double total = all.n > 0 ? all_sums[kLoss] * weights.inverse_norm : 0;
  const double results[kStats] = {total,
                                  all_sums[kClipped] / (all.n > 0 ? all.n : 1),
                                  all.mean[kValue],
                                  all.mean[kReturn],
                                  all.variance(kReturn),
                                  all.mean[kError],
                                  all.variance(kError),
                                  all.n};
  *loss = T(total);
#pragma unroll
  for (int i = 0; i < kStats; ++i) stats[i] = T(results[i]);
}

}  // namespace

int value_loss(Grid values, Grid old_values, Grid returns, Grid mask, int64_t rows, int64_t cols, double cliprange,
               int aggregation, const double* normalizer, int dtype, void* loss, void* stats, void* grad,
               double* scratch_memory, void* stream) {
  const Scratch scratch(scratch_memory, rows);
  Weighting weighting(mask, rows, cols, aggregation, normalizer);
  Ticket ticket;
  if (const int error = prepare(scratch, stream, &weighting, &ticket)) return error;
  return with_version(dtype, is_plain(cols, {values, old_values, returns}, mask, {grad}), [&](auto zero, auto plain) {
    using T = decltype(zero);
    const Inputs<T> in{values, old_values, returns, mask, T(cliprange), static_cast<T*>(grad)};
    const Quads quads(rows, cols, kThreads, kMaxBlocks);
    return launch(value_loss_kernel<T, plain.value>, quads.blocks(), kThreads, stream, in, quads, weighting, ticket,
                  scratch.partials, static_cast<T*>(loss), static_cast<T*>(stats));
  });
}

}  // namespace rlhf::cuda
