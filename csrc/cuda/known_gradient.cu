// known_gradient on CUDA: each row of logits turns into the gradient of its loss, in place, read once and written once.
//
//   loss_i = weights_i f(logprob_i, entropy_i): PPO's token loss with its KL and entropy terms, or -logprob_i
//
// Where the loss is a sum over rows whose weights are known before (PPO, SFT), the derivatives by the row's logprob and
// entropy follow from the row alone, as soon as its softmax does (token_logprobs.cu has the formulas). The row waits
// for them in shared memory. What does not fit there (227 KiB on Hopper; a bfloat16 row of 151936 logits has 297) is
// the end of the row, which was read last: it is read again, from L2, and before anything else is written.
// [8192 x 151936] bfloat16: 4.98 GB where two kernels move 7.47.
#include "estimators.cuh"
#include "softmax_row.cuh"

namespace rlhf::cuda {
namespace {

template <class T>
struct Loss {
  // advantages null: -logprob. old_logprobs null: the logprobs themselves.
  const T *weights, *old_logprobs, *advantages, *ref_logprobs, *importance_weights;
  PpoOptions<T> options;
  T kl_coef, entropy_coef;
  int kl_estimator;
};

template <class T>
struct Derivatives {
  T by_logprob, by_entropy;
};

template <class T>
struct Token {
  T weight, old_logprob, advantage, ref_logprob, importance_weight;
};

template <class T>
__device__ inline Token<T> read(const Loss<T>& loss, int64_t row) {
  const auto read_or = [row](const T* p, T otherwise) { return p == nullptr ? otherwise : p[row]; };
  return {loss.weights[row], read_or(loss.old_logprobs, T(0)), read_or(loss.advantages, T(0)),
          read_or(loss.ref_logprobs, T(0)), read_or(loss.importance_weights, T(1))};
}

template <class T>
__device__ inline Derivatives<T> derivatives(const Loss<T>& loss, const Token<T>& token, T logprob) {
  if (loss.advantages == nullptr) return {-token.weight, T(0)};
  const T old_logprob = loss.old_logprobs == nullptr ? logprob : token.old_logprob;
  T slope = ppo_token(logprob, old_logprob, token.advantage, token.importance_weight, loss.options).slope;
  if (loss.ref_logprobs != nullptr && loss.kl_coef != 0) {
    slope += loss.kl_coef * kl_token(loss.kl_estimator, logprob - token.ref_logprob).slope;
  }
  return {token.weight * slope, loss.entropy_coef == 0 ? T(0) : -token.weight * loss.entropy_coef};
}

template <class T>
struct RowResult {
  T max, log_sum, entropy;
  Derivatives<T> by;
  int label;
};

// Over the columns [head, head + count packs) of the row, where the stores meet boundaries of 16 bytes: the first
// packs from shared memory, whose columns may straddle two of its packs, the others from where they are written. The
// others come first: all blocks together read and write what L2 holds in the time of one row.
template <int kThreads, typename scalar_t, int kWords, typename acc_t, bool kEntropy>
__device__ inline void over_packs(scalar_t* x, Packs<scalar_t, kWords> held, int in_held, int head, int count,
                                  const Gradient<acc_t, kEntropy>& gradient) {
  constexpr int kSize = Pack<scalar_t>::kSize;
  const auto turn = [&](int pack, const Pack<scalar_t>& bytes) {
    acc_t values[kSize];
    unpack(bytes, values);
    gradient.over(values, head + pack * kSize);
    store_pack(values, x + head + pack * kSize);
  };
#pragma unroll 2
  for (int pack = in_held + threadIdx.x; pack < count; pack += kThreads) {
    turn(pack, load_pack<16>(x + head + pack * kSize));
  }
#pragma unroll 2
  for (int pack = threadIdx.x; pack < in_held; pack += kThreads) turn(pack, held[pack]);
}

template <bool kEntropy, int kThreads, typename scalar_t>
__device__ inline void write_gradient(const Arguments<scalar_t>& in, scalar_t* x, int held,
                                      const RowResult<accumulator_t<scalar_t>>& result) {
  using acc_t = accumulator_t<scalar_t>;
  constexpr int kSize = Pack<scalar_t>::kSize;
  const Gradient<acc_t, kEntropy> gradient(in.scale, in.inverse_temperature, result.max, result.log_sum, result.entropy,
                                           result.label, result.by.by_logprob, result.by.by_entropy);
  write_row(
      x, x, in.vocab, [&](int j) { return from_acc<scalar_t>(gradient(to_acc(x[j]), j)); },
      [&](int head, int count) {
        const int in_held = max(0, min(count, (held * kSize - head) / kSize));
        with_packs(reinterpret_cast<const scalar_t*>(dynamic_shared) + head,
                   [&](auto packs) { over_packs<kThreads>(x, packs, in_held, head, count, gradient); });
      });
}

template <typename scalar_t, int kThreads>
__global__ void __launch_bounds__(kThreads, sizeof(scalar_t) == 8 ? 1 : 1024 / kThreads)
    known_gradient_kernel(Arguments<scalar_t> in, Loss<accumulator_t<scalar_t>> loss, int held,
                          accumulator_t<scalar_t>* logprobs, accumulator_t<scalar_t>* entropies) {
  using acc_t = accumulator_t<scalar_t>;
  __shared__ RowResult<acc_t> result;
  const int64_t row = blockIdx.x;
  scalar_t* x = const_cast<scalar_t*>(in.logits) + in.rows.offset(row);
  if (in.mask != nullptr && !in.mask[row]) {
    if (threadIdx.x == 0) logprobs[row] = entropies[row] = acc_t(0);
    return write_zeros<kThreads>(x, in.vocab);
  }
  int64_t label = 0;
  scalar_t x_label = from_acc<scalar_t>(acc_t(0));
  if (threadIdx.x == 0) {  // asked for now, and needed last
    label = in.labels[row];
    check_label("known_gradient", label, row, in.vocab);
    x_label = x[label];
  }
  SoftmaxState<acc_t> state = with_packs(x, [&](auto packs) {
    held = min(held, packs.whole(in.vocab));
    // Twice the loads a pack: 64 registers hold no more of them beside what keeps the row.
    return row_state<true, kThreads, kGroup>(x, packs, in.vocab, in.scale, [&](int pack, const Pack<scalar_t>& bytes) {
      if (pack < held) dynamic_shared[pack] = *reinterpret_cast<const uint4*>(&bytes);
    });
  });
  Token<acc_t> token{};
  if (threadIdx.x == 0) token = read(loss, row);  // on its way while the block merges
  state = block_merge<kThreads>(state, in.scale);
  if (threadIdx.x == 0) {
    const acc_t log_sum = log(state.sum);
    const acc_t logprob = multiply_add(to_acc(x_label) - state.max, in.inverse_temperature, -log_sum);
    const acc_t entropy = log_sum - state.weighted / state.sum * in.inverse_temperature;
    logprobs[row] = logprob;
    entropies[row] = entropy;
    result = {state.max, log_sum, entropy, derivatives(loss, token, logprob), static_cast<int>(label)};
  }
  __syncthreads();
  if (result.by.by_entropy != 0) {
    write_gradient<true, kThreads>(in, x, held, result);
  } else if (result.by.by_logprob != 0) {
    write_gradient<false, kThreads>(in, x, held, result);
  } else {
    write_zeros<kThreads>(x, in.vocab);
  }
}

// How many packs of a row wait in shared memory: the whole row where two blocks of that fit, else what one block has.
struct Room {
  int bytes;  // of dynamic shared memory that a block of this device may have, whatever the row
  int held;
  bool two_blocks;
};

inline int find_room(int64_t row_bytes, Room* room) {
  constexpr int kOther = 2048;  // of a block: the static part, and what the system reserves
  int device, block, multiprocessor;
  if (const int error = cudaGetDevice(&device)) return error;
  if (const int error = cudaDeviceGetAttribute(&block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device)) return error;
  if (const int error = cudaDeviceGetAttribute(&multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device)) {
    return error;
  }
  const int64_t packs = row_bytes / 16;
  room->bytes = max(block - kOther, 0);
  room->two_blocks = packs * 16 + kOther <= min(multiprocessor / 2, block);
  // A pack that straddles two asks for the one after it, which is none of its columns.
  room->held = static_cast<int>(min(packs, int64_t(room->bytes / 16 - 1)));
  return cudaSuccess;
}

template <typename scalar_t, int kThreads>
int start(const Arguments<scalar_t>& in, const Loss<accumulator_t<scalar_t>>& loss, int64_t rows, const Room& room,
          void* logprobs, void* entropy, void* stream) {
  using acc_t = accumulator_t<scalar_t>;
  const auto kernel = known_gradient_kernel<scalar_t, kThreads>;
  // The same values at every launch: a kernel's attributes are the process's, and other threads launch it too. Without
  // the carveout, the driver may leave L1 room that the second block of a multiprocessor needs.
  if (const int error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, room.bytes)) {
    return error;
  }
  if (const int error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                             cudaSharedmemCarveoutMaxShared)) {
    return error;
  }
  return launch_with((room.held + 1) * 16, kernel, rows, kThreads, stream, in, loss, room.held,
                     static_cast<acc_t*>(logprobs), static_cast<acc_t*>(entropy));
}

}  // namespace

int known_gradient(void* logits, int dtype, int64_t rows, int64_t vocab, int64_t inner, int64_t outer_stride,
                   int64_t inner_stride, const int64_t* labels, const uint8_t* mask, double temperature,
                   const void* weights, const void* old_logprobs, const void* advantages, const void* ref_logprobs,
                   const void* importance_weights, double clip_low, double clip_high, double dual_clip,
                   double log_ratio_clamp, double kl_coef, int kl_estimator, double entropy_coef, void* logprobs,
                   void* entropy, void* stream) {
  return with_dtype(dtype, [&](auto scalar) -> int {
    using scalar_t = decltype(scalar);
    using acc_t = accumulator_t<scalar_t>;
    const Arguments<scalar_t> in(logits, {inner, outer_stride, inner_stride}, vocab, labels, mask, temperature);
    const acc_t clamp = acc_t(log_ratio_clamp);
    const Loss<acc_t> loss{static_cast<const acc_t*>(weights),
                           static_cast<const acc_t*>(old_logprobs),
                           static_cast<const acc_t*>(advantages),
                           static_cast<const acc_t*>(ref_logprobs),
                           static_cast<const acc_t*>(importance_weights),
                           {acc_t(clip_low), acc_t(clip_high), acc_t(dual_clip), clamp, exp_of(-clamp), exp_of(clamp)},
                           acc_t(kl_coef),
                           acc_t(entropy_coef),
                           kl_estimator};
    Room room;
    if (const int error = find_room(vocab * sizeof(scalar_t), &room)) return error;
    if constexpr (sizeof(scalar_t) == 8) {  // for gradcheck: 512 threads would leave too few registers
      return start<scalar_t, 256>(in, loss, rows, room, logprobs, entropy, stream);
    } else if (room.two_blocks) {
      return start<scalar_t, 512>(in, loss, rows, room, logprobs, entropy, stream);
    } else {  // one block a multiprocessor takes 1024 threads to keep as much in flight
      return start<scalar_t, 1024>(in, loss, rows, room, logprobs, entropy, stream);
    }
  });
}

}  // namespace rlhf::cuda
