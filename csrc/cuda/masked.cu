// masked_mean and masked_whiten on CUDA.
//
// The mean of a row is summed in units whose size depends on the number of columns alone, so that a row gives the same
// bits in every batch: a short row is one unit, of a warp; of a long one each unit is summed by a block, in turn by the
// same where there are many rows, else by several, and the last block to finish adds them in order.
// Whitening takes two launches, the moments of all values and then the values: each block of the second merges what the
// blocks of the first left.
#include "grid.cuh"
#include "sums.cuh"

namespace rlhf::cuda {
namespace {

constexpr int64_t kMaxBlocks = 1024;
constexpr int64_t kShort = 1024;    // columns that a warp takes alone
constexpr int64_t kUnit = 2048;     // columns, at least, of a unit of a long row
constexpr int kMaxUnits = 256;      // of a row
constexpr int64_t kSplitRows = 60;  // up to which blocks share a row; their units fit into kCudaScratch

struct MeanAndCount {
  double sum, count;

  template <class T>
  __device__ void store(T* mean, T* number) const {
    *number = T(count > 0 ? count : 1);
    *mean = T(sum / (count > 0 ? count : 1));
  }
};

// Columns begin + rank, begin + rank + ranks, ... below end of a row.
template <class T>
__device__ inline void add_row(const Grid& values, const Grid& mask, int64_t row, int64_t begin, int64_t end, int rank,
                               int ranks, double (&sums)[2]) {
  for (int64_t col = begin + rank * kQuad; col < end; col += ranks * kQuad) {
    const Place at{row, col, static_cast<int>(min(end - col, int64_t(kQuad)))};
    const Quad<T> loaded = load<false, T>(values, at);
    const Mask counts = load_mask<false>(mask, at);
    const Quad<T> x = keep(loaded, counts);
#pragma unroll
    for (int i = 0; i < kQuad; ++i) sums[0] += x[i];
    sums[1] += counts.count();
  }
}

__device__ inline MeanAndCount of_warp(double (&sums)[2], int lane) {
  const double mine = warp_reduce<Sum>(sums, lane);  // the sum in the lower lanes, the count in the upper
  return {__shfl_sync(kAllLanes, mine, 0), __shfl_sync(kAllLanes, mine, kWarp / 2)};
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    short_rows_kernel(Grid values, Grid mask, int64_t rows, int64_t cols, T* means, T* counts) {
  const int lane = threadIdx.x % kWarp;
  const int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (row >= rows) return;  // the whole warp
  double sums[2] = {};
  add_row<T>(values, mask, row, 0, cols, lane, kWarp, sums);
  const MeanAndCount total = of_warp(sums, lane);
  if (lane == 0) total.store(means + row, counts + row);
}

struct Units {  // of every row
  int64_t cols, size;
  int count;
  explicit Units(int64_t cols) : cols(cols), size(kUnit) {
    while (size * kMaxUnits < cols) size *= 2;
    count = static_cast<int>((cols + size - 1) / size);
  }

  template <class T>
  __device__ void sum(const Grid& values, const Grid& mask, int64_t row, int unit, MeanAndCount* out) const {
    const int64_t begin = unit * size;
    double sums[2] = {};
    add_row<T>(values, mask, row, begin, min(cols, begin + size), threadIdx.x, kThreads, sums);
    const double* total = block_reduce<Sum>(sums);
    if (threadIdx.x == 0) *out = {total[0], total[1]};
  }

  __device__ MeanAndCount add(const MeanAndCount* units, int lane) const {  // by a warp
    double sums[2] = {};
    for (int i = lane; i < count; i += kWarp) {
      sums[0] += units[i].sum;
      sums[1] += units[i].count;
    }
    return of_warp(sums, lane);
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    whole_rows_kernel(Grid values, Grid mask, Units units, T* means, T* counts) {
  __shared__ MeanAndCount sums[kMaxUnits];
  const int64_t row = blockIdx.x;
  for (int i = 0; i < units.count; ++i) units.sum<T>(values, mask, row, i, sums + i);
  __syncthreads();
  if (threadIdx.x >= kWarp) return;
  const MeanAndCount total = units.add(sums, threadIdx.x);
  if (threadIdx.x == 0) total.store(means + row, counts + row);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    split_rows_kernel(Grid values, Grid mask, int64_t rows, Units units, Ticket ticket, MeanAndCount* sums, T* means,
                      T* counts) {
  units.sum<T>(values, mask, blockIdx.x / units.count, blockIdx.x % units.count, sums + blockIdx.x);
  if (!is_last_block(ticket)) return;
  const int lane = threadIdx.x % kWarp;
  for (int64_t row = threadIdx.x / kWarp; row < rows; row += kWarps) {
    const MeanAndCount total = units.add(sums + row * units.count, lane);
    if (lane == 0) total.store(means + row, counts + row);
  }
}

template <class T, bool kPlain>
__global__ void __launch_bounds__(kThreads, 4) moments_kernel(Grid values, Grid mask, Quads quads, double* partials) {
  Moments<1> moments;
#pragma unroll 1  // registers: a large GPU runs all of kMaxBlocks at the same time; none waits for another
  for (int64_t quad = quads.first(); quad < quads.end(); quad += kThreads) {
    const Place at = quads.place(quad);
    const Mask counts = load_mask<kPlain>(mask, at);
    const Quad<T> x = load<kPlain, T>(values, at);
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      if (counts[i]) moments.add({x[i]});
    }
  }
  store_block_moments(moments, partials + int64_t(blockIdx.x) * kMomentsFields<1>);
}

template <class T, bool kPlain>
__global__ void __launch_bounds__(kThreads, 4)
    whiten_kernel(Grid values, Grid mask, Quads quads, bool shift_mean, double eps, const double* partials, T* whitened,
                  T* saved) {
  const auto first = first_moments<1>(partials, kMomentsFields<1>, gridDim.x);
  const Spread<1> all = merge_moments(first, partials, kMomentsFields<1>, gridDim.x);
  const T center = T(all.mean[0]), scale = T(1 / sqrt(all.deviations[0] / (all.n > 1 ? all.n - 1 : 1) + eps));
  const T back = shift_mean ? T(0) : center;
  for (int64_t quad = quads.first(); quad < quads.end(); quad += kThreads) {
    const Place at = quads.place(quad);
    const Mask counts = load_mask<kPlain>(mask, at);
    Quad<T> x = load<kPlain, T>(values, at);
#pragma unroll
    for (int i = 0; i < kQuad; ++i) x[i] = counts[i] ? (x[i] - center) * scale + back : T(0);
    store<kPlain>(whitened, quads.cols, at, x);
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) saved[0] = center, saved[1] = scale, saved[2] = T(all.n);
}

}  // namespace

int masked_mean(Grid values, Grid mask, int64_t rows, int64_t cols, int dtype, void* means, void* counts,
                double* scratch, void* stream) {
  return with_version(dtype, false, [&](auto zero, auto) {
    using T = decltype(zero);
    if (cols <= kShort) {
      return launch(short_rows_kernel<T>, (rows + kWarps - 1) / kWarps, kThreads, stream, values, mask, rows, cols,
                    static_cast<T*>(means), static_cast<T*>(counts));
    }
    const Units units(cols);
    if (rows > kSplitRows) {
      return launch(whole_rows_kernel<T>, rows, kThreads, stream, values, mask, units, static_cast<T*>(means),
                    static_cast<T*>(counts));
    }
    if (rows == 0) return int(cudaSuccess);
    Ticket ticket;
    if (const int error = take_ticket(stream, scratch, &ticket)) return error;
    return launch(split_rows_kernel<T>, rows * units.count, kThreads, stream, values, mask, rows, units, ticket,
                  reinterpret_cast<MeanAndCount*>(scratch + 2), static_cast<T*>(means), static_cast<T*>(counts));
  });
}

int masked_whiten(Grid values, Grid mask, int64_t rows, int64_t cols, int shift_mean, double eps, int dtype,
                  void* whitened, void* saved, double* scratch, void* stream) {
  return with_version(dtype, is_plain(cols, {values}, mask, {whitened}), [&](auto zero, auto plain) {
    using T = decltype(zero);
    const Quads quads(rows, cols, kThreads, kMaxBlocks);
    if (const int error =
            launch(moments_kernel<T, plain.value>, quads.blocks(), kThreads, stream, values, mask, quads, scratch))
      return error;
    return launch(whiten_kernel<T, plain.value>, quads.blocks(), kThreads, stream, values, mask, quads, shift_mean != 0,
                  eps, scratch, static_cast<T*>(whitened), static_cast<T*>(saved));
  });
}

}  // namespace rlhf::cuda
