// The formulas of csrc/common on a GPU, with the KL estimator chosen at run time: the branch is uniform.
#pragma once

#define RLHF_ISA cuda  // the namespace of csrc/common

#include <cuda_runtime.h>

#include "../common/policy.h"

namespace rlhf::cuda {

template <class T>
__device__ inline Kl<T> kl_token(int estimator, T d, T input = INFINITY, T output = INFINITY) {
  switch (estimator) {
    case kK1:
      return kl_clamped<kK1>(d, input, output);
    case kK2:
      return kl_clamped<kK2>(d, input, output);
    case kAbs:
      return kl_clamped<kAbs>(d, input, output);
    default:
      return kl_clamped<kK3>(d, input, output);
  }
}

}  // namespace rlhf::cuda
