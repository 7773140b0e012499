// CUDA's runtime header for a machine without CUDA: kernels run as ordinary C++, one fiber per thread of a block.
//
// Blocks run one after the other. A fiber runs until it waits at a barrier or for its warp; emulator::order says which
// thread, and which block, runs next (0 ascending, 1 descending, 2 shuffled), and results that depend on it are races.
// Shared memory is a static variable. Not modelled: blocks side by side, memory ordering, divergence within a warp,
// tensor cores, asynchronous copies.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)

namespace emulator {

inline bool misaligned = false;  // a vector was read or written beside its boundary, which a GPU refuses

template <int kBytes>
struct alignas(kBytes) Aligned {
  Aligned() = default;
  Aligned(const Aligned& from) { check(&from); }
  Aligned& operator=(const Aligned& from) {
    check(&from);
    check(this);
    return *this;
  }
  static void check(const void* p) {
    auto address = reinterpret_cast<uintptr_t>(p);
    asm volatile("" : "+r"(address));  // the compiler believes the type, and would leave out the question
    if (address % kBytes != 0) misaligned = true;
  }
};

}  // namespace emulator

struct uint2 : emulator::Aligned<8> {
  uint32_t x, y;
};
struct uint4 : emulator::Aligned<16> {
  uint32_t x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {{}, x, y, z, w}; }
struct float4 : emulator::Aligned<16> {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {{}, x, y, z, w}; }
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

constexpr int kMostShared = 232448;  // bytes a block of Hopper may ask for
inline uint4 dynamic_shared[kMostShared / 16 + 1];

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorIllegalAddress = 700,
  cudaErrorLaunchTimeout = 702,
  cudaErrorAssert = 710,
  cudaErrorMisalignedAddress = 716
};
using cudaStream_t = struct Stream*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

namespace emulator {

constexpr int kWarp = 32;
constexpr size_t kStack = 128 * 1024;

inline int order = 0;           // who runs next, see above
inline bool capturing = false;  // what cudaStreamIsCapturing says
inline long launches = 0;       // kernels and memsets so far
inline int shared_limit = kMostShared;
inline int function_attributes[2];  // the last values that any kernel was given
// What runs a kernel instead, where it is set: tests/cuda/compiled.py.
inline int (*instead)(void (*kernel)(), unsigned blocks, unsigned threads, size_t shared, int count,
                      const void** values, const size_t* sizes) = nullptr;

enum class State { kReady, kDone };

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  State state;
  long barriers, exchanges;  // how many it has reached
};

struct Warp {
  long deposits;  // into exchanges, by all lanes together
  uint64_t slots[2][kWarp];
};

inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline unsigned current;
inline long arrivals;
inline bool progress, trapped;

inline void yield() { swapcontext(&fibers[current].context, &scheduler); }

template <typename Condition>
void wait_until(Condition condition) {
  while (!condition()) yield();
  progress = true;
}

inline void run_fiber() {
  body();
  fibers[current].state = State::kDone;
  progress = true;
}

inline void start_fiber(Fiber& fiber) {
  fiber.stack.resize(kStack);
  fiber.state = State::kReady;
  fiber.barriers = fiber.exchanges = 0;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.data();
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = &scheduler;
  makecontext(&fiber.context, run_fiber, 0);
}

template <typename Index>
std::vector<Index> in_order(Index count, std::mt19937& random) {
  std::vector<Index> queue(count);
  std::iota(queue.begin(), queue.end(), Index(0));
  if (order == 1) std::reverse(queue.begin(), queue.end());
  if (order == 2) std::shuffle(queue.begin(), queue.end(), random);
  return queue;
}

// cudaErrorLaunchTimeout where every thread waits for another: a barrier that some of them never reach.
inline cudaError_t run_block(std::mt19937& random) {
  const unsigned threads = blockDim.x;
  fibers.resize(threads);
  warps.assign((threads + kWarp - 1) / kWarp, Warp());
  arrivals = 0;
  for (Fiber& fiber : fibers) start_fiber(fiber);
  std::vector<unsigned> queue = in_order(threads, random);
  while (!queue.empty()) {
    progress = false;
    if (order == 2) std::shuffle(queue.begin(), queue.end(), random);
    for (const unsigned thread : queue) {
      current = thread;
      threadIdx = dim3(thread);
      swapcontext(&scheduler, &fibers[thread].context);
      if (trapped) return cudaErrorAssert;
    }
    queue.erase(std::remove_if(queue.begin(), queue.end(), [](unsigned i) { return fibers[i].state == State::kDone; }),
                queue.end());
    if (!progress) return cudaErrorLaunchTimeout;
  }
  return cudaSuccess;
}

// Every lane of the warp gives a value and gets `read` of all of them. Two generations of slots: nobody deposits a
// second time before all have read the first.
template <typename T, typename Read>
auto exchange(T value, Read read) {
  static_assert(sizeof(T) <= 8);
  const unsigned lane = current % kWarp;
  Warp& warp = warps[current / kWarp];
  const long mine = fibers[current].exchanges++;
  uint64_t* slots = warp.slots[mine % 2];
  std::memcpy(slots + lane, &value, sizeof(T));
  ++warp.deposits;
  wait_until([&] { return warp.deposits >= (mine + 1) * kWarp; });
  return read([slots](unsigned from) {
    T theirs;
    std::memcpy(&theirs, slots + from, sizeof(T));
    return theirs;
  });
}

template <typename T>
T value_of_lane(T value, unsigned from) {
  const unsigned lane = current % kWarp;
  return exchange(value, [&](auto slot) { return slot(from < kWarp ? from : lane); });
}

}  // namespace emulator

inline void __syncthreads() {
  const long mine = ++emulator::fibers[emulator::current].barriers;
  ++emulator::arrivals;
  emulator::wait_until([mine] { return emulator::arrivals >= mine * static_cast<long>(blockDim.x); });
}
inline void __threadfence() {}

template <typename T>
T __shfl_sync(unsigned, T value, int from) {
  return emulator::value_of_lane(value, from);
}
template <typename T>
T __shfl_down_sync(unsigned, T value, int offset) {
  return emulator::value_of_lane(value, emulator::current % emulator::kWarp + offset);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int bits) {
  return emulator::value_of_lane(value, emulator::current % emulator::kWarp ^ bits);
}
inline unsigned __ballot_sync(unsigned, int flag) {
  return emulator::exchange(flag, [](auto slot) {
    unsigned bits = 0;
    for (int i = 0; i < emulator::kWarp; ++i) bits |= slot(i) ? 1u << i : 0u;
    return bits;
  });
}
inline int __reduce_add_sync(unsigned, int value) {
  return emulator::exchange(value, [](auto slot) {
    int sum = 0;
    for (int i = 0; i < emulator::kWarp; ++i) sum += slot(i);
    return sum;
  });
}

template <typename T>
T atomicAdd(T* to, T value) {
  const T before = *to;
  *to += value;
  return before;
}
inline unsigned atomicInc(unsigned* to, unsigned limit) {
  const unsigned before = *to;
  *to = before >= limit ? 0 : before + 1;
  return before;
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned bits) {
  return static_cast<unsigned>((uint64_t(high) << 32 | low) >> (bits & 31));
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __dp4a(unsigned a, unsigned b, unsigned sum) {
  for (int i = 0; i < 32; i += 8) sum += (a >> i & 255) * (b >> i & 255);
  return sum;
}

[[noreturn]] inline void __trap() {
  emulator::trapped = true;
  emulator::yield();
  std::abort();  // a trapped block is never resumed
}

template <typename... Parameters>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Parameters... values) {
  std::mt19937 random(1);
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  emulator::trapped = emulator::misaligned = false;
  emulator::body = [=] { kernel(values...); };
  ++emulator::launches;
  if (emulator::instead != nullptr) {
    const void* addresses[] = {&values...};
    const size_t sizes[] = {sizeof(values)...};
    return static_cast<cudaError_t>(emulator::instead(reinterpret_cast<void (*)()>(kernel), gridDim.x, blockDim.x,
                                                      config->dynamicSmemBytes, sizeof...(values), addresses, sizes));
  }
  auto* shared = reinterpret_cast<unsigned char*>(dynamic_shared);
  const size_t bytes = config->dynamicSmemBytes, guarded = std::min(bytes + 16, sizeof(dynamic_shared));
  if (bytes > static_cast<size_t>(emulator::shared_limit)) return cudaErrorInvalidValue;
  for (const unsigned block : emulator::in_order(config->gridDim.x, random)) {
    blockIdx = dim3(block);
    std::memset(shared, 0xff, guarded);  // NaN, in every dtype
    if (const cudaError_t error = emulator::run_block(random)) return error;
    if (emulator::misaligned) return cudaErrorMisalignedAddress;
    for (size_t i = bytes; i < guarded; ++i) {
      if (shared[i] != 0xff) return cudaErrorIllegalAddress;  // what was written lies beyond what was asked for
    }
  }
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  ++emulator::launches;
  return cudaSuccess;
}

enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = emulator::capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
inline cudaError_t cudaStreamGetId(cudaStream_t stream, unsigned long long* id) {
  *id = reinterpret_cast<uintptr_t>(stream);
  return cudaSuccess;
}

enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerMultiprocessor, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributePreferredSharedMemoryCarveout };
constexpr int cudaSharedmemCarveoutMaxShared = 100;
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = emulator::shared_limit + (attribute == cudaDevAttrMaxSharedMemoryPerMultiprocessor ? 1024 : 0);
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute attribute, int value) {
  emulator::function_attributes[attribute] = value;
  return value <= emulator::shared_limit ? cudaSuccess : cudaErrorInvalidValue;
}

using std::exp;
using std::fmax;
using std::isfinite;
using std::log;
using std::max;
using std::min;
using std::sqrt;
inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
template <typename T>
void __stcs(T* to, T value) {
  *to = value;
}
inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dmul_rn(double a, double b) { return a * b; }

template <typename T>
T __ldcg(const T* from) {
  return *from;
}
