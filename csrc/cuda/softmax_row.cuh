// A row of logits, read once from its first column on in packs of 16 bytes, and the gradient of its softmax.
//
// A pack holds the same columns whatever the address of the row, so a row gives the same bits wherever it lies in the
// batch. Where it does not lie on a boundary of 16 bytes (odd vocabularies, GPT-2's 50257: seven rows of eight), a pack
// is put together from the two that it straddles; the second is the first of the next thread and comes from L1.
#pragma once

#include <cstdio>

#include "reduce.cuh"

namespace rlhf::cuda {

constexpr int kUnroll = 4;  // packs of 16 bytes that a thread keeps in flight: 64 KiB an SM at 1024 threads
constexpr int kGroup = 2;   // packs that a thread adds to its state at a time, whatever the alignment of the row

struct Rows {  // ops.h: row i starts at (i / inner) * outer_stride + (i % inner) * inner_stride
  int64_t inner, outer_stride, inner_stride;
  __device__ int64_t offset(int64_t row) const { return row / inner * outer_stride + row % inner * inner_stride; }
};

template <typename scalar_t>
struct Arguments {
  using acc_t = accumulator_t<scalar_t>;
  const scalar_t* logits;
  Rows rows;
  int vocab;
  const int64_t* labels;
  const uint8_t* mask;
  acc_t scale, inverse_temperature;  // scale: log2(e) / temperature

  Arguments(const void* logits, Rows rows, int64_t vocab, const int64_t* labels, const uint8_t* mask,
            double temperature)
      : logits(static_cast<const scalar_t*>(logits)),
        rows(rows),
        vocab(static_cast<int>(vocab)),
        labels(labels),
        mask(mask),
        scale(acc_t(kLog2E / temperature)),
        inverse_temperature(acc_t(1 / temperature)) {}
};

__device__ inline void check_label(const char* op, int64_t label, int64_t row, int vocab) {
  if (label < 0 || label >= vocab) {
    printf("rlhf_fast %s: label %lld of row %lld is outside [0, %d)\n", op, static_cast<long long>(label),
           static_cast<long long>(row), vocab);
    __trap();
  }
}

// The packs of a row. kWords: -1 where it begins on a boundary of 16 bytes, else the whole words of 4 bytes that lie
// between the boundary before and it; odd says that 2 bytes more do.
template <typename scalar_t, int kWords>
struct Packs {
  const uint4* boundary;
  unsigned odd;

  __device__ explicit Packs(const scalar_t* row) {
    const auto past = reinterpret_cast<uintptr_t>(row) % 16;
    // From the pointer, not its number: the compiler then knows whether it reads global or shared memory.
    boundary = reinterpret_cast<const uint4*>(reinterpret_cast<const char*>(row) - past);
    odd = past % 4 != 0 ? 16 : 0;
  }
  // How many packs may be asked for: those of a row of so many columns whose bytes, the second pack's included, end
  // with the row. (Before its first byte the row may share 16 bytes with what is not its own; it reads and drops that.)
  __device__ int whole(int vocab) const { return max(0, vocab / Pack<scalar_t>::kSize - (kWords < 0 ? 0 : 1)); }
  __device__ Pack<scalar_t> operator[](int64_t pack) const {
    Pack<scalar_t> result;
    auto* to = reinterpret_cast<uint32_t*>(&result);
    const uint4 low = boundary[pack];
    if constexpr (kWords < 0) {
      *reinterpret_cast<uint4*>(to) = low;
    } else {
      const uint4 high = boundary[pack + 1];
      const uint32_t words[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        to[i] =
            sizeof(scalar_t) < 4 ? __funnelshift_r(words[kWords + i], words[kWords + i + 1], odd) : words[kWords + i];
      }
    }
    return result;
  }
};

// body(Packs of the row); the branch is uniform over the block.
template <typename scalar_t, typename Body>
__device__ inline auto with_packs(const scalar_t* row, Body body) {
  const auto past = reinterpret_cast<uintptr_t>(row) % 16;
  if (past == 0) return body(Packs<scalar_t, -1>(row));
  if constexpr (sizeof(scalar_t) < 8) {
    if (past / 4 == 1) return body(Packs<scalar_t, 1>(row));
    if (past / 4 == 3) return body(Packs<scalar_t, 3>(row));
  }
  if constexpr (sizeof(scalar_t) < 4) {
    if (past / 4 == 0) return body(Packs<scalar_t, 0>(row));
  }
  return body(Packs<scalar_t, 2>(row));
}

// The state of thread's share of the row. keep(pack, its bytes) sees each whole pack. kApart: packs in flight of a row
// that does not lie on a boundary.
template <bool kEntropy, int kThreads, int kApart, typename scalar_t, int kWords, typename Keep>
__device__ inline SoftmaxState<accumulator_t<scalar_t>> row_state(const scalar_t* x, Packs<scalar_t, kWords> row,
                                                                  int vocab, accumulator_t<scalar_t> scale, Keep keep) {
  using acc_t = accumulator_t<scalar_t>;
  constexpr int kSize = Pack<scalar_t>::kSize;
  constexpr int kLoaded = kWords < 0 ? kUnroll : kApart;
  static_assert(kLoaded % kGroup == 0);
  SoftmaxState<acc_t> state = SoftmaxState<acc_t>::empty();
  const int whole = row.whole(vocab);
  acc_t values[kGroup * kSize];
  int base = 0;
  for (; base + kLoaded * kThreads <= whole; base += kLoaded * kThreads) {
    const int first = base + threadIdx.x;
    Pack<scalar_t> packs[kLoaded];
#pragma unroll
    for (int u = 0; u < kLoaded; ++u) packs[u] = row[first + u * kThreads];
#pragma unroll
    for (int u = 0; u < kLoaded; ++u) {
      keep(first + u * kThreads, packs[u]);
      unpack(packs[u], values + u % kGroup * kSize);
      if (u % kGroup == kGroup - 1) state.template add<kEntropy>(values, scale);
    }
  }
  for (; base * kSize < vocab; base += kGroup * kThreads) {  // the row's end, which not all threads reach
    const int first = base + threadIdx.x;
    Pack<scalar_t> packs[kGroup];
#pragma unroll
    for (int u = 0; u < kGroup; ++u) {
      if (first + u * kThreads < whole) packs[u] = row[first + u * kThreads];
    }
#pragma unroll
    for (int u = 0; u < kGroup; ++u) {
      const int pack = first + u * kThreads;
      if (pack < whole) {
        keep(pack, packs[u]);
        unpack(packs[u], values + u * kSize);
      } else {
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          values[u * kSize + i] = pack * kSize + i < vocab ? to_acc(x[pack * kSize + i]) : -INFINITY;
        }
      }
    }
    state.template add<kEntropy>(values, scale);
  }
  return state;
}

// The gradient of a column: 2^s (constant + slope s) with s = scale (x - max), and at the label at_label more. Of an
// impossible token 2^s is 0, and kLeast takes the place of s: 0 times an infinite number would be NaN.
template <typename acc_t, bool kEntropy>
struct Gradient {
  static constexpr float kLeast = -2000;  // 2^kLeast is 0, in float64 too
  acc_t scale, max, constant, slope, at_label;
  int label;

  // Of by_logprob * logprob + by_entropy * entropy.
  __device__ Gradient(acc_t scale, acc_t inverse_temperature, acc_t max, acc_t log_sum, acc_t entropy, int64_t label,
                      acc_t by_logprob, acc_t by_entropy)
      : scale(scale), max(max), label(static_cast<int>(label)) {
    const acc_t inverse = inverse_temperature * exp(-log_sum);
    const acc_t offset = kEntropy ? by_entropy * (entropy - log_sum) : acc_t(0);
    constant = -(by_logprob + offset) * inverse;
    slope = -by_entropy * acc_t(1 / kLog2E) * inverse;
    at_label = by_logprob * inverse_temperature;
  }

  __device__ acc_t operator()(acc_t x) const {
    const acc_t s = (x - max) * scale, power = fast_exp2(s);
    return multiply(power, kEntropy ? multiply_add(slope, larger(s, acc_t(kLeast)), constant) : constant);
  }
  __device__ acc_t operator()(acc_t x, int column) const {
    return (*this)(x) + (column == label ? at_label : acc_t(0));
  }

  // Of the kCount columns from `first` on, over their values.
  template <int kCount>
  __device__ void over(acc_t (&values)[kCount], int first) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = (*this)(values[i]);
    const int at = label - first;
    if (at >= 0 && at < kCount) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) values[i] += i == at ? at_label : acc_t(0);
    }
  }
};

// What a row that does not count receives.
template <int kThreads, typename scalar_t>
__device__ inline void write_zeros(scalar_t* out, int vocab) {
  const auto zero = from_acc<scalar_t>(accumulator_t<scalar_t>(0));
  write_row(
      out, out, vocab, [&](int) { return zero; },
      [&](int head, int count) {
        auto* packs = reinterpret_cast<uint4*>(out + head);
        for (int pack = threadIdx.x; pack < count; pack += kThreads) packs[pack] = make_uint4(0, 0, 0, 0);
      });
}

}  // namespace rlhf::cuda
