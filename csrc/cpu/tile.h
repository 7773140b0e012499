// Small ops read their (rows, cols) inputs in tiles: load() brings part of a row, in whatever dtype and stride, into a
// local array of the accumulation type, and the formula is a plain loop over such arrays, which vectorises.
//
// A unit is the part of a row that one thread handles at a time. Units do not depend on the number of threads, each
// keeps its own partial sums, and these are added in order: results are the same bits for any number of threads.
#pragma once

#include <cstdint>
#include <cstring>
#include <new>

#include "../ops.h"

namespace rlhf::RLHF_ISA {

constexpr int kTile = 512;        // elements: ten float tiles fit into L1
constexpr int64_t kUnit = 16384;  // elements of a row per unit

// Elements for which another thread is woken. A thread that sleeps (OMP_WAIT_POLICY=PASSIVE, or nothing parallel just
// before) takes 40 us to wake, and ppo_loss 1.5 ns an element: 64k break even. One that still spins would pay from 8k
// on and save 25 us at 32k (EPYC, 2 cores).
constexpr int64_t kWorth = 65536;

struct Units {
  int64_t cols, per_row, count;
  Units(int64_t rows, int64_t cols) : cols(cols), per_row((cols + kUnit - 1) / kUnit), count(rows * per_row) {}
  int64_t row(int64_t unit) const { return unit / per_row; }
  int64_t begin(int64_t unit) const { return unit % per_row * kUnit; }
  int64_t end(int64_t unit) const { return begin(unit) + kUnit < cols ? begin(unit) + kUnit : cols; }
};

inline int worth_threads(int threads, int64_t elements) {
  const int64_t worth = 1 + elements / kWorth;
  return worth < threads ? int(worth) : threads;
}

// f(i) for every i < count. Alone without OpenMP, whose team of one costs a microsecond.
template <class F>
void for_each(int64_t count, int threads, F f) {
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i) f(i);
    return;
  }
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < count; ++i) f(i);
}

enum Unset { kUnset };

// Not std::vector: its code would be shared between instruction sets by the linker. Of zeros, unless kUnset. It begins
// with a line of the cache, so that no vector and no row of a tile lies in two.
template <class T>
struct Buffer {
  static constexpr std::align_val_t kLine{64};
  T* data;
  explicit Buffer(int64_t n) : data(new (kLine) T[n > 0 ? n : 1]()) {}
  Buffer(int64_t n, Unset) : data(new (kLine) T[n > 0 ? n : 1]) {}
  ~Buffer() { operator delete[](data, kLine); }
  Buffer(const Buffer&) = delete;
  T& operator[](int64_t i) const { return data[i]; }
};

namespace tile {

struct BFloat16 {
  uint16_t bits;
  operator float() const {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
  }
};

struct Bool {  // whatever its byte, as torch reads it: that of numpy's mask.view(bool) may be 255
  uint8_t byte;
  operator int() const { return byte != 0; }
};

struct Float16 {  // _Float16 is in newer compilers only; the arithmetic of F16::widen, which a loop of these vectorises
  uint16_t bits;
  operator float() const {
    const uint32_t magnitude = (bits & 0x7fffu) << 13;
    float value;
    std::memcpy(&value, &magnitude, 4);
    value *= 0x1p112f;
    uint32_t wide;
    std::memcpy(&wide, &value, 4);
    wide |= (magnitude >= 0x0f800000u ? 0x7f800000u : 0u) | (bits & 0x8000u) << 16;
    std::memcpy(&value, &wide, 4);
    return value;
  }
};

template <class T, class S>
inline void copy(T* out, const S* x, int64_t stride, int n) {
  if (stride == 1) {
    for (int j = 0; j < n; ++j) out[j] = T(x[j]);
  } else {
    for (int j = 0; j < n; ++j) out[j] = T(x[j * stride]);
  }
}

}  // namespace tile

// Bytes from x.data to x[row, col], which need not exist.
inline int64_t offset(const Grid& x, int64_t row, int64_t col) {
  const int64_t size = x.dtype == kFloat64 ? 8 : x.dtype == kFloat32 ? 4 : x.dtype == kBool ? 1 : 2;
  return (row * x.row_stride + col * x.col_stride) * size;
}

// out[j] = x[row, col + j]
template <class T>
inline void load(T* out, const Grid& x, int64_t row, int64_t col, int n) {
  const int64_t first = row * x.row_stride + col * x.col_stride;
  switch (x.dtype) {
    case kFloat32:
      return tile::copy(out, (const float*)x.data + first, x.col_stride, n);
    case kFloat64:
      return tile::copy(out, (const double*)x.data + first, x.col_stride, n);
    case kBFloat16:
      return tile::copy(out, (const tile::BFloat16*)x.data + first, x.col_stride, n);
    case kFloat16:
      return tile::copy(out, (const tile::Float16*)x.data + first, x.col_stride, n);
    case kBool:
      return tile::copy(out, (const tile::Bool*)x.data + first, x.col_stride, n);
  }
}

// The same values where they lie, if they lie there as such.
template <class T>
inline const T* view(T* buffer, const Grid& x, int64_t row, int64_t col, int n) {
  constexpr DType kSame = sizeof(T) == 8 ? kFloat64 : kFloat32;
  if (x.dtype == kSame && x.col_stride == 1) return (const T*)x.data + row * x.row_stride + col;
  load(buffer, x, row, col, n);
  return buffer;
}

// The same with 0 where mask is 0, so that no NaN from behind the mask enters a formula.
template <class T>
inline void load_masked(T* out, const Grid& x, const T* mask, int64_t row, int64_t col, int n) {
  if (x.dtype == kFloat32 && x.col_stride == 1) {  // the usual case, in one loop
    const float* first = (const float*)x.data + row * x.row_stride + col;
    for (int j = 0; j < n; ++j) out[j] = mask[j] != 0 ? T(first[j]) : T(0);
    return;
  }
  load(out, x, row, col, n);
  for (int j = 0; j < n; ++j) out[j] = mask[j] != 0 ? out[j] : T(0);
}

// Sums are kept in double: their rounding is then no part of the error.
template <class T>
inline double sum(const T* x, int n) {
  double s = 0;
#pragma omp simd reduction(+ : s)
  for (int j = 0; j < n; ++j) s += x[j];
  return s;
}

// Number, sum and squared deviations from the mean, merged as by Chan et al. 1979, so that a spread far smaller than
// the mean survives float arithmetic.
struct Moments {
  double n = 0, sum = 0, m2 = 0;

  double mean() const { return n > 0 ? sum / n : 0; }
  double variance() const { return n > 0 ? m2 / n : 0; }

  void merge(const Moments& o) {
    const double delta = o.mean() - mean();
    if (n > 0 && o.n > 0) m2 += delta * delta * (n * o.n / (n + o.n));
    m2 += o.m2;
    sum += o.sum;
    n += o.n;
  }
};

// Of x, which is 0 outside the mask; `around` is a guess of the mean and makes a constant x = around exact.
template <class T>
inline Moments moments(const T* x, const T* mask, double count, int n, T around = 0) {
  if (count == 0) return {};
  double s = 0, m2 = 0;
#pragma omp simd reduction(+ : s)
  for (int j = 0; j < n; ++j) s += mask[j] * (x[j] - around);
  const T mean = around + T(s / count);
#pragma omp simd reduction(+ : m2)
  for (int j = 0; j < n; ++j) m2 += mask[j] * (x[j] - mean) * (x[j] - mean);
  return {count, around * count + s, m2};
}

}  // namespace rlhf::RLHF_ISA
