// Chooses, once, the best instruction set that this CPU runs.
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstring>

#include "ops.h"

namespace rlhf {

#if defined(__x86_64__)
namespace avx512 {
extern const CpuOps table;
}
namespace avx2 {
extern const CpuOps table;
}
#endif
namespace portable {
extern const CpuOps table;
}

#if defined(__x86_64__)
namespace {

bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

#if defined(__linux__)
constexpr long kSupportedState = 0x1021, kRequestPermission = 0x1023, kTileData = 18;
#endif

// By the CPU and by Linux, which saves them where a thread is interrupted.
bool has_tiles() {
#if defined(__linux__)
  constexpr unsigned kLeaf = 7, kBFloat16Tiles = 1u << 22, kTiles = 1u << 24;  // of edx
  unsigned a, b, c, d;
  uint64_t states = 0;
  return __get_cpuid_count(kLeaf, 0, &a, &b, &c, &d) && (d & kTiles) && (d & kBFloat16Tiles) &&
         syscall(SYS_arch_prctl, kSupportedState, &states) == 0 && (states >> kTileData & 1);
#else
  return false;
#endif
}

}  // namespace
#endif

const CpuIsa* cpu_isas(int* count) {
  static const CpuIsa isas[] = {
#if defined(__x86_64__)
      {"amx", avx512::table, has_avx512() && has_tiles(), true},
      {"avx512", avx512::table, has_avx512()},
      // Every CPU with AVX2 and FMA has F16C.
      {"avx2", avx2::table, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
      {"portable", portable::table, true},
  };
  *count = sizeof(isas) / sizeof(isas[0]);
  return isas;
}

namespace {

const CpuIsa* best() {
  int count;
  const CpuIsa* isa = cpu_isas(&count);
  while (!isa->supported) ++isa;
  return isa;
}

const CpuIsa* in_use = best();

}  // namespace

const CpuIsa& cpu_isa() { return *in_use; }

bool may_use_tiles() {
#if defined(__x86_64__) && defined(__linux__)
  if (!in_use->tiles) return false;
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
#else
  return false;
#endif
}

bool use_cpu_isa(const char* name) {
  int count;
  const CpuIsa* isas = cpu_isas(&count);
  for (int i = 0; i < count; ++i) {
    if (std::strcmp(isas[i].name, name) == 0 && isas[i].supported) {
      in_use = &isas[i];
      return true;
    }
  }
  return false;
}

}  // namespace rlhf
