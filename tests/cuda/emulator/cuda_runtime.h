// CUDA's runtime header for a machine without CUDA: kernels run as ordinary C++, one fiber per thread of a block.
//
// Blocks run one after the other. A fiber runs until it waits at a barrier or a shuffle; emulator::order says who runs
// next (0 ascending, 1 descending, 2 shuffled), and results that depend on it are races. Shared memory is a static
// variable. Not modelled: memory ordering within a warp, divergence, tensor cores, asynchronous copies.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)

struct uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorAssert = 710, cudaErrorLaunchTimeout = 702 };
using cudaStream_t = struct Stream*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

namespace emulator {

constexpr int kWarp = 32;
constexpr size_t kStack = 128 * 1024;

inline int order = 0;  // who runs next, see above

enum class State { kReady, kDone };

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  State state;
  long barriers, shuffles;  // how many it has reached
};

struct Warp {
  long deposits;  // into shuffles, by all lanes together
  double slots[2][kWarp];
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
  fiber.barriers = fiber.shuffles = 0;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.data();
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = &scheduler;
  makecontext(&fiber.context, run_fiber, 0);
}

// cudaErrorLaunchTimeout where every thread waits for another: a barrier that some of them never reach.
inline cudaError_t run_block(std::mt19937& random) {
  const unsigned threads = blockDim.x;
  fibers.resize(threads);
  warps.assign((threads + kWarp - 1) / kWarp, Warp());
  arrivals = 0;
  std::vector<unsigned> queue(threads);
  for (unsigned i = 0; i < threads; ++i) {
    start_fiber(fibers[i]);
    queue[i] = order == 1 ? threads - 1 - i : i;
  }
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

}  // namespace emulator

inline void __syncthreads() {
  const long mine = ++emulator::fibers[emulator::current].barriers;
  ++emulator::arrivals;
  emulator::wait_until([mine] { return emulator::arrivals >= mine * static_cast<long>(blockDim.x); });
}

// Two generations of slots: nobody deposits a second time before all have read the first.
template <typename T>
T __shfl_down_sync(unsigned, T value, int offset) {
  using namespace emulator;
  const unsigned lane = current % kWarp, from = lane + offset;
  Warp& warp = warps[current / kWarp];
  const long mine = fibers[current].shuffles++;
  warp.slots[mine % 2][lane] = value;
  ++warp.deposits;
  wait_until([&] { return warp.deposits >= (mine + 1) * kWarp; });
  return static_cast<T>(warp.slots[mine % 2][from < kWarp ? from : lane]);
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
  emulator::trapped = false;
  emulator::body = [=] { kernel(values...); };
  for (unsigned block = 0; block < config->gridDim.x; ++block) {
    blockIdx = dim3(block);
    if (const cudaError_t error = emulator::run_block(random)) return error;
  }
  return cudaSuccess;
}

using std::exp;
using std::log;
using std::min;
inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
template <typename T>
void __stcs(T* to, T value) {
  *to = value;
}
