// The CUDA driver's calls for virtual memory. They are looked up when they are first needed, so the
// module loads without a GPU.
#pragma once
#include "runtime/cuda_call.h"

#ifdef TORCH_PD_RUNTIME_CUDA
#include <cuda.h>

#include <stdexcept>
#include <string>

namespace torch_pd {

template <typename Function>
Function* driver(const char* name) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result{};
  cuda_call("cudaGetDriverEntryPointByVersion",
            cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &result));
  if (result != cudaDriverEntryPointSuccess || found == nullptr) {
    throw std::runtime_error(std::string("the CUDA driver has no ") + name);
  }
  return reinterpret_cast<Function*>(found);
}

struct Driver {
  decltype(cuMemCreate)* create = driver<decltype(cuMemCreate)>("cuMemCreate");
  decltype(cuMemRelease)* release = driver<decltype(cuMemRelease)>("cuMemRelease");
  decltype(cuMemAddressReserve)* reserve =
      driver<decltype(cuMemAddressReserve)>("cuMemAddressReserve");
  decltype(cuMemAddressFree)* free = driver<decltype(cuMemAddressFree)>("cuMemAddressFree");
  decltype(cuMemMap)* map = driver<decltype(cuMemMap)>("cuMemMap");
  decltype(cuMemUnmap)* unmap = driver<decltype(cuMemUnmap)>("cuMemUnmap");
  decltype(cuMemSetAccess)* set_access = driver<decltype(cuMemSetAccess)>("cuMemSetAccess");
  decltype(cuMemGetAllocationGranularity)* granularity =
      driver<decltype(cuMemGetAllocationGranularity)>("cuMemGetAllocationGranularity");
  decltype(cuMemExportToShareableHandle)* to_fd =
      driver<decltype(cuMemExportToShareableHandle)>("cuMemExportToShareableHandle");
  decltype(cuMemImportFromShareableHandle)* from_fd =
      driver<decltype(cuMemImportFromShareableHandle)>("cuMemImportFromShareableHandle");
  decltype(cuGetErrorString)* error_string = driver<decltype(cuGetErrorString)>("cuGetErrorString");

  static const Driver& get() {
    static const Driver functions;
    return functions;
  }
};

inline void driver_call(const char* what, CUresult status) {
  if (status == CUDA_SUCCESS) return;
  const char* text = nullptr;
  Driver::get().error_string(status, &text);
  throw std::runtime_error(std::string(what) + ": " + (text ? text : "unknown error"));
}

// Physical memory of `device`, as cuMemCreate and cuMemGetAllocationGranularity take it.
inline CUmemAllocationProp memory_of(int device) {
  CUmemAllocationProp prop{};
  prop.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  prop.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  prop.location.id = device;
  return prop;
}

// Lets `device` read and write mapped addresses.
inline CUresult let_access(int device, CUdeviceptr address, size_t nbytes) {
  CUmemAccessDesc access{};
  access.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  access.location.id = device;
  access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  return Driver::get().set_access(address, nbytes, &access, 1);
}

}  // namespace torch_pd
#endif
