// exp and what is built on it, written once. The float versions, and exp in double, have no branch and no library call,
// so that loops over them vectorise on the CPU; relative errors stay below 1e-7 and 1e-15. RLHF_ISA names the copy: one
// per CPU instruction set, "cuda" on a GPU.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define RLHF_INLINE __host__ __device__ __forceinline__
#else
#define RLHF_INLINE inline __attribute__((always_inline))
#endif

namespace rlhf::RLHF_ISA {

template <class To, class From>
RLHF_INLINE To bits_as(From from) {
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

RLHF_INLINE double exp_of(double x) {
#ifdef __CUDA_ARCH__
  return ::exp(x);
#else
  x = x > 710 ? 710 : x;  // exp(710) is inf and exp(-746) is 0; NaN passes both
  x = x < -746 ? -746 : x;
  const double round = 6755399441055744;  // 1.5 * 2^52, as below
  const double n = x * 1.4426950408889634 + round - round;
  const double r = (x - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10;  // fdlibm's two parts of ln 2
  double q = 1. / 6227020800;  // what is left out is below 4e-18
  q = q * r + 1. / 479001600;
  q = q * r + 1. / 39916800;
  q = q * r + 1. / 3628800;
  q = q * r + 1. / 362880;
  q = q * r + 1. / 40320;
  q = q * r + 1. / 5040;
  q = q * r + 1. / 720;
  q = q * r + 1. / 120;
  q = q * r + 1. / 24;
  q = q * r + 1. / 6;
  q = q * r + 0.5;
  const double p = 1 + (r + r * r * q), half = n * 0.5 + round - round;
  const auto power = [=](double k) { return bits_as<double>((bits_as<uint64_t>(k + round) + 1023) << 52); };
  return p * power(half) * power(n - half);
#endif
}

RLHF_INLINE float exp_of(float x) {
#ifdef __CUDA_ARCH__
  return ::expf(x);
#else
  x = x > 89.f ? 89.f : x;  // exp(89) is inf and exp(-104) is 0 in float; NaN passes both
  x = x < -104.f ? -104.f : x;
  const float round = 12582912.f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const float shifted = x * 1.442695041f + round;
  const float n = shifted - round;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // n ln 2 in two parts, |r| <= ln 2 / 2
  float q = 1.f / 5040;
  q = q * r + 1.f / 720;
  q = q * r + 1.f / 120;
  q = q * r + 1.f / 24;
  q = q * r + 1.f / 6;
  q = q * r + 0.5f;
  const float p = 1.f + (r + r * r * q);
  // 2^n in two factors, because n runs from -150 to 128 and neither end is a normal float.
  const int32_t i = bits_as<int32_t>(shifted) - bits_as<int32_t>(round), half = i >> 1;
  return p * bits_as<float>((half + 127) << 23) * bits_as<float>((i - half + 127) << 23);
#endif
}

// exp(x) - 1 - x given e = exp(x), without the cancellation at small x; infinite at both ends.
RLHF_INLINE double exp_minus_1_minus(double x, double) {
  const double y = ::expm1(x) - x;
  return x == INFINITY ? x : y;
}

RLHF_INLINE float exp_minus_1_minus(float x, float e) {
  float q = 1.f / 479001600;
  q = q * x + 1.f / 39916800;
  q = q * x + 1.f / 3628800;
  q = q * x + 1.f / 362880;
  q = q * x + 1.f / 40320;
  q = q * x + 1.f / 5040;
  q = q * x + 1.f / 720;
  q = q * x + 1.f / 120;
  q = q * x + 1.f / 24;
  q = q * x + 1.f / 6;
  q = q * x + 0.5f;
  const float small = x * x * q, large = x == INFINITY ? x : (e - 1.f) - x;
  return ((x > -1.f) & (x < 1.f)) ? small : large;
}

// log(1 + e) for e in [0, 1]: 2 atanh(s) with s = e / (2 + e) <= 1/3.
RLHF_INLINE double log1p_of(double e) { return ::log1p(e); }

RLHF_INLINE float log1p_of(float e) {
  const float s = e / (2.f + e), s2 = s * s;
  float q = 1.f / 15;
  q = q * s2 + 1.f / 13;
  q = q * s2 + 1.f / 11;
  q = q * s2 + 1.f / 9;
  q = q * s2 + 1.f / 7;
  q = q * s2 + 1.f / 5;
  q = q * s2 + 1.f / 3;
  return 2.f * s + 2.f * s * (s2 * q);
}

// Binary cross-entropy of a preference with probability p: -p log sigma(d) - (1 - p) log sigma(-d), and d/dd of it.
template <class T>
struct Preference {
  T loss, slope;
};

template <class T>
RLHF_INLINE Preference<T> preference(T d, T p) {
  const T e = exp_of(d < 0 ? d : -d);  // exp(-|d|) in [0, 1]
  const T minor = e / (1 + e), major = 1 / (1 + e);
  const T positive = d < 0 ? minor : major, negative = d < 0 ? major : minor;  // sigma(d), sigma(-d)
  const T share = d < 0 ? p : 1 - p;  // of the linear part; 0 of it is nothing even where |d| is infinite
  const T linear = share == 0 ? T(0) : share * (d < 0 ? -d : d);
  return {log1p_of(e) + linear, (1 - p) * positive - p * negative};
}

// One pair of rewards: the loss of its preference, centred where coef is not 0, and the derivatives by both rewards.
template <class T>
struct PairLoss {
  T loss, by_chosen, by_rejected;
};

template <class T>
RLHF_INLINE PairLoss<T> pair_loss(T chosen, T rejected, T margin, T p, T center_coef) {
  const Preference<T> one = preference(chosen - rejected - margin, p);
  const T center = chosen + rejected, pull = center_coef != 0 ? center_coef * center : T(0);
  return {one.loss + (center_coef != 0 ? pull * center : T(0)), 2 * pull + one.slope, 2 * pull - one.slope};
}

template <class T>
RLHF_INLINE T sign(T x) {
  return x > 0 ? T(1) : x < 0 ? T(-1) : x;  // NaN stays
}

}  // namespace rlhf::RLHF_ISA
