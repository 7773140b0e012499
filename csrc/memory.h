// Memory of large gradients, kept from one training step for the next.
//
// malloc gives blocks of 32 MiB and more back to the system as soon as they are freed, and smaller ones where they lie
// at the end of its heap. The page faults of a new one cost several times what computing the gradient in it does.
// Tensors made here return their block to a list instead, as on a GPU every tensor does. Kept and used blocks together
// are never more than have been in use at once.
#pragma once
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <new>
#include <vector>

#include "tensor.h"
#if defined(__GLIBC__)
#include <malloc.h>
#endif

namespace rlhf {

constexpr size_t kAlignment = 64;

inline void* aligned(void* start) {
  return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(start) + kAlignment - 1) & -uintptr_t(kAlignment));
}

class KeptMemory {
 public:
  // Bytes; read and set under the GIL. In a step of SFT whose gradient of the lm_head has 31 MiB, 32 << 20 gave 20,000
  // page faults where this gives 2,000 to 6,000, and took 1.13 to 1.17 times as long.
  size_t from = 8 << 20;

  void* take(size_t bytes) {
    const std::lock_guard lock(mutex_);
    Block block{nullptr, nullptr, bytes};
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
      // Aligned by hand: what malloc cuts off its blocks for an alignment hardly fits anything later. Gradients of 8 to
      // 32 MiB of many sizes, one at a time, came to hold 225 MiB; so they hold 88.
      block.start = ::operator new(bytes + kAlignment);
      block.data = aligned(block.start);
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
#if defined(__GLIBC__)
    malloc_trim(0);  // else it keeps some of the blocks in its heap
#endif
    most_used_ = total(used_);
    return int64_t(bytes);
  }

 private:
  struct Block {
    void *start, *data;
    size_t bytes;
  };

  static size_t total(const std::vector<Block>& blocks) {
    size_t sum = 0;
    for (const Block& b : blocks) sum += b.bytes;
    return sum;
  }

  void release_oldest() {
    ::operator delete(kept_.front().start);
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

// A tensor that owns its block, which follows it, or is of kept memory.
struct Owned {
  static constexpr int kMostAxes = 8;

  DLManagedTensorVersioned managed;
  int64_t shape[kMostAxes], strides[kMostAxes];

  void* behind() { return aligned(this + 1); }
  static void free(DLManagedTensorVersioned* self) { ::operator delete(self); }
  static void give_back(DLManagedTensorVersioned* self) {
    kept_memory().give(self->tensor.data);
    free(self);
  }
};

// An uninitialised contiguous CPU tensor.
inline PyObject* make_tensor(const int64_t* shape, int axes, int dtype) {
  constexpr int kCpu = 1, kFloat = 2, kBfloat = 4, kBits[] = {32, 16, 16, 64};
  size_t bytes = kBits[dtype] / 8;
  for (int i = 0; i < axes; ++i) bytes *= size_t(shape[i]);
  const bool kept = bytes >= kept_memory().from && bytes > 0;
  // Aligned here: malloc keeps small blocks at hand for each thread, but not for aligned_alloc.
  auto* owned = new (::operator new(sizeof(Owned) + (kept ? 0 : kAlignment + bytes))) Owned;
  int64_t stride = 1;
  for (int i = axes; i-- > 0; stride *= std::max<int64_t>(shape[i], 1)) {  // as torch strides what is empty
    owned->shape[i] = shape[i];
    owned->strides[i] = stride;
  }
  DLManagedTensorVersioned& managed = owned->managed;
  managed = {torch().exchange->major, torch().exchange->minor, nullptr, kept ? Owned::give_back : Owned::free, 0, {}};
  try {
    managed.tensor.data = kept ? kept_memory().take(bytes) : owned->behind();
  } catch (...) {
    Owned::free(&managed);
    throw;
  }
  managed.tensor.device_type = kCpu;
  managed.tensor.ndim = axes;
  managed.tensor.code = dtype == kBFloat16 ? kBfloat : kFloat;
  managed.tensor.bits = uint8_t(kBits[dtype]);
  managed.tensor.lanes = 1;
  managed.tensor.shape = owned->shape;
  managed.tensor.strides = owned->strides;
  void* object = nullptr;  // torch steals the tensor, so it is not freed here where torch fails
  if (torch().exchange->to_object(&managed, &object) == 0) return static_cast<PyObject*>(object);
  throw py::error_already_set();
}

struct Shape {
  static constexpr int64_t kMostElements = int64_t{1} << 48;  // more than memory has, and far from where bytes overflow

  int64_t sizes[Owned::kMostAxes];
  int axes = 0;
  int64_t elements = 1;  // without the axes of size 0

  // Of a tensor, of a number, or of a tuple of both; false where it is none, or has too many axes or elements.
  bool append(PyObject* x) {
    if (PyLong_Check(x)) {
      int overflow;  // -1 is then what it gives
      return append(PyLong_AsLongLongAndOverflow(x, &overflow));
    }
    if (PyTuple_Check(x)) {
      for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(x); ++i) {
        if (!append(PyTuple_GET_ITEM(x, i))) return false;
      }
      return true;
    }
    DLTensor t;
    if (!is_plain_tensor(x) || !read(x, t)) return false;
    return std::all_of(t.shape, t.shape + t.ndim, [&](int64_t size) { return append(size); });
  }
  bool append(int64_t size) {
    if (size < 0 || axes == Owned::kMostAxes || size > kMostElements / elements) return false;
    elements *= std::max<int64_t>(size, 1);
    sizes[axes++] = size;
    return true;
  }
};

// An uninitialised contiguous CPU tensor; null where torch has to make it, or to say why it cannot.
inline py::object empty(PyObject* like, int dtype) {
  Shape shape;
  if (!shape.append(like)) return {};
  try {
    return py::reinterpret_steal<py::object>(make_tensor(shape.sizes, shape.axes, dtype));
  } catch (const std::bad_alloc&) {
    return {};
  }
}

// (like, dtype, *shapes) -> a tuple of uninitialised contiguous tensors of these shapes (None: none); a dtype of -1 is
// what values of like's are accumulated in. Or None where torch has to make them: like is not a plain CPU tensor, or
// memory does not suffice. Takes a third of the time of torch.empty, which parses its arguments and asks a dispatcher.
inline PyObject* empties(PyObject* const* given, Py_ssize_t count) {
  DLTensor like;
  if (count < 2 || !is_plain_tensor(given[0]) || !read(given[0], like) || like.device_type != 1) Py_RETURN_NONE;
  long dtype = PyLong_AsLong(given[1]);
  if (PyErr_Occurred()) throw py::error_already_set();
  if (dtype == -1) dtype = like.dtype() == kFloat64 ? kFloat64 : kFloat32;
  if (dtype < 0 || dtype >= kBool) throw py::value_error("needs the code of a floating dtype");
  py::object made = checked(PyTuple_New(count - 2));
  for (Py_ssize_t i = 2; i < count; ++i) {
    py::object one = given[i] == Py_None ? py::none() : empty(given[i], int(dtype));
    if (!one) Py_RETURN_NONE;
    PyTuple_SET_ITEM(made.ptr(), i - 2, one.release().ptr());
  }
  return made.release().ptr();
}

}  // namespace rlhf
