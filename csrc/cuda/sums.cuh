// Sums, maxima and moments over a block and over all blocks, in an order that depends on the shape alone.
#pragma once

#include <cmath>
#include <mutex>
#include <type_traits>
#include <unordered_map>

#include "launch.cuh"

namespace rlhf::cuda {

constexpr int kThreads = 256;  // of every block that calls what follows
constexpr int kWarps = kThreads / kWarp;
constexpr unsigned kAllLanes = 0xffffffffu;

struct Sum {
  __device__ static double of(double a, double b) { return a + b; }
  static constexpr double kNothing = 0;
};
struct Max {
  __device__ static double of(double a, double b) { return fmax(a, b); }
  static constexpr double kNothing = -INFINITY;
};

// Lane i returns the reduction over the warp of values[i * kCount / 32]. Each step halves the lanes that a value is
// spread over and, while there are several, the values that a lane holds: kCount + log2(32 / kCount) - 1 shuffles, not
// 5 kCount.
template <class Op, int kCount, int kWidth = kWarp / 2>
__device__ __forceinline__ double warp_reduce(const double (&values)[kCount], int lane) {
  if constexpr (kWidth == 0) {
    return values[0];
  } else {
    constexpr int kLeft = kCount > 1 ? kCount / 2 : 1;
    double left[kLeft];
#pragma unroll
    for (int i = 0; i < kLeft; ++i) {
      const bool upper = kCount > 1 && (lane & kWidth) != 0;
      const double low = values[i], high = values[i + kCount - kLeft];
      const double kept = upper ? high : low, given = upper ? low : high;
      left[i] = Op::of(kept, __shfl_xor_sync(kAllLanes, given, kWidth));
    }
    return warp_reduce<Op, kLeft, kWidth / 2>(left, lane);
  }
}

template <int kLeast>
constexpr int kPowerOf2 = 2 * kPowerOf2<(kLeast + 1) / 2>;
template <>
inline constexpr int kPowerOf2<1> = 1;

// The reductions over the block of kCount values a thread, in shared memory until the next call.
template <class Op, int kCount>
__device__ inline const double* block_reduce(const double (&values)[kCount]) {
  constexpr int kSlots = kPowerOf2<kCount>, kSpread = kWarp / kSlots;
  __shared__ double of_warp[kWarps][kSlots], of_block[kSlots];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  double padded[kSlots];
#pragma unroll
  for (int i = 0; i < kSlots; ++i) padded[i] = i < kCount ? values[i] : Op::kNothing;
  const double mine = warp_reduce<Op>(padded, lane);
  if (lane % kSpread == 0) of_warp[warp][lane / kSpread] = mine;
  __syncthreads();
  if (threadIdx.x < kCount) {
    double all = of_warp[0][threadIdx.x];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) all = Op::of(all, of_warp[w][threadIdx.x]);
    of_block[threadIdx.x] = all;
  }
  __syncthreads();
  return of_block;
}

// --- Moments --------------------------------------------------------------------------------------------------------
// n values of each of kCount variables as sums of x - around and its square, where `around` is one of the values (0 for
// one that is not finite): a spread far smaller than the mean survives, and a constant has variance 0 exactly.
template <int kCount>
struct Moments {
  double n = 0, around[kCount] = {}, sum[kCount] = {}, square[kCount] = {};

  template <class T>
  __device__ void add(const T (&x)[kCount]) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      if (n == 0) around[k] = isfinite(x[k]) ? x[k] : T(0);
      const double d = x[k] - around[k];
      sum[k] += d;
      square[k] += d * d;
    }
    n += 1;
  }

  __device__ void move(int k, double to) {
    const double delta = around[k] - to;
    if (n == 0) return;
    square[k] += delta * (2 * sum[k] + n * delta);
    sum[k] += n * delta;
    around[k] = to;
  }
};

template <int kCount>
constexpr int kMomentsFields = 1 + 3 * kCount;

// Of the block, left at `out`: n, and for each variable around, sum, square.
template <int kCount>
__device__ inline void store_block_moments(Moments<kCount> mine, double* out) {
  __shared__ int first[kWarps];
  __shared__ double around[kCount];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const unsigned some = __ballot_sync(kAllLanes, mine.n > 0);
  if (lane == 0) first[warp] = some == 0 ? kThreads : warp * kWarp + __ffs(some) - 1;
  if (threadIdx.x == 0) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) around[k] = 0;
  }
  __syncthreads();
  int owner = kThreads;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) owner = min(owner, first[w]);
  if (threadIdx.x == owner) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) around[k] = mine.around[k];
  }
  __syncthreads();
  double values[1 + 2 * kCount] = {mine.n};
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    mine.move(k, around[k]);
    values[1 + 2 * k] = mine.sum[k];
    values[2 + 2 * k] = mine.square[k];
  }
  const double* all = block_reduce<Sum>(values);
  if (threadIdx.x == 0) out[0] = all[0];
  if (threadIdx.x < kCount) {
    const int k = threadIdx.x;
    out[1 + 3 * k] = around[k];
    out[2 + 3 * k] = all[1 + 2 * k];
    out[3 + 3 * k] = all[2 + 2 * k];
  }
}

template <int kCount>
struct Spread {
  double n, mean[kCount], deviations[kCount];  // deviations: the sum of (x - mean)^2
  __device__ double variance(int k) const { return n > 0 ? deviations[k] / n : 0; }
};

template <int kCount>
__device__ inline Moments<kCount> load_moments(const double* from) {
  Moments<kCount> of_block;
  of_block.n = __ldcg(from);
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    of_block.around[k] = __ldcg(from + 1 + 3 * k);
    of_block.sum[k] = __ldcg(from + 2 + 3 * k);
    of_block.square[k] = __ldcg(from + 3 + 3 * k);
  }
  return of_block;
}

// Those of the first block that this thread merges.
template <int kCount>
__device__ inline Moments<kCount> first_moments(const double* partials, int stride, int blocks) {
  return threadIdx.x < blocks ? load_moments<kCount>(partials + int64_t(threadIdx.x) * stride) : Moments<kCount>();
}

// Of all blocks, from what each left at partials + block * stride; the same in every thread. `first` stays in registers
// for the second pass: up to kThreads blocks take one trip to L2.
template <int kCount>
__device__ inline Spread<kCount> merge_moments(const Moments<kCount>& first, const double* partials, int stride,
                                               int blocks) {
  Spread<kCount> spread;
  double values[1 + kCount] = {};
  const auto add = [&](const Moments<kCount>& of_block) {
    values[0] += of_block.n;
#pragma unroll
    for (int k = 0; k < kCount; ++k) values[1 + k] += of_block.n * of_block.around[k] + of_block.sum[k];
  };
  add(first);
  for (int block = threadIdx.x + kThreads; block < blocks; block += kThreads) {
    add(load_moments<kCount>(partials + int64_t(block) * stride));
  }
  const double* all = block_reduce<Sum>(values);
  spread.n = all[0];
#pragma unroll
  for (int k = 0; k < kCount; ++k) spread.mean[k] = spread.n > 0 ? all[1 + k] / spread.n : 0;
  double squares[kCount] = {};
  const auto add_squares = [&](const Moments<kCount>& of_block) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const double delta = of_block.n > 0 ? of_block.around[k] - spread.mean[k] : 0;
      squares[k] += of_block.square[k] + delta * (2 * of_block.sum[k] + of_block.n * delta);
    }
  };
  add_squares(first);
  for (int block = threadIdx.x + kThreads; block < blocks; block += kThreads) {
    add_squares(load_moments<kCount>(partials + int64_t(block) * stride));
  }
  all = block_reduce<Sum>(squares);
#pragma unroll
  for (int k = 0; k < kCount; ++k) spread.deviations[k] = all[k] < 0 ? 0 : all[k];
  return spread;
}

// --- The last block -------------------------------------------------------------------------------------------------
// A batch is reduced in one launch: every block leaves its partial results in memory and draws a number from a counter;
// the one that draws the last number adds all partial results, in the order of the blocks, so the sum does not depend
// on who that is. The counter starts at 0 and is left at 0, which costs no launch of its own. Two launches that run at
// the same time must not share one, so
//   on a stream     it belongs to the stream, whose launches follow each other. By cudaStreamGetId, because a handle
//                   may come back as another stream (after cudaStreamDestroy; cudaStreamPerThread in another thread);
//   in a capture    it belongs to the captured launch for good: the graph may run beside its stream, not beside itself;
//   none left       it is a word of the caller's scratch memory, which a memset clears first.
#ifndef RLHF_TICKETS
#define RLHF_TICKETS 4096
#endif
static __device__ unsigned tickets[RLHF_TICKETS];  // one array a device, 0 when the module is loaded

struct Ticket {
  int index;  // in tickets; -1: spare
  unsigned* spare;
  __device__ unsigned* counter() const { return index < 0 ? spare : tickets + index; }
};

inline cudaError_t take_ticket(void* stream, void* spare, Ticket* ticket) {
  static std::mutex mutex;
  static std::unordered_map<unsigned long long, int> of_stream;
  static int used = 0;

  const auto handle = static_cast<cudaStream_t>(stream);
  *ticket = {-1, static_cast<unsigned*>(spare)};
  cudaStreamCaptureStatus capture;
  if (const cudaError_t error = cudaStreamIsCapturing(handle, &capture)) return error;
  unsigned long long id = 0;
  if (capture == cudaStreamCaptureStatusNone) {
    if (const cudaError_t error = cudaStreamGetId(handle, &id)) return error;
  }
  {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto known = capture == cudaStreamCaptureStatusNone ? of_stream.find(id) : of_stream.end();
    if (known != of_stream.end()) {
      ticket->index = known->second;
    } else if (used < RLHF_TICKETS) {
      ticket->index = used++;
      if (capture == cudaStreamCaptureStatusNone) of_stream[id] = ticket->index;
    }
  }
  return ticket->index < 0 ? cudaMemsetAsync(spare, 0, sizeof(unsigned), handle) : cudaSuccess;
}

// Whether this block finishes last; what the others wrote before they asked is then visible, past the L1 cache. One
// thread fences for its block, between the barriers: it has seen what the block wrote, and its fence passes that on
// with the number it draws. With fences outside of the barriers every warp would wait for them, twice.
__device__ inline bool is_last_block(Ticket ticket) {
  __shared__ bool last;
  __syncthreads();
  if (gridDim.x == 1) return true;
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicInc(ticket.counter(), gridDim.x - 1) == gridDim.x - 1;  // the last draw resets it
    __threadfence();
  }
  __syncthreads();
  return last;
}

// By the last block: sums and then maxima over all blocks of what each left at partials + block * stride, a warp for
// each number; in shared memory until the next call.
template <int kSums, int kMaxima = 0>
__device__ inline const double* reduce_blocks(const double* partials, int stride) {
  constexpr int kCount = kSums + kMaxima, kTurns = (kCount + kWarps - 1) / kWarps;
  constexpr int kAtOnce = 2;  // blocks that a lane asks for: 64 take one trip to L2
  __shared__ double of_all[kTurns * kWarps];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const auto is_sum = [&](int turn) {
    return kMaxima == 0 || (turn + 1) * kWarps <= kSums || turn * kWarps + warp < kSums;
  };
  const auto join = [&](int turn, double& mine, double x) {
    const double sum = Sum::of(mine, x), maximum = Max::of(mine, x);
    mine = is_sum(turn) ? sum : maximum;
  };
  double mine[kTurns];
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) mine[turn] = is_sum(turn) ? Sum::kNothing : Max::kNothing;
  for (int first = lane; first < gridDim.x; first += kAtOnce * kWarp) {
    double x[kAtOnce][kTurns];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int64_t block = first + u * kWarp;
#pragma unroll
      for (int turn = 0; turn < kTurns; ++turn) {
        x[u][turn] = is_sum(turn) ? Sum::kNothing : Max::kNothing;
        const int i = min(turn * kWarps + warp, kCount - 1);  // a warp without a number reads the last one
        if (block < gridDim.x) x[u][turn] = __ldcg(partials + block * stride + i);
      }
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
#pragma unroll
      for (int turn = 0; turn < kTurns; ++turn) join(turn, mine[turn], x[u][turn]);
    }
  }
#pragma unroll
  for (int width = kWarp / 2; width > 0; width /= 2) {
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      join(turn, mine[turn], __shfl_xor_sync(kAllLanes, mine[turn], width));
    }
  }
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) {
    if (lane == 0) of_all[turn * kWarps + warp] = mine[turn];
  }
  __syncthreads();
  return of_all;
}

}  // namespace rlhf::cuda
