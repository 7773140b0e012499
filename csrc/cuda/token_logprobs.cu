// token_logprobs and its entropy on CUDA: one block per row, every logit read once forward and once backward.
//
//   M = max_j logits_j, s_j = (logits_j - M) / temperature, S = sum_j exp(s_j), p_j = exp(s_j) / S
//   logprob = s_label - ln S          entropy = ln S - sum_j p_j s_j
//   d/dlogits_j = (g [j = label] - p_j (g + h (ln p_j + entropy))) / temperature,  g, h the incoming gradients
//
// M and ln S are saved apart: their sum, the logsumexp, rounds away 1e-5 of the probabilities at logits near 170.
// Which columns a thread adds up does not depend on the address of the row, only the width of its loads does, so a
// row gives the same bits wherever it lies in the batch, odd vocabularies (GPT-2: 50257) included.
#include <cstdio>

#include "launch.cuh"
#include "reduce.cuh"

namespace rlhf::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kUnroll = 4;  // packs of 16 bytes that a thread keeps in flight: 64 KiB an SM at two blocks
template <typename scalar_t>
constexpr int kBlocksPerSm = sizeof(scalar_t) == 8 ? 1 : 2;  // at most 64 registers a thread, which float64 passes

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
};

__device__ void check_label(int64_t label, int64_t row, int vocab) {
  if (label < 0 || label >= vocab) {
    printf("rlhf_fast token_logprobs: label %lld of row %lld is outside [0, %d)\n", static_cast<long long>(label),
           static_cast<long long>(row), vocab);
    __trap();
  }
}

template <typename scalar_t, bool kEntropy, int kAlign>
__device__ SoftmaxState<accumulator_t<scalar_t>> row_state(const scalar_t* x, int vocab,
                                                           accumulator_t<scalar_t> scale) {
  using acc_t = accumulator_t<scalar_t>;
  constexpr int kSize = Pack<scalar_t>::kSize, kStride = kThreads * kSize;
  SoftmaxState<acc_t> state = SoftmaxState<acc_t>::empty();
  for (int64_t base = 0; base < vocab; base += kUnroll * kStride) {
    acc_t values[kUnroll * kSize];
    const int64_t first = base + threadIdx.x * kSize;
    if (base + kUnroll * kStride <= vocab) {
      Pack<scalar_t> packs[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) packs[u] = load_pack<kAlign>(x + first + u * kStride);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) unpack(packs[u], values + u * kSize);
    } else {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) load_before<kAlign>(x, first + u * kStride, vocab, values + u * kSize);
    }
    state.template add<kEntropy>(values, scale);
  }
  return state;
}

template <typename scalar_t, bool kEntropy>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<scalar_t>)
    forward_kernel(Arguments<scalar_t> in, accumulator_t<scalar_t>* logprobs, accumulator_t<scalar_t>* entropy,
                   accumulator_t<scalar_t>* saved) {
  using acc_t = accumulator_t<scalar_t>;
  const int64_t row = blockIdx.x;
  if (in.mask != nullptr && !in.mask[row]) {
    if (threadIdx.x == 0) {
      logprobs[row] = saved[2 * row] = saved[2 * row + 1] = acc_t(0);
      if constexpr (kEntropy) entropy[row] = acc_t(0);
    }
    return;
  }
  const scalar_t* x = in.logits + in.rows.offset(row);
  acc_t x_label = acc_t(0);
  if (threadIdx.x == 0) {  // asked for now, needed last
    check_label(in.labels[row], row, in.vocab);
    x_label = to_acc(x[in.labels[row]]);
  }
  SoftmaxState<acc_t> state =
      with_alignment(x, [&](auto align) { return row_state<scalar_t, kEntropy, align.value>(x, in.vocab, in.scale); });
  state = block_merge<kThreads>(state, in.scale);
  if (threadIdx.x == 0) {
    const acc_t log_sum = log(state.sum);
    logprobs[row] = multiply_add(x_label - state.max, in.inverse_temperature, -log_sum);
    if constexpr (kEntropy) entropy[row] = log_sum - state.weighted / state.sum * in.inverse_temperature;
    saved[2 * row] = state.max;
    saved[2 * row + 1] = log_sum;
  }
}

// The gradient of a column: exp(s) (constant + slope (x - max)), and at the label at_label more.
template <typename acc_t, bool kEntropy>
struct Gradient {
  acc_t scale, max, constant, slope, at_label;
  int label;

  __device__ acc_t operator()(acc_t x) const {
    const acc_t shift = x - max, power = fast_exp2(shift * scale);
    return power * (kEntropy ? multiply_add(slope, larger(shift, acc_t(kFloor)), constant) : constant);
  }
  __device__ acc_t operator()(acc_t x, int column) const {
    return (*this)(x) + (column == label ? at_label : acc_t(0));
  }
};

template <int kAlign, typename scalar_t, typename acc_t, bool kEntropy>
__device__ void gradient_packs(const scalar_t* x, scalar_t* out, int head, int count,
                               Gradient<acc_t, kEntropy> gradient) {
  constexpr int kSize = Pack<scalar_t>::kSize;
  for (int64_t base = threadIdx.x; base < count; base += kUnroll * kThreads) {
    Pack<scalar_t> packs[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t pack = base + u * kThreads;
      if (pack < count) packs[u] = load_pack<kAlign>(x + head + pack * kSize);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t pack = base + u * kThreads, first = head + pack * kSize;
      if (pack >= count) break;
      acc_t values[kSize];
      unpack(packs[u], values);
#pragma unroll
      for (int i = 0; i < kSize; ++i) values[i] = gradient(values[i]);
      const int64_t at = gradient.label - first;
      if (at >= 0 && at < kSize) {
#pragma unroll
        for (int i = 0; i < kSize; ++i) values[i] += i == at ? gradient.at_label : acc_t(0);
      }
      store_pack(values, out + first);
    }
  }
}

template <typename scalar_t, bool kEntropy>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<scalar_t>)
    backward_kernel(Arguments<scalar_t> in, const accumulator_t<scalar_t>* saved,
                    const accumulator_t<scalar_t>* entropy, const accumulator_t<scalar_t>* grad_logprobs,
                    const accumulator_t<scalar_t>* grad_entropy, scalar_t* grad_logits, Rows grad_rows) {
  using acc_t = accumulator_t<scalar_t>;
  const int64_t row = blockIdx.x;
  const scalar_t* x = in.logits + in.rows.offset(row);  // no __restrict__: grad_logits may be the logits
  scalar_t* out = grad_logits + grad_rows.offset(row);
  const bool counts = in.mask == nullptr || in.mask[row];
  const acc_t g = counts && grad_logprobs != nullptr ? grad_logprobs[row] : acc_t(0);
  const acc_t h = counts && kEntropy ? grad_entropy[row] : acc_t(0);
  if (g == acc_t(0) && h == acc_t(0)) {  // nothing to read
    const auto zero = from_acc<scalar_t>(acc_t(0));
    write_row(
        out, in.vocab, [&](int) { return zero; },
        [&](int head, int count) {
          auto* packs = reinterpret_cast<uint4*>(out + head);
          for (int pack = threadIdx.x; pack < count; pack += kThreads) packs[pack] = make_uint4(0, 0, 0, 0);
        });
    return;
  }
  const acc_t log_sum = saved[2 * row + 1], inverse = in.inverse_temperature * exp(-log_sum);
  const acc_t offset = kEntropy ? h * (entropy[row] - log_sum) : acc_t(0);
  const Gradient<acc_t, kEntropy> gradient{in.scale,
                                           saved[2 * row],
                                           -(g + offset) * inverse,
                                           -h * in.inverse_temperature * inverse,
                                           g * in.inverse_temperature,
                                           static_cast<int>(in.labels[row])};
  write_row(
      out, in.vocab, [&](int j) { return from_acc<scalar_t>(gradient(to_acc(x[j]), j)); },
      [&](int head, int count) {
        with_alignment(x + head, [&](auto align) { gradient_packs<align.value>(x, out, head, count, gradient); });
      });
}

}  // namespace

int token_logprobs_forward(const void* logits, int dtype, int64_t rows, int64_t vocab, int64_t inner,
                           int64_t outer_stride, int64_t inner_stride, const int64_t* labels, const uint8_t* mask,
                           double temperature, void* logprobs, void* entropy, void* saved, void* stream) {
  return with_dtype(dtype, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    using acc_t = accumulator_t<scalar_t>;
    const Arguments<scalar_t> in{static_cast<const scalar_t*>(logits),
                                 {inner, outer_stride, inner_stride},
                                 static_cast<int>(vocab),
                                 labels,
                                 mask,
                                 acc_t(kLog2E / temperature),
                                 acc_t(1 / temperature)};
    const auto kernel = entropy == nullptr ? forward_kernel<scalar_t, false> : forward_kernel<scalar_t, true>;
    return launch(kernel, rows, kThreads, stream, in, static_cast<acc_t*>(logprobs), static_cast<acc_t*>(entropy),
                  static_cast<acc_t*>(saved));
  });
}

int token_logprobs_backward(const void* logits, int dtype, int64_t rows, int64_t vocab, int64_t inner,
                            int64_t outer_stride, int64_t inner_stride, const int64_t* labels, const uint8_t* mask,
                            double temperature, const void* saved, const void* entropy, const void* grad_logprobs,
                            const void* grad_entropy, void* grad_logits, int64_t grad_outer_stride,
                            int64_t grad_inner_stride, void* stream) {
  return with_dtype(dtype, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    using acc_t = accumulator_t<scalar_t>;
    const Arguments<scalar_t> in{static_cast<const scalar_t*>(logits),
                                 {inner, outer_stride, inner_stride},
                                 static_cast<int>(vocab),
                                 labels,
                                 mask,
                                 acc_t(kLog2E / temperature),
                                 acc_t(1 / temperature)};
    const auto kernel = grad_entropy == nullptr ? backward_kernel<scalar_t, false> : backward_kernel<scalar_t, true>;
    return launch(kernel, rows, kThreads, stream, in, static_cast<const acc_t*>(saved),
                  static_cast<const acc_t*>(entropy), static_cast<const acc_t*>(grad_logprobs),
                  static_cast<const acc_t*>(grad_entropy), static_cast<scalar_t*>(grad_logits),
                  Rows{inner, grad_outer_stride, grad_inner_stride});
  });
}

}  // namespace rlhf::cuda
