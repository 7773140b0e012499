// Memory of large gradients, kept from one training step for the next.
//
// malloc gives blocks of 32 MiB and more back to the system as soon as they are freed, and the page faults of a new one
// cost several times what computing the gradient in it does. Tensors made here return their block to a list instead,
// as on a GPU every tensor does. Kept and used blocks together are never more than have been in use at once.
#pragma once
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include "tensor.h"

namespace rlhf {

class KeptMemory {
 public:
  void* take(size_t bytes) {
    const std::lock_guard lock(mutex_);
    Block block{nullptr, bytes};
    // The smallest that is large enough, if it is not far too large: the rest of it would be lost meanwhile.
    auto best = kept_.end();
    for (auto it = kept_.begin(); it != kept_.end(); ++it) {
      const bool fits = it->bytes >= bytes && it->bytes / 2 <= bytes;
      if (fits && (best == kept_.end() || it->bytes < best->bytes)) best = it;
    }
    if (best != kept_.end()) {
      block = *best;
      kept_.erase(best);
    } else {
      while (!kept_.empty() && total(kept_) + total(used_) + bytes > most_used_) release_oldest();
      block.data = ::operator new(bytes, std::align_val_t(kAlignment));
    }
    used_.push_back(block);
    most_used_ = std::max(most_used_, total(used_));
    return block.data;
  }

  void give(void* data) {
    const std::lock_guard lock(mutex_);
    const auto it = std::find_if(used_.begin(), used_.end(), [&](const Block& b) { return b.data == data; });
    kept_.push_back(*it);
    used_.erase(it);
  }

  // Gives all that is kept back to the system -> bytes.
  int64_t empty() {
    const std::lock_guard lock(mutex_);
    const size_t bytes = total(kept_);
    while (!kept_.empty()) release_oldest();
    most_used_ = total(used_);
    return int64_t(bytes);
  }

 private:
  static constexpr size_t kAlignment = 4096;
  struct Block {
    void* data;
    size_t bytes;
  };

  static size_t total(const std::vector<Block>& blocks) {
    size_t sum = 0;
    for (const Block& b : blocks) sum += b.bytes;
    return sum;
  }

  void release_oldest() {
    ::operator delete(kept_.front().data, std::align_val_t(kAlignment));
    kept_.erase(kept_.begin());
  }

  std::mutex mutex_;
  std::vector<Block> kept_, used_;  // a handful
  size_t most_used_ = 0;
};

inline KeptMemory& kept_memory() {
  static auto* memory = new KeptMemory;  // tensors may outlive every static object
  return *memory;
}

// As in dlpack.h: what torch.from_dlpack takes over.
struct DLManagedTensor {
  DLTensor tensor;
  void* context;
  void (*deleter)(DLManagedTensor*);
};

// A capsule for torch.from_dlpack: an uninitialised contiguous CPU tensor of this shape, whose memory comes back here.
inline py::capsule kept_tensor(const std::vector<int64_t>& shape, int dtype) {
  constexpr int kCpu = 1, kFloat = 2, kBfloat = 4, kBits[] = {32, 16, 16, 64};
  struct Owner {
    DLManagedTensor managed{};
    std::vector<int64_t> shape, strides;
  };
  auto owner = std::make_unique<Owner>();
  owner->shape = shape;
  owner->strides.resize(shape.size());
  int64_t count = 1;
  for (size_t i = shape.size(); i-- > 0; count *= shape[i]) owner->strides[i] = count;
  DLTensor& t = owner->managed.tensor;
  t.data = kept_memory().take(size_t(count) * kBits[dtype] / 8);
  t.device_type = kCpu;
  t.ndim = int32_t(shape.size());
  t.code = dtype == kBFloat16 ? kBfloat : kFloat;
  t.bits = uint8_t(kBits[dtype]);
  t.lanes = 1;
  t.shape = owner->shape.data();
  t.strides = owner->strides.data();
  owner->managed.context = owner.get();
  owner->managed.deleter = [](DLManagedTensor* self) {  // from any thread, without the GIL
    kept_memory().give(self->tensor.data);
    delete static_cast<Owner*>(self->context);
  };
  const auto unused = [](PyObject* capsule) {  // torch renames the capsule when it takes the tensor over
    if (!PyCapsule_IsValid(capsule, "dltensor")) return;
    auto* managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"));
    managed->deleter(managed);
  };
  return py::capsule(&owner.release()->managed, "dltensor", unused);
}

}  // namespace rlhf
