// The table of one instruction set. Like every file in csrc/cpu it is compiled once per instruction set, with
// RLHF_ISA naming the namespace that keeps the copies apart.
#include <type_traits>

#include "../ops.h"

namespace rlhf::RLHF_ISA {

#define DECLARE(op) std::remove_pointer_t<decltype(CpuOps::op)> op;
RLHF_CPU_OPS(DECLARE)
#undef DECLARE

// Data, which the loader fills, and no code: dispatch.cpp reads it before it knows what the CPU runs.
constexpr CpuOps filled() {
  CpuOps ops{};
#define FILL(op) ops.op = op;
  RLHF_CPU_OPS(FILL)
#undef FILL
  return ops;
}

extern const CpuOps table;
constexpr CpuOps table = filled();

}  // namespace rlhf::RLHF_ISA
