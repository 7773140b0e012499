// How the row kernels use threads, memory and dtypes.
#pragma once
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../ops.h"
#include "softmax_row.h"

namespace rlhf::RLHF_ISA {

// f(F32{}), f(BF16{}), ... for a DType code.
template <class F>
inline auto with_element(int dtype, F f) {
  switch (dtype) {
    case kBFloat16:
      return f(BF16{});
    case kFloat16:
      return f(F16{});
    case kFloat64:
      return f(F64{});
    default:
      return f(F32{});
  }
}

// Waking a thread costs some 3 us; 16k elements take about 4.
inline int team(int threads, int64_t elements) { return elements < 2 * 16384 ? 1 : threads; }

// Rows given to a thread at a time: some 4 MiB, so that two threads do not meet in one huge page, and at least 8 shares
// a thread, because masked rows cost nothing.
inline int64_t grain(int64_t rows, int64_t row_bytes, int threads) {
  const int64_t by_size = (int64_t(4) << 20) / (row_bytes + 1), by_count = rows / (8 * int64_t(threads));
  const int64_t least = by_size < by_count ? by_size : by_count;
  return least < 1 ? 1 : least;
}

// row(i) -> whether it takes the row; the first that it refuses, or -1. One thread goes without OpenMP, which makes a
// team even then, in 0.4 us.
template <class F>
inline int64_t each_row(int64_t rows, int threads, int64_t grain, F row) {
  int64_t refused = rows;
  if (threads == 1) {
    for (int64_t i = 0; i < rows; ++i) {
      if (!row(i)) return i;
    }
    return -1;
  }
#pragma omp parallel for num_threads(threads) schedule(dynamic, grain) reduction(min : refused)
  for (int64_t i = 0; i < rows; ++i) {
    if (!row(i) && i < refused) refused = i;
  }
  return refused == rows ? -1 : refused;
}

// Bytes of a tensor that comes from mmap, not from memory that malloc keeps, and does not stay in a cache either.
constexpr int64_t kLarge = int64_t(32) << 20;

// Whether to write a result of this size past the caches (put). Measured on AMD's, where a gradient then takes 0.72 to
// 0.81 of the time; Intel's hold such a store in a buffer of the core until memory has taken it, and have not been
// measured.
inline bool past_cache(int64_t bytes) {
#if defined(__x86_64__)
  return bytes >= kLarge && __builtin_cpu_is("amd");
#else
  return false;
#endif
}

// A fresh gradient of this size comes from mmap, and its page faults cost more than the arithmetic: 652 MB take 220 ms
// to fault in with 4 KiB pages and 52 ms with huge ones (2 threads, EPYC 9004). Below 32 MiB malloc reuses memory.
inline void use_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes < kLarge) return;
  const uintptr_t page = 4096, begin = (reinterpret_cast<uintptr_t>(data) + page - 1) & ~(page - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(page - 1);
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a hint: failure changes only the speed
#endif
}

// Gives whole pages between two addresses back to the system, where they are part of such a large allocation. Their
// content is lost, the addresses stay valid.
inline void release_pages(uintptr_t from, uintptr_t to, int64_t bytes) {
#if defined(__linux__) && defined(MADV_DONTNEED)
  if (bytes < kLarge) return;
  const uintptr_t page = 4096, begin = (from + page - 1) & ~(page - 1), end = to & ~(page - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
#endif
}

}  // namespace rlhf::RLHF_ISA
