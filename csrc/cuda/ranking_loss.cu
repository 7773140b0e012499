// ranking_loss on CUDA: a warp per prompt, a lane per response, every pair seen from both of its sides. The gradient
// needs the number of prompts with a pair first: up to kCountInBlock ranks every block counts them for itself, beyond
// that a launch before does.
#include "estimators.cuh"
#include "grid.cuh"
#include "sums.cuh"

namespace rlhf::cuda {
namespace {

constexpr int64_t kMaxBlocks = 1024;
constexpr int64_t kCountInBlock = 1 << 14;

enum Field { kLoss, kAccuracy, kMargin, kPairs, kSums };  // kLoss: of prompts' means

struct Prompts {         // and those of one block
  const int64_t* ranks;  // contiguous (rows, k), negative for padding
  int64_t rows, k, per_block;

  Prompts(const int64_t* ranks, int64_t rows, int64_t k) : ranks(ranks), rows(rows), k(k) {
    const int64_t groups = (rows + kWarps - 1) / kWarps;
    per_block = (groups + kMaxBlocks - 1) / kMaxBlocks * kWarps;
  }
  int64_t blocks() const { return rows == 0 ? 1 : (rows + per_block - 1) / per_block; }
  __device__ int64_t begin() const { return blockIdx.x * per_block; }
  __device__ int64_t end() const { return min(rows, (blockIdx.x + 1) * per_block); }

  __device__ bool has_pair(int64_t row) const {  // two different ranks
    int64_t seen = -1;
    for (int64_t j = 0; j < k; ++j) {
      const int64_t rank = ranks[row * k + j];
      if (rank >= 0 && seen >= 0 && rank != seen) return true;
      if (rank >= 0) seen = rank;
    }
    return false;
  }

  __device__ double count(int64_t first, int64_t end) const {  // prompts with a pair, by the block
    double own[1] = {};
    for (int64_t row = first; row < end; row += kThreads) own[0] += has_pair(row);
    return block_reduce<Sum>(own)[0];
  }
};

__global__ void __launch_bounds__(kThreads, 4) count_prompts_kernel(Prompts prompts, double* partials) {
  const double own = prompts.count(prompts.begin() + threadIdx.x, prompts.end());
  if (threadIdx.x == 0) partials[blockIdx.x] = own;
}

template <class T>
__device__ inline T reward_of(const Grid& rewards, int64_t row, int64_t col) {
  return load<false, T>(rewards, Place{row, col, 1})[0];
}

// One prompt, by a warp; its share of the loss and of the gradient is 1 / its pairs / the prompts.
template <class T>
__device__ inline void add_prompt(const Grid& rewards, const Prompts& prompts, int64_t row, int lane, T each, T* grad,
                                  double (&sums)[kSums]) {
  const int64_t k = prompts.k, *ranks = prompts.ranks + row * k;
  double own[1] = {};
  for (int64_t i = lane; i < k; i += kWarp) {
    for (int64_t j = 0; j < k; ++j) own[0] += ranks[i] >= 0 && ranks[j] > ranks[i];
  }
  const double pairs = warp_reduce<Sum>(own, lane), share = pairs > 0 ? 1 / pairs : 0;
  for (int64_t i = lane; i < k; i += kWarp) {
    T slope = 0;
    for (int64_t j = 0; j < k; ++j) {
      if (ranks[i] < 0 || ranks[j] < 0 || ranks[i] == ranks[j]) continue;
      const bool better = ranks[i] < ranks[j];
      const T difference = reward_of<T>(rewards, row, i) - reward_of<T>(rewards, row, j);
      const T d = better ? difference : -difference;
      const Preference<T> one = preference(d, T(1));
      slope += better ? one.slope : -one.slope;
      if (!better) continue;  // the other side counts it
      sums[kLoss] += share * one.loss;
      sums[kAccuracy] += 0.5 * (sign(d) + 1);
      sums[kMargin] += d;
      sums[kPairs] += 1;
    }
    grad[row * k + i] = slope * T(share) * each;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    ranking_loss_kernel(Grid rewards, Prompts prompts, const double* prompts_of_blocks, Ticket ticket, double* partials,
                        T* loss, T* stats, T* grad) {
  double counted;
  if (prompts_of_blocks == nullptr) {
    counted = prompts.count(threadIdx.x, prompts.rows);
  } else {
    double own[1] = {};
    for (int block = threadIdx.x; block < gridDim.x; block += kThreads) own[0] += prompts_of_blocks[block];
    counted = block_reduce<Sum>(own)[0];
  }
  const double each = 1 / (counted > 0 ? counted : 1);
  double sums[kSums] = {};
  const int lane = threadIdx.x % kWarp;
  for (int64_t row = prompts.begin() + threadIdx.x / kWarp; row < prompts.end(); row += kWarps) {
    add_prompt(rewards, prompts, row, lane, T(each), grad, sums);
  }
  const double* block_sums = block_reduce<Sum>(sums);
  if (threadIdx.x < kSums) partials[int64_t(blockIdx.x) * kSums + threadIdx.x] = block_sums[threadIdx.x];
  if (!is_last_block(ticket)) return;

  const double* all = reduce_blocks<kSums>(partials, kSums);
  if (threadIdx.x != 0) return;
  const double pairs = all[kPairs] > 0 ? all[kPairs] : 1;
  *loss = T(all[kLoss] * each);
  stats[0] = T(all[kAccuracy] / pairs);
  stats[1] = T(all[kMargin] / pairs);
  stats[2] = T(all[kPairs]);
}

}  // namespace

int ranking_loss(Grid rewards, const int64_t* ranks, int64_t rows, int64_t k, int dtype, void* loss, void* stats,
                 void* grad, double* scratch, void* stream) {
  return with_version(dtype, false, [&](auto zero, auto) {
    using T = decltype(zero);
    const Prompts prompts(ranks, rows, k);
    double *of_blocks = nullptr, *partials = scratch + 1 + kMaxBlocks;
    Ticket ticket;
    if (const int error = take_ticket(stream, scratch, &ticket)) return error;
    if (rows * k > kCountInBlock) {
      of_blocks = scratch + 1;
      if (const int error = launch(count_prompts_kernel, prompts.blocks(), kThreads, stream, prompts, of_blocks))
        return error;
    }
    return launch(ranking_loss_kernel<T>, prompts.blocks(), kThreads, stream, rewards, prompts, of_blocks, ticket,
                  partials, static_cast<T*>(loss), static_cast<T*>(stats), static_cast<T*>(grad));
  });
}

}  // namespace rlhf::cuda
