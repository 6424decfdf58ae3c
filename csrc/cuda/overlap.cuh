// Kernels whose start overlaps with the end of the one before them in the stream (programmatic
// dependent launch): their blocks are in place when that one's last writes are done.
#pragma once

#include <type_traits>

#include "common.cuh"
#include "ptx.cuh"

namespace torch_pd {

// Starts a kernel that begins with after_previous(). Works under graph capture; on GPUs before
// sm_90 it is an ordinary launch.
template <typename... Args>
inline void start_overlapped(const Launch& launch, void (*kernel)(Args...), int64_t blocks,
                             int threads, const std::type_identity_t<Args>&... args) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(blocks);
  config.blockDim = static_cast<unsigned>(threads);
  config.stream = launch.stream;
  config.attrs = &attribute;
  config.numAttrs = launch.info.capability >= 90 ? 1 : 0;
  check_cuda(launch.op, cudaLaunchKernelEx(&config, kernel, args...), "kernel launch");
}

// Every thread calls it before its first access to memory. Until then the kernels before may still
// be writing; ptx::prefetch_l2 alone is allowed, as nothing read before is kept.
__device__ __forceinline__ void after_previous() {
  ptx::grid_dependency_wait();
  ptx::launch_dependents();
}

}  // namespace torch_pd
