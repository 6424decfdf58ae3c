#pragma once
// One way to call the CUDA runtime: an error becomes std::runtime_error with the call's name.
#ifdef TORCH_PD_RUNTIME_CUDA
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace torch_pd {

inline void cuda_call(const char* what, cudaError_t status) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // not left behind for the next caller to find
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// Makes `device` current for a scope; other threads and the caller keep theirs.
class CudaDevice {
 public:
  explicit CudaDevice(int device) {
    cuda_call("cudaGetDevice", cudaGetDevice(&before_));
    cuda_call("cudaSetDevice", cudaSetDevice(device));
  }
  ~CudaDevice() { cudaSetDevice(before_); }
  CudaDevice(const CudaDevice&) = delete;
  CudaDevice& operator=(const CudaDevice&) = delete;

 private:
  int before_ = 0;
};

}  // namespace torch_pd
#endif
