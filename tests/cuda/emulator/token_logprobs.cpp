// The CUDA source itself, over the emulator's headers, with C names for ctypes.
#include RLHF_CUDA_SOURCE

extern "C" {

void set_order(int order) { emulator::order = order; }
void flush() { std::fflush(stdout); }

int forward(const void* logits, int dtype, int64_t rows, int64_t vocab, int64_t inner, int64_t outer_stride,
            int64_t inner_stride, const int64_t* labels, const uint8_t* mask, double temperature, void* logprobs,
            void* entropy, void* saved) {
  return rlhf::cuda::token_logprobs_forward(logits, dtype, rows, vocab, inner, outer_stride, inner_stride, labels, mask,
                                            temperature, logprobs, entropy, saved, nullptr);
}

int backward(const void* logits, int dtype, int64_t rows, int64_t vocab, int64_t inner, int64_t outer_stride,
             int64_t inner_stride, const int64_t* labels, const uint8_t* mask, double temperature, const void* saved,
             const void* entropy, const void* grad_logprobs, const void* grad_entropy, void* grad_logits,
             int64_t grad_outer_stride, int64_t grad_inner_stride) {
  return rlhf::cuda::token_logprobs_backward(logits, dtype, rows, vocab, inner, outer_stride, inner_stride, labels,
                                             mask, temperature, saved, entropy, grad_logprobs, grad_entropy,
                                             grad_logits, grad_outer_stride, grad_inner_stride, nullptr);
}
}
