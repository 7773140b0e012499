// The CUDA sources, compiled over the emulator's headers, for ctypes: the address of each op of ops.h under its name.
#include <cstdio>
#include <type_traits>

#include "cuda_runtime.h"
#include "ops.h"

namespace rlhf::cuda {
#define DECLARE(op) std::remove_pointer_t<decltype(CudaOps::op)> op;
RLHF_CUDA_OPS(DECLARE)
#undef DECLARE
}  // namespace rlhf::cuda

extern "C" {
#define ADDRESS(op) \
  extern decltype(rlhf::CudaOps::op) const op##_address; \
  decltype(rlhf::CudaOps::op) const op##_address = &rlhf::cuda::op;
RLHF_CUDA_OPS(ADDRESS)
#undef ADDRESS

extern const int64_t scratch_doubles;
const int64_t scratch_doubles = rlhf::kCudaScratch;

void run_instead(decltype(emulator::instead) run) { emulator::instead = run; }
void set_order(int order) { emulator::order = order; }
void set_capturing(bool capturing) { emulator::capturing = capturing; }
void set_shared_limit(int bytes) { emulator::shared_limit = bytes; }
int function_attribute(int which) { return emulator::function_attributes[which]; }
long launches() { return emulator::launches; }
void flush() { std::fflush(stdout); }
}
