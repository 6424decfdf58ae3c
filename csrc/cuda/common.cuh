// What every CUDA body needs: the current stream and device, launch checks, and the device-side
// error flag. No torch CUDA library is linked, so that this library also loads beside a CPU torch.
#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <cstdint>

#include "../check.h"

namespace torch_pd {

// aoti_torch_get_current_cuda_stream lives in libtorch_cuda, which a CPU torch lacks and which the
// linker's search does not reach (torch loads it privately): found by name, null if not loaded.
using CurrentStream = int32_t (*)(int32_t device, void** stream);

inline CurrentStream find_current_stream() {
  static const CurrentStream found = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* symbol = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
    return reinterpret_cast<CurrentStream>(symbol);
  }();
  return found;
}

inline void check_cuda(const char* op, cudaError_t error, const char* what) {
  TPD_CHECK(op, error == cudaSuccess, what, ": ", cudaGetErrorName(error), ", ",
            cudaGetErrorString(error));
}

struct DeviceInfo {
  int capability;  // major * 10 + minor
  int num_sms;
  int max_shared;  // bytes of shared memory that one block may ask for
};

inline const DeviceInfo& device_info(const char* op, int device) {
  constexpr int kMaxDevices = 64;
  static DeviceInfo infos[kMaxDevices];  // capability 0: not yet read; racing writers agree
  TPD_CHECK(op, device >= 0 && device < kMaxDevices, "CUDA device index ", device, " is above ",
            kMaxDevices - 1);
  DeviceInfo& info = infos[device];
  if (info.capability == 0) {
    int major = 0, minor = 0;
    const auto read = [&](int* value, cudaDeviceAttr attribute) {
      check_cuda(op, cudaDeviceGetAttribute(value, attribute, device), "cudaDeviceGetAttribute");
    };
    read(&major, cudaDevAttrComputeCapabilityMajor);
    read(&minor, cudaDevAttrComputeCapabilityMinor);
    read(&info.num_sms, cudaDevAttrMultiProcessorCount);
    read(&info.max_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin);
    info.capability = major * 10 + minor;
  }
  TPD_CHECK(op, info.capability >= 80, "needs compute capability 8.0 or later, cuda:", device,
            " has ", info.capability / 10, ".", info.capability % 10);
  return info;
}

// Makes the tensor's device current for its lifetime and holds torch's current stream there.
class Launch {
 public:
  Launch(const char* op, const Tensor& t)
      : op(op), device(t.get_device_index()), guard_(device), info(device_info(op, device)) {
    const CurrentStream current_stream = find_current_stream();
    TPD_CHECK(op, current_stream != nullptr,
              "this torch has no CUDA: install a CUDA build of torch");
    void* current = nullptr;
    TPD_CHECK(op, current_stream(device, &current) == 0,
              "torch gave no current stream for cuda:", device);
    stream = static_cast<cudaStream_t>(current);
  }

  // After each launch: a wrong launch is reported here, by op, not at some later call.
  void check() const { check_cuda(op, cudaGetLastError(), "kernel launch"); }

  // For kernels whose dynamic shared memory, with their static one, may exceed 48 KiB.
  template <typename Kernel>
  void allow_shared(Kernel* kernel, int bytes) const {
    TPD_CHECK(op, bytes <= info.max_shared, "needs ", bytes, " bytes of shared memory a block, ",
              "cuda:", device, " has ", info.max_shared);
    check_cuda(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
               "cudaFuncSetAttribute");
  }

  const char* const op;
  const int device;

 private:
  torch::stable::accelerator::DeviceGuard guard_;

 public:
  const DeviceInfo& info;
  cudaStream_t stream;
};

// What a kernel found in a tensor. The access was dropped. Texts: torch_pd/ops.py.
enum DeviceError : int32_t {
  kBadPage = 1,    // block table entry: page beyond its pool
  kBadPlace = 2,   // block table entry: place beyond the table of places
  kBadLength = 3,  // seq_lens, query_start or kv_start: outside the tables or tensors
  kBadSlot = 4,    // slots: beyond the pool
  kBadMove = 5,    // moves: page beyond its pool
  kBadLogits = 6,  // logits: a row with NaN, or without a token to choose; value is the row
  kBadToken = 7,   // token ids of adjustments: beyond the vocabulary
  kLostPeer = 8,   // exchange: nothing came from a rank; value is the rank
};

// Which op found it.
enum DeviceOp : int32_t {
  kPagedAttention = 1,
  kWriteKV = 2,
  kGatherKV = 3,
  kCopyPages = 4,
  kRopeWriteKV = 5,
  kSample = 6,
  kAdjustLogits = 7,
  kExchange = 8,
};

// The flag of one device: int32 [4] = {count, DeviceOp | DeviceError << 8, value low, value high};
// op, error and value are those of the first find since the flag was cleared. Allocated once
// (errors.cu).
int32_t* error_flag(const char* op, int device);

// One thread per bad value should call it.
__device__ inline void raise_flag(int32_t* flag, DeviceOp op, DeviceError error, int64_t value) {
  if (atomicAdd(flag, 1) == 0) {
    flag[1] = op | error << 8;
    flag[2] = static_cast<int32_t>(value);
    flag[3] = static_cast<int32_t>(value >> 32);
  }
}

}  // namespace torch_pd
