// token_logprobs and its entropy on CUDA: one block per row, every logit read once forward and once backward.
//
//   M = max_j logits_j, s_j = (logits_j - M) / temperature, S = sum_j exp(s_j), p_j = exp(s_j) / S
//   logprob = s_label - ln S          entropy = ln S - sum_j p_j s_j
//   d/dlogits_j = (g [j = label] - p_j (g + h (ln p_j + entropy))) / temperature,  g, h the incoming gradients
//
// M and ln S are saved apart: their sum, the logsumexp, rounds away 1e-5 of the probabilities at logits near 170.
#include "softmax_row.cuh"

namespace rlhf::cuda {
namespace {

constexpr int kThreads = 512;
template <typename scalar_t>
constexpr int kBlocksPerSm = sizeof(scalar_t) == 8 ? 1 : 2;  // at most 64 registers a thread, which float64 passes

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
  scalar_t x_label = from_acc<scalar_t>(acc_t(0));
  if (threadIdx.x == 0) {  // asked for now, needed last
    const int64_t label = in.labels[row];
    check_label("token_logprobs", label, row, in.vocab);
    x_label = x[label];
  }
  SoftmaxState<acc_t> state = with_packs(x, [&](auto packs) {
    return row_state<kEntropy, kThreads, kUnroll>(x, packs, in.vocab, in.scale, [](int, const Pack<scalar_t>&) {});
  });
  state = block_merge<kThreads>(state, in.scale);
  if (threadIdx.x == 0) {
    const acc_t log_sum = log(state.sum);
    logprobs[row] = multiply_add(to_acc(x_label) - state.max, in.inverse_temperature, -log_sum);
    if constexpr (kEntropy) entropy[row] = log_sum - state.weighted / state.sum * in.inverse_temperature;
    saved[2 * row] = state.max;
    saved[2 * row + 1] = log_sum;
  }
}

template <typename scalar_t, int kWords, typename acc_t, bool kEntropy>
__device__ void gradient_packs(Packs<scalar_t, kWords> x, scalar_t* out, int head, int count,
                               Gradient<acc_t, kEntropy> gradient) {
  constexpr int kSize = Pack<scalar_t>::kSize;
  for (int base = threadIdx.x; base < count; base += kUnroll * kThreads) {
    Pack<scalar_t> packs[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int pack = base + u * kThreads;
      if (pack < count) packs[u] = x[pack];
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int pack = base + u * kThreads, first = head + pack * kSize;
      if (pack >= count) break;
      acc_t values[kSize];
      unpack(packs[u], values);
      gradient.over(values, first);
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
  if (g == acc_t(0) && h == acc_t(0)) return write_zeros<kThreads>(out, in.vocab);  // nothing to read
  const Gradient<acc_t, kEntropy> gradient(in.scale, in.inverse_temperature, saved[2 * row], saved[2 * row + 1],
                                           kEntropy ? entropy[row] : acc_t(0), in.labels[row], g, h);
  write_row(
      out, x, in.vocab, [&](int j) { return from_acc<scalar_t>(gradient(to_acc(x[j]), j)); },
      [&](int head, int count) {
        with_packs(x + head, [&](auto packs) { gradient_packs(packs, out, head, count, gradient); });
      });
}

}  // namespace

int token_logprobs_forward(const void* logits, int dtype, int64_t rows, int64_t vocab, int64_t inner,
                           int64_t outer_stride, int64_t inner_stride, const int64_t* labels, const uint8_t* mask,
                           double temperature, void* logprobs, void* entropy, void* saved, void* stream) {
  return with_dtype(dtype, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    using acc_t = accumulator_t<scalar_t>;
    const Arguments<scalar_t> in(logits, {inner, outer_stride, inner_stride}, vocab, labels, mask, temperature);
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
    const Arguments<scalar_t> in(logits, {inner, outer_stride, inner_stride}, vocab, labels, mask, temperature);
    const auto kernel = grad_entropy == nullptr ? backward_kernel<scalar_t, false> : backward_kernel<scalar_t, true>;
    return launch(kernel, rows, kThreads, stream, in, static_cast<const acc_t*>(saved),
                  static_cast<const acc_t*>(entropy), static_cast<const acc_t*>(grad_logprobs),
                  static_cast<const acc_t*>(grad_entropy), static_cast<scalar_t*>(grad_logits),
                  Rows{inner, grad_outer_stride, grad_inner_stride});
  });
}

}  // namespace rlhf::cuda
