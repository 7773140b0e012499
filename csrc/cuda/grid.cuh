// How the small ops read and write (rows, cols) data: a thread handles four neighbouring columns of a row, a quad.
//
// A kernel comes in two versions. The plain one is for what training passes: float32 with contiguous columns on
// 16-byte boundaries, one load a quad. The other reads every dtype, stride and tail. Both do the same arithmetic.
#pragma once

#include <type_traits>

#include "launch.cuh"

namespace rlhf::cuda {

constexpr int kQuad = 4;

template <class T>
struct Quad {
  T v[kQuad];
  __device__ T& operator[](int i) { return v[i]; }
  __device__ const T& operator[](int i) const { return v[i]; }
};

struct Place {  // columns [col, col + count) of a row
  int64_t row, col;
  int count;
};

// The quads of a (rows, cols) shape, and those of one block: neighbours, the same whatever the GPU.
struct Quads {
  int64_t cols, per_row, count, per_block;
  double inverse;  // 1 / per_row

  Quads(int64_t rows, int64_t cols, int threads, int64_t max_blocks)
      : cols(cols), per_row((cols + kQuad - 1) / kQuad), count(rows * per_row) {
    const int64_t tiles = (count + threads - 1) / threads;
    per_block = (tiles + max_blocks - 1) / max_blocks * threads;
    inverse = 1.0 / static_cast<double>(per_row);
  }
  int64_t blocks() const { return count == 0 ? 1 : (count + per_block - 1) / per_block; }

  __device__ int64_t first() const { return blockIdx.x * per_block + threadIdx.x; }
  __device__ int64_t end() const { return min(count, (blockIdx.x + 1) * per_block); }
  __device__ Place place(int64_t quad) const {
    // quad / per_row without the subroutine of a 64-bit division; the product is off by less than one.
    int64_t row = static_cast<int64_t>(static_cast<double>(quad) * inverse), in_row = quad - row * per_row;
    if (in_row < 0) --row, in_row += per_row;
    if (in_row >= per_row) ++row, in_row -= per_row;
    const int64_t col = in_row * kQuad;
    return {row, col, static_cast<int>(min(cols - col, int64_t(kQuad)))};
  }
};

__device__ inline double as_number(float x) { return x; }
__device__ inline double as_number(double x) { return x; }
__device__ inline float as_number(__half x) { return __half2float(x); }
__device__ inline float as_number(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T, class S>
__device__ inline Quad<T> load_as(const void* data, int64_t first, int64_t stride, int count) {
  S numbers[kQuad];  // all asked for before one is converted, which waits for it
#pragma unroll
  for (int i = 0; i < kQuad; ++i) numbers[i] = i < count ? static_cast<const S*>(data)[first + i * stride] : S();
  Quad<T> quad;
#pragma unroll
  for (int i = 0; i < kQuad; ++i) quad[i] = static_cast<T>(as_number(numbers[i]));
  return quad;
}

template <bool kPlain, class T>
__device__ inline Quad<T> load(const Grid& x, Place at) {
  const int64_t first = at.row * x.row_stride + at.col * x.col_stride;
  if constexpr (kPlain) {
    static_assert(std::is_same_v<T, float>);
    const float4 four = *reinterpret_cast<const float4*>(static_cast<const float*>(x.data) + first);
    return {four.x, four.y, four.z, four.w};
  } else {
    switch (x.dtype) {
      case kFloat32:
        return load_as<T, float>(x.data, first, x.col_stride, at.count);
      case kBFloat16:
        return load_as<T, __nv_bfloat16>(x.data, first, x.col_stride, at.count);
      case kFloat16:
        return load_as<T, __half>(x.data, first, x.col_stride, at.count);
      default:
        return load_as<T, double>(x.data, first, x.col_stride, at.count);
    }
  }
}

// An optional input: `otherwise` where it is absent.
template <bool kPlain, class T>
__device__ inline Quad<T> load_or(const Grid& x, Place at, T otherwise) {
  if (x.data != nullptr) return load<kPlain, T>(x, at);
  return {otherwise, otherwise, otherwise, otherwise};
}

struct Mask {  // of a quad, as its bytes lie: bit 8 i is column i. Bare, so that nobody waits for it before it is used
  uint32_t bytes;
  __device__ bool operator[](int i) const { return bytes >> 8 * i & 1; }
  __device__ int count() const { return __popc(bytes & 0x01010101u); }
};

// An absent mask counts every column. Where not plain, its bytes are waited for here, so ask for the rest first.
template <bool kPlain>
__device__ inline Mask load_mask(const Grid& mask, Place at) {
  constexpr uint32_t kEvery = 0x01010101u;
  const auto* m = static_cast<const uint8_t*>(mask.data) + at.row * mask.row_stride + at.col * mask.col_stride;
  if constexpr (kPlain) {
    return {mask.data == nullptr ? kEvery : *reinterpret_cast<const uint32_t*>(m)};
  } else {
    if (mask.data == nullptr) return {kEvery >> 8 * (kQuad - at.count)};
    uint32_t bytes = 0;
#pragma unroll
    for (int i = 0; i < kQuad; ++i) bytes |= i < at.count && m[i * mask.col_stride] != 0 ? 1u << 8 * i : 0u;
    return {bytes};
  }
}

// What the mask hides becomes 0, so that no NaN from behind it enters a formula.
template <class T>
__device__ inline Quad<T> keep(Quad<T> x, Mask mask) {
#pragma unroll
  for (int i = 0; i < kQuad; ++i) x[i] = mask[i] ? x[i] : T(0);
  return x;
}

// Into contiguous (rows, cols) memory. __stcs, because the compiler splits plain assignments of 16 bytes into four.
template <bool kPlain, class T>
__device__ inline void store(T* out, int64_t cols, Place at, const Quad<T>& x) {
  T* to = out + at.row * cols + at.col;
  if constexpr (kPlain) {
    __stcs(reinterpret_cast<float4*>(to), make_float4(x[0], x[1], x[2], x[3]));
  } else {
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      if (i < at.count) to[i] = x[i];
    }
  }
}

// Whether the plain kernel may run.
inline bool aligned(const void* p, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

inline bool is_plain(int64_t cols, std::initializer_list<Grid> inputs, const Grid& mask,
                     std::initializer_list<const void*> outputs) {
  if (cols % kQuad != 0) return false;
  for (const Grid& x : inputs) {
    if (x.data == nullptr) continue;
    if (x.dtype != kFloat32 || x.col_stride != 1 || x.row_stride % kQuad != 0 || !aligned(x.data, 16)) return false;
  }
  for (const void* out : outputs) {
    if (!aligned(out, 16)) return false;
  }
  return mask.data == nullptr || (mask.col_stride == 1 && mask.row_stride % kQuad == 0 && aligned(mask.data, 4));
}

// body(accumulation type, whether plain as a constant): the versions that a kernel is compiled in.
template <class Body>
int with_version(int dtype, bool plain, Body body) {
  if (dtype == kFloat64) return body(double(), std::false_type());
  return plain ? body(float(), std::true_type()) : body(float(), std::false_type());
}

}  // namespace rlhf::cuda
