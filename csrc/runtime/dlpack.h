// Memory as a tensor, by the part of DLPack (version 0) that is needed here: uint8, one dimension.
//
// A tensor made this way belongs to the device that is named; asked for the device of an address,
// torch would name the owner's and run kernels there.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>

namespace torch_pd {

struct DLDevice {
  int32_t type, id;
};
struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct DLManagedTensor {
  DLTensor tensor;
  void* context;
  void (*deleter)(DLManagedTensor*);
};

struct DLExport {
  DLManagedTensor managed{};
  std::shared_ptr<const void> owner;
  int64_t shape = 0, stride = 1;
};

// A capsule of the bytes at an address of `device`, -1 for the CPU; it keeps `owner`, and so does
// the tensor that is made of it.
inline pybind11::capsule to_dlpack(std::shared_ptr<const void> owner, uint64_t address,
                                   size_t nbytes, int device) {
  auto* held = new DLExport;
  held->owner = std::move(owner);
  held->shape = static_cast<int64_t>(nbytes);
  held->managed.context = held;
  held->managed.deleter = [](DLManagedTensor* self) {
    delete static_cast<DLExport*>(self->context);
  };
  const DLDevice on = device < 0 ? DLDevice{1 /* CPU */, 0} : DLDevice{2 /* CUDA */, device};
  held->managed.tensor = {reinterpret_cast<void*>(address),
                          on,
                          1,
                          1 /* unsigned */,
                          8,
                          1,
                          &held->shape,
                          &held->stride,
                          0};
  return pybind11::capsule(&held->managed, "dltensor", [](PyObject* capsule) {
    // Whoever took the tensor has renamed the capsule.
    if (PyCapsule_IsValid(capsule, "dltensor")) {
      auto* managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"));
      managed->deleter(managed);
    }
  });
}

}  // namespace torch_pd
