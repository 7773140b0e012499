// The weight of each token's loss under a mode of reference.aggregate. The gradient is written by the launch that reads
// the batch first, so the number of tokens (or of sequences) must be known before any block begins. The mask is a
// seventeenth of the traffic: up to kCountInBlock bytes every block counts all of it for itself, from L2 and while its
// own tokens are on their way; beyond, a launch before counts each row once.
#pragma once

#include "grid.cuh"
#include "sums.cuh"

namespace rlhf::cuda {

constexpr int64_t kCountInBlock = 1 << 17, kRowsInBlock = 512;  // 128 KiB: 1.2 us from L2 to one multiprocessor
constexpr int64_t kMaxBlocks = 1024;                            // that leave partial results
constexpr int kPacksInFlight = 16;  // of 16 bytes a thread: a block counts 64 KiB in one trip to L2
static_assert(4 * kPacksInFlight < 256);

struct MaskCounts {
  unsigned long long tokens, sequences;  // a sequence is a row with a token
};

struct Weighting {
  Grid mask;
  int64_t rows, cols;
  int aggregation;
  const double* normalizer;
  const MaskCounts* counts;          // of a launch before, then
  const unsigned long long* of_row;  // the tokens of each row; null: this block counts

  bool needed, flat;  // whether any count is needed; whether the mask is one run of bytes to count

  Weighting(const Grid& mask, int64_t rows, int64_t cols, int aggregation, const double* normalizer)
      : mask(mask),
        rows(rows),
        cols(cols),
        aggregation(aggregation),
        normalizer(normalizer),
        counts(nullptr),
        of_row(nullptr),
        needed(aggregation == kSeqMeanTokenMean || (normalizer == nullptr && aggregation != kSeqMeanTokenSumNorm)),
        flat(aggregation == kTokenMean && mask.col_stride == 1 && (rows == 1 || mask.row_stride == cols)) {}
};

// Of bytes 0 and 1 at p + i * stride, i < n; thread `rank` of `ranks` neighbours takes its share.
__device__ inline int count_share(const uint8_t* p, int64_t stride, int n, int rank, int ranks) {
  int count = 0;
  const int head = stride == 1 ? min(n, static_cast<int>(-reinterpret_cast<uintptr_t>(p) % 16)) : n;
  for (int i = rank; i < head; i += ranks) count += p[i * stride];
  const auto* packs = reinterpret_cast<const uint4*>(p + head);
  const int whole = (n - head) / 16;
  for (int base = rank; base < whole; base += kPacksInFlight * ranks) {
    uint4 in_flight[kPacksInFlight];
#pragma unroll
    for (int i = 0; i < kPacksInFlight; ++i) {
      in_flight[i] = base + i * ranks < whole ? packs[base + i * ranks] : make_uint4(0, 0, 0, 0);
    }
    unsigned of_bytes = 0;  // four sums, each at most 4 kPacksInFlight
#pragma unroll
    for (const uint4& pack : in_flight) of_bytes += (pack.x + pack.y) + (pack.z + pack.w);
    count = __dp4a(of_bytes, 0x01010101u, static_cast<unsigned>(count));
  }
  for (int i = head + whole * 16 + rank; i < n; i += ranks) count += p[i * stride];
  return count;
}

struct Weights {
  double inverse_norm;
  const unsigned long long* of_row;  // null where the row does not matter
  __device__ double share(int64_t row) const {
    const unsigned long long n = of_row == nullptr ? 1 : of_row[row];
    return n > 1 ? 1.0 / static_cast<double>(n) : 1.0;  // a row without a token has nothing to weigh
  }
};

__device__ inline Weights find_weights(const Weighting& in) {
  __shared__ unsigned long long row_counts[kRowsInBlock];
  __shared__ int tokens_of_warp[kWarps], sequences_of_warp[kWarps];
  Weights weights{0, nullptr};
  const bool by_row = in.aggregation == kSeqMeanTokenMean;
  double norm = in.cols;
  if (in.counts != nullptr) {
    norm = in.aggregation == kTokenMean ? in.counts->tokens : in.counts->sequences;
    weights.of_row = by_row ? in.of_row : nullptr;
  } else if (in.needed) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const auto* mask = static_cast<const uint8_t*>(in.mask.data);
    int tokens = 0, sequences = 0;
    if (in.flat) {
      tokens = count_share(mask, 1, static_cast<int>(in.rows * in.cols), threadIdx.x, kThreads);
      tokens = __reduce_add_sync(kAllLanes, tokens);
    } else {
      for (int row = warp; row < in.rows; row += kWarps) {
        const int n = __reduce_add_sync(kAllLanes, count_share(mask + row * in.mask.row_stride, in.mask.col_stride,
                                                               static_cast<int>(in.cols), lane, kWarp));
        if (lane == 0) row_counts[row] = n;
        tokens += n;
        sequences += n > 0;
      }
    }
    if (lane == 0) {
      tokens_of_warp[warp] = tokens;
      sequences_of_warp[warp] = sequences;
    }
    __syncthreads();
    int total = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += in.aggregation == kTokenMean ? tokens_of_warp[w] : sequences_of_warp[w];
    norm = total;
    weights.of_row = by_row ? row_counts : nullptr;
  }
  if (in.normalizer != nullptr) norm = *in.normalizer;
  weights.inverse_norm = 1 / norm;
  return weights;
}

constexpr int kSegment = 4096;  // columns that a warp counts at a time

static __global__ void __launch_bounds__(kThreads, 2)
    count_kernel(Grid mask, int64_t rows, int64_t cols, MaskCounts* counts, unsigned long long* of_row) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t per_row = (cols + kSegment - 1) / kSegment, segments = rows * per_row;
  unsigned long long tokens = 0, sequences = 0;
  for (int64_t i = int64_t(blockIdx.x) * kWarps + warp; i < segments; i += int64_t(gridDim.x) * kWarps) {
    const int64_t row = i / per_row, col = i % per_row * kSegment;
    const auto* m = static_cast<const uint8_t*>(mask.data) + row * mask.row_stride + col * mask.col_stride;
    const int width = static_cast<int>(min(cols - col, int64_t(kSegment)));
    const int n = __reduce_add_sync(kAllLanes, count_share(m, mask.col_stride, width, lane, kWarp));
    if (lane == 0 && n > 0) {
      sequences += atomicAdd(of_row + row, static_cast<unsigned long long>(n)) == 0;  // one segment comes first
      tokens += n;
    }
  }
  if (lane == 0) {  // integers: the order does not matter
    atomicAdd(&counts->tokens, tokens);
    atomicAdd(&counts->sequences, sequences);
  }
}

// Scratch memory of an op (ops.h): a ticket and the counts of a launch before, which are cleared together, and the
// partial results of the blocks.
struct Scratch {
  double *ticket, *counts, *of_row, *partials;
  Scratch(double* p, int64_t rows) : ticket(p), counts(p + 1), of_row(p + 3), partials(p + 3 + rows) {}
};

// Has the mask counted where a launch before must do that, and takes a ticket for the launch that follows.
inline int prepare(const Scratch& scratch, void* stream, Weighting* weighting, Ticket* ticket) {
  const int64_t rows = weighting->rows, cols = weighting->cols;
  const bool in_block = rows * cols <= kCountInBlock && (weighting->flat || rows <= kRowsInBlock);
  if (!weighting->needed || in_block) return take_ticket(stream, scratch.ticket, ticket);
  auto* counts = reinterpret_cast<MaskCounts*>(scratch.counts);
  auto* of_row = reinterpret_cast<unsigned long long*>(scratch.of_row);
  weighting->counts = counts;
  weighting->of_row = of_row;
  *ticket = {-1, reinterpret_cast<unsigned*>(scratch.ticket)};
  const size_t bytes = (scratch.partials - scratch.ticket) * sizeof(double);
  if (const int error = cudaMemsetAsync(scratch.ticket, 0, bytes, static_cast<cudaStream_t>(stream))) return error;
  const int64_t segments = rows * ((cols + kSegment - 1) / kSegment);
  return launch(count_kernel, min((segments + kWarps - 1) / kWarps, kMaxBlocks), kThreads, stream, weighting->mask,
                rows, cols, counts, of_row);
}

}  // namespace rlhf::cuda
