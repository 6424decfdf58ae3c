// Scratch floats of one thread.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace torch_pd {

// At least `size` floats, 64-byte aligned, valid until this thread's next call. Kept between ops:
// fresh pages would cost more than the work that is done in them.
inline float* scratch_floats(int64_t size) {
  struct Free {
    void operator()(float* p) const { ::operator delete[](p, std::align_val_t(64)); }
  };
  thread_local std::unique_ptr<float[], Free> buffer;
  thread_local int64_t capacity = 0;
  if (size > capacity) {
    buffer.reset();
    capacity = 0;
    buffer.reset(static_cast<float*>(::operator new[](size * sizeof(float), std::align_val_t(64))));
    capacity = size;
  }
  return buffer.get();
}

}  // namespace torch_pd
