// kl_divergence on CUDA: one block per row, both rows of logits read once forward and once backward.
//
//   KL = sum_j p_j (log p_j - log q_j) = gap / sum_p - ln sum_p + ln sum_q,  gap = sum_j e^d_j (d_j - f_j)
//   dKL/dx_j = p_j (log p_j - log q_j - KL),  dKL/dy_j = q_j - p_j
//
// with d and f the distances of the logits x of p and y of q from the largest so far. p_j = 0 makes the term 0,
// whatever q is. [8192 x 151936] bfloat16: 4.98 GB forward, 9.96 GB with both gradients.
#include "launch.cuh"
#include "reduce.cuh"

namespace rlhf::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kUnroll = 2;  // packs of 16 bytes of each row that a thread keeps in flight
template <typename scalar_t>
constexpr int kBlocksPerSm = sizeof(scalar_t) == 8 ? 1 : 2;

template <typename acc_t>
struct Divergence {
  acc_t max_p, sum_p, max_q, sum_q, gap;

  __device__ static Divergence empty() {
    const auto nothing = SoftmaxState<acc_t>::empty();
    return {nothing.max, acc_t(0), nothing.max, acc_t(0), acc_t(0)};
  }

  // To other references. An infinite gap stays: q = 0 where p is not. Of a p that becomes 0 nothing does, however far
  // apart the references were and whatever q is.
  __device__ void move(acc_t to_p, acc_t to_q, acc_t scale) {
    const acc_t by_p = max_p - to_p, by_q = max_q - to_q, factor = fast_exp2(by_p * scale);
    const acc_t moved = multiply(factor, multiply_add(by_p - by_q, sum_p, gap));
    sum_p = multiply(sum_p, factor);
    gap = sum_p == 0 ? acc_t(0) : gap == acc_t(INFINITY) ? gap : moved;
    sum_q = multiply(sum_q, fast_exp2(by_q * scale));
    max_p = to_p;
    max_q = to_q;
  }

  __device__ void merge(Divergence other, acc_t scale) {
    const acc_t to_p = larger(max_p, other.max_p), to_q = larger(max_q, other.max_q);
    move(to_p, to_q, scale);
    other.move(to_p, to_q, scale);
    sum_p += other.sum_p;
    sum_q += other.sum_q;
    gap += other.gap;
  }

  template <int kCount>
  __device__ void add(const acc_t (&x)[kCount], const acc_t (&y)[kCount], acc_t scale) {
    acc_t top_p = max_p, top_q = max_q;
#pragma unroll
    for (int i = 0; i < kCount; ++i) top_p = larger(top_p, x[i]), top_q = larger(top_q, y[i]);
    move(top_p, top_q, scale);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const acc_t d = x[i] - max_p, f = y[i] - max_q, e = fast_exp2(d * scale);
      sum_p += e;
      sum_q += fast_exp2(f * scale);
      if (e > 0) gap = multiply_add(e, d - f, gap);
    }
  }

  __device__ acc_t value() const { return gap / sum_p - log(sum_p) + log(sum_q); }
};

// body(alignment that the addresses share); a row's columns are dealt to threads the same way whatever it is.
template <typename scalar_t, typename Body>
__device__ inline auto with_alignment_of_both(const scalar_t* x, const scalar_t* y, Body body) {
  const auto both = reinterpret_cast<uintptr_t>(x) | reinterpret_cast<uintptr_t>(y);
  return with_alignment(reinterpret_cast<const scalar_t*>(both), body);
}

template <typename scalar_t, int kAlign>
__device__ inline Divergence<accumulator_t<scalar_t>> read_rows(const scalar_t* x, const scalar_t* y, int vocab) {
  using acc_t = accumulator_t<scalar_t>;
  constexpr int kSize = Pack<scalar_t>::kSize, kStride = kThreads * kSize;
  auto state = Divergence<acc_t>::empty();
  int64_t base = 0;
  const auto add = [&](auto whole) {
    acc_t p[kUnroll * kSize], q[kUnroll * kSize];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t first = base + threadIdx.x * kSize + u * kStride;
      if constexpr (whole.value) {
        unpack(load_pack<kAlign>(x + first), p + u * kSize);
        unpack(load_pack<kAlign>(y + first), q + u * kSize);
      } else {
        load_before<kAlign>(x, first, vocab, p + u * kSize);
        load_before<kAlign>(y, first, vocab, q + u * kSize);
      }
    }
    state.add(p, q, acc_t(kLog2E));
    base += kUnroll * kStride;
  };
  // Without a branch around each pack, at whose end it would wait for what it asked for there.
  while (base + kUnroll * kStride <= vocab) add(std::true_type());
  while (base < vocab) add(std::false_type());
  return state;
}

template <typename scalar_t>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<scalar_t>)
    forward_kernel(const scalar_t* logits, const scalar_t* ref_logits, int vocab, const uint8_t* mask,
                   accumulator_t<scalar_t>* kl, accumulator_t<scalar_t>* saved) {
  using acc_t = accumulator_t<scalar_t>;
  const int64_t row = blockIdx.x;
  acc_t* out = saved + 4 * row;
  if (mask != nullptr && !mask[row]) {
    if (threadIdx.x == 0) kl[row] = out[0] = out[1] = out[2] = out[3] = acc_t(0);
    return;
  }
  const scalar_t *x = logits + row * vocab, *y = ref_logits + row * vocab;
  auto state = with_alignment_of_both(x, y, [&](auto align) { return read_rows<scalar_t, align.value>(x, y, vocab); });
  state = block_merge<kThreads>(state, acc_t(kLog2E));
  if (threadIdx.x == 0) {
    kl[row] = state.value();
    out[0] = state.max_p;
    out[1] = state.max_q;
    out[2] = log(state.sum_p);
    out[3] = log(state.sum_q);
  }
}

template <typename acc_t>
struct Gradients {
  acc_t max_p, max_q, scale_p, scale_q, shift;

  __device__ void operator()(acc_t x, acc_t y, acc_t* by_x, acc_t* by_y) const {
    const acc_t scale = acc_t(kLog2E), d = x - max_p, f = y - max_q;
    const acc_t power = fast_exp2(d * scale), p = power * scale_p;
    *by_x = power > 0 ? p * (d - f - shift) : p;
    *by_y = multiply_add(fast_exp2(f * scale), scale_q, -p);
  }
};

// A pack, in one store where it lies on a boundary of 16 bytes.
template <typename scalar_t>
__device__ inline void store_anywhere(const accumulator_t<scalar_t>* values, scalar_t* to) {
  if (reinterpret_cast<uintptr_t>(to) % 16 == 0) return store_pack(values, to);
#pragma unroll
  for (int i = 0; i < Pack<scalar_t>::kSize; ++i) to[i] = from_acc<scalar_t>(values[i]);
}

template <typename scalar_t>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<scalar_t>)
    backward_kernel(const scalar_t* logits, const scalar_t* ref_logits, int vocab, const uint8_t* mask,
                    const accumulator_t<scalar_t>* kl, const accumulator_t<scalar_t>* saved,
                    const accumulator_t<scalar_t>* grad_kl, scalar_t* grad_logits, scalar_t* grad_ref_logits) {
  using acc_t = accumulator_t<scalar_t>;
  constexpr int kSize = Pack<scalar_t>::kSize;
  const int64_t row = blockIdx.x;
  const scalar_t *x = logits + row * vocab, *y = ref_logits + row * vocab;
  scalar_t* out_x = grad_logits == nullptr ? nullptr : grad_logits + row * vocab;
  scalar_t* out_y = grad_ref_logits == nullptr ? nullptr : grad_ref_logits + row * vocab;
  scalar_t* out = out_x != nullptr ? out_x : out_y;  // whose boundaries the packs follow
  const bool counts = mask == nullptr || mask[row];
  const acc_t *s = saved + 4 * row, g = counts ? grad_kl[row] : acc_t(0);
  const Gradients<acc_t> gradients{s[0], s[1], g * exp(-s[2]), g * exp(-s[3]), s[2] - s[3] + kl[row]};

  const auto element = [&](int j) {
    acc_t by_x = acc_t(0), by_y = acc_t(0);
    if (counts) gradients(to_acc(x[j]), to_acc(y[j]), &by_x, &by_y);
    if (out_x != nullptr && out_y != nullptr) out_y[j] = from_acc<scalar_t>(by_y);
    return from_acc<scalar_t>(out_x != nullptr ? by_x : by_y);
  };
  const auto packs = [&](int head, int count) {
    with_alignment_of_both(x + head, y + head, [&](auto align) {
      for (int64_t pack = threadIdx.x; pack < count; pack += kThreads) {
        const int64_t first = head + pack * kSize;
        acc_t p[kSize] = {}, q[kSize] = {};
        if (counts) {  // what the mask hides is not read
          unpack(load_pack<align.value>(x + first), p);
          unpack(load_pack<align.value>(y + first), q);
#pragma unroll
          for (int i = 0; i < kSize; ++i) gradients(p[i], q[i], p + i, q + i);
        }
        if (out_x != nullptr) store_anywhere(p, out_x + first);
        if (out_y != nullptr) store_anywhere(q, out_y + first);
      }
    });
  };
  if (out != nullptr) write_row(out, out, vocab, element, packs);
}

}  // namespace

int kl_divergence_forward(const void* logits, const void* ref_logits, int dtype, int64_t rows, int64_t vocab,
                          const uint8_t* mask, void* kl, void* saved, void* stream) {
  return with_dtype(dtype, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    using acc_t = accumulator_t<scalar_t>;
    return launch(forward_kernel<scalar_t>, rows, kThreads, stream, static_cast<const scalar_t*>(logits),
                  static_cast<const scalar_t*>(ref_logits), static_cast<int>(vocab), mask, static_cast<acc_t*>(kl),
                  static_cast<acc_t*>(saved));
  });
}

int kl_divergence_backward(const void* logits, const void* ref_logits, int dtype, int64_t rows, int64_t vocab,
                           const uint8_t* mask, const void* kl, const void* saved, const void* grad_kl,
                           void* grad_logits, void* grad_ref_logits, void* stream) {
  return with_dtype(dtype, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    using acc_t = accumulator_t<scalar_t>;
    return launch(backward_kernel<scalar_t>, rows, kThreads, stream, static_cast<const scalar_t*>(logits),
                  static_cast<const scalar_t*>(ref_logits), static_cast<int>(vocab), mask,
                  static_cast<const acc_t*>(kl), static_cast<const acc_t*>(saved), static_cast<const acc_t*>(grad_kl),
                  static_cast<scalar_t*>(grad_logits), static_cast<scalar_t*>(grad_ref_logits));
  });
}

}  // namespace rlhf::cuda
