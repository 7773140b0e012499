// token_logprobs on the CPU: one row after another, each read from memory once (softmax_row.h).
#include "../ops.h"
#include "parallel.h"
#include "softmax_row.h"

namespace rlhf::RLHF_ISA {

int64_t token_logprobs_forward(const void* logits, int dtype, int64_t rows, int64_t vocab, int64_t inner,
                               int64_t outer_stride, int64_t inner_stride, const int64_t* labels, const uint8_t* mask,
                               double temperature, void* logprobs, void* entropy, void* saved, int threads) {
  return with_element(dtype, [&](auto element) {
    using E = decltype(element);
    using Accum = std::conditional_t<std::is_same_v<E, F64>, double, float>;
    const auto* x = static_cast<const typename E::type*>(logits);
    const double c = 1 / temperature;
    return each_row(rows, team(threads, rows * vocab), grain(rows, vocab * sizeof *x, threads), [=](int64_t i) {
      double logprob = 0, h = 0, max = 0, log_sum = 0;
      if (!mask || mask[i]) {
        if (labels[i] < 0 || labels[i] >= vocab) return false;
        const auto* row = x + (i / inner) * outer_stride + (i % inner) * inner_stride;
        const Softmax s = entropy ? softmax_row<true, E>(row, vocab, c) : softmax_row<false, E>(row, vocab, c);
        max = s.max;
        log_sum = std::log(s.sum);
        logprob = c * (E::scalar(row[labels[i]]) - max) - log_sum;
        h = log_sum - s.moment / s.sum;
      }
      static_cast<Accum*>(logprobs)[i] = Accum(logprob);
      if (entropy) static_cast<Accum*>(entropy)[i] = Accum(h);
      static_cast<Accum*>(saved)[2 * i] = Accum(max);
      static_cast<Accum*>(saved)[2 * i + 1] = Accum(log_sum);
      return true;
    });
  });
}

int64_t token_logprobs_backward(const void* logits, int dtype, int64_t rows, int64_t vocab, int64_t inner,
                                int64_t outer_stride, int64_t inner_stride, const int64_t* labels, const uint8_t* mask,
                                double temperature, const void* saved, const void* entropy, const void* grad_logprobs,
                                const void* grad_entropy, void* grad_logits, int64_t grad_outer_stride,
                                int64_t grad_inner_stride, int threads) {
  return with_element(dtype, [&](auto element) {
    using E = decltype(element);
    using Accum = std::conditional_t<std::is_same_v<E, F64>, double, float>;
    const auto at = [](const void* p, int64_t i) { return p ? double(static_cast<const Accum*>(p)[i]) : 0.0; };
    const auto* x = static_cast<const typename E::type*>(logits);
    auto* grad = static_cast<typename E::type*>(grad_logits);
    const double c = 1 / temperature;
    const int64_t bytes = rows * vocab * sizeof *grad;
    const bool past = grad != x && past_cache(bytes);
    if (grad != x) use_huge_pages(grad, bytes);
    return each_row(rows, team(threads, rows * vocab), grain(rows, vocab * sizeof *x, threads), [=](int64_t i) {
      auto* out = grad + (i / inner) * grad_outer_stride + (i % inner) * grad_inner_stride;
      const RowGradient row{at(grad_logprobs, i), at(grad_entropy, i), at(saved, 2 * i), at(saved, 2 * i + 1),
                            grad_entropy ? at(entropy, i) : 0};
      // A row without gradient (outside the mask, clipped by PPO) is not read; one with NaN still gives NaN.
      if ((mask && !mask[i]) || (row.g == 0 && row.h == 0 && std::isfinite(row.log_sum))) {
        std::memset(out, 0, vocab * sizeof *out);
        return true;
      }
      if (labels[i] < 0 || labels[i] >= vocab) return false;  // numpy may write to memory that the forward has read
      const auto* in = x + (i / inner) * outer_stride + (i % inner) * inner_stride;
      if (grad_entropy) {
        gradient_row<true, E>(in, out, vocab, labels[i], c, row, past);
      } else {
        gradient_row<false, E>(in, out, vocab, labels[i], c, row, past);
      }
      return true;
    });
  });
}

}  // namespace rlhf::RLHF_ISA
