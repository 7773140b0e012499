// The softmax of a row as a mergeable state: any split of the row, merged in a fixed order, gives the same numbers.
//
//   max       a reference, at least the largest logit seen
//   sum       sum of exp((x - max) / temperature)
//   weighted  sum of exp((x - max) / temperature) (x - max), from which the entropy follows
//
// Milakov & Gimelshein 2018, "Online normalizer calculation for softmax".
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "launch.cuh"

namespace rlhf::cuda {

// float accumulates every input dtype, double its own.
template <typename scalar_t>
using accumulator_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

__device__ inline float to_acc(float x) { return x; }
__device__ inline double to_acc(double x) { return x; }
__device__ inline float to_acc(__half x) { return __half2float(x); }
__device__ inline float to_acc(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename scalar_t>
__device__ inline scalar_t from_acc(accumulator_t<scalar_t> x) {
  if constexpr (std::is_same_v<scalar_t, __half>) {
    return __float2half_rn(x);
  } else if constexpr (std::is_same_v<scalar_t, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else {
    return x;
  }
}

// One special-function instruction, relative error 2^-22; exp2f would add scaling for results below 2^-126.
__device__ inline float fast_exp2(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}
__device__ inline double fast_exp2(double x) { return exp2(x); }

__device__ inline float larger(float a, float b) { return fmaxf(a, b); }
__device__ inline double larger(double a, double b) { return fmax(a, b); }
__device__ inline float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ inline double multiply_add(double a, double b, double c) { return fma(a, b, c); }
// Rounded, where the compiler might join a product to the addition that follows in one place and not in another: a
// row's bits would depend on where it lies.
__device__ inline float multiply(float a, float b) { return __fmul_rn(a, b); }
__device__ inline double multiply(double a, double b) { return __dmul_rn(a, b); }

// Where x - max is a factor of its own exponential, max(x - max, kFloor) turns 0 * (-inf), which an impossible token
// would give, into 0. So it does where the sum of 2^30 tokens at the least number of their dtype would be infinite.
constexpr float kFloor = -1e28f;

constexpr double kLog2E = 1.4426950408889634;

// Scale is log2(e) / temperature: exponentials are powers of two. It multiplies x - max, not x, so that the largest
// logit counts exactly 1 whatever its size.
template <typename acc_t>
struct SoftmaxState {
  acc_t max, sum, weighted;

  // Of nothing. The reference is finite so that -inf - max is -inf, not NaN, while only -inf was seen.
  __device__ static SoftmaxState empty() {
    return {std::is_same_v<acc_t, double> ? acc_t(-DBL_MAX) : acc_t(-FLT_MAX), acc_t(0), acc_t(0)};
  }

  __device__ void rescale(acc_t reference, acc_t scale) {
    const acc_t shift = max - reference, factor = fast_exp2(shift * scale);
    weighted = multiply(factor, multiply_add(larger(shift, acc_t(kFloor)), sum, weighted));
    sum = multiply(sum, factor);
    max = reference;
  }

  __device__ void merge(SoftmaxState other, acc_t scale) {
    const acc_t reference = larger(max, other.max);
    rescale(reference, scale);
    other.rescale(reference, scale);
    sum += other.sum;
    weighted += other.weighted;
  }

  // One rescale for all of x, and one exponential per element.
  template <bool kEntropy, int kCount>
  __device__ void add(const acc_t (&x)[kCount], acc_t scale) {
    acc_t top = max;
#pragma unroll
    for (int i = 0; i < kCount; ++i) top = larger(top, x[i]);
    rescale(top, scale);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const acc_t shift = x[i] - max, power = fast_exp2(shift * scale);
      sum += power;
      if constexpr (kEntropy) weighted = multiply_add(power, larger(shift, acc_t(kFloor)), weighted);
    }
  }
};

// A state is a struct of acc_t with empty() and merge(other, scale).
template <typename acc_t, typename State>
__device__ inline State warp_merge(State state, acc_t scale) {
  constexpr int kValues = sizeof(State) / sizeof(acc_t);
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    State other = state;
    auto* values = reinterpret_cast<acc_t*>(&other);
#pragma unroll
    for (int i = 0; i < kValues; ++i) values[i] = __shfl_down_sync(0xffffffffu, values[i], offset);
    state.merge(other, scale);
  }
  return state;
}

// The merged state is valid in thread 0. One call a block: the shared array is not guarded against a second.
template <int kThreads, typename acc_t, typename State>
__device__ inline State block_merge(State state, acc_t scale) {
  constexpr int kWarps = kThreads / kWarp, kValues = sizeof(State) / sizeof(acc_t);
  static_assert(kWarps <= kWarp && kThreads % kWarp == 0);
  __shared__ acc_t partial[kValues][kWarps];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;

  state = warp_merge(state, scale);
  auto* values = reinterpret_cast<acc_t*>(&state);
  if (lane == 0) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) partial[i][warp] = values[i];
  }
  __syncthreads();
  if (warp == 0) {
    state = State::empty();
    if (lane < kWarps) {
#pragma unroll
      for (int i = 0; i < kValues; ++i) values[i] = partial[i][lane];
    }
    state = warp_merge(state, scale);
  }
  return state;
}

// Sixteen bytes of a row, read in pieces of kAlign bytes, the alignment of the address.
template <typename scalar_t>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(scalar_t);
  scalar_t values[kSize];
};

template <int kBytes>
using word_t =
    std::conditional_t<kBytes == 16, uint4,
                       std::conditional_t<kBytes == 8, uint2, std::conditional_t<kBytes == 4, uint32_t, uint16_t>>>;

template <int kAlign, typename scalar_t>
__device__ inline Pack<scalar_t> load_pack(const scalar_t* from) {
  Pack<scalar_t> pack;
#pragma unroll
  for (int i = 0; i < 16 / kAlign; ++i) {
    reinterpret_cast<word_t<kAlign>*>(&pack)[i] = reinterpret_cast<const word_t<kAlign>*>(from)[i];
  }
  return pack;
}

template <typename scalar_t>
__device__ inline void unpack(const Pack<scalar_t>& pack, accumulator_t<scalar_t>* values) {
  if constexpr (std::is_same_v<scalar_t, __nv_bfloat16>) {  // the upper half of a float: one instruction each
    const auto* words = reinterpret_cast<const uint32_t*>(&pack);
#pragma unroll
    for (int i = 0; i < Pack<scalar_t>::kSize; ++i) {
      values[i] = __uint_as_float(i % 2 == 0 ? words[i / 2] << 16 : words[i / 2] & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int i = 0; i < Pack<scalar_t>::kSize; ++i) values[i] = to_acc(pack.values[i]);
  }
}

// The pack at x[first] unpacked, with -inf in place of what lies at or past x[end].
template <int kAlign, typename scalar_t>
__device__ inline void load_before(const scalar_t* x, int64_t first, int64_t end, accumulator_t<scalar_t>* values) {
  if (first + Pack<scalar_t>::kSize <= end) {
    unpack(load_pack<kAlign>(x + first), values);
  } else {
#pragma unroll
    for (int i = 0; i < Pack<scalar_t>::kSize; ++i) values[i] = first + i < end ? to_acc(x[first + i]) : -INFINITY;
  }
}

// to is on a 16-byte boundary. __stcs, because the compiler splits some plain assignments of 16 bytes.
template <typename scalar_t>
__device__ inline void store_pack(const accumulator_t<scalar_t>* values, scalar_t* to) {
  Pack<scalar_t> pack;
#pragma unroll
  for (int i = 0; i < Pack<scalar_t>::kSize; ++i) pack.values[i] = from_acc<scalar_t>(values[i]);
  __stcs(reinterpret_cast<uint4*>(to), *reinterpret_cast<const uint4*>(&pack));
}

// body(integral_constant<int, alignment of p in bytes, at most 16>); the branch is uniform over the block.
template <typename scalar_t, typename Body>
__device__ inline auto with_alignment(const scalar_t* p, Body body) {
  const auto address = reinterpret_cast<uintptr_t>(p);
  if (address % 16 == 0) return body(std::integral_constant<int, 16>());
  if constexpr (sizeof(scalar_t) < 8) {
    if (address % 8 == 0) return body(std::integral_constant<int, 8>());
  }
  if constexpr (sizeof(scalar_t) < 4) {
    if (address % 4 == 0) return body(std::integral_constant<int, 4>());
  }
  return body(std::integral_constant<int, sizeof(scalar_t)>());
}

// Writes a row in stores of 16 bytes, whatever its alignment: element(j) at the ragged ends, packs(head, count)
// between. Where x, which is read, meets other boundaries than out, one pack less (Packs::whole in softmax_row.cuh).
template <typename scalar_t, typename Element, typename Packs>
__device__ inline void write_row(scalar_t* out, const scalar_t* x, int vocab, Element element, Packs packs) {
  constexpr int kSize = Pack<scalar_t>::kSize;
  const int to_boundary = static_cast<int>(-reinterpret_cast<uintptr_t>(out) % 16 / sizeof(scalar_t));
  const int apart = (reinterpret_cast<uintptr_t>(out) - reinterpret_cast<uintptr_t>(x)) % 16 != 0;
  const int head = min(vocab, to_boundary), count = max(0, (vocab - head) / kSize - apart), tail = head + count * kSize;
  const int thread = threadIdx.x;
  if (thread < head) out[thread] = element(thread);
  packs(head, count);
  if (tail + thread < vocab) out[tail + thread] = element(tail + thread);
}

}  // namespace rlhf::cuda
