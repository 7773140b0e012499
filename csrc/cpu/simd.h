// One thin vector layer over GCC vector extensions. Kernels include it and are compiled once per instruction set
// (CMakeLists.txt); the width follows from the flags.
//
// A kernel walks a row in steps of a Pair, two vectors of float32: on AVX-512 one 64-byte load of 16-bit elements.
// Which element lands in which lane is up to the dtype, but load and store agree. Sums over lanes have a fixed order,
// so what comes out for a row depends on nothing but the row.
#pragma once
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>

namespace rlhf::RLHF_ISA {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
constexpr int kPair = 2 * kWidth;

using vf = float __attribute__((vector_size(4 * kWidth)));
using vi = int32_t __attribute__((vector_size(4 * kWidth)));
using vu = uint32_t __attribute__((vector_size(4 * kWidth)));
using vs = int16_t __attribute__((vector_size(4 * kWidth)));  // a Pair of 16-bit elements
using vh = uint16_t __attribute__((vector_size(2 * kWidth)));

struct Pair {
  vf a, b;
};

template <class To, class From>
inline To bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

template <class V>
inline V load_vector(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// Lane j becomes lane from[j] of a followed by b.
template <class V, class Index>
[[gnu::always_inline]] inline V shuffle(V a, V b, Index from) {
#if defined(__clang__)
  constexpr int kLanes = sizeof(V) / sizeof(a[0]);
  V y;
  for (int j = 0; j < kLanes; ++j) y[j] = from[j] < kLanes ? a[from[j]] : b[from[j] - kLanes];
  return y;
#else
  return __builtin_shuffle(a, b, from);
#endif
}

inline vf splat(float x) { return x - vf{}; }

// max(a, b), and b where either is NaN: the running max(x, acc) ignores a NaN, the limit max(least, x) keeps it.
inline vf max(vf a, vf b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

inline vs max(vs a, vs b) {
#if defined(__AVX512F__)
  return bits<vs>(_mm512_max_epi16(bits<__m512i>(a), bits<__m512i>(b)));
#elif defined(__AVX2__)
  return bits<vs>(_mm256_max_epi16(bits<__m256i>(a), bits<__m256i>(b)));
#else
  return a > b ? a : b;
#endif
}

inline vs min(vs a, vs b) {
#if defined(__AVX512F__)
  return bits<vs>(_mm512_min_epi16(bits<__m512i>(a), bits<__m512i>(b)));
#elif defined(__AVX2__)
  return bits<vs>(_mm256_min_epi16(bits<__m256i>(a), bits<__m256i>(b)));
#else
  return a < b ? a : b;
#endif
}

inline vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

// Not inlined: gcc 12 keeps a vector whose lanes it can see being read in memory, also through the loop before.
[[gnu::noinline]] inline float reduce_max(vf x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(x);
#else
  float m = x[0];
  for (int i = 1; i < kWidth; ++i) m = x[i] > m ? x[i] : m;
  return m;
#endif
}

#if defined(__AVX512F__)
inline __m512d halves_in_double(vf x) {
  const __m256 low = _mm512_castps512_ps256(x), high = _mm512_extractf32x8_ps(x, 1);
  return _mm512_add_pd(_mm512_cvtps_pd(low), _mm512_cvtps_pd(high));
}
#endif

[[gnu::noinline]] inline double reduce_add(vf x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_pd(halves_in_double(x));
#else
  double s = 0;
  for (int i = 0; i < kWidth; ++i) s += x[i];
  return s;
#endif
}

// Of both. They meet in double, for a row's largest exp, which is 1, would round a small one that it met in float32.
[[gnu::noinline]] inline double reduce_add(vf x, vf y) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_pd(_mm512_add_pd(halves_in_double(x), halves_in_double(y)));
#elif defined(__AVX2__)
  const auto halves = [](vf v) {
    return _mm256_add_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(v)), _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1)));
  };
  const __m256d sums = _mm256_add_pd(halves(x), halves(y));
  const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(sums), _mm256_extractf128_pd(sums, 1));
  return two[0] + two[1];
#else
  return reduce_add(x) + reduce_add(y);
#endif
}

// At p, which past the caches is aligned to V. Then the memory is not read before it is written, which saves a third of
// what a row's gradient moves. Such stores end with a fence().
template <bool kPastCache, class V>
inline void put(void* p, V v) {
#if defined(__AVX512F__)
  if constexpr (kPastCache) return _mm512_stream_si512(static_cast<__m512i*>(p), bits<__m512i>(v));
#elif defined(__AVX2__)
  if constexpr (kPastCache) return _mm256_stream_si256(static_cast<__m256i*>(p), bits<__m256i>(v));
#endif
  std::memcpy(p, &v, sizeof v);
}

inline void fence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// ---- elements ------------------------------------------------------------------------------------------------------

#if defined(__AVX512F__)
inline uint32_t lowest(int64_t n) { return uint32_t((uint64_t(1) << n) - 1); }  // n bits
#endif

// The last n < kPair elements of a row as they lie in memory, with E::kImpossible, a token that cannot happen, behind
// them. (A copy to a full buffer costs more than all else in a row of twenty.)
template <class E>
inline vs tail16(const uint16_t* p, int64_t n) {
#if defined(__AVX512F__)
  const __m512i rest = _mm512_set1_epi16(short(E::kImpossible));
  return bits<vs>(_mm512_mask_loadu_epi16(rest, lowest(n), p));
#else
  alignas(64) uint16_t buffer[kPair];
  for (auto& x : buffer) x = E::kImpossible;
  std::memcpy(buffer, p, n * sizeof *p);
  return load_vector<vs>(buffer);
#endif
}

template <class E>
inline Pair load_tail(const typename E::type* p, int64_t n) {
  if constexpr (sizeof *p == 2) {
    return E::widen(tail16<E>(p, n));
  } else {
#if defined(__AVX512F__)
    const __m512 rest = _mm512_set1_ps(E::kImpossible);
    return {bits<vf>(_mm512_mask_loadu_ps(rest, __mmask16(lowest(n)), p)),
            bits<vf>(_mm512_mask_loadu_ps(rest, __mmask16(lowest(n) >> kWidth), p + kWidth))};
#else
    alignas(64) typename E::type buffer[kPair];
    for (auto& x : buffer) x = E::kImpossible;
    std::memcpy(buffer, p, n * sizeof *p);
    return E::load(buffer);
#endif
  }
}

template <class E>
inline void store_tail(typename E::type* p, int64_t n, Pair x) {
  alignas(64) typename E::type buffer[kPair];
  E::store(buffer, x);
#if defined(__AVX512F__)
  if constexpr (sizeof *p == 2) {
    _mm512_mask_storeu_epi16(p, lowest(n), _mm512_load_si512(buffer));
  } else {
    _mm512_mask_storeu_ps(p, __mmask16(lowest(n)), _mm512_load_ps(buffer));
    _mm512_mask_storeu_ps(p + kWidth, __mmask16(lowest(n) >> kWidth), _mm512_load_ps(buffer + kWidth));
  }
#else
  std::memcpy(p, buffer, n * sizeof *p);
#endif
}

template <class E>
inline Pair load_some(const typename E::type* p, int64_t n) {
  return n == kPair ? E::load(p) : load_tail<E>(p, n);
}

template <class E, bool kPastCache>
inline void store_some(typename E::type* p, int64_t n, Pair x) {
  n == kPair ? E::template store<kPastCache>(p, x) : store_tail<E>(p, n, x);
}

// max over 16-bit floats by their bits, half the work of widening first. As signed integers positive floats come in
// order and above all others, negative ones in reverse order. A NaN may come out.
template <class E>
inline float max16(const uint16_t* p, int64_t n) {
  const int64_t whole = n - n % kPair;
  vs v = tail16<E>(p + whole, n - whole), most = v, least = v;
  for (int64_t i = 0; i < whole; i += kPair) {
    v = load_vector<vs>(p + i);
    most = max(v, most);
    least = min(v, least);
  }
  const Pair m = E::widen(most >= 0 ? most : least);
  return reduce_max(max(m.a, m.b));
}

struct F32 {
  using type = float;
  static constexpr float kImpossible = -__builtin_inff();
  static constexpr bool kCoarse = false;  // an exp good enough for gradients of this type
  static float scalar(float x) { return x; }
  static float round(double x) { return float(x); }
  static Pair load(const float* p) { return {load_vector<vf>(p), load_vector<vf>(p + kWidth)}; }
  template <bool kPastCache = false>
  static void store(float* p, Pair x) {
    put<kPastCache>(p, x.a);
    put<kPastCache>(p + kWidth, x.b);
  }
  // Of n elements; NaNs are ignored or come out, for every element type.
  static float max(const float* p, int64_t n) {
    const int64_t whole = n - n % kPair;
    Pair m = load_tail<F32>(p + whole, n - whole);
    for (int64_t i = 0; i < whole; i += kPair) {
      const Pair x = load(p + i);
      m = {RLHF_ISA::max(x.a, m.a), RLHF_ISA::max(x.b, m.b)};
    }
    return reduce_max(RLHF_ISA::max(m.a, m.b));
  }
};

// bfloat16 is the upper half of a float32. Lane i of a holds element 2i and of b element 2i + 1, so nothing is
// shuffled.
struct BF16 {
  using type = uint16_t;
  static constexpr uint16_t kImpossible = 0xff80;
  static constexpr bool kCoarse = true;
  static float scalar(uint16_t x) { return bits<float>(uint32_t(x) << 16); }
  static uint16_t round(double x) { return uint16_t((bits<uint32_t>(float(x)) + 0x8000) >> 16); }
  static Pair widen(vs x) {
    const vu u = bits<vu>(x);
    return {bits<vf>(u << 16), bits<vf>(u & 0xffff0000u)};
  }
  static Pair load(const uint16_t* p) { return widen(load_vector<vs>(p)); }
  // To nearest, ties away from zero: a computed gradient is a tie once in 65536, and this is 2 operations, not 5.
  template <bool kPastCache = false>
  static void store(uint16_t* p, Pair x) {
    const vu u = ((bits<vu>(x.a) + 0x8000u) >> 16) | ((bits<vu>(x.b) + 0x8000u) & 0xffff0000u);
    put<kPastCache>(p, u);
  }
  static float max(const uint16_t* p, int64_t n) { return max16<BF16>(p, n); }
};

struct F16 {
  using type = uint16_t;
  static constexpr uint16_t kImpossible = 0xfc00;
  static constexpr bool kCoarse = true;
  static vf widen(vh h) {
#if defined(__AVX512F__)
    return _mm512_cvtph_ps(bits<__m256i>(h));
#elif defined(__AVX2__)
    return _mm256_cvtph_ps(bits<__m128i>(h));
#else
    const vu u = __builtin_convertvector(h, vu), magnitude = (u & 0x7fffu) << 13;
    const vu scaled = bits<vu>(bits<vf>(magnitude) * 0x1p112f);                    // also normalises subnormals
    const vu special = bits<vu>(bits<vi>(magnitude) >= 0x0f800000) & 0x7f800000u;  // inf and NaN
    return bits<vf>(scaled | special | (u & 0x8000u) << 16);
#endif
  }
  static vh narrow(vf x) {  // to nearest even
#if defined(__AVX512F__)
    return bits<vh>(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
    return bits<vh>(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#else
    const vf magnitude = bits<vf>(bits<vu>(x) & 0x7fffffffu);
    const vu u = bits<vu>(magnitude);
    const vu subnormal = bits<vu>(magnitude + 0.5f) - 0x3f000000u;  // the sum rounds at 2^-24, their spacing
    const vu normal = (u - (112u << 23) + 0xfffu + (u >> 13 & 1u)) >> 13;
    const vu special = magnitude != magnitude ? splat_u(0x7e00) : splat_u(0x7c00);
    const vu rounded = magnitude < 0x1p-14f ? subnormal : magnitude < 65520.0f ? normal : special;
    return __builtin_convertvector(rounded | (bits<vu>(x) >> 16 & 0x8000u), vh);
#endif
  }
  static vu splat_u(uint32_t x) { return x - vu{}; }
  static float scalar(uint16_t x) { return widen(x - vh{})[0]; }
  static uint16_t round(double x) { return narrow(splat(float(x)))[0]; }
  static Pair widen(vs x) {
    vh half[2];
    std::memcpy(half, &x, sizeof x);
    return {widen(half[0]), widen(half[1])};
  }
  static Pair load(const uint16_t* p) { return {widen(load_vector<vh>(p)), widen(load_vector<vh>(p + kWidth))}; }
  template <bool kPastCache = false>
  static void store(uint16_t* p, Pair x) {
    const vh both[] = {narrow(x.a), narrow(x.b)};
    put<kPastCache>(p, load_vector<vs>(both));
  }
  static float max(const uint16_t* p, int64_t n) { return max16<F16>(p, n); }
};

// ---- exp and tanh --------------------------------------------------------------------------------------------------

// exp(c d) for c d <= 0, from y = c log2(e) d: 2^y = 2^n p(y - n), p minimax for 2^r with p(0) = 1, so that exp(0) is
// exactly 1. exp(-inf) is 0 and NaN stays. Throughput is bound by the ports of the vector units (EPYC 9004: 13
// operations, two a cycle), so neither Estrin's scheme nor more chains in flight gains anything, and operations count.
//   AVX-512  n is whole, r on [0, 1]: subtracting n and multiplying by 2^n are an instruction each. p's relative error
//            is 8.2e-8, coarse 2.9e-6; the rounding of y adds an absolute error below 2^-24. (With a table as below, or
//            a degree more, no faster: a permutation takes the place of two multiplications.)
//   AVX2     n is in eighths, r on [-1/16, 1/16], 2^n by a table of eight. p: 2.5e-8, coarse 3.4e-6; the table: 3e-8. A
//            third fewer operations than the portable form.
template <bool kCoarse = false>
class Exp {
 public:
  explicit Exp(double c) : factor_(splat(float(c * kLog2E))), least_(splat(float(-127 / (c * kLog2E)))) {}

  // d, or a finite number in its place where float32 has no exp(c d), as of -inf. NaN stays.
  vf bounded(vf d) const { return max(least_, d); }

  vf operator()(vf d) const {
#if defined(__AVX512F__)
    const vf y = d * factor_;
    return _mm512_scalef_ps(polynomial(_mm512_reduce_ps(y, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)), y);
#elif defined(__AVX2__)
    const Pair f = factors(d);
    return f.a * f.b;
#else
    const vf y = d * factor_;
    const vf shifted = (y - 0.5f) + kShift;  // leaves the integer in the low bits
    const vf p = polynomial(y - (shifted - kShift));
    const vi normal = ~(y <= -126.0f);  // below lies 0; NaN compares false and stays
    return bits<vf>((bits<vu>(p) + (bits<vu>(shifted) << 23)) & bits<vu>(normal));
#endif
  }

  // e = exp(c d) -> sum + e, where exp is a product rounded once. The compiler would round so only where nothing else
  // reads e, and then a row's sum would depend on whether its entropy is wanted too.
  vf add(vf sum, vf d, vf& e) const {
#if defined(__AVX2__) && !defined(__AVX512F__)
    const Pair f = factors(d);
    e = f.a * f.b;
    return fma(f.a, f.b, sum);
#else
    e = (*this)(d);
    return sum + e;
#endif
  }

 private:
#if defined(__AVX2__) && !defined(__AVX512F__)
  // p and 2^n
  Pair factors(vf d) const {
    d = bounded(d);                                     // below it 2^n has no exponent, and there n is -127 and 2^n 0
    const vf shifted = fma(d, factor_, splat(kShift));  // leaves 8 n in the low bits
    const vf r = fma(d, factor_, kShift - shifted);
    const vf fraction = _mm256_permutevar8x32_ps(load_vector<vf>(kPowers), bits<__m256i>(shifted));
    return {polynomial(r), bits<vf>((bits<vu>(shifted) << 20) + bits<vu>(fraction))};
  }
  static constexpr float kShift = 1572864.0f;  // 1.5 2^23 eighths
  static vf polynomial(vf r) {
    vf p;
    if constexpr (kCoarse) {
      p = fma(splat(2.40225881e-1f), r, splat(6.93308890e-1f));
    } else {
      p = fma(splat(5.54962233e-2f), r, splat(2.40257636e-1f));
      p = fma(p, r, splat(6.93147242e-1f));
    }
    return fma(p, r, splat(1.0f));
  }
  // The bits of 2^(i / 8), less i 2^20, which shifted adds.
  alignas(32) static constexpr uint32_t kPowers[8] = {0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7,
                                                      0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7};
#else
  static constexpr float kShift = 12582912.0f;  // 1.5 2^23
  static vf polynomial(vf r) {
    vf p;
    if constexpr (kCoarse) {
      p = fma(splat(1.34266848e-2f), r, splat(5.22424728e-2f));
      p = fma(p, r, splat(2.41280198e-1f));
      p = fma(p, r, splat(6.93044841e-1f));
    } else {
      p = fma(splat(1.86713017e-3f), r, splat(9.01702978e-3f));
      p = fma(p, r, splat(5.57999127e-2f));
      p = fma(p, r, splat(2.40164444e-1f));
      p = fma(p, r, splat(6.93151295e-1f));
    }
    return fma(p, r, splat(1.0f));
  }
#endif
  static constexpr double kLog2E = 1.4426950408889634;
  vf factor_, least_;
};

// tanh(x) = x + x z p(z), z = x^2, below 0.625, with p minimax for the relative error: 4e-9. Beyond it 1 - 2 e / (1 +
// e), e = exp(-2 |x|) < 0.29: rounded once near 1, where 1 - tanh^2 keeps few digits. NaN stays.
inline vf tanh(vf x) {
  const vu sign = bits<vu>(x) & 0x80000000u;
  const vf size = bits<vf>(bits<vu>(x) ^ sign), z = x * x, e = Exp<>(2)(-size);
  vf p = fma(splat(-5.71704e-3f), z, splat(2.065059e-2f));
  p = fma(p, z, splat(-5.37435e-2f));
  p = fma(p, z, splat(1.3331491e-1f));
  p = fma(p, z, splat(-3.3333284e-1f));
  return size > 0.625f ? bits<vf>(bits<vu>(1.0f - 2.0f * e / (1.0f + e)) | sign) : fma(x * z, p, x);
}

// x -> softcap tanh(scale x / softcap), of n numbers and what is left to a whole number of vectors. slopes (if not
// null): its derivative over scale, 1 - tanh^2 = 4 e / (1 + e)^2, where e = exp(-2 |scale x / softcap|).
inline void cap(float* x, int64_t n, double scale, double softcap, float* slopes = nullptr) {
  const float factor = float(scale / softcap), limit = float(softcap);
  const Exp<> exp(2);
  for (int64_t i = 0; i < n; i += kWidth) {
    const vf y = load_vector<vf>(x + i) * factor, capped = limit * tanh(y);
    std::memcpy(x + i, &capped, sizeof capped);
    if (slopes) {
      const vf e = exp(y < 0.0f ? y : -y), slope = 4.0f * e / ((1.0f + e) * (1.0f + e));
      std::memcpy(slopes + i, &slope, sizeof slope);
    }
  }
}

}  // namespace rlhf::RLHF_ISA
