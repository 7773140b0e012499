// Chooses, once, the best instruction set that this CPU runs.
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

const CpuIsa* cpu_isas(int* count) {
  static const CpuIsa isas[] = {
#if defined(__x86_64__)
      {"avx512", avx512::table,
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl")},
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
