// The device error flag: kernels drop an access that an index value would take outside its pool and
// count it here; the engine reads the row together with the sampled tokens.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>

#include "common.cuh"

namespace torch_pd {

namespace {

constexpr int kMaxDevices = 64;

// One instance per device, zero when the library is loaded there; it is never freed, so captured
// graphs may hold its address.
__device__ int32_t flag_row[4];

__global__ void read_flag(int32_t* flag, int32_t* out, bool reset) {
  const int i = threadIdx.x;
  out[i] = flag[i];
  if (reset) flag[i] = 0;
}

Tensor device_errors(const Tensor& like, bool reset) {
  const char* op = "device_errors";
  const Launch launch(op, like);
  Tensor out = torch::stable::new_empty(like, {4}, ScalarType::Int);
  read_flag<<<1, 4, 0, launch.stream>>>(error_flag(op, launch.device),
                                        static_cast<int32_t*>(out.data_ptr()), reset);
  launch.check();
  return out;
}

}  // namespace

int32_t* error_flag(const char* op, int device) {
  static std::atomic<int32_t*> flags[kMaxDevices];
  TPD_CHECK(op, device >= 0 && device < kMaxDevices, "CUDA device index ", device, " is above ",
            kMaxDevices - 1);
  int32_t* flag = flags[device].load(std::memory_order_acquire);
  if (flag != nullptr) return flag;
  // The first use may fall into a graph capture, which forbids loading a module unless relaxed.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  check_cuda(op, cudaThreadExchangeStreamCaptureMode(&mode), "cudaThreadExchangeStreamCaptureMode");
  void* address = nullptr;
  const cudaError_t error = cudaGetSymbolAddress(&address, flag_row);
  check_cuda(op, cudaThreadExchangeStreamCaptureMode(&mode), "cudaThreadExchangeStreamCaptureMode");
  check_cuda(op, error, "cudaGetSymbolAddress");
  flag = static_cast<int32_t*>(address);
  flags[device].store(flag, std::memory_order_release);
  return flag;
}

}  // namespace torch_pd

STABLE_TORCH_LIBRARY_IMPL(torch_pd, CUDA, m) {
  m.impl("device_errors", TORCH_BOX(&torch_pd::device_errors));
}
